"""Detectors of one stage: what the heads say of every cell of a pyramid, and the boxes found in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from detectors.backbones import Pyramid
from detectors.detector import Detector
from detectors.padded import PaddedTargets, scatter_by_image
from detectors.rpn import Anchors
from detectors.simple_pyramid import SimplePyramid
from harness.core import boxes as box_ops
from harness.core.types import Normalize, UserError, View

STRIDES = (8, 16, 32, 64, 128)  # of the five levels


@dataclass
class DenseOutput:
    """What the heads say of A anchors (cells) in B images; levels lie one after the other."""

    logits: Tensor  # (B, A, C); column c is class c + 1, there is no background
    deltas: Tensor  # (B, A, 4)
    quality: Tensor | None  # (B, A) logits of how good the boxes are, such as their centerness
    anchors: Tensor  # (A, 4) pixels of the view
    level_sizes: list[int]

    @property
    def levels(self) -> Tensor:
        """(A,) int64: the level of each anchor, finest 0."""
        device = self.anchors.device
        return torch.cat([torch.full((size,), level, device=device) for level, size in enumerate(self.level_sizes)])


@dataclass
class Wanted:
    """What every anchor should say of one thing. Its loss is sum(weights * loss of each anchor) / count."""

    values: Tensor  # (B, A, ...)
    weights: Tensor  # (B, A), or of a shape that broadcasts to it; 0 leaves an anchor out
    count: Tensor  # 0-d

    def mean(self, losses: Tensor) -> Tensor:
        """0-d: what the losses (B, A) of all anchors come to."""
        return (losses * self.weights).sum() / self.count


@dataclass
class DenseTargets:
    """What the A anchors of B images are to say: made of boxes by a detector, or by a method in its own way."""

    classes: Wanted  # (B, A, C) probabilities in 0..1; all 0 for background
    boxes: Wanted  # (B, A, 4) pixels of the view; without meaning where the weight is 0, but boxes
    quality: Wanted | None  # (B, A) in 0..1, of detectors that tell it


# Of an output and wanted probabilities (B, A, C), the class loss (B, A).
ClassLoss = Callable[[DenseOutput, Tensor], Tensor]


class OneStage(Detector):
    """A backbone, heads on every level, and NMS over all images of a batch at once.

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
        """Logits (B, A, C), deltas (B, A, 4), quality logits (B, A) or None."""

    @abstractmethod
    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., 4) to boxes."""

    def output(self, features: list[Tensor], view: View) -> DenseOutput:
        """The heads on all levels, in float32."""
        anchors, level_sizes = self.anchors(features, view.images.shape[-2:])
        logits, deltas, quality = self.heads(features)
        told = None if quality is None else quality.float()
        return DenseOutput(logits.float(), deltas.float(), told, anchors, level_sizes)

    def scores(self, output: DenseOutput) -> Tensor:
        """(B, A, C) in 0..1: what detections are ranked by, and report."""
        return output.logits.sigmoid()

    @torch.no_grad()
    def find(self, features: list[Tensor], view: View, score_threshold: float) -> PaddedTargets:
        return self.detections(self.output(features, view), view, score_threshold)

    @torch.no_grad()
    def detections(self, output: DenseOutput, view: View, score_threshold: float) -> PaddedTargets:
        """`find` in what the heads have said of a view."""
        scores = self.scores(output)
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


def one_hot(labels: Tensor, positive: Tensor, classes: int) -> Tensor:
    """(B, A, C) float32 of labels (B, A) in 1..C: 1 for the label where positive (B, A), 0 elsewhere."""
    columns = torch.arange(1, classes + 1, device=labels.device)
    return ((labels[..., None] == columns) & positive[..., None]).float()


def focal_loss(output: DenseOutput, wanted: Tensor) -> Tensor:
    """(B, A): sigmoid focal loss (alpha 0.25, gamma 2) of probabilities 0 or 1, summed over classes."""
    return sigmoid_focal_loss(output.logits, wanted, alpha=0.25, gamma=2.0).sum(-1)


def check_groups(channels: int, groups: int) -> None:
    """Raises UserError for channels of a pyramid that do not fall into the groups of the towers' normalisation."""
    if channels % groups:
        raise UserError(
            f"detector.pyramid_channels={channels} must be a multiple of {groups}, the groups of the towers' "
            "normalisation"
        )


def check_dense_style(style: str, sizes: Sequence[float]) -> None:
    """Raises UserError for an unknown style, or not one size for each of five levels."""
    if style not in ("torchvision", "detectron"):
        raise UserError(f"detector.style={style} is unknown: choose torchvision or detectron")
    if len(sizes) != 5:
        raise UserError(f"detector.anchor_sizes={list(sizes)} must be five numbers, one per pyramid level")
