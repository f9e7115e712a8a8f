"""COCO annotation files, by a typed decode that skips polygons without making Python objects of them."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from harness.core.types import UserError
from harness.data.annotations import RawAnnotations, whole_numbers

_NOT_JSON_NUMBERS = re.compile(rb"(?<=[\[:,\s])-?(?:NaN|Infinity)(?=[\],}\s])")
_ENTRY = re.compile(r"`\$\.(images|annotations|categories)\[(\d+)\](?:\.(\w+))?")  # where msgspec found a mistake
_WHOLE = {"images": ("id", "width", "height"), "annotations": ("image_id", "category_id"), "categories": ("id",)}
# What to do about a value, by its key.
_REMEDIES = {
    **dict.fromkeys(("id", "image_id", "category_id"), "ids are whole numbers, without quotes"),
    **dict.fromkeys(("width", "height"), "write the size of the stored picture, in whole pixels"),
    "bbox": "a bbox is [x, y, width, height], four numbers in pixels",
    "file_name": "write the picture's path below the folder of pictures, in quotes",
    "name": "write the name of the class in quotes",
    "iscrowd": "write 0 or 1",
    "area": "write a number of square pixels",
}
_SHORT = 100  # bytes
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
        UserError: if it is not JSON, or not of COCO's form; with the entry that is to blame.
    """
    file = _decode(content[3:] if content.startswith(b"\xef\xbb\xbf") else content, origin)
    del content
    needed = ("images", "annotations", "categories") if labeled else ("images",)
    missing = [key for key in needed if getattr(file, key) is None]
    if missing:
        raise UserError(f"{origin} has no `{'`, `'.join(missing)}`: give a COCO annotation file")
    images, boxes, categories = file.images or [], file.annotations or [], file.categories or []
    if labeled and not categories:
        raise UserError(f"{origin} lists no category: give the classes of its boxes under `categories`")

    def of_image(key: str, *remedy: str) -> np.ndarray:
        values = [getattr(i, key) for i in images]
        return whole_numbers(values, lambda row: f"{origin}: the {key} of image {images[row].file_name!r}", *remedy)

    def of_box(key: str) -> np.ndarray:
        values = [getattr(b, key) for b in boxes]
        return whole_numbers(values, lambda row: f"{origin}: the {key} of `annotations[{row}]`")

    whole_numbers([c.id for c in categories], lambda row: f"{origin}: the id of category {categories[row].name!r}")
    return RawAnnotations(
        origin,
        of_image("id"),
        [i.file_name for i in images],
        np.stack([of_image(key, _REMEDIES[key]) for key in ("height", "width")], 1),
        [(c.id, c.name) for c in categories],
        of_box("image_id"),
        of_box("category_id"),
        _floats(list(chain.from_iterable([b.bbox for b in boxes]))).reshape(-1, 4),
        np.fromiter([b.iscrowd for b in boxes], np.bool_),
        _floats([b.area for b in boxes]),
    )


def _decode(content: bytes | bytearray, origin: str) -> _File:
    if len(content) < _SHORT and not content.strip():
        raise UserError(f"{origin} is empty and cannot be read as JSON: give a complete COCO annotation file")
    try:
        return msgspec.json.decode(content, type=_File)
    except msgspec.ValidationError as error:
        return _decode_leniently(content, origin, error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Python's json module writes NaN and Infinity, which JSON does not know; read as null, such boxes are counted.
        plain = _NOT_JSON_NUMBERS.sub(b"null", content)
        if plain != content:
            return _decode(plain, origin)
        raise UserError(f"{origin} cannot be read as JSON ({error}): give a complete COCO annotation file") from error


def _decode_leniently(content: bytes | bytearray, origin: str, error: msgspec.ValidationError) -> _File:
    """The same by way of plain objects, which is slow: whole numbers may be written as 3.0, and mistakes are named."""
    try:
        plain = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(_complaint(None, origin, error)) from error
    for part, keys in _WHOLE.items():
        entries = plain.get(part) if isinstance(plain, dict) else None
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                entry |= {k: int(v) for k in keys if isinstance(v := entry.get(k), float) and v.is_integer()}
    try:
        return msgspec.convert(plain, _File)
    except msgspec.ValidationError as remaining:
        raise UserError(_complaint(plain, origin, remaining)) from remaining


def _complaint(plain: Any, origin: str, error: msgspec.ValidationError) -> str:
    """One sentence about an entry that is not of COCO's form: which it is, what is wrong, what it should be."""
    match = _ENTRY.search(str(error))
    key = (match[3] or next(iter(re.findall(r"required field `(\w+)`", str(error))), "")) if match else ""
    entry = _entry(plain, match[1], int(match[2])) if match else ""
    if isinstance(plain, list):
        entry = "; a list, perhaps of detections"
    remedy = _REMEDIES.get(key, "correct that entry" if match else "give a JSON object with images and annotations")
    return f"{origin} is not a COCO annotation file ({error}{entry}): {remedy}"


def _entry(plain: Any, part: str, row: int) -> str:
    """`; image cat.jpg`, as far as the entry itself says so."""
    try:
        entry = plain[part][row]
    except (TypeError, KeyError, IndexError):
        return ""
    if not isinstance(entry, dict):
        return ""
    keys = {"images": ("file_name", "id"), "annotations": ("id", "image_id"), "categories": ("name", "id")}[part]
    return "".join(f"; {key} {ascii(entry[key])[:80]}" for key in keys if key in entry)


def _floats(values: list[_Number]) -> np.ndarray:
    """float64; None becomes NaN."""
    try:
        return np.fromiter(values, np.float64)
    except TypeError:
        return np.array(values, np.float64)
