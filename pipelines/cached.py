"""Replays the first batches of another pipeline: what a data loader that costs nothing would give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from harness.core.types import Batch, ImageSource, MicroBatch, Pipeline, View


class CachedPipeline:
    """A `harness.core.types.Pipeline` for measuring; its training sees the same few batches again and again.

    Args:
        pipeline: makes the batches; closed with this one.
        count: how many are kept.
    """

    def __init__(self, pipeline: Pipeline, count: int = 8) -> None:
        self._pipeline, self._count = pipeline, count

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, kept as they are drawn, then over and over."""
        return itertools.cycle(itertools.islice(self._pipeline.batches(start_step), self._count))

    def batch_of(self, micro: MicroBatch) -> Batch:
        """As the wrapped pipeline."""
        return self._pipeline.batch_of(micro)

    def images(self, source: ImageSource, view: str = "test") -> Iterator[tuple[View, Tensor]]:
        """As the wrapped pipeline."""
        return self._pipeline.images(source, view)

    def close(self) -> None:
        """Closes the wrapped pipeline."""
        self._pipeline.close()
