from __future__ import annotations

import math

import pytest
import torch

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
