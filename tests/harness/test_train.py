"""Parts of the training loop that a run on a CPU does not show."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.train import RunError, StepFlags, StepTaken, warn_of_few_pseudo_labels
from harness.types import Batch

STOP, NOT_FINITE = 0, 1


def _taken(step: int, loss: float = 1.0) -> StepTaken:
    ids, keys = torch.tensor([step]), torch.tensor([100 + step])
    return StepTaken(step, {"rpn_class": torch.tensor(loss)}, Batch({}, {}, ids, ids, keys, keys))


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """What `StepFlags` needs of an experiment."""
    return SimpleNamespace(cfg=SimpleNamespace(run_dir=tmp_path, seed=7), world=SimpleNamespace(rank=0))


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
    replay = json.loads((run.cfg.run_dir / "non_finite_rank0.json").read_text())
    assert (replay["step"], replay["labeled_ids"], replay["labeled_keys"]) == (3, [3], [103])


def test_state_is_never_saved_after_a_loss_that_is_not_finite(run: Any) -> None:
    """A stop heard late is followed by a checkpoint: the step in between must be known to be good."""
    buffer = torch.zeros(2)
    with pytest.raises(RunError, match="step 4"):
        _steps_read(StepFlags(run, buffer, True), buffer, {3: STOP, 4: NOT_FINITE}, set(), 8)


@pytest.mark.parametrize(
    ("step", "pseudo", "warned"),
    [(119, 0.0, False), (120, 0.2, True), (139, 0.2, True), (140, 0.2, False), (139, 0.3, False)],
)
def test_teacher_that_knows_too_little_at_the_end_of_burn_in_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, step: int, pseudo: float, warned: bool
) -> None:
    """3 boxes per labelled image, 120 steps of burn-in, a line every 20 steps."""
    run: Any = SimpleNamespace(
        method=SimpleNamespace(unlabeled_from=120), cfg=SimpleNamespace(logging=SimpleNamespace(every=20))
    )
    metrics = {"pseudo_boxes": torch.tensor(pseudo), "labeled_boxes": torch.tensor(3.0)}
    warn_of_few_pseudo_labels(run, step, metrics)
    assert ("lengthen method.burn_in" in caplog.text) == warned
