"""Files: read only where they are regular, so that a FIFO or a device in a file's place never keeps a run waiting.

The functions here raise `OSError` as the system gives it, with the path that the user knows as its `filename`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def require_regular(path: str | Path) -> None:
    """Raises OSError unless a path is a regular file: reading a FIFO or a device may never end."""
    _require_regular(os.stat(path).st_mode, path)


def _require_regular(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def open_to_read(path: str | Path) -> BinaryIO:
    """A regular file, opened; does not wait for the other end of a FIFO.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    return _open_regular(path, os.O_RDONLY, "rb")


def _open_regular(path: str | Path, flags: int, mode: str) -> BinaryIO:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, mode)  # type: ignore[return-value]
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    with naming(path), open_to_read(path) as file:
        return file.read()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError the name that the user knows: writing names no file, and a temporary's name says nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
