"""What is no regular file is refused before it is read: a FIFO would never end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core import files
from harness.core.record import available_cores, read_record
from harness.core.types import UserError
from harness.data.images import LEVELS, check_images, read_sizes
from harness.engine import checkpoint
from harness.launch.local import MOST_PER_CORE, _check_cores

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("read", [files.read_bytes, files.open_to_read, files.require_regular])
def test_fifos_devices_and_folders_are_refused(fifo: Path, read: Callable[[Path], Any]) -> None:
    for path, error in ((fifo, "Not a regular file"), (Path("/dev/zero"), "Not a regular"), (fifo.parent, "Is a dir")):
        with pytest.raises(OSError, match=error) as raised:
            read(path)
        assert raised.value.filename == str(path)
    with pytest.raises(FileNotFoundError):
        read(fifo.parent / "nothing")
    (fifo.parent / "file").write_bytes(b"content")
    assert files.read_bytes(fifo.parent / "file") == b"content"


@pytest.mark.parametrize("level", LEVELS)
def test_picture_that_is_a_fifo_is_a_bad_picture(fifo: Path, level: str) -> None:
    checked = check_images([str(fifo)], np.array([7]), np.array([[8, 8]]), level)
    assert checked.bad == {7: "not a regular file"}
    assert read_sizes([str(fifo)], 1) == ["not a regular file"]


def test_record_and_checkpoint_that_are_fifos(fifo: Path) -> None:
    with pytest.raises(UserError, match="Not a regular file"):
        read_record(fifo)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(fifo)


def test_processes_beyond_the_cores(capfd: pytest.CaptureFixture[str]) -> None:
    cores = available_cores()
    _check_cores(cores)
    assert not capfd.readouterr().err
    _check_cores(cores + 1)
    assert f"devices={cores + 1} share {cores} core" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"devices=1000 .*lower devices"):
        _check_cores(1000)
    _check_cores(MOST_PER_CORE * cores)
