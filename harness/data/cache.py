"""Folders that are made once per machine and shared by every run, each named by a hash of what it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.core import files

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def cached_folder(root: Path, parameters: dict[str, Any]) -> Path:
    """Where the folder made from `parameters` (plain data) lies under `root`, whether it exists or not."""
    canonical = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
    return Path(root) / hashlib.sha256(canonical.encode()).hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Whether `folder` is complete and undamaged.

    Files directly in it are compared by sha256, sub-folders by the number and total size of their files: enough to see
    a half-deleted or truncated cache, and a matter of milliseconds.
    """
    try:
        manifest = json.loads(files.read_bytes(folder / _MANIFEST))
        named = cached_folder(folder.parent, manifest["parameters"]) == folder  # else the manifest is damaged
        return bool(named and manifest["contents"] == _contents(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build_once(root: Path, parameters: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The cached folder of `parameters`, built if it is missing or damaged.

    Processes that ask at the same time wait for the first one. The folder is built under another name and renamed when
    it is complete, so nobody ever reads a half-written one.

    Args:
        root: folder of this kind of cached thing.
        parameters: plain data that decides the content; another value gives another folder.
        build: writes the content into the empty folder it is given.

    Returns:
        The whole folder.

    Raises:
        UserError: if the folder is not there and `root` cannot be written, or has no locks.
        RunError: the disk is full, or fails.
    """
    folder = cached_folder(root, parameters)
    if is_whole(folder):
        return folder
    try:
        with _locked(folder.with_suffix(".lock")):
            if not is_whole(folder):
                if folder.exists():
                    logger.warning("the cached folder %s is damaged and is made again", folder)
                _build(folder, parameters, build)
    except OSError as error:
        raise files.refusal(error, {"cache_dir": root}) from error
    return folder


def _build(folder: Path, parameters: dict[str, Any], build: Callable[[Path], None]) -> None:
    partial = folder.with_suffix(".partial")
    with files.naming(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        build(partial)
        manifest = {"parameters": parameters, "contents": _contents(partial)}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _contents(folder: Path) -> dict[str, Any]:
    """Name to sha256 of each file, name to [number of files, bytes] of each sub-folder; JSON data."""
    contents: dict[str, Any] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                with os.scandir(entry.path) as files:
                    sizes = [file.stat().st_size for file in files]
                contents[entry.name] = [len(sizes), sum(sizes)]
            elif entry.name != _MANIFEST:
                contents[entry.name] = hashlib.sha256(Path(entry.path).read_bytes()).hexdigest()
    return contents


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock; the system frees it when the process ends, however it ends."""
    with files.open_to_append(path) as file:
        files.take_lock(file, wait=True)
        yield
