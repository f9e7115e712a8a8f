"""The run folder: who holds it, its checkpoints, and whether it belongs to this run."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from harness.core import checksum, files
from harness.core.escape import plain
from harness.core.readback import Count, convert
from harness.core.types import RunError, UserError
from harness.engine.loop import Counters, todays_counters

_NAME = re.compile(r"step-([0-9]{8,})\.pt")


class _Content(msgspec.Struct):
    """What a checkpoint holds; the last four are for taking a run up again, its networks can be used without."""

    step: Count
    identity: dict[str, str]
    method: dict[str, Tensor]
    optimizer: dict[str, Any] = {}
    pipeline: dict[str, Any] = {}
    counters: Counters | None = None
    detector: str = ""


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; what else lies in their folder is left alone."""
    found = (run_dir / "checkpoints").glob("step-*.pt")
    return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_file()), key=_step_of)


def path_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}.pt"


def misfit(path: Path, error: Exception) -> str:
    """The sentence about a checkpoint whose content cannot be loaded into this run."""
    what = f"it lacks {error}" if isinstance(error, KeyError) else plain(error)[:300]
    return f"the checkpoint {path} does not fit this run ({what}): delete it and start again"


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
    path = path_of(run_dir, state["step"])
    try:
        _remove_temporaries(folder)
        with files.replacing(path) as file, checksum.sealing(file) as sealed:
            torch.save(state, sealed)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        raise RunError(
            f"cannot write the checkpoint {path} ({error}): free space on that disk and start the same command again, "
            "which continues from the previous checkpoint"
        ) from error
    _sync_folder(folder)
    for old in checkpoints(run_dir)[:-keep]:
        if not keep_every or _step_of(old) % keep_every:
            with contextlib.suppress(OSError):  # one that stays costs space, not the run
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
        UserError: when the file is not a whole checkpoint, not what was written, or holds what none does.
    """
    try:
        checksum.verify(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        why = error if isinstance(error, checksum.Damaged) else type(error).__name__
        raise UserError(f"the checkpoint {path} is damaged ({why}): delete it and start again") from error
    if not isinstance(state, dict) or not {"step", "method", "identity"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of ssodbench: name a file that a run wrote")
    if "counters" in state:
        state["counters"] = todays_counters(state["counters"])
    if wrong := _misfit(path, state):
        raise UserError(f"the checkpoint {path} is damaged ({wrong}): delete it and start again")
    return state


def _misfit(path: Path, state: dict[Any, Any]) -> str | None:
    """What of a state no run wrote, by its kind or against the rest."""
    try:
        content = convert(state, _Content)
    except ValueError as error:
        return str(error)
    if content.counters is not None and (unknown := state["counters"].keys() - vars(content.counters).keys()):
        return f"counters has the unknown key {min(unknown, key=str)}"
    steps = [content.step, *([content.counters.step] if content.counters else [])]
    steps += [_step_of(path)] if _NAME.fullmatch(path.name) else []
    return f"its steps are {', '.join(map(str, steps))}, which should be the same" if len(set(steps)) > 1 else None


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


def take_up(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimiser's state, and checks what torch would find in the first step only.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    optimizer.load_state_dict(state)
    for parameter, known in optimizer.state.items():
        for name, value in known.items():
            if name != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(f"{name} is of shape {list(value.shape)}, not {list(parameter.shape)}")


def refuse_foreign(run_dir: Path, differences: Iterable[str]) -> None:
    """Refuses to take up a run under another configuration, split or dataset.

    Raises:
        UserError: naming what differs and how to start anew.
    """
    differing = sorted(differences, key=lambda said: not said.split(":")[0].endswith("name"))  # what says most first
    if differing:
        shown = "; ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise UserError(
            f"the run in {run_dir} was started with other settings ({shown}): "
            "give the same ones to continue it, or another run_dir=DIR, or delete that folder, to start anew"
        )
