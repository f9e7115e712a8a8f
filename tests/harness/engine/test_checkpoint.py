"""The run folder: locks, whole checkpoints, retention."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.core import lock
from harness.core.types import UserError
from harness.engine import checkpoint
from harness.engine.loop import RunError


def _state(step: int) -> dict[str, Any]:
    return {"step": step, "method": {"w": torch.full((3,), float(step))}, "identity": {"config": "c"}}


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 11):
        checkpoint.save(tmp_path, _state(step), keep=2, keep_every=4)
    assert [checkpoint._step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [4, 8, 9, 10]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest["step"] == 10


def test_newest_is_read_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an optimiser's step counts must stay."""
    checkpoint.save(tmp_path, _state(1), keep=1, keep_every=None)
    places, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **keys: places.append(keys["map_location"]) or load(path, **keys))
    assert checkpoint.newest(tmp_path) is not None
    assert places == ["cpu"]


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "other"])
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, _state(1), keep=5, keep_every=None)
    bad = checkpoint.save(tmp_path, _state(2), keep=5, keep_every=None)
    content = bad.read_bytes()
    if damage == "other":
        torch.save({"something": 1}, bad)
    else:
        bad.write_bytes({"truncate": content[: len(content) // 2], "garbage": b"x" * 100, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="step-00000002"):
        state = checkpoint.newest(tmp_path)
    assert state is not None
    assert state["step"] == 1


def test_stray_files_are_left_alone(tmp_path: Path) -> None:
    own = checkpoint.save(tmp_path, _state(3), keep=1, keep_every=None)
    folder = own.parent
    for name in ("step-00000004 (copy).pt", "step-abc.pt", ".step-00000005.pt.swp", "step-00000006.pt~", "step-7.pt"):
        (folder / name).write_bytes(b"x")
    (folder / "step-00000009.pt").mkdir()
    assert checkpoint.checkpoints(tmp_path) == [own]
    assert checkpoint.find(tmp_path) == own
    checkpoint.save(tmp_path, _state(8), keep=1, keep_every=None)
    assert len(list(folder.iterdir())) == 7  # the six, and the new one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "2"}, "step: Expected `int`"),
        ({"step": 3}, "its steps are 3, 2"),
        ({"step": -1}, "step=-1 must be a whole number of at least 0"),
        ({"method": {"w": 1.0}}, "method.*Expected `Tensor`"),
        ({"identity": {"config": 1}}, "identity.*Expected `str`"),
        ({"counters": {"step": 9}}, "its steps are 2, 9, 2"),
        ({"counters": {"luck": 9}}, "unknown key luck"),
        ({"counters": [1]}, "counters: Expected"),
        ({"optimizer": 1}, "optimizer: Expected"),
    ],
)
def test_content_of_another_kind_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = checkpoint.save(tmp_path, _state(2), keep=1, keep_every=None)
    torch.save(_state(2) | changes, path)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, _state(1), keep=1, keep_every=None)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="free space"):
        checkpoint.save(tmp_path, _state(2), keep=1, keep_every=None)
    monkeypatch.undo()
    state = checkpoint.newest(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def _hold(folder: str, ready: Any) -> None:
    held = lock.RunLock(Path(folder)).acquire()
    ready.set()
    time.sleep(60)
    held.release()


@pytest.mark.timeout(60)
def test_second_process_is_told_who_holds_the_folder_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"process {process.pid} "):
        lock.RunLock(tmp_path).acquire()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lock.RunLock(tmp_path).acquire().release()


def test_discarded_lock_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock.RunLock(folder).acquire().release(discard=True)
    assert not folder.exists()


def test_foreign_runs_are_refused_with_the_difference(tmp_path: Path) -> None:
    checkpoint.refuse_foreign(tmp_path, [])
    with pytest.raises(UserError, match=r"seed: 1 -> 2.*run_dir"):
        checkpoint.refuse_foreign(tmp_path, ["seed: 1 -> 2"])
