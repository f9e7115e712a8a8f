"""Loss formulas that several detectors and methods share. All of them return 0-d tensors in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.core import boxes as box_ops

_TINY = 1e-7  # square pixels, instead of no area


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


def giou(predicted: Tensor, wanted: Tensor) -> Tensor:
    """(...): 1 - generalised IoU (Rezatofighi et al., 2019) of boxes (..., 4), in 0..2.

    A predicted box may be turned inside out: its area is negative then, so that the gradient turns it back.
    """
    corner = torch.maximum(predicted[..., :2], wanted[..., :2])
    other = torch.minimum(predicted[..., 2:], wanted[..., 2:])
    shared = (other - corner).clamp(min=0).prod(-1)
    area = (predicted[..., 2:] - predicted[..., :2]).prod(-1)
    union = (area + box_ops.area(wanted) - shared).clamp(min=_TINY)
    hull = torch.maximum(predicted[..., 2:], wanted[..., 2:]) - torch.minimum(predicted[..., :2], wanted[..., :2])
    around = hull.clamp(min=0).prod(-1).clamp(min=_TINY)
    return 1 - shared / union + (around - union) / around
