"""Every random number of a training: counter-based, so that (seed, step, slot) alone decides it.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) used as a
keyed hash: number i of key k is mix(k + (i + 1) * GOLDEN). It needs no state, so the same draws come out whatever the
backend, the world size, the thread count, and whether the run was resumed. NumPy draws feed the pipelines; the same
function in torch feeds samplers and box jitter on the training device. Both give the same bits.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.types import UserError

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WRAP = 1 << 64


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        return z ^ (z >> np.uint64(31))


def stream_key(name: str) -> int:
    """A number for a named stream of draws, the same in every process."""
    return zlib.crc32(name.encode())


def image_keys(seed: int, step: int, slots: np.ndarray | list[int]) -> np.ndarray:
    """Random key of each image of a step.

    Args:
        seed: the run's seed.
        step: student step, from 0.
        slots: (B,) positions of the images within the step's global batch.

    Returns:
        (B,) int64 keys, for `uniform` and `torch_uniform`.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], dtype=np.int64).astype(np.uint64) + np.uint64(_GOLDEN))
        key = _mix(key + np.uint64((step + 1) * _GOLDEN % _WRAP))
        return _mix(key + (np.asarray(slots, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)).astype(np.int64)


def uniform(keys: np.ndarray, count: int, stream: str) -> np.ndarray:
    """Draws `count` numbers per key.

    Args:
        keys: (B,) int64 from `image_keys`.
        count: how many numbers.
        stream: what they are for; another name gives independent numbers.

    Returns:
        (B, count) float64 in [0, 1).
    """
    with np.errstate(over="ignore"):
        start = _mix(np.asarray(keys).astype(np.uint64) ^ np.uint64(stream_key(stream)))
        counters = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        bits = _mix(start[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the same bits as a uint64."""
    return value - _WRAP if value >= _WRAP // 2 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch only shifts arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _torch_mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return z ^ _shift(z, 31)


def torch_uniform(keys: Tensor, count: int, stream: str) -> Tensor:
    """`uniform` on the keys' device.

    Args:
        keys: (B,) int64, as `Batch.labeled_keys`.
        count: how many numbers.
        stream: what they are for.

    Returns:
        (B, count) float32 in [0, 1): the first 24 bits of what `uniform` gives.
    """
    start = _torch_mix(keys ^ stream_key(stream))
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(_GOLDEN)
    bits = _torch_mix(start[:, None] + counters[None, :])
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def torch_normal(keys: Tensor, count: int, stream: str) -> Tensor:
    """(B, count) float32 standard normal numbers, by Box and Muller's transform of `torch_uniform`."""
    pairs = torch_uniform(keys, 2 * count, stream)
    radius = torch.sqrt(-2.0 * torch.log(1.0 - pairs[:, :count]))
    return radius * torch.cos(2.0 * torch.pi * pairs[:, count:])


@dataclass(frozen=True)
class MicroBatch:
    """Which images one forward sees. Positions index the labelled and the unlabelled list of images."""

    step: int
    index: int  # number of the micro-batch within the step
    labeled: np.ndarray  # (Bl,) int64 positions
    unlabeled: np.ndarray  # (Bu,) int64 positions
    labeled_slots: np.ndarray  # (Bl,) int64 places within the step's global batch, for `image_keys`
    unlabeled_slots: np.ndarray  # (Bu,) int64


class _Order:
    """An endless walk through `count` images: every epoch is a new permutation, a pure function of its number."""

    def __init__(self, count: int, seed: int, stream: str) -> None:
        self.count, self._seed, self._stream = count, seed, stream
        self._epochs: dict[int, np.ndarray] = {}

    def _epoch(self, number: int) -> np.ndarray:
        if number not in self._epochs:
            if len(self._epochs) >= 8:
                self._epochs.pop(min(self._epochs))
            draws = uniform(image_keys(self._seed, number, [0]), self.count, self._stream)[0]
            self._epochs[number] = np.argsort(draws, kind="stable")
        return self._epochs[number]

    def __call__(self, start: int, count: int) -> np.ndarray:
        """(count,) int64 positions number start, start + 1, ... of the walk."""
        pieces = []
        while count > 0:
            number, offset = divmod(start, self.count)
            piece = self._epoch(number)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


class BatchSampler:
    """Which images every step draws: a pure function of (seed, step), whatever the world size.

    A step draws `labeled + unlabeled` images and splits them into micro-batches of `micro` images. With ratio "exact"
    the labelled images are spread over the micro-batches as evenly as they go; with "bernoulli" each place of a
    micro-batch is labelled with probability labeled / (labeled + unlabeled), and then at least one place of either
    kind is kept (Soft Teacher's sampler). Both lists are walked in shuffled epochs.

    Args:
        num_labeled: images in the labelled list.
        num_unlabeled: images in the unlabelled list; 0 where a method needs none.
        labeled: labelled images per step, over all ranks.
        unlabeled: unlabelled images per step, over all ranks.
        micro: images per forward; None for all at once.
        seed: the run's seed.
        ratio: "exact" or "bernoulli".
        unlabeled_from: first step that draws unlabelled images; before it their places stay empty.
        anneal_steps: with "bernoulli", the probability of a labelled image falls linearly to 0 over so many last steps
            (Soft Teacher's paper: 10,000; its code: none).
        steps: length of the schedule; needed for annealing alone.

    Raises:
        UserError: for numbers that do not fit together.
    """

    _CHUNK = 1024  # steps whose Bernoulli draws are made at once

    def __init__(
        self,
        num_labeled: int,
        num_unlabeled: int,
        labeled: int,
        unlabeled: int,
        micro: int | None = None,
        seed: int = 0,
        ratio: str = "exact",
        unlabeled_from: int = 0,
        anneal_steps: int = 0,
        steps: int = 0,
    ) -> None:
        total = labeled + unlabeled
        micro = micro or total
        if labeled < 0 or unlabeled < 0 or total == 0:
            raise UserError("batch.labeled and batch.unlabeled must be 0 or more, and not both 0")
        if labeled and not num_labeled:
            raise UserError("batch.labeled asks for labelled images, but the split has none")
        if unlabeled and not num_unlabeled:
            raise UserError("batch.unlabeled asks for unlabelled images, but the split has none")
        if total % micro:
            raise UserError(f"batch.micro={micro} must divide batch.labeled + batch.unlabeled = {total}")
        if ratio not in ("exact", "bernoulli"):
            raise UserError(f"batch.ratio={ratio} is unknown; give exact or bernoulli")
        self.micro_batches = total // micro
        for name, part in (("labeled", labeled), ("unlabeled", unlabeled)):
            if ratio == "exact" and 0 < part < self.micro_batches:
                raise UserError(
                    f"batch.{name}={part} leaves some of the {self.micro_batches} micro-batches without such an image; "
                    f"raise it to {self.micro_batches} or raise batch.micro"
                )
        if anneal_steps and (ratio != "bernoulli" or not 0 < anneal_steps <= steps):
            raise UserError(
                f"batch.anneal_steps={anneal_steps} needs batch.ratio=bernoulli and a schedule that is at least as long"
            )
        if not labeled and unlabeled_from:
            raise UserError("batch.labeled=0 leaves the steps before the first unlabelled image empty")
        if ratio == "bernoulli" and unlabeled and labeled and micro < 2:
            raise UserError("batch.ratio=bernoulli needs batch.micro of at least 2")
        self.labeled, self.unlabeled, self.micro, self.seed = labeled, unlabeled, micro, seed
        self.unlabeled_from = unlabeled_from
        self.anneal_steps, self.steps = anneal_steps, steps
        self._bernoulli = ratio == "bernoulli" and labeled > 0 and unlabeled > 0
        self._labeled_order = _Order(num_labeled, seed, "labeled order")
        self._unlabeled_order = _Order(num_unlabeled, seed, "unlabeled order")
        self._chunks: list[np.ndarray] = []  # labelled images of each micro-batch, (CHUNK, K)
        self._before: list[tuple[int, int]] = [(0, 0)]  # images drawn of each list before each chunk

    def _labeled_counts(self, chunk: int) -> np.ndarray:
        """(CHUNK, K) labelled images in the micro-batches of the steps of a chunk, by Bernoulli draws."""
        share = np.array(self.labeled / (self.labeled + self.unlabeled))
        steps = range(chunk * self._CHUNK, (chunk + 1) * self._CHUNK)
        keys = np.concatenate([image_keys(self.seed, step, [0]) for step in steps])
        draws = uniform(keys, self.micro_batches * self.micro, "batch ratio")
        if self.anneal_steps:
            share = share * np.clip((self.steps - np.array(steps)[:, None]) / self.anneal_steps, 0.0, 1.0)
        counts = (draws < share).reshape(self._CHUNK, self.micro_batches, self.micro).sum(2)
        return np.clip(counts, 1, self.micro - 1)

    def _unlabeled_steps(self, first: int, last: int) -> int:
        """How many of the steps first, ..., last - 1 draw unlabelled images."""
        return max(0, last - max(first, self.unlabeled_from))

    def _prepare(self, chunk: int) -> None:
        """Count the draws of all chunks up to this one."""
        while len(self._chunks) <= chunk:
            number = len(self._chunks)
            counts = self._labeled_counts(number)
            first, last = number * self._CHUNK, (number + 1) * self._CHUNK
            active = self._unlabeled_steps(first, last)
            unlabeled = int((self.micro - counts[self._CHUNK - active :]).sum())
            self._chunks.append(counts)
            labeled_before, unlabeled_before = self._before[-1]
            self._before.append((labeled_before + int(counts.sum()), unlabeled_before + unlabeled))

    def _counts(self, step: int) -> tuple[np.ndarray, int, int]:
        """(K,) labelled images of the step's micro-batches, and how many of each list were drawn before the step."""
        if not self._bernoulli:
            bounds = np.arange(self.micro_batches + 1) * self.labeled // self.micro_batches
            return np.diff(bounds), step * self.labeled, self._unlabeled_steps(0, step) * self.unlabeled
        chunk, offset = divmod(step, self._CHUNK)
        self._prepare(chunk)
        counts, (labeled, unlabeled) = self._chunks[chunk], self._before[chunk]
        active = self._unlabeled_steps(chunk * self._CHUNK, step)
        labeled += int(counts[:offset].sum())
        unlabeled += int((self.micro - counts[offset - active : offset]).sum())
        return counts[offset], labeled, unlabeled

    def images(self, step: int) -> tuple[int, int]:
        """Labelled and unlabelled images that a step draws, over all ranks."""
        labeled = int(self._counts(step)[0].sum())
        unlabeled = self.micro_batches * self.micro - labeled if step >= self.unlabeled_from else 0
        return labeled, unlabeled

    def draw(self, step: int, micro: int = 0) -> MicroBatch:
        """Micro-batch number `micro` of a step."""
        counts, labeled_start, unlabeled_start = self._counts(step)
        labeled_count = int(counts[micro])
        unlabeled_count = self.micro - labeled_count if step >= self.unlabeled_from else 0
        before = int(counts[:micro].sum())
        slots = np.arange(micro * self.micro, (micro + 1) * self.micro, dtype=np.int64)
        return MicroBatch(
            step=step,
            index=micro,
            labeled=self._labeled_order(labeled_start + before, labeled_count),
            unlabeled=self._unlabeled_order(unlabeled_start + micro * self.micro - before, unlabeled_count),
            labeled_slots=slots[:labeled_count],
            unlabeled_slots=slots[labeled_count : labeled_count + unlabeled_count],
        )

    def stream(self, start_step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
        """Endless micro-batches of one rank: numbers rank, rank + world_size, ... of every step.

        Raises:
            UserError: if the ranks cannot share the micro-batches evenly.
        """
        if self.micro_batches % world_size:
            raise UserError(
                f"{world_size} processes cannot share {self.micro_batches} micro-batches per step evenly; "
                f"choose batch.micro so that their number is a multiple of {world_size}"
            )
        for step in itertools.count(start_step):
            for micro in range(rank, self.micro_batches, world_size):
                yield self.draw(step, micro)
