"""Named time ranges of a training step: where its time goes.

    with stage("teacher"):
        ...

marks a range, wherever that is. Nothing happens unless somebody measures:

    with measured(recorder):
        train(...)

A range within another one takes its time out of the outer one, so that the ranges of a step never overlap; what none
of them covers is `REST`. Ranges of the same name are added up. Only the thread that trains may mark ranges.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

REST = "rest"

_NOTHING: AbstractContextManager[None] = nullcontext()
_recorder: Recorder | None = None


def stage(name: str) -> AbstractContextManager[None]:
    """A range of this name; costs a comparison where nobody measures."""
    return _NOTHING if _recorder is None else _recorder.stage(name)


def begin_step() -> None:
    """A step begins; the loop says so."""
    if _recorder is not None:
        _recorder.begin_step()


def end_step() -> None:
    """The step has ended."""
    if _recorder is not None:
        _recorder.end_step()


@contextmanager
def measured(recorder: Recorder) -> Iterator[None]:
    """Hands what is marked in the block to a recorder."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


@dataclass(frozen=True)
class _Mark:
    """From here on the time is that of `name`."""

    name: str
    host: float  # seconds
    event: torch.cuda.Event | None  # on the device, read when everything is over


@dataclass(frozen=True)
class StepTimes:
    """One step in seconds."""

    host: dict[str, float]  # stage -> time of the host
    device: dict[str, float] | None  # stage -> time of the GPU; None on a CPU


class Recorder:
    """Keeps when each range of each step began.

    On a GPU every mark records an event in the current stream, and nothing waits for it within a step.

    Args:
        device: that is trained on.
        trace: whether ranges also show in a trace of torch.profiler.
        after_step: called with the number of steps so far.
    """

    def __init__(
        self, device: torch.device, trace: bool = False, after_step: Callable[[int], None] | None = None
    ) -> None:
        self._on_gpu, self._trace, self._after_step = device.type == "cuda", trace, after_step
        self._steps: list[list[_Mark]] = []
        self._names: list[str] = []  # of the ranges that are open, innermost last
        self._marks: list[_Mark] | None = None  # of the step under way
        self._range: AbstractContextManager[None] = _NOTHING

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See the module's function."""
        with self._traced(name):
            self._names.append(name)
            self._mark(name)
            try:
                yield
            finally:
                self._names.pop()
                self._mark(self._names[-1] if self._names else REST)

    def begin_step(self) -> None:
        """A step begins."""
        self._marks = []
        self._range = self._traced("step")
        self._range.__enter__()
        self._mark(REST)

    def end_step(self) -> None:
        """The step has ended."""
        assert self._marks is not None, "no step has begun"
        self._mark(REST)
        self._range.__exit__(None, None, None)
        self._steps.append(self._marks)
        self._marks = None
        if self._after_step is not None:
            self._after_step(len(self._steps))

    def steps(self) -> list[StepTimes]:
        """The steps that have ended; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [
            StepTimes(_sums(marks, _host), _sums(marks, _device) if self._on_gpu else None) for marks in self._steps
        ]

    def _mark(self, name: str) -> None:
        if self._marks is None:
            return  # between two steps: an evaluation, a checkpoint
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(_Mark(name, time.perf_counter(), event))

    def _traced(self, name: str) -> AbstractContextManager[None]:
        return torch.profiler.record_function(name) if self._trace else _NOTHING


def _host(begin: _Mark, end: _Mark) -> float:
    return end.host - begin.host


def _device(begin: _Mark, end: _Mark) -> float:
    assert begin.event is not None
    assert end.event is not None
    return begin.event.elapsed_time(end.event) / 1000


def _sums(marks: list[_Mark], between: Callable[[_Mark, _Mark], float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for begin, end in itertools.pairwise(marks):
        sums[begin.name] = sums.get(begin.name, 0.0) + between(begin, end)
    return sums
