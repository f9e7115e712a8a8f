"""RoIAlign on a feature pyramid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from harness.core import boxes as box_ops


class PyramidRoiAlign(nn.Module):
    """RoIAlign on the pyramid level that fits each region: floor(level + log2(sqrt(area) / scale)) (FPN, equation 1).

    Args:
        output: side of the pooled grid.
        sampling_ratio: samples per bin and axis; 0 takes as many as the bin is wide.
        aligned: shift by half a pixel, as detectron does and torchvision's detectors do not.
        scale: side in pixels of a region that belongs on `level`.
        level: log2 of that level's stride.
    """

    def __init__(self, output: int, sampling_ratio: int, aligned: bool, scale: int = 224, level: int = 4) -> None:
        super().__init__()
        self.output = output
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.scale = scale
        self.level = level

    def forward(self, features: list[Tensor], strides: list[int], boxes: Tensor, images: Tensor) -> Tensor:
        """Boxes (R, 4) of images (R,) to (R, channels, output, output)."""
        finest, coarsest = int(math.log2(strides[0])), int(math.log2(strides[-1]))
        fitting = torch.floor(self.level + torch.log2(box_ops.area(boxes).sqrt() / self.scale) + 1e-6)
        level = fitting.nan_to_num(nan=finest).clamp(finest, coarsest).sub(finest).long()  # a loss tells of no numbers
        if torch.compiler.is_exporting():
            return self.in_graph(features, strides, boxes, images, level)
        if not boxes.is_cuda and self.sampling_ratio == 1:
            return self.by_look_up(features, strides, boxes, images, level)
        return self.by_operator(features, strides, boxes, images, level)

    def by_operator(
        self, features: list[Tensor], strides: list[int], boxes: Tensor, images: Tensor, level: Tensor
    ) -> Tensor:
        """torchvision's operator on each level's regions; waits once for the device. `level` (R,) int64."""
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes], 1)
        order = torch.argsort(level, stable=True)
        counts = (level[None] == torch.arange(len(strides), device=level.device)[:, None]).sum(1).tolist()
        pooled = [
            roi_align(feature, part, self.output, 1.0 / stride, self.sampling_ratio, self.aligned)
            for feature, stride, part in zip(features, strides, rois[order].split(counts), strict=True)
        ]
        return torch.cat(pooled).index_select(0, torch.argsort(order))

    def in_graph(
        self, features: list[Tensor], strides: list[int], boxes: Tensor, images: Tensor, level: Tensor
    ) -> Tensor:
        """torchvision's operator on every level for all regions, of which each takes one: sizes do not depend on data.

        `level` (R,) int64.
        """
        rois = torch.cat([images[:, None].to(boxes.dtype), boxes], 1)
        pooled = torch.zeros((), dtype=features[0].dtype)
        for number, (feature, stride) in enumerate(zip(features, strides, strict=True)):
            here = roi_align(feature, rois, self.output, 1.0 / stride, self.sampling_ratio, self.aligned)
            pooled = torch.where((level == number)[:, None, None, None], here, pooled)
        return pooled

    def by_look_up(
        self, features: list[Tensor], strides: list[int], boxes: Tensor, images: Tensor, level: Tensor
    ) -> Tensor:
        """The same for one sample per bin, as weighted sums of rows of one table that holds all levels.

        On a CPU its backward pass takes a quarter of the time of torchvision's.
        """
        shapes = boxes.new_tensor([feature.shape[-2:] for feature in features])  # height, width of each level
        cells = [feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features]
        first = torch.tensor([0, *cells]).cumsum(0)[level]
        height, width = shapes[level].unbind(1)
        scaled = boxes / boxes.new_tensor(strides)[level, None] - (0.5 if self.aligned else 0.0)
        extent = scaled[:, 2:] - scaled[:, :2]
        bins = (extent if self.aligned else extent.clamp(min=1)) / self.output
        places = torch.arange(self.output, dtype=boxes.dtype) + 0.5
        row, row_weight = _taps(scaled[:, 1:2] + places * bins[:, 1:2], height)
        column, column_weight = _taps(scaled[:, 0:1] + places * bins[:, 0:1], width)
        start = first + images * (height * width).long()
        index = (row * width.long()[:, None, None])[:, :, None, :, None] + column[:, None, :, None, :]
        index = index + start[:, None, None, None, None]
        weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
        table = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1]) for feature in features])
        weight = weight.reshape(-1, 4).to(table.dtype)
        pooled = F.embedding_bag(index.reshape(-1, 4), table, per_sample_weights=weight, mode="sum")
        return pooled.view(-1, self.output, self.output, table.shape[1]).permute(0, 3, 1, 2)


def _taps(at: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The two neighbours of positions (R, n) on an axis of R lengths, and their weights: (R, n, 2) each.

    As in RoIAlign, more than 1 outside counts as 0, and the border repeats itself up to there.
    """
    last = (size - 1)[:, None]
    inside = (at >= -1) & (at <= size[:, None])
    at = at.nan_to_num(nan=0.0).clamp(min=0)  # what diverged is told by its loss, not by an index that is out of range
    low = torch.minimum(at.floor(), last)
    share = torch.where(low == last, 0.0, at - low)
    index = torch.stack([low, torch.minimum(low + 1, last)], -1).long()
    return index, torch.stack([1 - share, share], -1) * inside[..., None]
