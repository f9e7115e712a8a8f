"""Named time ranges: what nests, what is added up, and that nothing is kept where nobody measures."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from harness.core import stages
from harness.core.stages import REST, Recorder, measured, stage

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_an_inner_range_takes_its_time_out_of_the_outer_one(clock: list[float]) -> None:
    recorder = Recorder(CPU)
    with measured(recorder):
        stages.begin_step()
        clock[0] += 1
        with stage("outer"):
            clock[0] += 2
            with stage("inner"):
                clock[0] += 4
            clock[0] += 8
        with stage("inner"):
            clock[0] += 16
        clock[0] += 32
        stages.end_step()
    (step,) = recorder.steps()
    assert step.host == {REST: 33, "outer": 10, "inner": 20}
    assert step.device is None


def test_an_error_within_a_range_ends_it(clock: list[float]) -> None:
    recorder = Recorder(CPU)
    with measured(recorder):
        stages.begin_step()
        with contextlib.suppress(ValueError), stage("a"):
            clock[0] += 1
            raise ValueError
        clock[0] += 2
        stages.end_step()
    assert recorder.steps()[0].host == {REST: 2, "a": 1}


def test_what_lies_between_steps_is_of_no_step(clock: list[float]) -> None:
    recorder, seen = Recorder(CPU, after_step=lambda count: seen.append(count)), []
    with measured(recorder):
        for _ in range(2):
            stages.begin_step()
            clock[0] += 1
            stages.end_step()
            with stage("evaluation"):
                clock[0] += 50
    assert [step.host for step in recorder.steps()] == [{REST: 1}, {REST: 1}]
    assert seen == [1, 2]


def test_nothing_is_kept_where_nobody_measures() -> None:
    recorder = Recorder(CPU)
    with measured(recorder):
        pass
    stages.begin_step()
    with stage("a"):
        pass
    stages.end_step()
    assert recorder.steps() == []
    assert stage("a") is stage("b")  # nothing is even made


def test_ranges_show_in_a_trace() -> None:
    recorder = Recorder(CPU, trace=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace, measured(recorder):
        stages.begin_step()
        with stage("student"):
            torch.ones(2) + 1
        stages.end_step()
    assert {"step", "student", "aten::add"} <= {event.key for event in trace.key_averages()}
