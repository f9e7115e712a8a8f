"""RetinaNet (Lin et al., 2017): torchvision's head and loss formulas, for all images of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detectors import losses
from detectors.backbones import Depth, Norm, Pyramid, SmallBackbone, Stages
from detectors.large_pyramid import large_pyramid
from detectors.matching import match_anchors
from detectors.one_stage import (
    STRIDES,
    ClassLoss,
    DenseOutput,
    DenseTargets,
    OneStage,
    Wanted,
    check_dense_style,
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
from harness.core.types import UserError, View
from harness.core.validate import Channels, File, Limits, Pixels

_CODER = (1.0, 1.0, 1.0, 1.0)


class RetinaNet(OneStage):
    """Focal loss on dense anchors (Lin et al., 2017).

    Args:
        per_image_normalizer: losses are divided by each image's positives and averaged over images, as torchvision
            does, or divided by the positives of the batch, as mmdetection does.
        beta: of the box loss; 0 is L1.
        others: see `OneStage`.
    """

    def __init__(
        self,
        *,
        per_image_normalizer: bool,
        beta: float,
        backbone: Pyramid | SimplePyramid,
        anchors: Anchors,
        **others: Any,
    ) -> None:
        super().__init__(backbone=backbone, anchors=anchors, **others)
        self.per_image_normalizer = per_image_normalizer
        self.beta = beta
        self.head = RetinaNetHead(backbone.out_channels, len(anchors.bases[0]), self.num_classes)

    def heads(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        found = self.head(features)
        return found["cls_logits"], found["bbox_regression"], None

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return box_ops.decode(deltas, anchors, _CODER)

    def losses(self, features: list[Tensor], view: View, targets: PaddedTargets, keys: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - nothing is drawn
        """`class` and `box`."""
        output = self.output(features, view)
        return self.loss(output, self.targets(output, view, targets))

    def targets(self, output: DenseOutput, view: View, boxes: PaddedTargets) -> DenseTargets:  # noqa: ARG002 - of images
        """What the anchors are to say where these boxes (of B images) are the truth; weights hold the normaliser."""
        matches = match_anchors(output.anchors, boxes, 0.5, 0.4, low_quality=True)
        positive = matches.positive
        labels = gather_rows(boxes.labels, matches.target)
        anchors = output.anchors.expand(len(positive), -1, -1)
        wanted = torch.where(positive[..., None], gather_rows(boxes.boxes, matches.target), anchors)
        if self.per_image_normalizer:
            weights = 1.0 / (positive.sum(1, keepdim=True).clamp(min=1) * len(positive))
        else:
            weights = 1.0 / positive.sum().clamp(min=1).expand(len(positive), 1)
        one = torch.ones((), device=weights.device)
        return DenseTargets(
            Wanted(one_hot(labels, positive, self.num_classes), (positive | matches.negative) * weights, one),
            Wanted(wanted, positive * weights, one),
            None,
        )

    def loss(self, output: DenseOutput, targets: DenseTargets, class_loss: ClassLoss = focal_loss) -> dict[str, Tensor]:
        """`class` and `box` (smooth L1 of the deltas) of targets, whoever made them."""
        anchors = output.anchors.expand(len(output.deltas), -1, -1)
        wanted = box_ops.encode(targets.boxes.values, anchors, _CODER)
        boxes = targets.boxes
        return {
            "class": targets.classes.mean(class_loss(output, targets.classes.values)),
            "box": losses.box_regression(output.deltas, wanted, boxes.weights, self.beta) / boxes.count,
        }


def _octaves(sizes: Sequence[float]) -> list[list[float]]:
    """Three sizes of every level, a third of an octave apart."""
    return [[size * 2 ** (octave / 3) for octave in range(3)] for size in sizes]


def retinanet(
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
    anchor_sizes: Annotated[Sequence[Pixels], Limits(least=1)] = (32, 64, 128, 256, 512),
    style: Literal["torchvision", "detectron"] = "torchvision",
) -> RetinaNet:
    """RetinaNet on ResNet-FPN: nine anchors per cell.

    Args:
        num_classes, name: see `Detector`.
        backbone: `timm:NAME` in place of the ResNet of this `depth`; see `timm_pyramid` for its weights.
        cache_dir, depth, weights, norm, frozen_stages, caffe: see `build_resnet`.
        pyramid_channels: of every pyramid level.
        anchor_sizes: smallest of the three sizes of each level, in pixels.
        style: `torchvision` (losses normalised per image, rounded anchors) or `detectron` (over the batch, unrounded).

    Raises:
        UserError: see `build_resnet`; an unknown style.
    """
    check_dense_style(style, anchor_sizes)
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
    like_torchvision = style == "torchvision"
    if like_torchvision:
        sizes = [
            [float(size), float(int(size * 2 ** (1 / 3))), float(int(size * 2 ** (2 / 3)))] for size in anchor_sizes
        ]
    else:
        sizes = _octaves(anchor_sizes)
    return RetinaNet(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=Anchors(
            sizes, (0.5, 1.0, 2.0), rounded=like_torchvision, strides=None if like_torchvision else STRIDES
        ),
        per_image_normalizer=like_torchvision,
        beta=0.0,
        normalize=normalize,
        pretraining=pretraining,
        nms_iou=0.5,
    )


def small_retinanet(
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
    anchor_sizes: Annotated[Sequence[Pixels], Limits(least=1)] = (12, 18, 28),
) -> RetinaNet:
    """RetinaNet for the CPU preset's pictures, in detectron's style, with three square anchors per cell.

    Args:
        anchor_sizes: smallest of the three sizes of each level, in pixels.
        others: see `detectors.faster_rcnn.small_faster_rcnn`.

    Raises:
        UserError: a file is missing or does not fit.
    """
    if len(anchor_sizes) != 3:
        raise UserError(f"detector.anchor_sizes={list(anchor_sizes)} must be three numbers, one per pyramid level")
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
    return RetinaNet(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=Anchors(_octaves(anchor_sizes), (1.0,), rounded=False, strides=SmallBackbone.strides),
        per_image_normalizer=False,
        beta=0.0,
        normalize=normalize,
        pretraining=pretraining,
        nms_iou=0.5,
        candidates=150,
        detections=50,
    )
