"""Who holds a folder: one live process at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from harness.core import files
from harness.core.types import UserError


class FolderHeld(UserError):  # noqa: N818  told like any other mistake
    """Another live process has the run folder."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"the run folder {folder} is held by {holder}: wait for it to end, or set another run_dir=DIR")
        self.folder, self.holder = folder, holder

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return FolderHeld, (self.folder, self.holder)  # what the other ranks are told


class RunLock:
    """Holds a run folder for one live process.

    The operating system frees the lock when the process ends, however it ends, so a dead process never blocks.
    """

    NAME = "lock"  # of the file in the folder

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / self.NAME
        self._file: BinaryIO | None = None
        self.created = not run_dir.exists()

    def acquire(self) -> RunLock:
        """Takes the lock.

        Raises:
            FolderHeld: naming the process that holds it.
            UserError: why the folder cannot be written or locked.
            RunError: the disk is full, or fails.
        """
        folder = self.path.parent
        try:
            file = files.open_to_append(self.path)
        except OSError as error:
            raise files.refusal(error, {"run_dir": folder}) from error
        try:
            files.take_lock(file, wait=False)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        except BlockingIOError as error:
            file.close()
            raise FolderHeld(folder, self.holder()) from error
        except OSError as error:
            _drop(file)
            raise files.refusal(error, {"run_dir": folder}) from error
        self._file = file
        return self

    def wait_and_acquire(self, seconds: float, say: Callable[[str], None], pause: float = 1.0) -> RunLock:
        """Takes the lock, and waits for who holds it: a job that was put into the queue again may find its own process
        of before, on a machine that has not ended it yet.

        Args:
            seconds: how long to wait.
            say: tells that this process waits, and for whom.
            pause: between two tries.

        Raises:
            UserError: it is still held, or as `acquire`.
        """
        end, told = time.monotonic() + seconds, False
        while True:
            try:
                return self.acquire()
            except FolderHeld as held:
                if time.monotonic() >= end:
                    raise
                if not told:
                    say(f"waiting up to {seconds:.0f} s for the run folder {self.path.parent}: {held.holder} has it")
                told = True
            time.sleep(pause)

    def holder(self) -> str:
        """Who holds the folder, as it says itself."""
        try:
            return files.read_bytes(self.path).decode(errors="replace").strip() or "another process"
        except OSError:
            return "another process"

    def release(self, discard: bool = False) -> None:
        """Frees the lock; with `discard`, a folder that the lock made and nothing else was written to goes too."""
        if self._file is None:
            return
        if discard and self.created:
            with contextlib.suppress(OSError):  # the folder has got content, or has gone: neither is an error
                self.path.unlink(missing_ok=True)
                self.path.parent.rmdir()
        _drop(self._file)
        self._file = None


def _drop(file: BinaryIO) -> None:
    """Closes a file whose content does not matter, also where the disk is too full to take it."""
    with contextlib.suppress(OSError):
        file.close()
