"""Which boxes the candidates (anchors, proposals) of a batch should learn, and which of them do: no loops, no waits."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from detectors.padded import PaddedTargets, gather
from harness import boxes as box_ops
from harness.sampling import torch_uniform

_LARGEST_TABLE = 2**28  # overlaps at once; 1 GiB, of which a few are alive at the same time


@dataclass
class Matches:
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


def match(
    candidates: Tensor, targets: PaddedTargets, positive_iou: float, negative_iou: float, low_quality: bool = False
) -> Matches:
    """Faster R-CNN's assignment by IoU.

    Args:
        candidates: (A, 4) the same for all images, or (B, A, 4).
        targets: the boxes.
        positive_iou: at least this to be positive.
        negative_iou: less than this to be negative.
        low_quality: the candidates that overlap a box most are positive too, however little that is (ties included).
            They learn the box that they overlap most themselves, as in detectron and torchvision.
    """
    images, boxes = targets.valid.shape
    if images > 1 and images * boxes * candidates.shape[-2] > _LARGEST_TABLE:
        parts = [
            match(
                candidates if candidates.dim() == 2 else candidates[rows],
                targets[rows],
                positive_iou,
                negative_iou,
                low_quality,
            )
            for rows in (slice(0, images // 2), slice(images // 2, images))
        ]
        return Matches(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Matches)))
    overlap = box_ops.iou(targets.boxes, candidates).masked_fill_(~targets.valid[:, :, None], -1.0)  # (B, N, A)
    best, target = overlap.max(1)
    positive, negative = best >= positive_iou, best < negative_iou
    if low_quality:
        most = overlap.amax(2, keepdim=True)
        forced = ((overlap == most) & (most > 0)).any(1)
        positive, negative = positive | forced, negative & ~forced
    return Matches(target, positive, negative)


def sample(matches: Matches, count: int, positive_fraction: float, keys: Tensor, stream: str) -> Samples:
    """Draws `count` candidates per image: at most `positive_fraction` of them positive, the rest negative.

    Args:
        matches: for A candidates of B images.
        count: S, lowered to A where there are fewer.
        positive_fraction: 0..1.
        keys: (B,) random keys of the images.
        stream: name of the draw, see `harness.sampling`.
    """
    candidates = matches.positive.shape[1]
    count = min(count, candidates)
    noise = torch_uniform(keys, candidates, stream)
    room = min(int(count * positive_fraction), candidates)
    value, index = torch.where(matches.positive, noise, -1.0).topk(room, dim=1)
    chosen = torch.zeros_like(matches.positive).scatter_(1, index, value >= 0)
    order = torch.where(chosen, noise + 2.0, torch.where(matches.negative, noise, -1.0))
    value, index = order.topk(count, dim=1)
    return Samples(index, value >= 0, value >= 2)


def matched_boxes(samples: Samples, matches: Matches, targets: PaddedTargets, candidates: Tensor) -> Tensor:
    """(B, S, 4): the box each sampled positive should learn; the candidate itself elsewhere, so that nothing is NaN.

    `candidates` (B, S, 4) are the sampled ones.
    """
    boxes = gather(targets.boxes, gather(matches.target, samples.index))
    return torch.where(samples.positive[..., None], boxes, candidates)
