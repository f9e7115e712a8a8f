"""Which process runs which cell: suite processes that share a folder, on one host or several, take different cells."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from pathlib import Path
from typing import BinaryIO

from harness.core import files
from harness.core.lock import RunLock

_TRIES, _PAUSE = 3, 0.1  # who asks for a holder locks the file for a moment, which is no claim


class Claims:
    """The cells that this process has taken. The system frees them when it ends, however it ends.

    Args:
        suite_dir: the suite's folder; `claims/CELL.lock` in it is locked by the process that runs the cell. If the
            cell fails it says why, so that the others do not try the same.
        begun: when this process began, in seconds since the epoch; what failed later in another one is not tried again.
            None: now.
    """

    def __init__(self, suite_dir: Path, begun: float | None = None) -> None:
        self.folder = suite_dir / "claims"
        self.begun = time.time() if begun is None else begun
        self._taken: dict[str, BinaryIO] = {}

    def make_folder(self) -> None:
        """Makes the folder of claims.

        Raises:
            OSError: it cannot be written, or its file system has no locks.
        """
        files.make_folder(self.folder)
        with files.open_to_append(self._path("suite")) as file, contextlib.suppress(BlockingIOError):
            files.take_lock(file, wait=False)  # for a moment: whether that can be done

    def take(self, cell: str, run_dir: Path) -> bool:
        """Takes a cell, unless another process has it, still trains in its folder, or has just failed.

        Raises:
            OSError: the claim cannot be written, or the file system has no locks.
        """
        file = files.open_to_append(self._path(cell))
        for attempt in range(_TRIES):
            try:
                files.take_lock(file, wait=False)
            except BlockingIOError:
                if attempt == _TRIES - 1:
                    file.close()
                    return False
                time.sleep(_PAUSE)
            else:
                break
        left_running = _is_held(run_dir / RunLock.NAME)  # by a suite process that was killed
        if left_running or self.failure(cell) is not None:
            file.close()
            return False
        _write(file, f"process {os.getpid()} on {socket.gethostname()}")
        self._taken[cell] = file
        return True

    def release(self, cell: str, failed: str | None = None) -> None:
        """Gives a cell back; says why it failed, if it did."""
        with self._taken.pop(cell) as file:
            _write(file, "" if failed is None else f"failed {time.time():.3f} {failed}")

    def failure(self, cell: str) -> str | None:
        """Why a cell failed in another process since this one began; None if it did not."""
        try:
            text = files.read_bytes(self._path(cell)).decode(errors="replace")
        except OSError:
            return None
        match = re.fullmatch(r"failed (\d+\.\d+) (.*)", text, re.DOTALL)
        return match[2] if match and float(match[1]) >= self.begun else None

    def holder(self, cell: str, run_dir: Path) -> str | None:
        """The process that runs a cell, as it says itself; None where none does."""
        for path in (self._path(cell), run_dir / RunLock.NAME):
            if _is_held(path):
                with contextlib.suppress(OSError):
                    return files.read_bytes(path).decode(errors="replace").strip() or "another process"
        return None

    def _path(self, cell: str) -> Path:
        return self.folder / f"{cell}.lock"


def _write(file: BinaryIO, text: str) -> None:
    file.truncate(0)
    file.write(text.encode())
    file.flush()


def _is_held(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with files.open_to_append(path) as file:
            files.take_lock(file, wait=False)
    except BlockingIOError:
        return True
    return False


def require_suite_folder(claims: Claims, suite_dir: Path) -> None:
    """Makes the suite's folder, and tries a lock in it.

    Raises:
        UserError: it cannot be written, or its file system has no locks.
        RunError: the disk is full, or fails.
    """
    try:
        claims.make_folder()
    except OSError as error:
        kind = type(files.refusal(error, {"runs_dir": suite_dir}))
        # `make` passes no settings on, so its users are told the command behind it.
        made = "MAKELEVEL" in os.environ
        command = "run `.venv/bin/ssodbench suite suite=NAME runs_dir=DIR`" if made else "set runs_dir=DIR"
        what = f"cannot write the suite's folder {suite_dir} ({error.strerror})"
        raise kind(f"{what}: {command} with a folder that can be written") from error


def remove_if_empty(claims: Claims, suite_dir: Path) -> None:
    """Takes away a suite's folder in which there is nothing but claims that nobody holds."""
    with contextlib.suppress(OSError):
        if any(path != claims.folder for path in suite_dir.iterdir()):
            return
        for path in claims.folder.iterdir():
            if not _is_held(path):
                path.unlink()
        claims.folder.rmdir()
        suite_dir.rmdir()
