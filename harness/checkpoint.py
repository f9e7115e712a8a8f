"""The run folder: who holds it, its checkpoints, and whether it belongs to this run."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

from harness.train import RunError
from harness.types import UserError


class RunLock:
    """Holds a run folder for one live process.

    The operating system frees the lock when the process ends, however it ends, so a dead process never blocks.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self._file: IO[str] | None = None
        self.created = not run_dir.exists()

    def acquire(self) -> RunLock:
        """Takes the lock.

        Raises:
            UserError: naming the process that holds it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {self.path.parent}: {error.strerror}; set run_dir=DIR"
            ) from error
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            self._file = None
            raise UserError(
                f"the run folder {self.path.parent} is held by {holder}: wait for it to end, or set another run_dir=DIR"
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return self

    def release(self, discard: bool = False) -> None:
        """Frees the lock; with `discard`, a folder that the lock made and nothing else was written to goes too."""
        if self._file is None:
            return
        if discard and self.created:
            self.path.unlink(missing_ok=True)
            if not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()
        self._file.close()
        self._file = None


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*.pt"), key=_step_of)


def is_saved(run_dir: Path, step: int) -> bool:
    """Whether there is a checkpoint of the state after so many steps."""
    return step in map(_step_of, checkpoints(run_dir))


def save(run_dir: Path, state: dict[str, Any], keep: int, keep_every: int | None) -> Path:
    """Writes a checkpoint so that at any moment the folder holds a whole one: temporary name, fsync, rename.

    Keeps the newest `keep`, and those whose step is a multiple of `keep_every`.

    Raises:
        RunError: when the disk is full; what was there before stays.
    """
    folder = run_dir / "checkpoints"
    path = folder / f"step-{state['step']:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(folder)
        descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
        with os.fdopen(descriptor, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        _remove_temporaries(folder)
        raise RunError(
            f"cannot write the checkpoint {path} ({error}): free space on that disk and start the same command again, "
            "which continues from the previous checkpoint"
        ) from error
    _sync_folder(folder)
    for old in checkpoints(run_dir)[:-keep]:
        if not keep_every or _step_of(old) % keep_every:
            old.unlink()
    return path


def _remove_temporaries(folder: Path) -> None:
    for left_over in folder.glob("*.tmp"):
        left_over.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """One checkpoint's state, as tensors and plain values alone.

    Raises:
        UserError: when the file is not a whole checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"the checkpoint {path} is damaged ({type(error).__name__}): delete it and start again"
        ) from error
    if not isinstance(state, dict) or not {"step", "method", "identity"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of ssodbench: name a file that a run wrote")
    return state


def newest(run_dir: Path) -> dict[str, Any] | None:
    """The newest valid checkpoint of a run, on the CPU; an invalid one is named and passed over.

    `load_state_dict` moves what belongs on the device. An optimiser's step counts stay on the CPU, where they are read
    for every parameter in every step.
    """
    for path in reversed(checkpoints(run_dir)):
        try:
            return read(path)
        except UserError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    return None


def find(path: Path) -> Path:
    """The checkpoint that a user names: a file, or the newest of a run folder.

    Raises:
        UserError: when there is none.
    """
    if path.is_file():
        return path
    found = checkpoints(path) if path.is_dir() else []
    if not found:
        raise UserError(f"there is no checkpoint at {path}: name a run folder or a file step-NNNNNNNN.pt")
    return found[-1]


def refuse_foreign(run_dir: Path, differences: Iterable[str]) -> None:
    """Refuses to take up a run under another configuration, split or dataset.

    Raises:
        UserError: naming what differs and how to start anew.
    """
    differing = list(differences)
    if differing:
        shown = "; ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise UserError(
            f"the run in {run_dir} was started with other settings ({shown}): "
            "give the same ones to continue it, or another run_dir=DIR, or delete that folder, to start anew"
        )
