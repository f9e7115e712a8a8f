from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from detectors import losses


def test_smooth_l1_and_l1_by_hand():
    predicted = torch.tensor([[0.05, -0.2, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    wanted = torch.zeros(2, 4)
    beta = 1 / 9
    expected = 0.5 * 0.05**2 / beta + (0.2 - beta / 2) + (1.0 - beta / 2)
    found = losses.box_regression(predicted, wanted, torch.tensor([1.0, 0.0]), beta)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert losses.box_regression(predicted, wanted, torch.tensor([1.0, 0.5]), 0.0).item() == pytest.approx(
        1.25 + 6, abs=1e-6
    )


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_focal_loss_by_hand(gamma):
    # (1 - p_y)^gamma * -log p_y, summed with weights (Unbiased Teacher, focal loss over a softmax).
    logits, labels, weights = [[2.0, -1.0, 0.5], [0.0, 0.1, -3.0], [1.0, 1.0, 1.0]], [0, 2, 1], [1.0, 0.25, 0.0]
    expected = 0.0
    for row, label, weight in zip(logits, labels, weights, strict=True):
        p = softmax(row)[label]
        expected += weight * (1 - p) ** gamma * -math.log(p)
    found = losses.cross_entropy(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights), gamma)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_focal_loss_of_a_certain_answer_has_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    losses.cross_entropy(logits, torch.tensor([0]), torch.ones(1), 1.5).backward()
    assert torch.isfinite(logits.grad).all()


def test_binary_cross_entropy_by_hand():
    logits, wanted, weights = [0.3, -2.0, 4.0], [1.0, 0.0, 0.25], [1.0, 2.0, 0.5]
    expected = 0.0
    for x, y, w in zip(logits, wanted, weights, strict=True):
        p = 1 / (1 + math.exp(-x))
        expected += w * -(y * math.log(p) + (1 - y) * math.log(1 - p))
    found = losses.binary_cross_entropy(torch.tensor(logits), torch.tensor(wanted), torch.tensor(weights))
    assert found.item() == pytest.approx(expected, abs=1e-6)


LOGITS = (-90.0, -20.0, -3.0, -0.1, 0.0, 1.5, 6.0, 25.0, 90.0)


def precise_sigmoid(x: float) -> tuple[float, float]:
    """A probability, and what is missing to 1, neither of them rounded to 0."""
    return (1 / (1 + math.exp(-x)), math.exp(-x) / (1 + math.exp(-x))) if x >= 0 else precise_sigmoid(-x)[::-1]


@pytest.mark.parametrize("wanted", [0.0, 0.3, 1.0])
def test_soft_focal_loss_of_every_logit(wanted):
    logits = torch.tensor(LOGITS, requires_grad=True)
    found = losses.soft_focal(logits, torch.full((len(LOGITS),), wanted))
    for logit, value in zip(LOGITS, found.tolist(), strict=True):
        p, missing = precise_sigmoid(logit)
        bce = -wanted * math.log(p) - (1 - wanted) * math.log(missing)
        assert value == pytest.approx((p - wanted) ** 2 * bce, rel=1e-4, abs=1e-7)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("wanted", [0.0, 0.3, 1.0])
def test_joint_focal_loss_of_every_pair_of_logits(wanted):
    """c = s t; 1 - c is (1 - s) + s (1 - t), which keeps its digits where both are nearly 1."""
    logits, quality = torch.meshgrid(torch.tensor(LOGITS), torch.tensor(LOGITS), indexing="ij")
    logits, quality = logits.clone().requires_grad_(), quality.clone().requires_grad_()
    found = losses.joint_focal(logits, quality, torch.full_like(logits, wanted).detach())
    for i, logit in enumerate(LOGITS):
        for j, other in enumerate(LOGITS):
            (s, no_s), (t, no_t) = precise_sigmoid(logit), precise_sigmoid(other)
            bce = -wanted * math.log(s * t) - (1 - wanted) * math.log(no_s + s * no_t)
            expected = (s * t - wanted) ** 2 * bce * (1.0 if wanted else 0.75)
            assert found[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-7), (logit, other)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(quality.grad).all()


def test_giou_loss_is_torchvisions_to_the_bit():
    """Values and gradients: boxes that overlap, touch, are apart, the same, or empty."""
    generator = torch.Generator().manual_seed(0)
    corners, sides = torch.rand(2, 500, 2, generator=generator) * 20, torch.rand(2, 500, 2, generator=generator) * 15
    sides[:, :20] = 0
    a, b = torch.cat([corners, corners + sides], -1).round(decimals=1)  # some edges meet
    b[10:30] = a[10:30]
    results = []
    for function in (losses.giou_loss, generalized_box_iou_loss):
        pair = [part.clone().requires_grad_() for part in (a, b)]
        value = function(*pair)
        (value * torch.arange(500)).sum().backward()
        results.append([value, *(part.grad for part in pair)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
