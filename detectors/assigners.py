"""Assignment by cost: the network's own predictions decide which candidates (cells) learn which box.

All images and boxes of a batch at once: no loops, no waits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detectors.matching import AnchorMatches
from detectors.padded import PaddedTargets
from harness.core import boxes as box_ops

_TINY_OVERLAP = 1e-7  # added before the logarithm


def dynamic_k(cost: Tensor, overlap: Tensor, allowed: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Gives each box as many candidates as it overlaps well, the cheapest ones (SimOTA, Ge et al., 2021).

    A box gets k candidates, the sum of its `top` largest overlaps, rounded down, and at least 1. A candidate that
    several boxes have chosen goes to the cheapest of all boxes, also to one that did not choose it, as in the official
    code of Consistent-Teacher.

    Args:
        cost: (B, N, A) of N boxes and A candidates in B images.
        overlap: (B, N, A) intersection over union in 0..1.
        allowed: (B, N, A) bool; other pairs do not exist.
        top: overlaps that are summed.

    Returns:
        (B, A) int64, the box of each candidate, which means nothing where it has none, and (B, A) bool, whether it has.
    """
    top = min(top, cost.shape[-1])
    overlap = torch.where(allowed, overlap, 0.0)
    cost = torch.where(allowed, cost.clamp(max=torch.finfo(cost.dtype).max), torch.inf)  # allowed ones come first
    counts = overlap.topk(top, dim=-1).values.sum(-1).int().clamp(min=1)
    cheapest = cost.topk(top, dim=-1, largest=False).indices
    rank = torch.arange(top, device=cost.device)
    chosen = (rank < counts[..., None]) & allowed.gather(-1, cheapest)
    picked = torch.zeros_like(allowed).scatter_(-1, cheapest, chosen)
    times = picked.sum(1)
    target = torch.where(times > 1, cost.argmin(1), picked.to(torch.uint8).argmax(1))
    return target, times > 0


@torch.no_grad()
def adaptive(
    logits: Tensor,
    boxes: Tensor,
    anchors: Tensor,
    strides: Tensor,
    targets: PaddedTargets,
    usable: Tensor | None = None,
    top: int = 13,
    overlap_weight: float = 2.0,
) -> tuple[AnchorMatches, Tensor]:
    """Consistent-Teacher's adaptive sample assignment (Wang et al., CVPR 2023).

    Candidates are the anchors whose centre lies strictly inside at least one box, and each of them may learn any box of
    its image. The cost of a pair is the focal loss of the class, plus `overlap_weight` * -ln of the overlap of the
    predicted box, plus 10^(d - 3), d the distance of the centres in strides.

    Args:
        logits: (B, A, C) of the classes.
        boxes: (B, A, 4) predicted, in pixels.
        anchors: (A, 4) pixels.
        strides: (A,) pixels.
        targets: the boxes.
        usable: (B, A) bool; the other anchors are neither positive nor negative.
        top: see `dynamic_k`.
        overlap_weight: 2; 3 with all of COCO labelled.

    Returns:
        Matches, and the overlap (B, A) of each predicted box with the box that it learns, 0 where it learns none.
    """
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    x, y = centers.unbind(-1)
    left, top_side, right, bottom = targets.boxes[..., None, :].unbind(-1)  # (B, N, 1)
    inside = (x > left) & (x < right) & (y > top_side) & (y < bottom) & targets.valid[..., None]
    candidates = inside.any(1) if usable is None else inside.any(1) & usable
    allowed = candidates[:, None] & targets.valid[..., None]
    overlap = box_ops.iou(targets.boxes, boxes)
    middle = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2
    distance = torch.hypot(x - middle[..., :1], y - middle[..., 1:]) / strides
    cost = _class_cost(logits, targets.labels)
    cost.add_((overlap + _TINY_OVERLAP).log_(), alpha=-overlap_weight).add_(10 ** (distance - 3))
    target, positive = dynamic_k(cost, overlap, allowed, top)
    negative = ~positive if usable is None else usable & ~positive
    quality = overlap.gather(1, target[:, None])[:, 0] * positive
    return AnchorMatches(target, positive, negative), quality


def _class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, N, A): the focal loss (alpha 0.25, gamma 2), summed over classes, of each anchor if it had each label."""
    score = logits.sigmoid()
    wrong = 0.75 * score**2 * F.softplus(logits)
    difference = 0.25 * (1 - score) ** 2 * F.softplus(-logits) - wrong
    column = (labels - 1).clamp(min=0)[..., None].expand(-1, -1, logits.shape[1])
    return difference.transpose(1, 2).gather(1, column) + wrong.sum(-1)[:, None]
