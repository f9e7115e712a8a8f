"""Where a command talks to people. Output that cannot be written is lost, not an error: it is not worth a training."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO, Any

import rich.console


class _Lossy:
    """A text file whose writing never fails: not on a full disk, a closed pipe or a terminal that has gone."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a ValueError: the file is closed
            try:
                self._file.write(text)
            except UnicodeEncodeError as error:
                self._file.write(text.encode(error.encoding, "replace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Console(rich.console.Console):
    """Rich's console, of standard output by default or of standard error, that loses what it cannot write."""

    @property
    def file(self) -> IO[str]:
        """Where it writes to."""
        return _Lossy(super().file)  # type: ignore[return-value]

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def say(self, text: str) -> None:
        """Prints a line as it is: nothing in it is markup, and it is not wrapped."""
        self.print(text, markup=False, highlight=False, soft_wrap=True)


STDERR = Console(stderr=True)


def settle() -> None:
    """Writes what standard output and error still hold, before a process ends, and gives up what they cannot take.

    Python itself would try again at its end, fail, and turn the exit code into 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def counted(number: int, noun: str) -> str:
    """`1 class`, `3 classes`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith(('s', 'x')) else 's'}"
