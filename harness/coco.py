"""COCO annotation files, by a typed decode that skips polygons without making Python objects of them."""

from __future__ import annotations

import re
from itertools import chain

import msgspec
import numpy as np

from harness.annotations import RawAnnotations
from harness.types import UserError

_NOT_JSON_NUMBERS = re.compile(rb"(?<=[\[:,\s])-?(?:NaN|Infinity)(?=[\],}\s])")
_Number = float | None


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[_Number, _Number, _Number, _Number]
    iscrowd: int | bool = 0
    area: _Number = None


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str


class _File(msgspec.Struct):
    images: list[_Image] | None = None
    annotations: list[_Annotation] | None = None
    categories: list[_Category] | None = None


def parse(content: bytes | bytearray, origin: str, labeled: bool = True) -> RawAnnotations:
    """Reads the bytes of a COCO annotation file.

    Args:
        content: the file's bytes.
        origin: its name, for messages.
        labeled: whether it must have annotations and categories; a list of unlabelled images needs neither.

    Raises:
        UserError: if it is not JSON, or not of COCO's form.
    """
    file = _decode(content[3:] if content.startswith(b"\xef\xbb\xbf") else content, origin)
    del content
    needed = ("images", "annotations", "categories") if labeled else ("images",)
    missing = [key for key in needed if getattr(file, key) is None]
    if missing:
        raise UserError(f"{origin} has no `{'`, `'.join(missing)}`: give a COCO annotation file")
    images, boxes, categories = file.images or [], file.annotations or [], file.categories or []
    try:
        return RawAnnotations(
            origin,
            np.fromiter([i.id for i in images], np.int64),
            [i.file_name for i in images],
            np.array([(i.height, i.width) for i in images], np.int64).reshape(-1, 2),
            [(c.id, c.name) for c in categories],
            np.fromiter([b.image_id for b in boxes], np.int64),
            np.fromiter([b.category_id for b in boxes], np.int64),
            _floats(list(chain.from_iterable([b.bbox for b in boxes]))).reshape(-1, 4),
            np.fromiter([b.iscrowd for b in boxes], np.bool_),
            _floats([b.area for b in boxes]),
        )
    except OverflowError as error:
        raise UserError(f"{origin} has an id or a size beyond 64 bits: number images and classes from 1") from error


def _decode(content: bytes | bytearray, origin: str) -> _File:
    try:
        return msgspec.json.decode(content, type=_File)
    except msgspec.ValidationError as error:
        raise UserError(f"{origin} is not a COCO annotation file ({error}): correct that entry") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Python's json module writes NaN and Infinity, which JSON does not know; read as null, such boxes are counted.
        plain = _NOT_JSON_NUMBERS.sub(b"null", content)
        if plain != content:
            return _decode(plain, origin)
        raise UserError(f"{origin} cannot be read as JSON ({error}): give a complete COCO annotation file") from error


def _floats(values: list[_Number]) -> np.ndarray:
    """float64; None becomes NaN."""
    try:
        return np.fromiter(values, np.float64)
    except TypeError:
        return np.array(values, np.float64)
