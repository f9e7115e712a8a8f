"""FCOS (Tian et al., 2019): torchvision's heads and loss formulas, for all images of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import generalized_box_iou_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detectors import losses
from detectors.backbones import Depth, Norm, Pyramid, SmallBackbone, Stages
from detectors.large_pyramid import large_pyramid
from detectors.one_stage import STRIDES, OneStage, check_dense_style, focal_loss
from detectors.padded import PaddedTargets, gather_rows
from detectors.rpn import Anchors
from detectors.simple_pyramid import SimplePyramid
from detectors.small_pyramid import small_pyramid
from detectors.timm_networks import TimmName
from detectors.weights import Generated
from harness.core import boxes as box_ops
from harness.core.types import UserError, View
from harness.core.validate import Channels, File, Limits

_SMALL_GROUPS = 16  # of the small FCOS's towers


class Fcos(OneStage):
    """Cells inside a box regress its four sides (Tian et al., 2019), with centre sampling and centerness.

    Args:
        center: of a cell in units of its stride: 0.5, or 0 as torchvision has it.
        radius: cells this near to a box's centre, in strides, are positive.
        convolutions: of each tower.
        groups: of its normalisation.
        others: see `OneStage`.
    """

    def __init__(
        self,
        *,
        center: float,
        backbone: Pyramid | SimplePyramid,
        anchors: Anchors,
        radius: float = 1.5,
        convolutions: int = 4,
        groups: int = 32,
        **others: Any,
    ) -> None:
        super().__init__(backbone=backbone, anchors=anchors, **others)
        self.center = center
        self.radius = radius
        width, norm = backbone.out_channels, partial(nn.GroupNorm, groups)
        self.classification_head = FCOSClassificationHead(
            width, 1, self.num_classes, num_convs=convolutions, norm_layer=norm
        )
        self.regression_head = FCOSRegressionHead(width, 1, num_convs=convolutions, norm_layer=norm)

    def heads(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        deltas, centerness = self.regression_head(features)
        return self.classification_head(features), deltas, centerness[..., 0]

    def _center_and_size(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        size = anchors[..., 2:] - anchors[..., :2]
        return (anchors[..., :2] + anchors[..., 2:]) / 2 + self.center * size, size

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Left, top, right, bottom in strides from the cell's centre."""
        center, size = self._center_and_size(anchors)
        return torch.cat([center - deltas[..., :2] * size, center + deltas[..., 2:] * size], -1)

    def assign(self, anchors: Tensor, level_sizes: list[int], targets: PaddedTargets) -> tuple[Tensor, Tensor]:
        """The smallest box that each cell is responsible for: its index (B, A), and whether there is one (B, A)."""
        center, size = self._center_and_size(anchors)
        stride = size[:, 0]
        lower, upper = stride * 4, stride * 8
        lower, upper = lower.clone(), upper.clone()
        lower[: level_sizes[0]] = 0
        upper[len(upper) - level_sizes[-1] :] = torch.inf
        boxes = targets.boxes[:, :, None]  # (B, N, 1, 4)
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2
        near = (center - middle).abs().amax(-1) < self.radius * stride
        sides = torch.cat([center - boxes[..., :2], boxes[..., 2:] - center], -1)
        farthest = sides.amax(-1)
        fits = near & (sides.amin(-1) > 0) & (farthest > lower) & (farthest < upper) & targets.valid[..., None]
        area = torch.where(fits, box_ops.area(targets.boxes)[..., None], torch.inf)
        smallest, index = area.min(1)
        return index, smallest < torch.inf

    def losses(self, features: list[Tensor], view: View, targets: PaddedTargets, keys: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - nothing is drawn
        """`class`, `box` (GIoU) and `centerness`, each divided by the number of positive cells of the batch."""
        output = self.output(features, view)
        assert output.centerness is not None
        index, positive = self.assign(output.anchors, output.level_sizes, targets)
        count = positive.sum().clamp(min=1)
        labels = gather_rows(targets.labels, index)
        center, size = self._center_and_size(output.anchors)
        cell = torch.cat([center - size, center + size], -1)
        boxes = torch.where(positive[..., None], gather_rows(targets.boxes, index), cell)
        predicted = self.decode(output.deltas, output.anchors)
        overlap = generalized_box_iou_loss(predicted, boxes) * positive
        left_top, right_bottom = center - boxes[..., :2], boxes[..., 2:] - center
        ratio = torch.minimum(left_top, right_bottom) / torch.maximum(left_top, right_bottom)
        wanted = ratio.prod(-1).clamp(min=0).sqrt()
        return {
            "class": focal_loss(output.logits, labels, positive).sum() / count,
            "box": overlap.sum() / count,
            "centerness": losses.binary_cross_entropy(output.centerness, wanted, positive) / count,
        }


def fcos(
    *,
    num_classes: int,
    name: str,
    cache_dir: str | Path,
    backbone: TimmName | None = None,
    depth: Depth = 50,
    weights: File = "torchvision",
    norm: Norm | None = None,
    frozen_stages: Stages | None = None,
    caffe: bool | None = None,
    pyramid_channels: Channels = 256,
    style: Literal["torchvision", "detectron"] = "torchvision",
) -> Fcos:
    """FCOS on ResNet-FPN, levels at strides 8 to 128.

    Args:
        num_classes, name: see `Detector`.
        backbone: `timm:NAME` in place of the ResNet of this `depth`; see `timm_pyramid` for its weights.
        cache_dir, depth, weights, norm, frozen_stages, caffe: see `build_resnet`.
        pyramid_channels: of every pyramid level.
        style: `torchvision` (a cell's point is its corner) or `detectron` (its centre).

    Raises:
        UserError: see `build_resnet`; an unknown style.
    """
    check_dense_style(style, STRIDES)
    pyramid, normalize, pretraining = large_pyramid(
        backbone,
        depth=depth,
        weights=weights,
        norm=norm,
        usual_norm="frozen",
        frozen_stages=frozen_stages,
        caffe=caffe,
        cache_dir=cache_dir,
        channels=pyramid_channels,
        first=1,
        extra=lambda: LastLevelP6P7(pyramid_channels, pyramid_channels),
    )
    return Fcos(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=Anchors(  # a cell is its own anchor
            [[float(stride)] for stride in STRIDES],
            (1.0,),
            rounded=True,
            strides=None if style == "torchvision" else STRIDES,
        ),
        center=0.0 if style == "torchvision" else 0.5,
        normalize=normalize,
        pretraining=pretraining,
        nms_iou=0.6,
    )


def small_fcos(
    *,
    num_classes: int,
    name: str,
    cache_dir: str | Path,
    weights: File = "generated",
    generated: Generated | None = None,
    backbone: TimmName | None = None,
    norm: Norm | None = None,
    frozen_stages: Stages | None = None,
    channels: Annotated[Sequence[Channels], Limits(least=4, most=4)] = (24, 32, 64, 96),
    pyramid_channels: Channels = 48,
    convolutions: Annotated[int, Limits(ge=1, le=8)] = 2,
) -> Fcos:
    """FCOS for the CPU preset's pictures, levels at strides 4 to 16; a cell's point is its centre.

    A level is for boxes whose farther side is 4 to 8 strides away, the finest for all smaller, the coarsest for all
    larger ones.

    Args:
        convolutions: of each tower.
        others: see `detectors.faster_rcnn.small_faster_rcnn`.

    Raises:
        UserError: a file is missing or does not fit, or the pyramid's channels do not fall into groups.
    """
    if pyramid_channels % _SMALL_GROUPS:
        raise UserError(
            f"detector.pyramid_channels={pyramid_channels} must be a multiple of {_SMALL_GROUPS}, the groups of the "
            "towers' normalisation"
        )
    pyramid, normalize, pretraining = small_pyramid(
        backbone,
        weights=weights,
        generated=generated,
        norm=norm,
        frozen_stages=frozen_stages,
        cache_dir=cache_dir,
        widths=channels,
        channels=pyramid_channels,
    )
    strides = SmallBackbone.strides
    return Fcos(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=Anchors([[float(stride)] for stride in strides], (1.0,), rounded=True, strides=strides),
        center=0.5,
        convolutions=convolutions,
        groups=_SMALL_GROUPS,
        normalize=normalize,
        pretraining=pretraining,
        nms_iou=0.6,
        candidates=150,
        detections=50,
    )
