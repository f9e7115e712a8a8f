"""Learning rates, parameter groups and flat gradients, against hand-worked values and plain torch."""

from __future__ import annotations

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from harness.core.distributed import FlatGradients, World
from harness.engine.optim import build_optimizer, learning_rate_factor


def _schedule(**changes: object) -> DictConfig:
    base = {
        "steps": 100,
        "warmup_steps": 10,
        "warmup_factor": 0.1,
        "decay": "flat",
        "decay_start": 0.6,
        "milestones": [50, 0.8],
        "decay_factor": 0.1,
    }
    return OmegaConf.create({**base, **changes})


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [
        ("flat", 0, 0.1),
        ("flat", 5, 0.55),
        ("flat", 10, 1.0),
        ("flat", 99, 1.0),
        ("step", 49, 1.0),
        ("step", 50, 0.1),
        ("step", 79, 0.1),
        ("step", 80, 0.01),
        ("linear", 60, 1.0),
        ("linear", 80, 0.5),
        ("linear", 99, 0.025),
        ("cosine", 60, 1.0),
        ("cosine", 80, 0.5),
        ("cosine", 100, 0.0),
    ],
)
def test_learning_rate_factor(decay: str, step: int, expected: float) -> None:
    assert learning_rate_factor(step, _schedule(decay=decay)) == pytest.approx(expected)


def test_weight_decay_spares_norms_and_biases_when_told() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    options = OmegaConf.create({"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": False})
    optimizer = build_optimizer(net, options)
    decayed, spared = (g["params"] for g in optimizer.param_groups)
    assert {id(p) for p in decayed} == {id(net[0].weight), id(net[2].weight)}
    assert len(spared) == 4
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]


class _Undecayed(nn.Module):
    no_weight_decay = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_weight_decay_always_spares_modules_that_say_so(decay_norm_and_bias: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 2), _Undecayed())
    options = {"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": decay_norm_and_bias}
    decays = {
        id(p): group["weight_decay"]
        for group in build_optimizer(net, OmegaConf.create(options)).param_groups
        for p in group["params"]
    }
    own = (net[0].weight, net[0].bias, net[1].scale)
    assert [decays[id(p)] for p in own] == [0.5, 0.5 if decay_norm_and_bias else 0.0, 0.0]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_flat_gradients_equal_torchs_own(channels_last: bool, micro_batches: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    twin.load_state_dict(net.state_dict())
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    flat = FlatGradients(net, micro_batches)
    x = torch.rand(2, 3, 8, 8)
    for _ in range(2):
        net(x).square().sum().backward()
        flat.collect()
        twin(x).square().sum().backward()
    flat.combine(World(0, 1, torch.device("cpu")))
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    norm = flat.clip(0.5)
    expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    flat.zero()
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


def test_sums_of_gradients_do_not_depend_on_their_order() -> None:
    torch.manual_seed(0)
    parts = torch.randn(8, 10_000)
    results = []
    for order in (range(8), reversed(range(8)), (3, 1, 4, 0, 5, 2, 6, 7)):
        net = nn.Linear(10_000, 1, bias=False)
        flat = FlatGradients(net, micro_batches=8)
        for i in order:
            net(parts[i]).backward()
            flat.collect()
        flat.combine(World(0, 1, torch.device("cpu")))
        results.append(flat.gradient.clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
