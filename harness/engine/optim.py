"""Optimiser, parameter groups, warm-up and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(module: nn.Module, options: DictConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters.

    With `decay_norm_and_bias: false`, weight decay spares biases and normalisation layers (STAC decays weights only);
    modules that say `no_weight_decay = True` it always spares.
    """
    spared = {
        id(p)
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False)
        if getattr(m, "no_weight_decay", False)
        or (not options.decay_norm_and_bias and (isinstance(m, _NORMS) or name == "bias"))
    }
    everything = [p for p in module.parameters() if p.requires_grad]
    if not spared:
        groups = [{"params": everything, "weight_decay": options.weight_decay}]
    else:
        groups = [
            {"params": [p for p in everything if id(p) not in spared], "weight_decay": options.weight_decay},
            {"params": [p for p in everything if id(p) in spared], "weight_decay": 0.0},
        ]
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.get("momentum", 0.9), foreach=True)
    return torch.optim.AdamW(groups, lr=options.lr, foreach=True)


def milestone_steps(milestones: Sequence[float], steps: int) -> list[int]:
    """Milestones in steps; those below 1 are fractions of the schedule."""
    return [round(m * steps) if m < 1 else int(m) for m in milestones]


def learning_rate_factor(step: int, schedule: DictConfig) -> float:
    """What the learning rate is multiplied with at `step` (from 0): warm-up times decay, both pure functions of it.

    Warm-up is linear from `warmup_factor` at step 0 to 1 at `warmup_steps`. Decay: `flat`; `step`, times
    `decay_factor` from each milestone on; `linear` and `cosine`, from 1 at `decay_start` to 0 at the end.
    """
    warmup = 1.0
    if step < schedule.warmup_steps:
        warmup = schedule.warmup_factor + (1 - schedule.warmup_factor) * step / schedule.warmup_steps
    if schedule.decay == "flat":
        return warmup
    if schedule.decay == "step":
        passed = sum(step >= m for m in milestone_steps(schedule.milestones, schedule.steps))
        return warmup * schedule.decay_factor**passed
    start = schedule.decay_start * schedule.steps
    progress = min(max((step - start) / max(schedule.steps - start, 1e-9), 0.0), 1.0)
    return warmup * (1 - progress if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
