"""Detectors of one stage: what the heads say of every cell of a pyramid, and the boxes found in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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
    centerness: Tensor | None  # (B, A) logits
    anchors: Tensor  # (A, 4) pixels of the view
    level_sizes: list[int]


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


def focal_loss(logits: Tensor, labels: Tensor, positive: Tensor) -> Tensor:
    """(B, A): sigmoid focal loss (alpha 0.25, gamma 2) summed over classes; no class is right where not positive."""
    classes = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    wanted = (labels[..., None] == classes) & positive[..., None]
    return sigmoid_focal_loss(logits, wanted.to(logits.dtype), alpha=0.25, gamma=2.0).sum(-1)


def check_dense_style(style: str, sizes: Sequence[float]) -> None:
    """Raises UserError for an unknown style, or not one size for each of five levels."""
    if style not in ("torchvision", "detectron"):
        raise UserError(f"detector.style={style} is unknown: choose torchvision or detectron")
    if len(sizes) != 5:
        raise UserError(f"detector.anchor_sizes={list(sizes)} must be five numbers, one per pyramid level")
