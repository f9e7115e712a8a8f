"""Annotations parsed once per machine: arrays on disk, keyed by the sha256 of the files they were parsed from.

Hashing COCO's annotations takes as long as everything else together, so a stamp remembers which sha256 a file had. It
is trusted only if size, inode, modification time and change time (which no program can set) of every file are still the
same, and all of them lay in the past by more than a clock tick when it was read; otherwise the content is hashed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from harness.core.files import read_bytes, require_regular, write_atomically
from harness.core.types import UserError
from harness.data.annotations import CleanAnnotations, Finding
from harness.data.cache import build_once, cached_folder, is_whole

_TICK_NS = 2_000_000_000  # the coarsest time stamp of a file system in use
_STRINGS = ("file_names", "category_names")
_BLOCK = 1 << 24  # bytes read while those before are hashed

Content = bytes | bytearray
Parse = Callable[[list[Content]], CleanAnnotations]


def load_annotations(
    files: Sequence[Path], parameters: dict[str, Any], cache_dir: Path, parse: Parse
) -> tuple[CleanAnnotations, str]:
    """Opens annotations, parsed now or earlier.

    Args:
        files: every file that the annotations depend on, in order.
        parameters: what else they depend on, as plain data.
        cache_dir: root of the cache.
        parse: makes the arrays from the files' bytes; called only if they are not in the cache.

    Returns:
        The arrays, and the sha256 of the files' content.
    """
    root = Path(cache_dir) / "annotations"
    paths = [str(file) for file in files]
    key = hashlib.sha256(json.dumps([[os.path.realpath(path) for path in paths], parameters]).encode()).hexdigest()[:32]
    stamp = root / "stamps" / f"{key}.json"
    with _readable():
        state = _state(paths)
    sha256 = _trusted(stamp, state)
    if sha256 is None or not is_whole(cached_folder(root, _parameters(sha256, parameters))):
        began = time.time_ns()
        with _readable():
            contents, hashes = map(list, zip(*map(_read_and_hash, paths), strict=True))
        sha256 = _joint(hashes)
        with _no_collection():
            folder = build_once(root, _parameters(sha256, parameters), lambda to: save_annotations(to, parse(contents)))
        with _readable():
            unchanged = _state(paths) == state
        if unchanged:
            content = {"state": state["digest"], "sha256": sha256, "read": began}
            with suppress(OSError):  # where the cache can only be read, the next start hashes again
                write_atomically(stamp, json.dumps(content).encode(), durable=False)
    else:
        folder = cached_folder(root, _parameters(sha256, parameters))
    return read_annotations(folder), sha256


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename} ({error.strerror}): give a file that is there and readable"
        ) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """There is no garbage in millions of fresh numbers, and looking for it costs a sixth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _read_and_hash(path: str) -> tuple[Content, str]:
    """A file's bytes and their sha256; of a large file, hashed by a second thread while this one reads on."""
    if os.stat(path).st_size <= _BLOCK:
        small = read_bytes(path)
        return small, hashlib.sha256(small).hexdigest()
    with open(path, "rb", buffering=0) as whole, ThreadPoolExecutor(1) as pool:
        content = bytearray(os.fstat(whole.fileno()).st_size)
        sha256, view, filled = hashlib.sha256(), memoryview(content), 0
        while read := whole.readinto(view[filled : filled + _BLOCK]):
            pool.submit(sha256.update, view[filled : filled + read])
            filled += read
    return content if filled == len(content) else content[:filled], sha256.hexdigest()


def _joint(hashes: list[str]) -> str:
    """The hash of one file as it is, as `sha256sum` gives it; of several, that of the list of their hashes."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def digest(contents: Sequence[Content]) -> str:
    """sha256 of one or several files' bytes."""
    return _joint([hashlib.sha256(content).hexdigest() for content in contents])


def _parameters(sha256: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {**parameters, "sha256": sha256, "code": code_sha256()}


@cache
def code_sha256() -> str:
    """Hash of the code that decides what is stored: all of this folder, so that no reader has to be listed."""
    return digest([file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))])


def _state(paths: list[str]) -> dict[str, Any]:
    """A digest of the files' names, sizes and times, and the newest of these times."""
    stats = [require_regular(path) for path in paths]
    rows = [(s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
    newest = max(max(row[2:]) for row in rows)
    return {"digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest(), "newest": newest}


def _trusted(stamp: Path, state: dict[str, Any]) -> str | None:
    """The sha256 that the stamp remembers, if the files cannot have changed since."""
    try:
        known = json.loads(stamp.read_text())
        if known["state"] == state["digest"] and state["newest"] + _TICK_NS < known["read"]:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def save_annotations(folder: Path, annotations: CleanAnnotations) -> None:
    """Writes annotations into an empty folder."""
    values = {field.name: getattr(annotations, field.name) for field in fields(annotations)}
    strings = {name: values.pop(name) for name in _STRINGS}
    strings["findings"] = [asdict(finding) for finding in values.pop("findings")]
    np.savez(folder / "arrays.npz", **values)
    (folder / "strings.json").write_text(json.dumps(strings))


def read_annotations(folder: Path) -> CleanAnnotations:
    """Annotations that `save` wrote."""
    strings = json.loads((folder / "strings.json").read_text())
    findings = tuple(Finding(f["what"], f["count"], tuple(f["examples"])) for f in strings.pop("findings"))
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        return CleanAnnotations(**dict(arrays), **strings, findings=findings)
