"""What a file system refuses, made here: real obstacles, and errors injected where the machine would not refuse."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Patch = Callable[[pytest.MonkeyPatch, Path], Any]
Prepare = Callable[[Path], Any]

# Functions that change a file system, and those that may only look at it; each with the position of its paths.
_CHANGES: tuple[tuple[Any, str, tuple[int, ...]], ...] = (
    (os, "mkdir", (0,)),
    (os, "replace", (0, 1)),
    (os, "rename", (0, 1)),
    (os, "unlink", (0,)),
    (os, "rmdir", (0,)),
)
_LOOKS: tuple[tuple[Any, str, tuple[int, ...]], ...] = (
    (os, "stat", (0,)),
    (os, "scandir", (0,)),
    (os, "listdir", (0,)),
)


def refusing(place: str, code: int, reads: bool = False) -> Patch:
    """Everything below `place` (a folder of the case, or an absolute one) is refused: writing, or also reading."""

    def patch(monkeypatch: pytest.MonkeyPatch, tmp: Path) -> None:
        below = os.path.join(tmp, place)

        def hit(path: Any) -> bool:
            return isinstance(path, str | Path) and Path(os.path.abspath(path)).is_relative_to(below)

        def guard(function: Callable[..., Any], positions: tuple[int, ...]) -> Callable[..., Any]:
            def guarded(*args: Any, **kwargs: Any) -> Any:
                for path in (args[i] for i in positions if i < len(args)):
                    if hit(path):
                        raise OSError(code, os.strerror(code), str(path))
                return function(*args, **kwargs)

            return guarded

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if hit(path) and (reads or set(mode) & set("wax+")):
                raise OSError(code, os.strerror(code), str(path))
            return real_open(path, mode, *args, **kwargs)

        def opened_low(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if hit(path) and (reads or flags & (os.O_WRONLY | os.O_RDWR)):
                raise OSError(code, os.strerror(code), str(path))
            return real_open_low(path, flags, *args, **kwargs)

        def accessible(path: Any, mode: int, **kwargs: Any) -> bool:
            return real_access(path, mode, **kwargs) and not (hit(path) and (reads or mode & os.W_OK))

        real_open, real_open_low, real_access = io.open, os.open, os.access
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(os, "open", opened_low)
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            monkeypatch.setattr(os, "access", accessible)
        for module, name, positions in _CHANGES + (_LOOKS if reads else ()):
            monkeypatch.setattr(module, name, guard(getattr(module, name), positions))

    return patch


def full(place: str, code: int = errno.ENOSPC) -> Patch:
    """Files below `place` can be made, but what is written does not get to the disk."""

    def patch(monkeypatch: pytest.MonkeyPatch, tmp: Path) -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(str(tmp / place)):
                raise OSError(code, os.strerror(code))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return patch


def no_locks(code: int) -> Patch:
    """A file system without locks."""

    def patch(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    return patch


def deleted_working_folder(monkeypatch: pytest.MonkeyPatch, tmp: Path) -> None:
    """The process stands in a folder that is gone."""
    gone = tmp / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    shutil.rmtree(gone)


def loop(name: str) -> Prepare:
    """A symbolic link to itself."""
    return lambda tmp: (tmp / name).symlink_to(tmp / name)


def file(name: str) -> Prepare:
    """A file where a folder is wanted."""
    return lambda tmp: (tmp / name).write_text("a file\n")


def folder(name: str) -> Prepare:
    """A folder where a file is wanted."""
    return lambda tmp: (tmp / name).mkdir(parents=True)


def fifo(name: str) -> Prepare:
    """A FIFO that nobody writes to, where a file is wanted."""

    def make(tmp: Path) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp / name)

    return make


def device(name: str) -> Prepare:
    """An endless device where a file is wanted."""

    def make(tmp: Path) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).symlink_to("/dev/zero")

    return make


def all_of(*parts: Prepare) -> Prepare:
    """Several obstacles."""
    return lambda tmp: [part(tmp) for part in parts]
