"""A checksum at the end of a file, so that a flipped bit is found before what it changed is trained on.

The last line of a sealed file is `ssodbench-crc32 XXXXXXXX`: the CRC-32 of all bytes before it, which differs for any
two contents of one length that differ within 32 neighbouring bits, a single flipped bit above all. Torch and NumPy look
for a zip archive's directory from the end of the file backwards, so both read a sealed file as any other. A file that
ends with that directory was written before there were checksums; whatever else ends without the line is damaged.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from harness.core.files import open_to_read

_MARK = b"\nssodbench-crc32 "
_LENGTH = len(_MARK) + 8 + 1  # the sum in hexadecimal and a line feed
_ZIP_END, _ZIP_END_LENGTH = b"PK\x05\x06", 22  # of the directory of an archive without a comment
_BLOCK = 1 << 20  # bytes: stays in the processor's cache


class Damaged(ValueError):  # noqa: N818  a state of a file
    """The content of a file is not what was written."""


class _Sealed:
    """A file for `torch.save` whose checksum a second thread computes while this one writes."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool, self.crc32 = file, pool, 0

    def write(self, data: bytes) -> int:
        sum_ = self._pool.submit(zlib.crc32, data, self.crc32)
        try:
            return self._file.write(data)
        finally:
            self.crc32 = sum_.result()  # the data may change as soon as we return

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def sealing(file: BinaryIO) -> Iterator[Any]:
    """Something to write to in place of an empty open file; at the end of the block the checksum is written behind."""
    with ThreadPoolExecutor(1) as pool:
        writer = _Sealed(file, pool)
        yield writer
        file.write(_line(writer.crc32))


def sealed(content: bytes) -> bytes:
    """The content with its checksum behind it."""
    return content + _line(zlib.crc32(content))


def verify(path: str | Path) -> None:
    """Checks a file against the checksum at its end, if it has one.

    Raises:
        Damaged: the content is not what was written, or the end is missing.
        OSError: the file cannot be read.
    """
    with open_to_read(path) as file:
        length = max(file.seek(0, os.SEEK_END) - _LENGTH, 0)
        file.seek(length)
        end = file.read()
        if end[-_ZIP_END_LENGTH:].startswith(_ZIP_END):
            return
        file.seek(0)
        if end != _line(_sum_of(file, length)):
            raise Damaged("its checksum does not match")


def _line(crc32: int) -> bytes:
    return b"%s%08x\n" % (_MARK, crc32)


def _sum_of(file: BinaryIO, length: int) -> int:
    """CRC-32 of the next `length` bytes."""
    crc32, block = 0, bytearray(_BLOCK)
    view = memoryview(block)
    while length and (read := file.readinto(view[: min(length, _BLOCK)])):  # type: ignore[attr-defined]
        crc32, length = zlib.crc32(view[:read], crc32), length - read
    return crc32
