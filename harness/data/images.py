"""Picture files: whether they are there, what their headers say, whether they decode.

EXIF orientation is never applied: COCO's boxes and sizes refer to the stored pixels, and the pipelines decode those.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from harness.config.layouts import SUFFIXES
from harness.core.files import open_to_read
from harness.data.annotations import Finding

LEVELS = ("quick", "headers", "full")

_SAMPLE = 2000  # headers read at level quick
_EXAMPLES = 5
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 5 to 8 swap the sides
_NOT_REGULAR = "not a regular file"  # a FIFO or a device, which may never end
_TAIL = 64  # bytes at the end in which a whole JPEG has its end marker
_END = b"\xff\xd9"  # a JPEG's end marker
_MORE = bytes(np.random.default_rng(0).integers(0, 255, 1 << 16, np.uint8))  # without 0xff: no marker
_TASK = 64  # pictures handed to a thread at once

T = TypeVar("T")
R = TypeVar("R")


class BadImage(Exception):  # noqa: N818  a finding, not an error of the program
    """A picture that cannot be used, and why."""


@dataclass(frozen=True)
class Header:
    """Size, kind of pixels and rotation of a picture, read from the beginning of its file."""

    width: int
    height: int
    pixels: str  # "RGB", or what the pipelines convert: "16 bit", "CMYK", "gray", "palette", "alpha"
    orientation: int = 1


@dataclass
class ImageCheck:
    """The result of looking at a set of pictures: bad ones, and oddities that a run copes with."""

    checked: int = 0  # headers read or pictures decoded, as the level says
    bad: dict[int, str] = field(default_factory=dict)  # image id -> reason
    findings: list[Finding] = field(default_factory=list)


def read_header(path: str, decode: bool = False) -> Header:
    """Reads a picture's header, and all of its pixels if asked to.

    Raises:
        BadImage: if that cannot be done.
    """
    try:
        with open_to_read(path) as file, Image.open(file) as image:
            orientation = int(image.getexif().get(_ORIENTATION, 1)) if "exif" in image.info else 1
            header = Header(*image.size, _pixels(image, file), orientation)
            is_jpeg = image.format == "JPEG"
            if decode or (is_jpeg and not _ends(file)):
                image.load()
            if decode and is_jpeg and _is_cut_short(file, image.tobytes()):
                raise BadImage("cut short, with an end marker put on")
            return header
    except FileNotFoundError as error:
        raise BadImage("missing") from error
    except IsADirectoryError as error:
        raise BadImage("a folder") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large") from error
    except PermissionError as error:
        raise BadImage("not readable") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, TypeError) as error:
        raise BadImage(_reason(path, error)) from error


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return _NOT_REGULAR
    if os.path.getsize(path) == 0:
        return "empty"
    return "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "not an image, or damaged"


def _pixels(image: Image.Image, file: BinaryIO) -> str:
    if image.mode.startswith(("I", "F")) or (image.format == "PNG" and _png_depth(file) == 16):
        return "16 bit"
    if image.mode == "P":
        return "palette"
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return "alpha"
    return {"L": "gray", "1": "gray"}.get(image.mode, image.mode)


def _png_depth(file: BinaryIO) -> int:
    """Bits per channel, which Pillow does not tell; byte 24 of the file."""
    return _bytes_from(file, 24)[0]


def _ends(file: BinaryIO) -> bool:
    """Whether a JPEG file has its end marker; one that has none is decoded to see whether anything is missing."""
    return _END in _bytes_from(file, max(0, os.fstat(file.fileno()).st_size - _TAIL))


def _bytes_from(file: BinaryIO, offset: int, count: int = _TAIL) -> bytes:
    """Bytes of a file from an offset on, its position left as it is, since Pillow reads on from there."""
    position = file.tell()
    file.seek(offset)
    content = file.read(count)
    file.seek(position)
    return content


def _is_cut_short(file: BinaryIO, pixels: bytes) -> bool:
    """Whether a JPEG file ends before its last pixels, though its end marker is there.

    Decoders fill up such a picture with grey and report nothing, or write a line to stderr that names no file. It shows
    when more data is put before the end marker: a whole picture has no use for it and stays the same, one that lacks
    pixels takes it for them. This costs a second decoding.

    Args:
        file: the whole file; it is read from its beginning.
        pixels: what Pillow decoded it to.
    """
    file.seek(0)
    data = file.read()
    end = data.rfind(_END)
    with Image.open(io.BytesIO(data[:end] + _MORE + _END)) as longer:
        return end > 0 and longer.tobytes() != pixels


def check_images(
    paths: Sequence[str],
    ids: np.ndarray,
    sizes: np.ndarray,
    level: str = "quick",
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> ImageCheck:
    """Looks at the pictures of a dataset.

    Args:
        paths: files of the N images.
        ids: (N,) their ids.
        sizes: (N, 2) the (height, width) that the annotations give.
        level: "quick" sees that every file exists and is not empty, and reads the headers of 2,000 spread evenly;
            "headers" reads all headers; "full" decodes every picture.
        threads: how many work side by side.
        progress: called with the number of pictures done since the last call.
    """
    result = ImageCheck()
    rows = range(len(paths))
    if level == "quick":
        result.bad = {int(ids[row]): reason for row in rows if (reason := _absent(paths[row]))}
        if len(paths) > _SAMPLE:
            rows = np.unique(np.linspace(0, len(paths) - 1, _SAMPLE).astype(int)).tolist()
        progress(len(paths) - len(rows))
    notes: dict[str, list[str]] = {}

    def look(row: int) -> tuple[int, Header | str]:
        try:
            return row, read_header(paths[row], decode=level == "full")
        except BadImage as bad:
            return row, str(bad)

    for row, seen in _parallel(look, rows, threads, progress):
        result.checked += 1
        name = os.path.basename(paths[row])
        reason = seen if isinstance(seen, str) else _mismatch(seen, sizes[row])
        if reason:
            result.bad[int(ids[row])] = reason
        elif isinstance(seen, Header):
            if seen.pixels != "RGB":
                notes.setdefault(f"pictures with {seen.pixels} pixels, read as 8-bit RGB", []).append(name)
            if seen.orientation != 1:
                notes.setdefault("pictures with an EXIF rotation, which is not applied", []).append(name)
    result.findings = [Finding(what, len(names), tuple(names[:_EXAMPLES])) for what, names in sorted(notes.items())]
    result.findings += _summary(result.bad, paths, ids)
    return result


def _summary(bad: dict[int, str], paths: Sequence[str], ids: np.ndarray) -> list[Finding]:
    """One finding for each kind of reason."""
    name_of = {int(i): os.path.basename(path) for i, path in zip(ids, paths, strict=True) if int(i) in bad}
    kinds: dict[str, list[str]] = {}
    for number, reason in bad.items():
        kind, _, detail = reason.partition(": ")
        kinds.setdefault(kind, []).append(f"{name_of[number]} {detail}".strip())
    return [Finding(f"pictures {kind}", len(names), tuple(names[:_EXAMPLES])) for kind, names in sorted(kinds.items())]


def _absent(path: str) -> str | None:
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            return "a folder" if stat.S_ISDIR(state.st_mode) else _NOT_REGULAR
        return None if state.st_size else "empty"
    except OSError:
        return "missing"


def _mismatch(header: Header, size: np.ndarray) -> str | None:
    height, width = int(size[0]), int(size[1])
    if (header.width, header.height) == (width, height):
        return None
    if header.orientation > 4 and (header.height, header.width) == (width, height):
        return (
            f"annotated after rotation by EXIF: stored as {header.width}x{header.height}, annotated as {width}x{height}"
        )
    return f"of another size than annotated: {header.width}x{header.height}, annotated as {width}x{height}"


def _parallel(work: Callable[[T], R], items: Iterable[T], threads: int, progress: Callable[[int], None]) -> Iterator[R]:
    """`work` on each item, in order, by threads (Pillow decodes outside Python's lock), with few tasks in flight."""
    feed = iter(items)
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, threads)) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about files that it can still read
        waiting = [pool.submit(list, map(work, chunk)) for chunk in _chunks(feed, 4 * max(1, threads))]
        while waiting:
            done = waiting.pop(0).result()
            waiting += [pool.submit(list, map(work, chunk)) for chunk in _chunks(feed, 1)]
            progress(len(done))
            yield from done


def _chunks(feed: Iterator[T], count: int) -> Iterator[list[T]]:
    for _ in range(count):
        chunk = list(islice(feed, _TASK))
        if chunk:
            yield chunk


def list_pictures(folder: Path) -> list[tuple[str, os.stat_result]]:
    """(name relative to the folder, state) of every picture below it, sorted by name."""
    found = []
    for directory, _, files in os.walk(folder, followlinks=True):
        for file in files:
            if file.lower().endswith(SUFFIXES):
                path = os.path.join(directory, file)
                try:
                    found.append((os.path.relpath(path, folder), os.stat(path)))
                except OSError:
                    continue  # a link to nowhere is no picture
    return sorted(found, key=lambda entry: entry[0])


def read_sizes(paths: Sequence[str], threads: int) -> list[tuple[int, int] | str]:
    """(height, width) of each picture, or why it has none."""

    def look(path: str) -> tuple[int, int] | str:
        try:
            header = read_header(path)
            return header.height, header.width
        except BadImage as bad:
            return str(bad)

    return list(_parallel(look, paths, threads, lambda _: None))
