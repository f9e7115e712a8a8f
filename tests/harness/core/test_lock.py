"""Waiting for a run folder, as a job does that was put into the queue again."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path

import pytest

from harness.core.lock import FolderHeld, RunLock


def test_a_folder_that_becomes_free_is_taken(tmp_path: Path) -> None:
    held, said = RunLock(tmp_path).acquire(), []
    threading.Timer(0.3, held.release).start()
    taken = RunLock(tmp_path).wait_and_acquire(30.0, said.append, pause=0.05)
    with pytest.raises(FolderHeld):
        RunLock(tmp_path).acquire()
    taken.release()
    (word,) = said  # once
    assert f"waiting up to 30 s for the run folder {tmp_path}: process " in word


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_waiting_has_an_end(tmp_path: Path, seconds: float) -> None:
    held, said = RunLock(tmp_path).acquire(), []
    begin = time.monotonic()
    with pytest.raises(FolderHeld, match="is held by process"):
        RunLock(tmp_path).wait_and_acquire(seconds, said.append, pause=0.05)
    assert seconds <= time.monotonic() - begin < 10
    assert len(said) == (seconds > 0)
    held.release()


def test_the_other_ranks_are_told_the_same(tmp_path: Path) -> None:
    error = FolderHeld(tmp_path, "process 1 on n1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
