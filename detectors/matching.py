"""Which boxes the candidates (anchors, proposals) of a batch should learn, and which of them do: no loops, no waits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from detectors.padded import PaddedTargets, gather_rows
from harness.core import boxes as box_ops
from harness.core.draws import torch_uniform

_LARGEST_TABLE = 2**28  # overlaps at once; 1 GiB, of which a few are alive at the same time


@dataclass
class AnchorMatches:
    """Candidates A of B images against the boxes of their images."""

    target: Tensor  # (B, A) int64, index of the best box
    positive: Tensor  # (B, A) bool
    negative: Tensor  # (B, A) bool; neither: ignored


@dataclass
class Samples:
    """S candidates of each image that a loss looks at, positives first."""

    index: Tensor  # (B, S) int64 into the candidates
    valid: Tensor  # (B, S) bool; an image may have fewer than S candidates to offer
    positive: Tensor  # (B, S) bool
    room: int  # the most positives that an image can have

    def head(self) -> Samples:
        """The first samples of each image, at least one, among which all its positives are."""
        room = max(1, self.room)
        return Samples(self.index[:, :room], self.valid[:, :room], self.positive[:, :room], self.room)


def match_anchors(
    candidates: Tensor,
    targets: PaddedTargets,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool = False,
    low_quality_iou: float = 0.0,
    low_quality_of: str = "box",
    usable: Tensor | None = None,
) -> AnchorMatches:
    """Faster R-CNN's assignment by IoU.

    Args:
        candidates: (A, 4) the same for all images, or (B, A, 4).
        targets: the boxes.
        positive_iou: at least this to be positive.
        negative_iou: less than this to be negative.
        low_quality: the candidates that overlap a box most are positive too (ties included). They learn the box that
            they overlap most themselves, as in detectron, tensorpack and torchvision.
        low_quality_iou: what that takes. 0: any overlap above 0, as in detectron2 and torchvision.
        low_quality_of: whose largest overlap must reach `low_quality_iou`: that of the `box`, as mmdetection's
            min_pos_iou says, or that of the `anchor` (the candidate), as in tensorpack, where negatives come last.
        usable: (B, A) bool; the other candidates are neither positive nor negative, and no box looks at them.
    """
    images, boxes = targets.valid.shape
    if images > 1 and images * boxes * candidates.shape[-2] > _LARGEST_TABLE:
        rules: dict[str, Any] = {
            "positive_iou": positive_iou,
            "negative_iou": negative_iou,
            "low_quality": low_quality,
            "low_quality_iou": low_quality_iou,
            "low_quality_of": low_quality_of,
        }
        parts = [
            match_anchors(
                candidates if candidates.dim() == 2 else candidates[rows],
                targets[rows],
                usable=None if usable is None else usable[rows],
                **rules,
            )
            for rows in (slice(0, images // 2), slice(images // 2, images))
        ]
        return AnchorMatches(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(AnchorMatches)))
    overlap = box_ops.iou(targets.boxes, candidates).masked_fill_(~targets.valid[:, :, None], -1.0)  # (B, N, A)
    if usable is not None:
        overlap.masked_fill_(~usable[:, None], -1.0)
    best, target = overlap.max(1)
    positive, negative = best >= positive_iou, best < negative_iou
    if low_quality:
        most = overlap.amax(2, keepdim=True)
        enough = (most > 0) if low_quality_of == "anchor" else (most > 0) & (most >= low_quality_iou)
        forced = ((overlap == most) & enough).any(1)
        if low_quality_of == "anchor":
            forced &= best >= low_quality_iou
        positive, negative = positive | forced, negative & ~forced
    return AnchorMatches(target, positive, negative if usable is None else negative & usable)


def sample(matches: AnchorMatches, count: int, positive_fraction: float, keys: Tensor, stream: str) -> Samples:
    """Draws `count` candidates per image: at most `positive_fraction` of them positive, the rest negative.

    Args:
        matches: for A candidates of B images.
        count: S, lowered to A where there are fewer.
        positive_fraction: 0..1, of `count` as it is given: fewer candidates do not mean fewer positives, as in all of
            the official codes.
        keys: (B,) random keys of the images.
        stream: name of the draw, see `harness.data.sampling`.
    """
    candidates = matches.positive.shape[1]
    room, count = min(int(count * positive_fraction), candidates), min(count, candidates)
    noise = torch_uniform(keys, candidates, stream)
    value, index = torch.where(matches.positive, noise, -1.0).topk(room, dim=1)
    chosen = torch.zeros_like(matches.positive).scatter_(1, index, value >= 0)
    order = torch.where(chosen, noise + 2.0, torch.where(matches.negative, noise, -1.0))
    value, index = order.topk(count, dim=1)
    return Samples(index, value >= 0, value >= 2, room)


def matched_boxes(samples: Samples, matches: AnchorMatches, targets: PaddedTargets, candidates: Tensor) -> Tensor:
    """(B, S, 4): the box each sampled positive should learn; the candidate itself elsewhere, so that nothing is NaN.

    `candidates` (B, S, 4) are the sampled ones.
    """
    boxes = gather_rows(targets.boxes, gather_rows(matches.target, samples.index))
    return torch.where(samples.positive[..., None], boxes, candidates)
