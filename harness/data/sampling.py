"""Every random number of a training: counter-based, so that (seed, step, slot) alone decides it.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) used as a
keyed hash: number i of key k is mix(k + (i + 1) * GOLDEN). It needs no state, so the same draws come out whatever the
backend, the world size, the thread count, and whether the run was resumed. NumPy draws feed the pipelines; the same
function in torch feeds samplers and box jitter on the training device. Both give the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from harness.config.step import StepShape, check_annealing
from harness.core.draws import image_keys, uniform
from harness.core.types import MicroBatch, UserError


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


class _Walk:
    """An endless walk through a list of images, each group of them in shuffled epochs of its own.

    Args:
        count: images in the list.
        landscape: (count,) bool, by which the images are grouped; None for one group.
        seed: the run's seed.
        stream: name of the list's draws.
    """

    def __init__(self, count: int, landscape: np.ndarray | None, seed: int, stream: str) -> None:
        self.groups = 1 if landscape is None else 2
        if landscape is None:
            self.members = [np.arange(count)]
            self._orders = [_Order(count, seed, stream)]
        else:
            self.members = [np.flatnonzero(landscape == group) for group in (False, True)]
            self._orders = [_Order(len(m), seed, f"{stream} {group}") for group, m in enumerate(self.members)]

    def group_of(self, chosen: np.ndarray) -> np.ndarray:
        """The groups to draw from where `chosen` are asked for: the other one where a group has no image."""
        if self.groups == 1:
            return np.zeros_like(chosen)
        empty = [not len(members) for members in self.members]
        return np.full_like(chosen, empty[0]) if any(empty) else chosen

    def __call__(self, group: int, start: int, count: int) -> np.ndarray:
        """(count,) int64 positions number start, start + 1, ... of a group's walk."""
        return self.members[group][self._orders[group](start, count)] if count else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class _Part:
    """The draws of a chunk of steps from one list, micro-batch after micro-batch."""

    counts: np.ndarray  # (CHUNK * K,) int64 images
    groups: np.ndarray  # (CHUNK * K,) int64 group of the list that they come from
    starts: np.ndarray  # (CHUNK * K,) int64 images of that group that were drawn before


class BatchSampler:
    """Which images every step draws: a pure function of (seed, step), whatever the world size.

    A step draws `labeled + unlabeled` images and splits them into micro-batches of `micro` images. With ratio "exact"
    the labelled images are spread over the micro-batches as evenly as they go; with "bernoulli" each place of a
    micro-batch is labelled with probability labeled / (labeled + unlabeled), and then at least one place of either
    kind is kept (Soft Teacher's sampler). Both lists are walked in shuffled epochs.

    With `group` the images that are padded to one size have like shapes: a micro-batch holds either landscape images
    (wider than high) or the others. Each group of each list is then walked in shuffled epochs of its own, so that an
    image is drawn once in every epoch of its group. Of each 64 successive micro-batches either group has its share, to
    one, at places drawn anew; so the epochs of the groups keep step. What differs is whose share:

    * "joint": one group for labelled and unlabelled images together, its share that of the two lists taken together
      (Soft Teacher's and mmdetection's samplers). In a list with other proportions, images of the group that it has
      fewer of come up more often. A list that has no image of a group gives images of the other one.
    * "separate": each list has groups of its own and keeps its own proportions, so that every image of a list comes up
      equally often (Unbiased Teacher's loader, which collects images of either list until a group is full).

    What was drawn before a step is counted in chunks of 1,024 steps: taking up a run of 8 micro-batches at step 180,000
    costs 0.1 s with ratio "exact" and, grouped or not, 4 s with "bernoulli".

    Args:
        num_labeled: images in the labelled list.
        num_unlabeled: images in the unlabelled list; 0 where a method needs none.
        shape: how many images of either kind a step has, and how it is divided.
        seed: the run's seed.
        unlabeled_from: first step that draws unlabelled images; before it their places stay empty.
        anneal_steps: with "bernoulli", the probability of a labelled image falls linearly to 0 over so many last steps
            (Soft Teacher's paper: 10,000; its code: none).
        steps: length of the schedule; needed for annealing alone.
        group: None, "joint" or "separate".
        landscape: (num_labeled,) and (num_unlabeled,) bool, whether images are wider than high; for `group`.

    Raises:
        UserError: for numbers that do not fit together.
    """

    _CHUNK = 1024  # steps that are counted at once
    _BLOCK = 64  # micro-batches in which the groups have their shares; divides any chunk

    def __init__(
        self,
        num_labeled: int,
        num_unlabeled: int,
        shape: StepShape,
        *,
        seed: int = 0,
        unlabeled_from: int = 0,
        anneal_steps: int = 0,
        steps: int = 0,
        group: str | None = None,
        landscape: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        if shape.labeled and not num_labeled:
            raise UserError("batch.labeled asks for labelled images, but the split has none")
        if shape.unlabeled and not num_unlabeled:
            raise UserError("batch.unlabeled asks for unlabelled images, but the split has none")
        if group not in (None, "joint", "separate"):
            raise UserError(f"batch.group_by_aspect={group} is unknown; give null, joint or separate")
        check_annealing(anneal_steps, shape.ratio, steps)
        if not shape.labeled and unlabeled_from:
            raise UserError("batch.labeled=0 leaves the steps before the first unlabelled image empty")
        self.shape, self.seed = shape, seed
        self.labeled, self.unlabeled = shape.labeled, shape.unlabeled
        self.micro, self.micro_batches = shape.micro_images, shape.micro_batches
        self.unlabeled_from = unlabeled_from
        self.anneal_steps, self.steps = anneal_steps, steps
        self.group = group
        self._bernoulli = shape.ratio == "bernoulli" and shape.labeled > 0 and shape.unlabeled > 0
        assert landscape is not None or group is None, "shapes are needed to group by them"
        by_list = landscape if group is not None and landscape is not None else (None, None)
        self._walks = (
            _Walk(num_labeled, by_list[0], seed, "labeled order"),
            _Walk(num_unlabeled, by_list[1], seed, "unlabeled order"),
        )
        self._drawn = [[(0,) * walk.groups for walk in self._walks]]  # images of each list's groups before each chunk
        self._chunks: dict[int, tuple[_Part, _Part]] = {}  # the last ones that were asked for

    def _labeled_counts(self, chunk: int) -> np.ndarray:
        """(CHUNK, K) labelled images in the micro-batches of the steps of a chunk."""
        if not self._bernoulli:
            bounds = np.arange(self.micro_batches + 1) * self.labeled // self.micro_batches
            return np.tile(np.diff(bounds), (self._CHUNK, 1))
        share = np.array(self.labeled / (self.labeled + self.unlabeled))
        steps = range(chunk * self._CHUNK, (chunk + 1) * self._CHUNK)
        keys = np.concatenate([image_keys(self.seed, step, [0]) for step in steps])
        draws = uniform(keys, self.micro_batches * self.micro, "batch ratio")
        if self.anneal_steps:
            share = share * np.clip((self.steps - np.array(steps)[:, None]) / self.anneal_steps, 0.0, 1.0)
        counts = (draws < share).reshape(self._CHUNK, self.micro_batches, self.micro).sum(2)
        return np.clip(counts, 1, self.micro - 1)

    def _chosen(self, chunk: int, lists: tuple[int, ...], stream: str) -> np.ndarray:
        """(CHUNK * K,) group that each micro-batch of a chunk draws from, by the shares of the groups in `lists`."""
        sizes = np.sum([[len(group) for group in self._walks[number].members] for number in lists], axis=0)
        landscape, total = int(sizes[1]), int(sizes.sum())
        blocks = self._CHUNK * self.micro_batches // self._BLOCK
        first = chunk * blocks * self._BLOCK
        before = [(first + self._BLOCK * block) * landscape // total for block in range(blocks + 1)]
        draws = uniform(image_keys(self.seed, chunk, [0]), blocks * self._BLOCK, stream).reshape(blocks, self._BLOCK)
        place = np.argsort(np.argsort(draws, axis=1, kind="stable"), axis=1)
        return (place < np.diff(before)[:, None]).astype(np.int64).reshape(-1)

    def _groups(self, chunk: int) -> list[np.ndarray]:
        """For each list, (CHUNK * K,) the group that the micro-batches of a chunk draw from."""
        nothing = np.zeros(self._CHUNK * self.micro_batches, dtype=np.int64)
        drawn = tuple(number for number, part in enumerate((self.labeled, self.unlabeled)) if part)
        if self.group is None:
            return [nothing, nothing]
        if self.group == "joint":
            chosen = self._chosen(chunk, drawn, "group order")
            return [walk.group_of(chosen) for walk in self._walks]
        names = ("labeled group order", "unlabeled group order")
        return [self._chosen(chunk, (n,), names[n]) if n in drawn else nothing for n in range(2)]

    def _count(self, chunk: int) -> tuple[_Part, _Part]:
        """The draws of a chunk from either list; also counts those of the chunk after it."""
        labeled = self._labeled_counts(chunk)
        active = np.arange(chunk * self._CHUNK, (chunk + 1) * self._CHUNK) >= self.unlabeled_from
        unlabeled = np.where(active[:, None], self.micro - labeled, 0)
        parts, after = [], []
        for counts, groups, before in zip((labeled, unlabeled), self._groups(chunk), self._drawn[chunk], strict=True):
            counts, starts, totals = counts.reshape(-1), np.zeros_like(groups), []
            for group, drawn in enumerate(before):
                own = np.where(groups == group, counts, 0)
                sums = drawn + np.cumsum(own)
                starts = np.where(groups == group, sums - own, starts)
                totals.append(int(sums[-1]))
            parts.append(_Part(counts, groups, starts))
            after.append(tuple(totals))
        if len(self._drawn) == chunk + 1:
            self._drawn.append(after)
        return parts[0], parts[1]

    def _parts(self, step: int) -> tuple[tuple[_Part, _Part], int]:
        """The chunk that a step is in, and the place of its first micro-batch there."""
        chunk, offset = divmod(step, self._CHUNK)
        while len(self._drawn) <= chunk:
            self._count(len(self._drawn) - 1)
        if chunk not in self._chunks:
            if len(self._chunks) >= 4:
                self._chunks.pop(min(self._chunks))
            self._chunks[chunk] = self._count(chunk)
        return self._chunks[chunk], offset * self.micro_batches

    def images(self, step: int) -> tuple[int, int]:
        """Labelled and unlabelled images that a step draws, over all ranks."""
        parts, first = self._parts(step)
        labeled, unlabeled = (int(part.counts[first : first + self.micro_batches].sum()) for part in parts)
        return labeled, unlabeled

    def draw(self, step: int, micro: int = 0) -> MicroBatch:
        """Micro-batch number `micro` of a step."""
        parts, first = self._parts(step)
        at = first + micro
        labeled, unlabeled = (
            walk(int(part.groups[at]), int(part.starts[at]), int(part.counts[at]))
            for walk, part in zip(self._walks, parts, strict=True)
        )
        slots = np.arange(micro * self.micro, (micro + 1) * self.micro, dtype=np.int64)
        return MicroBatch(
            step=step,
            index=micro,
            labeled=labeled,
            unlabeled=unlabeled,
            labeled_slots=slots[: len(labeled)],
            unlabeled_slots=slots[len(labeled) : len(labeled) + len(unlabeled)],
        )

    def stream(self, start_step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
        """Endless micro-batches of one rank: numbers rank, rank + world_size, ... of every step.

        Raises:
            UserError: if the ranks cannot share the micro-batches evenly.
        """
        replace(self.shape, world=world_size)  # which checks itself
        for step in itertools.count(start_step):
            for micro in range(rank, self.micro_batches, world_size):
                yield self.draw(step, micro)
