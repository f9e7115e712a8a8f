"""Mixtures of two Gaussians on scores: which of a class's scores are likely to be right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Of scikit-learn's GaussianMixture, which the official code of Consistent-Teacher fits.
_ITERATIONS, _TOLERANCE, _SMALLEST_VARIANCE = 100, 1e-3, 1e-6
FEWEST = 4  # scores of which a mixture is made


@dataclass
class Mixture:
    """One mixture for each of G groups; the first component began at the group's smallest number, the second at its
    largest."""

    weights: Tensor  # (G, 2, 1), sum 1
    means: Tensor  # (G, 2, 1)
    variances: Tensor  # (G, 2, 1)

    def log_densities(self, values: Tensor) -> Tensor:
        """(G, n) to (G, 2, n): logarithm of each component's weight times its density."""
        distance = (values[:, None] - self.means) ** 2 / self.variances
        return self.weights.log() - 0.5 * (distance + self.variances.log() + math.log(2 * math.pi))


def fit_mixtures(values: Tensor, valid: Tensor) -> Mixture:
    """Expectation maximisation for all groups at once, without waiting for the device.

    A group whose mean log-likelihood changes by less than 0.001 stays as it is, as if it had been left alone.

    Args:
        values: (G, n) float64.
        valid: (G, n) bool; what is not valid does not exist. A group without any gives what means nothing.
    """
    values = torch.where(valid, values, 0.0)
    smallest = torch.where(valid, values, torch.inf).amin(1)
    largest = torch.where(valid, values, -torch.inf).amax(1)
    means = torch.stack([smallest, largest], 1)[..., None].nan_to_num(posinf=0.0, neginf=0.0)
    mixture = Mixture(torch.full_like(means, 0.5), means, torch.ones_like(means))
    count = valid.sum(1).clamp(min=1).to(values.dtype)
    likelihood, active = torch.full_like(count, -torch.inf), valid.any(1)
    for _ in range(_ITERATIONS):
        if values.device.type == "cpu" and not active.any():  # elsewhere to look would mean to wait
            break
        mixture, now = _improved(mixture, values, valid, count, active)
        active = active & ~((now - likelihood).abs() < _TOLERANCE)
        likelihood = now
    return mixture


def _improved(mixture: Mixture, values: Tensor, valid: Tensor, count: Tensor, active: Tensor) -> tuple[Mixture, Tensor]:
    """The mixture after a step, changed in the active groups; and the mean log-likelihood (G,) before it."""
    parts = mixture.log_densities(values)
    total = parts.logsumexp(1, keepdim=True)
    share = (parts - total).exp() * valid[:, None]
    size = share.sum(-1, keepdim=True) + 10 * torch.finfo(values.dtype).eps
    means = (share * values[:, None]).sum(-1, keepdim=True) / size
    variances = (share * (values[:, None] - means) ** 2).sum(-1, keepdim=True) / size + _SMALLEST_VARIANCE
    changes = active[:, None, None]
    better = Mixture(
        torch.where(changes, size / size.sum(1, keepdim=True), mixture.weights),
        torch.where(changes, means, mixture.means),
        torch.where(changes, variances, mixture.variances),
    )
    return better, (total[:, 0] * valid).sum(1) / count


def thresholds(scores: Tensor) -> Tensor:
    """The score of each class that lies in the middle of the scores that are likely to be right.

    Among the scores that belong to the upper component it is the one of the largest density of the mixture: the `high`
    policy of Consistent-Teacher's official code.

    Args:
        scores: (C, n) in 0..1; 0 stands for none.

    Returns:
        (C,): 0 for a class of fewer than 4 scores, or none of which belongs to the upper component.
    """
    values, valid = scores.double(), scores > 0
    parts = fit_mixtures(values, valid).log_densities(values)
    upper = valid & (parts[:, 1] > parts[:, 0]) & (valid.sum(1, keepdim=True) >= FEWEST)
    density = torch.where(upper, parts.logsumexp(1), -torch.inf)
    best = scores.gather(1, density.argmax(1, keepdim=True))[:, 0]
    return torch.where(upper.any(1), best, 0.0)
