"""Learning rates, parameter groups and flat gradients, against hand-worked values and plain torch."""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detectors.detector import ParameterGroup
from harness.config import compose
from harness.config.identity import identity
from harness.core.distributed import FlatGradients, World
from harness.core.types import UserError
from harness.core.validate import Share, Steps
from harness.engine.optim import LearningRateFactor, build_optimizer, set_learning_rate

SGD = "harness.engine.optim.sgd"


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
    assert LearningRateFactor(_schedule(decay=decay))(step) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["flat", "step", "linear", "cosine"]), st.lists(st.integers(0, 120), min_size=1, max_size=20))
def test_the_factor_is_a_pure_function_of_the_step(decay: str, steps: list[int]) -> None:
    """The same in any order, again, and after a resume, for which everything is built anew."""
    used, fresh = LearningRateFactor(_schedule(decay=decay)), _schedule(decay=decay)
    assert [used(step) for step in steps] == [LearningRateFactor(fresh)(step) for step in steps]


def test_shipped_decays_are_found_by_their_target_too() -> None:
    for decay, keys in {"Flat": {}, "Cosine": {"decay_start": 0.6}, "Linear": {"decay_start": 0.6}}.items():
        named = _schedule(decay={"_target_": f"harness.engine.optim.{decay}", **keys})
        short = _schedule(decay=decay.lower())
        assert [LearningRateFactor(named)(s) for s in range(101)] == [LearningRateFactor(short)(s) for s in range(101)]


class Halving:
    """A decay of one's own: half of it every `every` steps."""

    def __init__(self, steps: int, every: Steps) -> None:
        assert steps == 100
        self.every = every

    def factor(self, step: int) -> float:
        return 0.5 ** (step // self.every)


class SignSgd(torch.optim.Optimizer):
    """An optimiser of one's own."""

    def __init__(self, params: Any, lr: float, pull: Share = 0.0) -> None:
        super().__init__(params, {"lr": lr, "pull": pull})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * (p.grad.sign() + group["pull"] * p)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_schedule")
    module.Halving, module.SignSgd = Halving, SignSgd  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_schedule", module)


@pytest.mark.usefixtures("own")
def test_a_decay_and_an_optimizer_of_ones_own_are_one_target_each() -> None:
    given = ["schedule.steps=100", "schedule.decay={_target_: own_schedule.Halving, every: 20}"]
    given += ["schedule.optimizer._target_=own_schedule.SignSgd", "+schedule.optimizer.pull=0.5"]
    schedule = compose.load([*given, "schedule.warmup_steps=0"]).schedule
    assert [LearningRateFactor(schedule)(step) for step in (0, 19, 20, 99)] == [1.0, 1.0, 0.5, 0.0625]
    layer = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(layer, schedule.optimizer)
    assert isinstance(optimizer, SignSgd)
    before = layer.weight.detach().clone()
    set_learning_rate(optimizer, 0.1)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * (1 + 0.5 * before))
    for wrong, key in (("every: 0", "schedule.decay.every"), ("evry: 3", "schedule.decay.evry")):
        with pytest.raises(UserError, match=re.escape(key)):
            compose.load([f"schedule.decay={{_target_: own_schedule.Halving, {wrong}}}"])
    with pytest.raises(UserError, match=r"schedule\.optimizer\.pull=2 must be a number"):
        compose.load(["schedule.optimizer._target_=own_schedule.SignSgd", "+schedule.optimizer.pull=2"])


@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_short_names_of_optimizers_are_those_of_before(preset: str, name: str, tmp_path: Path) -> None:
    """On the command line and in files; a run that named its optimiser so keeps its identity."""
    (tmp_path / "schedule").mkdir()
    base = {"small": "small", "paper": "coco_180k"}[preset]
    (tmp_path / "schedule" / "mine.yaml").write_text(f"defaults: [{base}]\noptimizer: {{name: {name}}}\n")
    by_key = compose.load([f"preset={preset}", f"schedule.optimizer.name={name}"])
    in_file = compose.load([f"preset={preset}", "schedule=mine"], [tmp_path])
    for cfg in (by_key, in_file):
        assert cfg.schedule.optimizer._target_ == f"harness.engine.optim.{name}"
        assert identity(cfg)["schedule"]["optimizer"]["name"] == name
        assert "_target_" not in identity(cfg)["schedule"]["optimizer"]
        made = build_optimizer(nn.Linear(2, 2), cfg.schedule.optimizer)
        assert type(made) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        if name == "sgd":
            assert made.defaults["momentum"] == 0.9


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 0.1), (0.5, 2.0)])
@pytest.mark.parametrize("spare", [False, True])
def test_groups_train_as_an_optimizer_made_by_hand(scales: tuple[float, float], spare: bool) -> None:
    """Two steps with warm-up; SGD with momentum and decay, written out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    twin = copy.deepcopy(net)
    schedule = _schedule(warmup_steps=4, warmup_factor=0.25)
    options = {"_target_": SGD, "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": not spare, "momentum": 0.9}
    groups = [
        ParameterGroup(tuple(net[0].parameters()), scales[0]),
        ParameterGroup((*net[1].parameters(), *net[2].parameters()), scales[1]),
    ]
    optimizer = build_optimizer(net, OmegaConf.create(options), groups)
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    x = torch.rand(5, 3)
    for step in range(2):
        set_learning_rate(optimizer, 0.1 * LearningRateFactor(schedule)(step))
        for model in (net, twin):
            model.zero_grad()
            model(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                decayed = not spare or (not name.startswith("1.") and not name.endswith("bias"))
                assert p.grad is not None
                velocity[name] = 0.9 * velocity[name] + p.grad + (0.5 * p if decayed else 0)
                scale = scales[0] if name.startswith("0.") else scales[1]
                p -= 0.1 * (0.25 + 0.75 * step / 4) * scale * velocity[name]
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_group_is_what_there_was_before_groups() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    options = OmegaConf.create({"_target_": SGD, "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": True})
    (group,) = build_optimizer(net, options).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    assert group["lr"] == 0.1


def test_groups_that_miss_or_repeat_a_parameter_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    options = OmegaConf.create({"_target_": SGD, "lr": 0.1, "weight_decay": 0.0, "decay_norm_and_bias": True})
    everything = tuple(net.parameters())
    for wrong, words in (
        ([ParameterGroup(everything[1:])], r"0\.weight is in 0 of them"),
        ([ParameterGroup(everything), ParameterGroup(everything[:1])], r"0\.weight is in 2 of them"),
        ([ParameterGroup((*everything, nn.Parameter(torch.ones(1))))], "no others"),
    ):
        with pytest.raises(UserError, match=words):
            build_optimizer(net, options, wrong)
    net[0].weight.requires_grad_(False)
    build_optimizer(net, options, [ParameterGroup(everything[1:])])  # what is frozen may be left out


def test_weight_decay_spares_norms_and_biases_when_told() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    options = OmegaConf.create({"_target_": SGD, "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": False})
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
    options = {"_target_": SGD, "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": decay_norm_and_bias}
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
