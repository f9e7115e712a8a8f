"""Exponential moving average of a network: the teacher of mean-teacher methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ramp(step: int, limit: float, gamma: float = 1.0) -> float:
    """Momentum min(limit, 1 - gamma / (gamma + step)): 0 at step 0, so that the first update copies.

    With gamma = 1, from Soft Teacher's code, then 1/2, 2/3, ...: up to the limit the teacher is the plain mean of all
    students so far. mmdetection's MeanTeacherHook has gamma = 4: old students are forgotten sooner.
    """
    return min(limit, 1.0 - gamma / (gamma + step))


def _state(network: nn.Module, buffers: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in network.named_parameters()}  # noqa: C416
    if buffers:
        tensors.update(network.named_buffers())
    return tensors


@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, momentum: float, buffers: bool = True) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, matched by name, in the teacher's precision.

    Args:
        teacher: changed in place.
        student: a network of the same shape.
        momentum: 1 leaves the teacher as it is, 0 copies the student.
        buffers: average buffers too (running statistics of BatchNorm; those are stale otherwise). Buffers that are no
            floating-point numbers, such as counters, are copied.
    """
    ours, theirs = _state(teacher, buffers), _state(student, buffers)
    assert ours.keys() == theirs.keys(), "teacher and student differ in their parameters"
    averaged = [name for name, tensor in ours.items() if tensor.is_floating_point()]
    targets = [ours[name] for name in averaged]
    torch._foreach_lerp_(targets, [theirs[name].to(ours[name].dtype) for name in averaged], 1.0 - momentum)
    for name, tensor in ours.items():
        if not tensor.is_floating_point():
            tensor.copy_(theirs[name])


@torch.no_grad()
def copy(teacher: nn.Module, student: nn.Module) -> None:
    """teacher <- student, buffers included."""
    update(teacher, student, momentum=0.0)
