"""The second stage: regions of a feature pyramid to classes and boxes, for all images of a batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from detectors import losses
from detectors.matching import match_anchors, matched_boxes, sample
from detectors.padded import PaddedTargets, gather_rows, scatter_by_image
from detectors.roi_align import PyramidRoiAlign
from detectors.rpn import Proposals
from harness.core import boxes as box_ops
from harness.core.validate import Channels, Limits, NotNegative, Share


class BoxHead(nn.Module):
    """Two fully connected layers and the two predictors: class logits (R, C + 1) and deltas (R, C + 1, 4).

    Args:
        inputs: channels * output^2 of the pooled regions.
        hidden: width of both layers.
        num_classes: C; column 0 is background.
        batch_norm: BatchNorm after both layers.
    """

    def __init__(self, inputs: int, hidden: int, num_classes: int, batch_norm: bool) -> None:
        super().__init__()

        def block(width: int) -> list[nn.Module]:
            norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
            return [nn.Linear(width, hidden, bias=not batch_norm), *norm, nn.ReLU(inplace=True)]

        self.layers = nn.Sequential(*block(inputs), *block(hidden))
        self.classes = nn.Linear(hidden, num_classes + 1)
        self.boxes = nn.Linear(hidden, (num_classes + 1) * 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers(pooled.flatten(1))
        return self.classes(hidden).float(), self.boxes(hidden).float().view(-1, self.classes.out_features, 4)


@dataclass
class Rois:
    """Regions that a loss looks at, of all images, one after the other."""

    boxes: Tensor  # (R, 4)
    images: Tensor  # (R,) int64
    labels: Tensor  # (R,) int64, 0 for background
    wanted: Tensor  # (R, 4) the box to learn; the region itself for background
    weights: Tensor  # (R,) float32: 1, or 0 for padding

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, rows: Tensor) -> Rois:
        """Some of them, by mask or index."""
        return Rois(self.boxes[rows], self.images[rows], self.labels[rows], self.wanted[rows], self.weights[rows])

    @property
    def positive(self) -> Tensor:
        """(R,) float32: 1 for foreground, 0 for background and padding."""
        return self.weights * (self.labels > 0)

    @property
    def count(self) -> Tensor:
        """How many there are without padding, at least 1."""
        return self.weights.sum().clamp(min=1)


@dataclass(frozen=True)
class RoiSettings:
    """The numbers of table C.0 that concern the second stage; the defaults are torchvision's."""

    batch: Annotated[int, Limits(ge=1, le=100_000)] = 512  # regions per image in the losses
    positive_fraction: Share = 0.25
    iou: Share = 0.5
    beta: NotNegative = 1 / 9
    output: Annotated[int, Limits(ge=1, le=64)] = 7
    hidden: Channels = 1024
    batch_norm: bool = False
    sampling_ratio: Annotated[int, Limits(ge=0, le=64)] = 2
    aligned: bool = False
    canonical_scale: Annotated[int, Limits(ge=1, le=100_000)] = 224
    canonical_level: Annotated[int, Limits(ge=0, le=16)] = 4
    coder: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    nms_iou: Share = 0.5
    detections: Annotated[int, Limits(ge=1, le=10_000)] = 100  # per image


class RoiStage(nn.Module):
    """Sampling, head, losses and detections.

    Args:
        channels: of the feature maps.
        strides: of the levels that are pooled from.
        num_classes: C.
        settings: numbers.
    """

    def __init__(self, channels: int, strides: list[int], num_classes: int, settings: RoiSettings) -> None:
        super().__init__()
        s = settings
        self.settings = settings
        self.strides = strides
        self.pool = PyramidRoiAlign(s.output, s.sampling_ratio, s.aligned, s.canonical_scale, s.canonical_level)
        self.head = BoxHead(channels * s.output**2, s.hidden, num_classes, s.batch_norm)

    def forward(self, features: list[Tensor], boxes: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, C + 1) and deltas (R, C + 1, 4) of regions (R, 4) of images (R,)."""
        levels = features[: len(self.strides)]
        return self.head(self.pool(levels, self.strides, boxes, images))

    @torch.no_grad()
    def sample(
        self,
        proposals: Proposals,
        targets: PaddedTargets,
        keys: Tensor,
        stream: str = "roi",
        positives_only: bool = False,
    ) -> tuple[Rois, Tensor]:
        """Regions to learn from: the boxes themselves are proposals too.

        Args:
            proposals: of the B images.
            targets: what lies in them.
            keys: (B,).
            stream: name of the random draw.
            positives_only: return the foreground part only.

        Returns:
            The regions, and how many were sampled in all, 0-d and at least 1.
        """
        s = self.settings
        candidates = torch.cat([proposals.boxes, targets.boxes], 1)
        usable = torch.cat([proposals.valid, targets.valid], 1)
        matches = match_anchors(candidates, targets, s.iou, s.iou)
        matches.positive &= usable
        matches.negative &= usable
        samples = sample(matches, s.batch, s.positive_fraction, keys, stream)
        count = samples.valid.sum().clamp(min=1).float()
        if positives_only:
            samples = samples.head()
        boxes = gather_rows(candidates, samples.index)
        labels = gather_rows(targets.labels, gather_rows(matches.target, samples.index)) * samples.positive
        wanted = matched_boxes(samples, matches, targets, boxes)
        images = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(labels)
        used = samples.positive if positives_only else samples.valid
        rois = Rois(
            boxes.reshape(-1, 4),
            images.reshape(-1),
            labels.reshape(-1),
            wanted.reshape(-1, 4),
            used.reshape(-1).float(),
        )
        return self._without_padding(rois), count

    def _without_padding(self, rois: Rois) -> Rois:
        """Padding has no weight. It is removed where that costs no wait, or where BatchNorm would see it."""
        if rois.boxes.is_cuda and not self.settings.batch_norm:
            return rois
        return rois.select(rois.weights > 0)

    def class_loss(self, logits: Tensor, rois: Rois, focal_gamma: float = 0.0) -> Tensor:
        """Mean over the regions of cross entropy, or of the focal loss."""
        return losses.cross_entropy(logits, rois.labels, rois.weights, focal_gamma) / rois.count

    def box_loss(self, deltas: Tensor, rois: Rois, count: Tensor) -> Tensor:
        """Sum over the foreground regions of smooth L1, divided by `count`."""
        own = deltas[torch.arange(len(deltas), device=deltas.device), rois.labels]
        # Padding has no area: its deltas are NaN, which a weight of 0 would not undo.
        foreground = rois.positive[:, None] > 0
        unit = torch.zeros_like(rois.boxes)
        unit[:, 2:] = 1
        regions, boxes = (torch.where(foreground, part, unit) for part in (rois.boxes, rois.wanted))
        wanted = box_ops.encode(boxes, regions, self.settings.coder)
        return losses.box_regression(own, wanted, rois.positive, self.settings.beta) / count

    @torch.no_grad()
    def detections(
        self, logits: Tensor, deltas: Tensor, proposals: Proposals, sizes: Tensor, score_threshold: float
    ) -> PaddedTargets:
        """The best boxes of each image by falling score: softmax score above the threshold, NMS per class.

        Args:
            logits, deltas: of all B * P proposals, padding included.
            proposals: the regions.
            sizes: (B, 2) valid sizes.
            score_threshold: strictly above.
        """
        batch, count = proposals.valid.shape
        classes = logits.shape[1] - 1
        scores = logits.softmax(-1)[:, 1:] * proposals.valid.view(-1, 1)
        region, label = (scores > score_threshold).nonzero(as_tuple=True)
        label = label + 1
        image = region // count
        boxes = box_ops.decode(deltas[region, label], proposals.boxes.view(-1, 4)[region], self.settings.coder)
        boxes = box_ops.clip_boxes(boxes, sizes[image])
        score = scores[region, label - 1].masked_fill(~box_ops.is_large_enough(boxes, 1e-2), 0.0)
        keep = box_ops.nms(boxes, score, image, label, self.settings.nms_iou)
        room = min(self.settings.detections, count * classes)
        boxes, label, score = (scatter_by_image(part[keep], image[keep], batch, room) for part in (boxes, label, score))
        return PaddedTargets(boxes, label, score, score > score_threshold)
