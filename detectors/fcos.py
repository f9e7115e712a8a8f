"""FCOS (Tian et al., 2019): torchvision's loss formulas, for all images of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detectors import losses
from detectors.backbones import Depth, Norm, Pyramid, SmallBackbone, Stages
from detectors.fcos_heads import ClassHead, DistanceHead
from detectors.large_pyramid import large_pyramid
from detectors.one_stage import (
    STRIDES,
    ClassLoss,
    DenseOutput,
    DenseTargets,
    OneStage,
    Wanted,
    check_dense_style,
    check_groups,
    focal_loss,
    one_hot,
)
from detectors.padded import PaddedTargets, gather_rows
from detectors.rpn import Anchors
from detectors.simple_pyramid import SimplePyramid
from detectors.small_pyramid import small_pyramid
from detectors.timm_networks import TimmName
from detectors.weights import Generated
from harness.core import boxes as box_ops
from harness.core.types import View
from harness.core.validate import Channels, File, Limits

_SMALL_GROUPS = 16  # of the small FCOS's towers

Quality = Literal["centerness", "iou"]
Score = Literal["sqrt", "product"]


class Fcos(OneStage):
    """Cells inside a box regress its four sides (Tian et al., 2019), with centre sampling and a quality of the box.

    Args:
        center: of a cell in units of its stride: 0.5, or 0 as torchvision has it.
        radius: cells this near to a box's centre, in strides, are positive.
        convolutions: of each tower.
        groups: of its normalisation.
        quality: what a positive cell tells of its box: its `centerness` in it, or the `iou` of its prediction with it.
        scales: distances are multiplied with a learnt factor for each level.
        score: of a detection: `sqrt`, the root of the class's probability times the quality; or their `product`.
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
        quality: Quality | None = None,
        scales: bool | None = None,
        score: Score | None = None,
        **others: Any,
    ) -> None:
        super().__init__(backbone=backbone, anchors=anchors, **others)
        self.center = center
        self.radius = radius
        self.quality = quality or "centerness"
        self.score = score or "sqrt"
        width = backbone.out_channels
        self.classification_head = ClassHead(width, self.num_classes, convolutions, groups)
        self.regression_head = DistanceHead(width, convolutions, groups, len(anchors.bases), bool(scales))

    def heads(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        deltas, quality = self.regression_head(features)
        return self.classification_head(features), deltas, quality

    def scores(self, output: DenseOutput) -> Tensor:
        assert output.quality is not None
        product = output.logits.sigmoid() * output.quality.sigmoid()[..., None]
        return product if self.score == "product" else product.sqrt()

    def centers(self, anchors: Tensor) -> Tensor:
        """(A, 2): the points of the cells, from which distances are measured."""
        return self._center_and_size(anchors)[0]

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
        """`class`, `box` (GIoU) and `centerness` or `iou`, each divided by the number of positive cells."""
        output = self.output(features, view)
        return self.loss(output, self.targets(output, view, targets))

    def targets(self, output: DenseOutput, view: View, boxes: PaddedTargets) -> DenseTargets:  # noqa: ARG002 - of images
        """What the cells are to say where these boxes are the truth.

        Args:
            output: of the view; the IoU of what it predicts is wanted of `quality: iou`.
            view: the images.
            boxes: what lies in them.
        """
        index, positive = self.assign(output.anchors, output.level_sizes, boxes)
        count = positive.sum().clamp(min=1)
        labels = gather_rows(boxes.labels, index)
        center, size = self._center_and_size(output.anchors)
        cell = torch.cat([center - size, center + size], -1)
        wanted = torch.where(positive[..., None], gather_rows(boxes.boxes, index), cell)
        if self.quality == "iou":
            quality = box_ops.paired_iou(self.decode(output.deltas, output.anchors), wanted).detach()
        else:
            quality = self.centerness(output.anchors, wanted)
        everywhere = torch.ones((), device=count.device)
        return DenseTargets(
            Wanted(one_hot(labels, positive, self.num_classes), everywhere, count),
            Wanted(wanted, positive, count),
            Wanted(quality, positive, count),
        )

    def centerness(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """(B, A) in 0..1: how near the cells (A, 4) are to the middle of their boxes (B, A, 4); 0 outside of them."""
        center = self.centers(anchors)
        left_top, right_bottom = center - boxes[..., :2], boxes[..., 2:] - center
        ratio = torch.minimum(left_top, right_bottom) / torch.maximum(left_top, right_bottom)
        return ratio.prod(-1).clamp(min=0).sqrt()

    def loss(self, output: DenseOutput, targets: DenseTargets, class_loss: ClassLoss = focal_loss) -> dict[str, Tensor]:
        """`class`, `box` (GIoU) and `centerness` or `iou` of targets, whoever made them."""
        assert output.quality is not None
        assert targets.quality is not None
        predicted = self.decode(output.deltas, output.anchors)
        quality = F.binary_cross_entropy_with_logits(output.quality, targets.quality.values, reduction="none")
        return {
            "class": targets.classes.mean(class_loss(output, targets.classes.values)),
            "box": targets.boxes.mean(losses.giou_loss(predicted, targets.boxes.values)),
            self.quality: targets.quality.mean(quality),
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
    quality: Quality | None = None,
    scales: bool | None = None,
    score: Score | None = None,
) -> Fcos:
    """FCOS on ResNet-FPN, levels at strides 8 to 128.

    Args:
        num_classes, name: see `Detector`.
        backbone: `timm:NAME` in place of the ResNet of this `depth`; see `timm_pyramid` for its weights.
        cache_dir, depth, weights, norm, frozen_stages, caffe: see `build_resnet`.
        pyramid_channels: of every pyramid level.
        style: `torchvision` (a cell's point is its corner) or `detectron` (its centre).
        quality, scales, score: see `Fcos`.

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
        quality=quality,
        scales=scales,
        score=score,
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
    quality: Quality | None = None,
    scales: bool | None = None,
    score: Score | None = None,
) -> Fcos:
    """FCOS for the CPU preset's pictures, levels at strides 4 to 16; a cell's point is its centre.

    A level is for boxes whose farther side is 4 to 8 strides away, the finest for all smaller, the coarsest for all
    larger ones.

    Args:
        convolutions: of each tower.
        quality, scales, score: see `Fcos`.
        others: see `detectors.faster_rcnn.small_faster_rcnn`.

    Raises:
        UserError: a file is missing or does not fit, or the pyramid's channels do not fall into groups.
    """
    check_groups(pyramid_channels, _SMALL_GROUPS)
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
        quality=quality,
        scales=scales,
        score=score,
        normalize=normalize,
        pretraining=pretraining,
        nms_iou=0.6,
        candidates=150,
        detections=50,
    )
