"""Ranks and reductions: the same code for one process and for many.

Gradients of all trainable parameters live in one flat buffer, so that a step has one all-reduce, one norm and one
zeroing whatever the number of layers, and a rank whose parameters got no gradient still takes part.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.core.types import UserError

logger = logging.getLogger(__name__)


T = TypeVar("T")
Error = TypeVar("Error", bound=BaseException)


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def resolve_device(device: str, devices: int) -> str:
    """`auto` made definite: cpu or cuda.

    Raises:
        UserError: when more GPUs are asked for than there are, or cuda without one.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus == 0:
        raise UserError("device=cuda, but there is no CUDA device: use device=cpu")
    if device == "cuda" and devices > gpus and "LOCAL_RANK" not in os.environ:
        raise UserError(f"devices={devices}, but there are {gpus} GPUs: lower devices, or train on device=cpu")
    return device


def join(device: str) -> World:
    """Joins the process group that torchrun's environment describes; a lone process joins none."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        torch.cuda.set_device(local)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=60))
    return World(rank, size, torch.device("cuda", local) if device == "cuda" else torch.device("cpu"))


def leave() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Waits for all ranks."""
    if world.size > 1:
        dist.barrier()


def gather(world: World, value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. Pickled: for arrays after an evaluation, not for steps."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def from_main(world: World, compute: Callable[[], Any]) -> Any:
    """Runs `compute` on rank 0 alone and gives its result, or raises its exception, on every rank."""
    if world.size == 1:
        return compute()
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box[0] = compute()
        except Exception as error:
            box[1] = _portable(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise on_all_ranks(box[1])
    return box[0]


def on_every_rank(world: World, compute: Callable[[], T]) -> T:
    """Runs `compute`, which has no collective in it, on every rank; if it fails on one, raises that error on all."""
    if world.size == 1:
        return compute()
    result, own = None, None
    try:
        result = compute()
    except Exception as error:
        own = error
    first = next((error for error in gather(world, own and _portable(own)) if error is not None), None)
    if first is not None:
        raise on_all_ranks(own or first)
    return result  # type: ignore[return-value]


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where the error itself cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def on_all_ranks(error: Error) -> Error:
    """Notes that every rank raises this error at this point, so that rank 0 alone need say it and none waits."""
    vars(error)["on_all_ranks"] = True
    return error


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether `on_all_ranks` noted that."""
    return bool(vars(error).get("on_all_ranks"))


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed, as it does when another process has ended."""
    # What gloo raises is a plain RuntimeError, which names the line of its source.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def average_values(world: World, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named 0-d tensors averaged over the ranks, in one collective; all ranks give the same names."""
    if world.size == 1 or not values:
        return values
    stacked = torch.stack([values[name].float() for name in sorted(values)])
    dist.all_reduce(stacked)
    return dict(zip(sorted(values), (stacked / world.size).unbind(), strict=True))


def gather_micro_batches(world: World, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors of all micro-batches of a step, on every rank, without waiting for the device.

    Args:
        world: micro-batch number i * world.size + rank is the i-th of a rank, as `BatchSampler.stream` deals them out.
        parts: of this rank's micro-batches, in their order; names and shapes are the same everywhere.

    Returns:
        (K, ...) tensors in the order of the K micro-batches.
    """
    gathered = {}
    for name in sorted(parts[0]) if parts else ():
        own = torch.stack([part[name] for part in parts])
        if world.size > 1:
            ranks = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(ranks, own.contiguous())
            own = torch.stack(ranks, 1).flatten(0, 1)
        gathered[name] = own
    return gathered


class FlatGradients:
    """Gradients of a module's trainable parameters as views into one buffer.

    With several micro-batches in a step, their float32 gradients are summed in float64, over the micro-batches of a
    rank and over the ranks, and rounded once. The order of the additions then vanishes in the rounding, so that a step
    gives the same weights on any number of devices; in float32 it would not, and a proposal that flips at a threshold
    makes a difference of 1e-7 one of 1e-2 within a few steps.

    Args:
        module: whose parameters.
        micro_batches: of a step, over all ranks.
        flags: numbers that ride along in the all-reduce, so that ranks agree on a request to stop or on a non-finite
            loss without a collective of their own.
    """

    def __init__(self, module: nn.Module, micro_batches: int = 1, flags: int = 2) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        count = sum(p.numel() for p in self.parameters)
        first = self.parameters[0]
        self.gradient = torch.zeros(count, dtype=first.dtype, device=first.device)
        self.flags = torch.zeros(flags, dtype=first.dtype, device=first.device)
        self._sum = torch.zeros(count + flags, dtype=torch.float64, device=first.device) if micro_batches > 1 else None
        offset = 0
        for p in self.parameters:
            # The parameter's own strides, so that channels_last weights accumulate without a copy.
            p.grad = self.gradient.as_strided(p.size(), p.stride(), offset)
            offset += p.numel()

    def zero(self) -> None:
        """Zeroes gradients and flags."""
        self.gradient.zero_()
        self.flags.zero_()
        if self._sum is not None:
            self._sum.zero_()

    def collect(self) -> None:
        """Takes the gradient of one more micro-batch."""
        if self._sum is not None:
            self._sum[: len(self.gradient)] += self.gradient
            self.gradient.zero_()

    def combine(self, world: World) -> None:
        """Sums gradients and flags over micro-batches and ranks, in one collective."""
        if self._sum is None:
            return  # one micro-batch, hence one rank
        self._sum[len(self.gradient) :] = self.flags
        if world.size > 1:
            dist.all_reduce(self._sum)
        self.gradient.copy_(self._sum[: len(self.gradient)])
        self.flags.copy_(self._sum[len(self.gradient) :])

    def clip(self, norm: float | None) -> Tensor:
        """Scales the gradient down to an L2 norm of at most `norm`; gives the norm before."""
        total = torch.linalg.vector_norm(self.gradient)
        if norm is not None:
            self.gradient.mul_(torch.clamp(norm / (total + 1e-6), max=1.0))
        return total


def average_buffers(world: World, modules: Sequence[nn.Module]) -> None:
    """Averages floating-point buffers (BatchNorm's running statistics) over the ranks, in one collective."""
    if world.size == 1:
        return
    buffers = [b for m in modules for b in m.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.flatten().float() for b in buffers])
    dist.all_reduce(flat)
    flat /= world.size
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
