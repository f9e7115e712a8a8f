"""Optimiser, parameter groups, warm-up and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from detectors.detector import ParameterGroup
from harness.config.make import make
from harness.config.schema import ScheduleOptions
from harness.core.steps import in_steps
from harness.core.types import UserError
from harness.core.validate import NotNegative, Share

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def sgd(params: Iterable[Any], lr: float, *, momentum: Share = 0.9) -> torch.optim.SGD:
    """SGD with momentum."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum, foreach=True)


def adamw(params: Iterable[Any], lr: float, *, momentum: Share | None = None) -> torch.optim.AdamW:  # noqa: ARG001
    """AdamW; `momentum`, which a schedule made for SGD may have, is not read."""
    return torch.optim.AdamW(params, lr=lr, foreach=True)


def build_optimizer(
    module: nn.Module, options: Mapping[str, Any], groups: Sequence[ParameterGroup] | None = None
) -> torch.optim.Optimizer:
    """The optimiser that `schedule.optimizer._target_` names, over the trainable parameters.

    With `decay_norm_and_bias: false`, weight decay spares biases and normalisation layers (STAC decays weights only);
    modules that say `no_weight_decay = True` it always spares.

    Args:
        module: what is trained.
        options: `lr`, `weight_decay`, `decay_norm_and_bias`, the `_target_` and its keys.
        groups: the module's parameters by learning rate; None for one rate.

    Raises:
        UserError: the constructor does not take its keys, or the groups are not the module's trainable parameters.
    """
    spared = {
        id(p)
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False)
        if getattr(m, "no_weight_decay", False)
        or (not options["decay_norm_and_bias"] and (isinstance(m, _NORMS) or name == "bias"))
    }
    groups = [ParameterGroup(tuple(module.parameters()))] if groups is None else groups
    _check_groups(module, groups)
    parts: list[dict[str, Any]] = []
    for group in groups:
        trained = [p for p in group.parameters if p.requires_grad]
        for weight_decay, own in (
            (options["weight_decay"], [p for p in trained if id(p) not in spared]),
            (0.0, [p for p in trained if id(p) in spared]),
        ):
            if own:
                rate = options["lr"] * group.lr_scale
                parts.append({"params": own, "lr": rate, "weight_decay": weight_decay, "lr_scale": group.lr_scale})
    optimizer: torch.optim.Optimizer = make("schedule.optimizer", options, parts, lr=options["lr"])
    return optimizer


def _check_groups(module: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Raises UserError unless each trainable parameter is in one group."""
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    given = [id(p) for group in groups for p in group.parameters if p.requires_grad]
    wrong = [name for key, name in names.items() if given.count(key) != 1]
    if wrong or len(given) != len(names):
        what = f"{wrong[0]} is in {given.count(next(k for k, n in names.items() if n == wrong[0]))}" if wrong else ""
        raise UserError(
            f"parameter_groups() of {type(module).__name__} must name each trainable parameter once"
            f"{f': {what} of them' if what else ', and no others'}"
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group: `rate` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)  # checkpoints of before have none


class Decay(Protocol):
    """How the learning rate falls, warm-up aside; the `_target_` of `schedule.decay` names one.

    Its constructor gets `steps`, the length of the schedule, and the keys of `schedule.decay`.
    """

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with at `step` (from 0): a pure function of it, as resuming needs."""


class Flat:
    """No decay."""

    def __init__(self, steps: int) -> None: ...

    def factor(self, step: int) -> float:  # noqa: ARG002 - the same at every step
        return 1.0


class AtMilestones:
    """Times `decay_factor` from each milestone on.

    Args:
        steps: length of the schedule.
        milestones: in steps; those below 1 are fractions of the schedule.
        decay_factor: of each.
    """

    def __init__(self, steps: int, *, milestones: Sequence[NotNegative], decay_factor: NotNegative = 0.1) -> None:
        self._milestones, self._decay_factor = milestone_steps(milestones, steps), decay_factor

    def factor(self, step: int) -> float:
        return self._decay_factor ** sum(step >= milestone for milestone in self._milestones)


class Linear:
    """From 1 at `decay_start`, a fraction of the steps, in a straight line to 0 at the end."""

    def __init__(self, steps: int, *, decay_start: Share = 0.0) -> None:
        self._start, self._steps = decay_start * steps, steps

    def _progress(self, step: int) -> float:
        return min(max((step - self._start) / max(self._steps - self._start, 1e-9), 0.0), 1.0)

    def factor(self, step: int) -> float:
        return 1 - self._progress(step)


class Cosine(Linear):
    """From 1 at `decay_start` to 0 at the end, along half a cosine."""

    def factor(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * self._progress(step)))


# The short names of `schedule.decay`: class, and the keys of the schedule that it takes.
DECAYS: dict[str, tuple[Callable[..., Decay], tuple[str, ...]]] = {
    "flat": (Flat, ()),
    "step": (AtMilestones, ("milestones", "decay_factor")),
    "linear": (Linear, ("decay_start",)),
    "cosine": (Cosine, ("decay_start",)),
}


def milestone_steps(milestones: Sequence[float], steps: int) -> list[int]:
    """Milestones in steps; those below 1 are fractions of the schedule."""
    return [in_steps(milestone, steps) for milestone in milestones]


class LearningRateFactor:
    """What the learning rate is multiplied with at each step: warm-up times decay, both pure functions of the step.

    Warm-up is linear from `warmup_factor` at step 0 to 1 at `warmup_steps`.

    Raises:
        UserError: the decay cannot be built from its keys.
    """

    def __init__(self, schedule: ScheduleOptions) -> None:
        self._warmup_steps, self._warmup_factor = schedule.warmup_steps, schedule.warmup_factor
        if isinstance(schedule.decay, str):
            kind, keys = DECAYS[schedule.decay]
            self._decay = kind(schedule.steps, **{key: getattr(schedule, key) for key in keys})
        else:
            self._decay = make("schedule.decay", schedule.decay, steps=int(schedule.steps))

    def __call__(self, step: int) -> float:
        """The factor at `step`, from 0."""
        warmup = 1.0
        if step < self._warmup_steps:
            warmup = self._warmup_factor + (1 - self._warmup_factor) * step / self._warmup_steps
        return warmup * self._decay.factor(step)
