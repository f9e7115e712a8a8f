"""Loss formulas that several detectors and methods share, in float32: 0-d sums, or elementwise where they say so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-7  # px^2, that no area is divided by 0


def box_regression(predicted: Tensor, wanted: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Sum of smooth L1 over boxes (..., 4) times weights (...).

    Args:
        predicted: deltas, wanted: their targets.
        weights: 0 drops a box.
        beta: where the parabola becomes a line: (x^2 / 2 beta) below, |x| - beta / 2 above; 0 is plain L1.
    """
    loss = F.smooth_l1_loss(predicted.float(), wanted, beta=beta, reduction="none")
    return (loss.sum(-1) * weights).sum()


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, focal_gamma: float = 0.0) -> Tensor:
    """Sum over R of weights * (1 - p)^gamma * -log p, p the probability of the right class.

    Args:
        logits: (R, C + 1), labels: (R,), weights: (R,).
        focal_gamma: 0 is cross entropy; Unbiased Teacher takes 1.5 (focal loss over a softmax, background included).
    """
    surprise = F.cross_entropy(logits.float(), labels, reduction="none")
    if focal_gamma:
        surprise = (1 - torch.exp(-surprise)).clamp(min=0) ** focal_gamma * surprise
    return (weights * surprise).sum()


def binary_cross_entropy(logits: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * BCE of logits, all of one shape."""
    return (F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none") * weights).sum()


def soft_focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Elementwise |p - q|^2 BCE(p, q), p = sigmoid(logits), q wanted in 0..1 (quality focal loss, Li et al., 2020)."""
    logits = logits.float()
    return (logits.sigmoid() - wanted).square() * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def joint_focal(logits: Tensor, quality: Tensor, wanted: Tensor) -> Tensor:
    """Elementwise |c - q|^2 BCE(c, q) of c = sigmoid(logits) sigmoid(quality), times 0.75 where q is 0 (ARSL).

    Args:
        logits: any shape.
        quality: logits that broadcast to it.
        wanted: q in 0..1, of the shape of `logits`.
    """
    logits, quality = logits.float(), quality.float()
    log_class, log_quality = F.logsigmoid(logits), F.logsigmoid(quality)
    log_joint = log_class + log_quality
    # 1 - c = (1 - s) + s (1 - t) for the two sigmoids s and t: never the logarithm of a rounded 0
    log_not = torch.logaddexp(F.logsigmoid(-logits), log_class + F.logsigmoid(-quality))
    surprise = -(wanted * log_joint + (1 - wanted) * log_not)
    return (log_joint.exp() - wanted).square() * surprise * torch.where(wanted > 0, 1.0, 0.75)


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU of boxes (..., 4) with their counterparts: (...), in 0..2, about 1 where both are empty.

    Values and gradients are those of torchvision's `generalized_box_iou_loss`, which waits for the device.
    """
    shared, union = _shared_and_union(a.float(), b.float())
    hull = _hull(a.float(), b.float())
    return 1 - (shared / (union + _TINY) - (hull - union) / (hull + _TINY))


def _shared_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) of the intersection and of the union of each pair of boxes (..., 4)."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    width = torch.min(ax2, bx2) - torch.max(ax1, bx1)
    height = torch.min(ay2, by2) - torch.max(ay1, by1)
    shared = torch.where((width > 0) & (height > 0), width * height, 0.0)
    return shared, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared


def _hull(a: Tensor, b: Tensor) -> Tensor:
    """Areas (...) of the smallest boxes around each pair."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    return (torch.max(ax2, bx2) - torch.min(ax1, bx1)) * (torch.max(ay2, by2) - torch.min(ay1, by1))
