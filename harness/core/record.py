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

from harness.core import readback
from harness.core.files import write_atomically
from harness.core.types import RunRecord, UserError

SCHEMA_VERSION = 2
BASELINE = "supervised"  # the method that tables compare the others with
STATUSES = ("running", "ok", "failed", "interrupted")
_PACKAGES = ("torch", "torchvision", "numpy", "numba", "pycocotools", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_FIELDS = {field.name for field in dataclasses.fields(RunRecord)}
# What decides where a run stands in a table: a record without one of these would stand in the wrong place.
_NEEDED = (
    "status",
    "suite",
    "method",
    "preset",
    "detector",
    "seed",
    "dataset",
    "dataset_sha256",
    "val_sha256",
    "protocol",
    "percent",
    "fold",
    "split_sha256",
    "steps",
    "score_threshold",
    "ap",
    "config_sha256",
)
_METRICS = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
_MOST = dict.fromkeys(("percent", *_METRICS), 100) | dict.fromkeys(
    ("data_stall", "score_threshold", "pseudo_precision", "pseudo_recall", "pseudo_iou"), 1
)


class _Environment(msgspec.Struct):
    """The keys of a record's environment that reports read."""

    packages: dict[str, str] = {}
    cpu: str | None = None
    cores: int | None = None
    threads: int | list[int] | None = None
    gpus: list[str] | None = None


def write_record(path: Path, record: RunRecord) -> None:
    """Writes a record atomically as indented JSON. Numbers that are not finite become null."""
    assert record.status in STATUSES, record.status
    write_atomically(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read_record(path: Path) -> RunRecord:
    """Reads and checks a record.

    Raises:
        UserError: the file is missing, damaged, not a record, or was written by a newer ssodbench.
    """
    return parse_record(path, readback.content_of(path, "give the folder of a run"))


def parse_record(path: Path, content: bytes) -> RunRecord:
    """A record from its JSON, a line of records.jsonl for instance; `path` is named in messages.

    Raises:
        UserError: it is damaged, not a record, or was written by a newer ssodbench.
    """
    remedy = "delete it (or its folder) and run the cell again"
    raw: Any = readback.decode_json(path, content, Any, remedy)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or type(version) is not int or version < 1:
        raise UserError(f"{path} is not a run record, it has no schema_version: {remedy}.")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path} is too new (schema {version}, this ssodbench reads up to {SCHEMA_VERSION}): update ssodbench."
        )
    if version == 1:
        raw = _of_schema_1(raw)
    if unknown := sorted(set(raw) - _FIELDS):
        raise UserError(
            f"{path} has the unknown key {unknown[0]!r}, so it is too new for this ssodbench, or damaged: update "
            f"ssodbench, or {remedy}."
        )
    readback.require_shallow(path, raw, remedy)
    try:
        record = readback.convert(raw, RunRecord)
        readback.convert(record.environment, _Environment)
    except ValueError as error:
        raise readback.damaged(path, str(error), f"{remedy}.") from error
    if wrong := _misfit(raw, record):
        raise readback.damaged(path, wrong, f"{remedy}.")
    return record


def _of_schema_1(raw: dict[str, Any]) -> dict[str, Any]:
    """A record of schema 1 in today's form: it had a key for each metric of `student` and of `teacher`."""
    migrated = {**raw, "schema_version": SCHEMA_VERSION}
    scores: dict[str, dict[str, Any]] = {}
    for network in ("student", "teacher"):
        metrics = {metric: migrated.pop(f"{network}_{metric}", None) for metric in _METRICS}
        if any(value is not None for value in metrics.values()):
            scores[network] = metrics
    return {**migrated, "scores": scores}


def _misfit(raw: dict[str, Any], record: RunRecord) -> str | None:
    """The first value of the right type that no run could have written, as a sentence; None if there is none."""
    if record.status not in STATUSES:
        return f"status is {record.status!r}, not one of {', '.join(STATUSES)}"
    if missing := [key for key in _NEEDED if key not in raw]:
        return f"the key {missing[0]} is missing"
    for key, value in vars(record).items():
        for number in value if isinstance(value, list) else [value]:
            most = _MOST.get(key, 2**63 - 1)
            if isinstance(number, int | float) and not 0 <= number <= most * (1 + 1e-9):  # a mean may round up
                return f"{key} is {str(number)[:30]}, not within 0 to {most}"
    for key, most in (("scores", 100), ("per_class", 100), ("errors", 2**53)):
        for name, metrics in getattr(record, key).items():
            for metric, number in metrics.items():
                if number is not None and not 0 <= number <= most * (1 + 1e-9):
                    return f"{key}.{name}.{metric} is {str(number)[:30]}, not within 0 to {most}"
    return None


def environment() -> dict[str, Any]:
    """The machine and the packages that a run's numbers depend on."""
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
