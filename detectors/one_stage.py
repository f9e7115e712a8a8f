"""RetinaNet and FCOS: torchvision's heads and loss formulas, for all images of a batch at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detectors import losses
from detectors.backbones import Depth, Norm, Pyramid, Stages
from detectors.detector import Detector
from detectors.matching import match_anchors
from detectors.padded import PaddedTargets, gather_rows, scatter_by_image
from detectors.rpn import Anchors
from detectors.timm_backbones import SimplePyramid, TimmName, large_pyramid
from harness.core import boxes as box_ops
from harness.core.types import Normalize, UserError, View
from harness.core.validate import Channels, File, Limits, Pixels

_CODER = (1.0, 1.0, 1.0, 1.0)
_STRIDES = (8, 16, 32, 64, 128)  # of the five levels


@dataclass
class DenseOutput:
    """What the heads say of A anchors (cells) in B images; levels lie one after the other."""

    logits: Tensor  # (B, A, C); column c is class c + 1, there is no background
    deltas: Tensor  # (B, A, 4)
    centerness: Tensor | None  # (B, A) logits
    anchors: Tensor  # (A, 4) pixels of the view
    level_sizes: list[int]


class OneStage(Detector):
    """What RetinaNet and FCOS have in common.

    Args:
        num_classes: C.
        name, normalize, pretraining: see `Detector`.
        backbone: images to features.
        anchors: of each cell.
        nms_iou, candidates, detections: NMS within a class; best per level before it, best per image after it.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        name: str,
        backbone: Pyramid | SimplePyramid,
        anchors: Anchors,
        normalize: Normalize,
        pretraining: str,
        nms_iou: float,
        candidates: int = 1000,
        detections: int = 100,
    ) -> None:
        super().__init__(num_classes=num_classes, name=name, normalize=normalize, pretraining=pretraining)
        self.backbone = backbone
        self.anchors = anchors
        self.nms_iou = nms_iou
        self.candidates = candidates
        self.max_detections = detections

    @abstractmethod
    def heads(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, A, C), deltas (B, A, 4), centerness (B, A) or None."""

    @abstractmethod
    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., 4) to boxes."""

    def output(self, features: list[Tensor], view: View) -> DenseOutput:
        """The heads on all levels, in float32."""
        anchors, level_sizes = self.anchors(features, view.images.shape[-2:])
        logits, deltas, centerness = self.heads(features)
        center = None if centerness is None else centerness.float()
        return DenseOutput(logits.float(), deltas.float(), center, anchors, level_sizes)

    @torch.no_grad()
    def find(self, features: list[Tensor], view: View, score_threshold: float) -> PaddedTargets:
        output = self.output(features, view)
        scores = output.logits.sigmoid()
        if output.centerness is not None:
            scores = (scores * output.centerness.sigmoid()[..., None]).sqrt()
        batch, _, classes = scores.shape
        values, places, start = [], [], 0
        for size in output.level_sizes:
            level = scores[:, start : start + size].flatten(1)
            value, index = level.topk(min(self.candidates, level.shape[1]), dim=1)
            values.append(value)
            places.append(index + start * classes)
            start += size
        score, place = torch.cat(values, 1), torch.cat(places, 1)
        image, slot = (score > score_threshold).nonzero(as_tuple=True)
        score, place = score[image, slot], place[image, slot]
        anchor, label = place // classes, place % classes + 1
        boxes = self.decode(output.deltas[image, anchor], output.anchors[anchor])
        boxes = box_ops.clip_boxes(boxes, view.sizes[image])
        score = score.masked_fill(~box_ops.is_large_enough(boxes, 1e-2), 0.0)
        keep = box_ops.nms(boxes, score, image, label, self.nms_iou)
        boxes, label, score = (
            scatter_by_image(part[keep], image[keep], batch, self.max_detections) for part in (boxes, label, score)
        )
        return PaddedTargets(boxes, label, score, score > score_threshold)


def _focal(logits: Tensor, labels: Tensor, positive: Tensor) -> Tensor:
    """(B, A): sigmoid focal loss (alpha 0.25, gamma 2) summed over classes; no class is right where not positive."""
    classes = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    wanted = (labels[..., None] == classes) & positive[..., None]
    return sigmoid_focal_loss(logits, wanted.to(logits.dtype), alpha=0.25, gamma=2.0).sum(-1)


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
        matches = match_anchors(output.anchors, targets, 0.5, 0.4, low_quality=True)
        positive = matches.positive
        labels = gather_rows(targets.labels, matches.target)
        per_anchor = _focal(output.logits, labels, positive) * (positive | matches.negative)
        anchors = output.anchors.expand(len(positive), -1, -1)
        boxes = torch.where(positive[..., None], gather_rows(targets.boxes, matches.target), anchors)
        wanted = box_ops.encode(boxes, anchors, _CODER)
        if self.per_image_normalizer:
            weights = 1.0 / (positive.sum(1, keepdim=True).clamp(min=1) * len(positive))
        else:
            weights = 1.0 / positive.sum().clamp(min=1).expand(len(positive), 1)
        return {
            "class": (per_anchor * weights).sum(),
            "box": losses.box_regression(output.deltas, wanted, positive * weights, self.beta),
        }


class Fcos(OneStage):
    """Cells inside a box regress its four sides (Tian et al., 2019), with centre sampling and centerness.

    Args:
        center: of a cell in units of its stride: 0.5, or 0 as torchvision has it.
        radius: cells this near to a box's centre, in strides, are positive.
        others: see `OneStage`.
    """

    def __init__(
        self, *, center: float, backbone: Pyramid | SimplePyramid, anchors: Anchors, radius: float = 1.5, **others: Any
    ) -> None:
        super().__init__(backbone=backbone, anchors=anchors, **others)
        self.center = center
        self.radius = radius
        self.classification_head = FCOSClassificationHead(backbone.out_channels, 1, self.num_classes)
        self.regression_head = FCOSRegressionHead(backbone.out_channels, 1)

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
            "class": _focal(output.logits, labels, positive).sum() / count,
            "box": overlap.sum() / count,
            "centerness": losses.binary_cross_entropy(output.centerness, wanted, positive) / count,
        }


def _check_style(style: str, sizes: Sequence[float]) -> None:
    if style not in ("torchvision", "detectron"):
        raise UserError(f"detector.style={style} is unknown: choose torchvision or detectron")
    if len(sizes) != 5:
        raise UserError(f"detector.anchor_sizes={list(sizes)} must be five numbers, one per pyramid level")


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
    _check_style(style, anchor_sizes)
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
        sizes = [[size * 2 ** (octave / 3) for octave in range(3)] for size in anchor_sizes]
    return RetinaNet(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=Anchors(
            sizes, (0.5, 1.0, 2.0), rounded=like_torchvision, strides=None if like_torchvision else _STRIDES
        ),
        per_image_normalizer=like_torchvision,
        beta=0.0,
        normalize=normalize,
        pretraining=pretraining,
        nms_iou=0.5,
    )


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
    _check_style(style, _STRIDES)
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
            [[float(stride)] for stride in _STRIDES],
            (1.0,),
            rounded=True,
            strides=None if style == "torchvision" else _STRIDES,
        ),
        center=0.0 if style == "torchvision" else 0.5,
        normalize=normalize,
        pretraining=pretraining,
        nms_iou=0.6,
    )
