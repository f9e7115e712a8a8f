"""Replays the first batches of another pipeline: what a data loader that costs nothing would give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

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
        self.bad_images = pipeline.bad_images
        self._kept: dict[int, list[Batch]] = {}  # by the step that they begin with

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, all made before the first is given, then over and over.

        The wrapped pipeline is done with them then, and its threads are idle.
        """
        if start_step not in self._kept:
            stream = self._pipeline.batches(start_step)
            self._kept[start_step] = list(itertools.islice(stream, self._count))
            if hasattr(stream, "close"):
                stream.close()
        return itertools.cycle(self._kept[start_step])

    def batch_of(self, micro: MicroBatch) -> Batch:
        """As the wrapped pipeline."""
        return self._pipeline.batch_of(micro)

    def images(self, source: ImageSource, view: str = "test") -> Iterator[tuple[View, Tensor]]:
        """As the wrapped pipeline."""
        return self._pipeline.images(source, view)

    def state(self) -> dict[str, Any]:
        """As the wrapped pipeline."""
        return self._pipeline.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """As the wrapped pipeline."""
        self._pipeline.load_state(state)

    def close(self) -> None:
        """Closes the wrapped pipeline."""
        self._pipeline.close()
