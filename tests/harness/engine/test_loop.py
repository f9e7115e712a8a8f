"""Parts of the training loop that a run on a CPU does not show."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from detectors.methods.method import Method
from detectors.padded import PaddedTargets, pad
from harness.core.stopping import Interrupted, StopRequest
from harness.core.types import Batch, ImageSource, Target, View
from harness.engine.loop import (
    Counters,
    MicroBatchTaken,
    RunError,
    StepFlags,
    StepTaken,
    inspect,
    todays_counters,
)

STOP, NOT_FINITE = 0, 1


def _taken(step: int, loss: float = 1.0, norm: float = 1.0) -> StepTaken:
    """A step of two micro-batches, of which the first has the loss."""
    micro_batches = []
    for number, value in enumerate((loss, 1.0)):
        ids, keys = torch.tensor([step + number]), torch.tensor([100 + step + number])
        micro_batches.append(MicroBatchTaken(Batch({}, {}, ids, ids, keys, keys), torch.tensor(value).isfinite()))
    return StepTaken(step, {"rpn_class": torch.tensor(loss)}, torch.tensor(norm), micro_batches)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """What `StepFlags` needs of an experiment."""
    return SimpleNamespace(settings=SimpleNamespace(run_dir=tmp_path, seed=7), world=SimpleNamespace(rank=0))


def _steps_read(flags: StepFlags, buffer: torch.Tensor, marked: dict[int, int], at_once: set[int], steps: int) -> int:
    """Runs through steps, with the flag `marked[step]` set, and gives the step in which a stop is heard."""
    for step in range(steps):
        buffer.zero_()
        if step in marked:
            buffer[marked[step]] = 1
        if flags.read(_taken(step, float("nan") if marked.get(step) == NOT_FINITE else 1.0), step in at_once):
            return step
    return -1


@pytest.mark.parametrize(("late", "at_once", "heard"), [(False, set(), 3), (True, set(), 4), (True, {3}, 3)])
def test_request_to_stop_is_heard_one_step_late_at_most(run: Any, late: bool, at_once: set[int], heard: int) -> None:
    buffer = torch.zeros(2)
    assert _steps_read(StepFlags(run, buffer, late), buffer, {3: STOP}, at_once, 8) == heard


@pytest.mark.parametrize(("late", "at_once"), [(False, set()), (True, set()), (True, {3}), (True, {4})])
def test_loss_that_is_not_finite_is_told_with_its_own_step(run: Any, late: bool, at_once: set[int]) -> None:
    buffer = torch.zeros(2)
    with pytest.raises(RunError, match=r"step 3 \(rpn_class\)"):
        _steps_read(StepFlags(run, buffer, late), buffer, {3: NOT_FINITE}, at_once, 8)
    replay = json.loads((run.settings.run_dir / "non_finite_rank0.json").read_text())
    assert replay["step"] == 3
    shown = [(m["finite"], m["labeled_ids"], m["labeled_keys"]) for m in replay["micro_batches"]]
    assert shown == [(False, [3], [103]), (True, [4], [104])]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_gradient_that_is_not_finite_is_told_though_the_losses_are(run: Any, late: bool, norm: float) -> None:
    flags = StepFlags(run, torch.zeros(2), late)
    flags.read(_taken(2), at_once=False)
    with pytest.raises(RunError, match="gradient is not finite at step 3, though"):
        flags.read(_taken(3, norm=norm), at_once=True)


class _Labeller(Method):
    """A method whose last forward took the boxes given for the truth of the images of its strong view."""

    def __init__(self, labels: PaddedTargets) -> None:
        nn.Module.__init__(self)
        self.labels = {"all": labels}
        self.student: Any = SimpleNamespace(num_classes=2)

    def forward(self, batch: Batch, step: int) -> Any:
        raise NotImplementedError


def _measured(hidden: ImageSource | None, ids: list[int], boxes: list[list[float]]) -> tuple[dict[str, Any], Counters]:
    """What is noted of pseudo labels, one box for each image, at the last step of a schedule."""
    notes: list[Any] = []
    empty, count = torch.zeros(0, dtype=torch.int64), len(ids)
    view = View(torch.zeros(count, 3, 32, 32), torch.full((count, 2), 32), torch.eye(3).repeat(count, 1, 1))
    batch = Batch({}, {"strong": view}, empty, torch.tensor(ids), empty, torch.tensor(ids))
    labels = pad([Target(torch.tensor([box]), torch.tensor([1]), torch.tensor([0.9])) for box in boxes])
    run: Any = SimpleNamespace(
        data=SimpleNamespace(hidden=hidden),
        method=_Labeller(labels),
        settings=SimpleNamespace(schedule=SimpleNamespace(steps=10)),
    )
    log: Any = SimpleNamespace(pseudo=lambda _, quality: notes.append(quality["all"]))
    counters = Counters()
    inspect(run, batch, 9, counters, log)
    return notes[0], counters


def _truth(ids: list[int]) -> ImageSource:
    """One box [0, 0, 10, 10] of class 1 in each image."""
    count = len(ids)
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (count, 1))
    sizes, ones = np.full((count, 2), 32), np.ones(count, np.int64)
    paths = [f"{i}.jpg" for i in ids]
    return ImageSource(paths, np.array(ids), sizes, boxes, ones, ones.astype(np.float32), np.arange(count + 1))


RIGHT, WRONG = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]


@pytest.mark.parametrize("known", [None, [8, 9]])
def test_pseudo_labels_on_images_of_unknown_truth_are_not_measured(known: list[int] | None) -> None:
    """Unknown is not zero, neither in the line nor in the mean that the record gets."""
    noted, counters = _measured(_truth(known) if known else None, [1, 2], [RIGHT, WRONG])
    assert noted == {"precision": None, "recall": None, "iou": None, "labels": 2.0, "boxes": None}
    assert counters.measurements == 0


def test_pseudo_labels_are_measured_where_the_truth_is_known() -> None:
    """Of images 1 to 4 the truth of 2 and 3 is known: of their labels one is right; the others do not count."""
    noted, counters = _measured(_truth([3, 7, 2]), [1, 2, 3, 4], [WRONG, RIGHT, WRONG, WRONG])
    assert noted == {"precision": 0.5, "recall": 0.5, "iou": 1.0, "labels": 2.0, "boxes": 2.0}
    assert counters.measured == {"precision": 0.5, "recall": 0.5, "iou": 1.0, "labels": 2.0, "boxes": 2.0}
    assert counters.measurements == 1
    assert counters.by_class == [[2, 1, 2], [0, 0, 0]]


def test_counters_of_older_checkpoints_are_read() -> None:
    """They kept the sums of precision, recall and IoU in a list."""
    old = {"step": 7, "images_labeled": 14, "pseudo": [1.0, 0.5, 1.5], "pseudo_count": 2}
    counters = Counters(**todays_counters(old))
    assert (counters.step, counters.images_labeled, counters.measurements) == (7, 14, 2)
    assert counters.measured == {"precision": 1.0, "recall": 0.5, "iou": 1.5}
    assert Counters(**todays_counters(dataclasses.asdict(counters))) == counters
    assert Counters(**todays_counters({"pseudo": [0.0, 0.0, 0.0], "pseudo_count": 0})) == Counters()


@pytest.mark.parametrize(("passed_on", "received"), [(True, 1), (False, 2)])
def test_signal_that_a_launcher_passes_on_counts_once(
    monkeypatch: pytest.MonkeyPatch, passed_on: bool, received: int
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if passed_on:
        monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    before = signal.getsignal(signal.SIGUSR1)
    stop = StopRequest()
    try:
        for _ in range(2):
            stop._receive(signal.SIGUSR1, None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stop.signal_number == signal.SIGUSR1
    assert 1 + len(ended) == received


def test_hang_up_is_never_a_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "raise_signal", lambda _: pytest.fail("ended at once"))
    for first in (signal.SIGHUP, signal.SIGTERM):
        stop = StopRequest()
        stop._receive(first, None)
        stop._receive(signal.SIGHUP, None)
        assert stop.signal_number == first


def test_request_to_stop_is_raised_where_nothing_is_to_be_saved() -> None:
    stop = StopRequest()
    with pytest.raises(Interrupted) as raised, stop.at_once():
        stop._receive(signal.SIGTERM, None)
    assert pickle.loads(pickle.dumps(raised.value)).signal_number == signal.SIGTERM
    with pytest.raises(Interrupted), stop.at_once():
        pytest.fail("begun though it was asked to stop")
    stop = StopRequest()
    with stop.at_once():
        pass
    stop._receive(signal.SIGTERM, None)  # the loop looks at it
    assert stop.signal_number == signal.SIGTERM


def test_state_is_never_saved_after_a_loss_that_is_not_finite(run: Any) -> None:
    """A stop heard late is followed by a checkpoint: the step in between must be known to be good."""
    buffer = torch.zeros(2)
    with pytest.raises(RunError, match="step 4"):
        _steps_read(StepFlags(run, buffer, True), buffer, {3: STOP, 4: NOT_FINITE}, set(), 8)
