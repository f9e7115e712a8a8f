"""RunRecord to JSON and back: one record.json per run, its schema versioned, with the environment it was made in."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from harness.files import read_bytes
from harness.types import RunRecord, UserError

SCHEMA_VERSION = 1
STATUSES = ("running", "ok", "failed", "interrupted")
_PACKAGES = ("torch", "torchvision", "numpy", "numba", "pycocotools", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_FIELDS = {field.name for field in dataclasses.fields(RunRecord)}


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replaces `path` by `content`, so that a reader (or a crash) sees the old file or the new one, never a part.

    With `durable` false the content is not forced to the disk: enough for what only live readers need.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_record(path: Path, record: RunRecord) -> None:
    """Writes a record atomically as indented JSON. Numbers that are not finite become null."""
    assert record.status in STATUSES, record.status
    write_atomically(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read_record(path: Path) -> RunRecord:
    """Reads and checks a record.

    Raises:
        UserError: the file is missing, damaged, not a record, or was written by a newer ssodbench.
    """
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of a run.") from error
    remedy = "delete it (or its folder) and run the cell again"
    try:
        raw = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is damaged, it is not valid JSON ({error}): {remedy}.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int:
        raise UserError(f"{path} is not a run record, it has no schema_version: {remedy}.")
    unknown = sorted(set(raw) - _FIELDS)
    if version > SCHEMA_VERSION or unknown:
        what = f"schema {version}" if version > SCHEMA_VERSION else f"the unknown key {unknown[0]!r}"
        raise UserError(f"{path} has {what}, so a newer ssodbench wrote it: update ssodbench to read it.")
    try:
        record = msgspec.convert(raw, RunRecord)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from error
    if record.status not in STATUSES:
        raise UserError(f"{path} is damaged (status is {record.status!r}, not one of {', '.join(STATUSES)}): {remedy}.")
    return record


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code: versions, processor, cores, memory, GPUs."""
    names = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "gpus": names,
        "cuda": torch.version.cuda if names else None,
        "commit": code_commit(),
    }


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def code_commit() -> str | None:
    """Git commit of the running code, "-dirty" appended when tracked files differ from it; None without git."""
    folder = Path(__file__).resolve().parent
    # An installed package may lie in somebody else's repository: only one that tracks this file counts.
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
