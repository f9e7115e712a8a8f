"""From what an annotation file says to arrays that can be trusted: checked, repaired where safe, and counted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.core.console import counted
from harness.core.types import UserError

_LOOKED_AT = 100  # rows, for examples that differ
_EXAMPLES = 5  # shown of each finding
_TABLE = 1 << 22  # largest range of ids that is looked up in a table
_ROUNDING = 1e-3  # px by which a box may leave its image without being called outside
_FARTHEST = 1e9  # px; coordinates beyond this are no place in a picture
_LARGEST_AREA = 1e10  # px; the evaluation counts no box with a larger one, nor with a negative one
_LARGEST_ID = 2**53 - 1  # pycocotools takes detections as float64, which cannot tell larger whole numbers apart
_UNPRINTABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # no file has such a name, and no line of a report holds it


@dataclass(frozen=True)
class Finding:
    """Something odd that was found, and what was done about it."""

    what: str
    count: int
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join((*self.examples, "...") if self.count > len(self.examples) else self.examples)
        return f"{self.what}: {self.count:,}" + (f" ({shown})" if self.examples else "")


@dataclass
class RawAnnotations:
    """Annotations as a file has them, unchecked. N images, M boxes."""

    origin: str  # the file, for messages
    image_ids: np.ndarray  # (N,) int64
    file_names: list[str]
    sizes: np.ndarray  # (N, 2) int64 (height, width)
    categories: list[tuple[int, str]]
    box_image_ids: np.ndarray  # (M,) int64
    box_category_ids: np.ndarray  # (M,) int64
    xywh: np.ndarray  # (M, 4) float64
    crowd: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float64, NaN where the file gives none
    unlisted: dict[int, str] = field(default_factory=dict)  # names of other categories that boxes may have


@dataclass
class CleanAnnotations:
    """The same, checked: boxes grouped by image, in the file's order of images and, within one, of boxes."""

    image_ids: np.ndarray  # (N,) int64
    file_names: list[str]
    sizes: np.ndarray  # (N, 2) int64 (height, width)
    boxes: np.ndarray  # (M, 4) float32 xyxy, clipped to the image
    xywh: np.ndarray  # (M, 4) float64 as in the file, for the evaluation
    labels: np.ndarray  # (M,) int64 in 1..C
    crowd: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float32
    offsets: np.ndarray  # (N + 1,) int64
    category_ids: np.ndarray  # (C,) int64, ascending
    category_names: list[str]
    findings: tuple[Finding, ...]


def finding(what: str, where: np.ndarray, describe: Callable[[int], str]) -> list[Finding]:
    """A finding about the rows where the mask `where` holds, with some that differ; nothing if there is none."""
    rows = np.flatnonzero(where)
    examples = dict.fromkeys(describe(int(i)) for i in rows[:_LOOKED_AT])
    return [Finding(what, len(rows), tuple(examples)[:_EXAMPLES])] if len(rows) else []


def clean(raw: RawAnnotations) -> CleanAnnotations:
    """Checks annotations, drops boxes that cannot be used and clips those that leave their image.

    Raises:
        UserError: for what would make training or evaluation meaningless: no image, duplicate image ids, file names or
            category ids, ids that the evaluation cannot tell apart, images without a size or a usable name.
    """
    _check_names(raw)
    _check_images(raw)
    category_ids, category_names, findings = _categories(raw)
    image_rows = positions(raw.image_ids, raw.box_image_ids)
    category_rows = positions(category_ids, raw.box_category_ids)
    names = raw.file_names

    def describe(row: int) -> str:
        box = ", ".join(f"{v:g}" for v in raw.xywh[row])
        image = names[image_rows[row]] if image_rows[row] >= 0 else f"image {raw.box_image_ids[row]}"
        return f"{image} [{box}]"

    keep = np.ones(len(raw.xywh), bool)

    def drop(where: np.ndarray, what: str, show: Callable[[int], str] = describe) -> None:
        findings.extend(finding(what, where & keep, show))
        keep[where] = False

    drop(image_rows < 0, "boxes of an image that is not listed, dropped", lambda i: f"image {raw.box_image_ids[i]}")
    drop(
        category_rows < 0,
        "boxes of a category that is not listed, dropped",
        lambda i: raw.unlisted.get(int(raw.box_category_ids[i]), f"category {raw.box_category_ids[i]}"),
    )
    x, y, w, h = np.ascontiguousarray(raw.xywh.T)  # columns: short rows are what NumPy is slowest at
    with np.errstate(invalid="ignore", over="ignore"):
        drop(~np.isfinite(x + y + w + h), "boxes with NaN or infinite coordinates, dropped")
        largest = np.maximum(np.maximum(np.abs(x), np.abs(y)), np.maximum(w, h))
        drop(largest > _FARTHEST, "boxes with coordinates beyond a billion px, dropped")
    drop((w <= 0) | (h <= 0), "boxes of zero or negative width or height, dropped")
    height, width = (side[np.maximum(image_rows, 0)] for side in raw.sizes.T.astype(np.float64))
    with np.errstate(invalid="ignore"):
        left, right, top, bottom = (
            np.clip(edge, 0, limit).astype(np.float32)
            for edge, limit in ((x, width), (x + w, width), (y, height), (y + h, height))
        )
        drop((right <= left) | (bottom <= top), "boxes wholly outside their image, dropped")
        beyond = (np.minimum(x, y) < -_ROUNDING) | (x + w - width > _ROUNDING) | (y + h - height > _ROUNDING)
    findings += finding("boxes that leave their image, clipped", beyond & keep, describe)

    order = np.flatnonzero(keep)
    order = order[np.argsort(image_rows[order], kind="stable")]
    counts = np.bincount(image_rows[order], minlength=len(raw.image_ids))
    possible = (raw.areas >= 0) & (raw.areas <= _LARGEST_AREA)
    impossible = keep & ~possible & ~np.isnan(raw.areas)
    findings += finding("areas that the evaluation would ignore, taken from the box", impossible, describe)
    with np.errstate(over="ignore", invalid="ignore"):  # of boxes that were dropped
        areas = np.where(possible, raw.areas, w * h)
    return CleanAnnotations(
        raw.image_ids,
        raw.file_names,
        raw.sizes,
        np.stack([left[order], top[order], right[order], bottom[order]], 1),
        np.take(raw.xywh, order, 0),
        category_rows[order] + 1,
        raw.crowd[order],
        areas[order].astype(np.float32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        category_ids,
        category_names,
        tuple(findings),
    )


def positions(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Position of each of `wanted` in `known` (distinct integers in any order); -1 where it is not there."""
    if not len(known):
        return np.full(len(wanted), -1, np.int64)
    low, high = int(known.min()), int(known.max())
    if high - low < _TABLE:  # a table is ten times faster than a search, and COCO's ids fit
        table = np.full(high - low + 1, -1, np.int64)
        table[known - low] = np.arange(len(known))
        return np.where((wanted >= low) & (wanted <= high), table[np.clip(wanted, low, high) - low], -1)
    order = np.argsort(known, kind="stable")
    found = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    rows = order[found]
    return np.where(known[rows] == wanted, rows, -1)


def whole_numbers(values: Sequence[int], describe: Callable[[int], str], remedy: str = "number from 1") -> np.ndarray:
    """(K,) int64 of numbers that float64 can hold too.

    Args:
        values: the numbers.
        describe: what the number in a row is, and where, for the message.
        remedy: what to do about one that is too large.

    Raises:
        UserError: for a number that is too large.
    """
    try:
        array = np.fromiter(values, np.int64, len(values))
        if not ((array > _LARGEST_ID) | (array < -_LARGEST_ID)).any():
            return array
    except OverflowError:
        pass
    row = next(row for row, value in enumerate(values) if abs(value) > _LARGEST_ID)
    raise UserError(
        f"{describe(row)} is {values[row]}, beyond 2**53, where the evaluation cannot tell numbers apart: {remedy}"
    )


def _check_images(raw: RawAnnotations) -> None:
    if not len(raw.image_ids):
        raise UserError(f"{raw.origin} lists no image: give an annotation file with images")
    repeated = _repeated(raw.image_ids.tolist())
    if repeated:
        raise UserError(f"{raw.origin} gives {_count(repeated, 'image id')} more than once: number the images apart")
    empty = (raw.sizes <= 0).any(1)
    if empty.any():
        row = int(np.flatnonzero(empty)[0])
        raise UserError(
            f"{raw.origin} gives {counted(int(empty.sum()), 'image')} a width or height that is not positive, first "
            f"{raw.file_names[row]}: write the size of the stored picture"
        )


def _check_names(raw: RawAnnotations) -> None:
    """Checks file names and class names, all at once; the one to blame is looked for only if there is one."""
    names, classes = raw.file_names, [name for _, name in raw.categories]
    joined = "/".join(names)
    if not all(names) or _UNPRINTABLE.search(joined):
        row = next(row for row, name in enumerate(names) if not name or _UNPRINTABLE.search(name))
        raise UserError(
            f"{raw.origin} gives image {raw.image_ids[row]} the file name {names[row]!a}, which no picture can "
            "have: write its path below the folder of pictures"
        )
    if not all(classes) or _UNPRINTABLE.search("".join(classes)):
        number, name = next(c for c in raw.categories if not c[1] or _UNPRINTABLE.search(c[1]))
        raise UserError(f"{raw.origin} gives category {number} the name {name!a}: give it one that can be printed")
    if "./" in joined or "//" in joined:  # perhaps two ways to write one path
        names = [os.path.normpath(name) for name in names]
    repeated = _repeated(names)
    if repeated:
        raise UserError(f"{raw.origin} lists {_count(repeated, 'file name')} more than once: list every picture once")


def _categories(raw: RawAnnotations) -> tuple[np.ndarray, list[str], list[Finding]]:
    """Ids ascending, so that the order in the file does not matter, and names, distinct."""
    ordered = sorted(raw.categories)
    repeated = _repeated([i for i, _ in ordered])
    if repeated:
        raise UserError(
            f"{raw.origin} gives {_count(repeated, 'category id')} more than once: number the classes apart"
        )
    shared = _repeated([name for _, name in ordered])
    names = [f"{name} (id {i})" if name in shared else name for i, name in ordered]
    found = [Finding("names that several classes have, told apart by id", len(shared), tuple(shared[:_EXAMPLES]))]
    return np.array([i for i, _ in ordered], np.int64), names, found if shared else []


def _repeated(values: Sequence[int] | Sequence[str]) -> list[str]:
    """Each value that stands in the list more than once, in order of its second appearance."""
    if len(set(values)) == len(values):
        return []
    seen: set[int | str] = set()
    found: dict[int | str, None] = {}
    for value in values:
        if value in seen:
            found[value] = None
        seen.add(value)
    return [str(value) for value in found]


def _count(values: list[str], noun: str) -> str:
    """`1 image id (5)` or `3 image ids (5, 7, 9)`."""
    shown = ", ".join(values[:_EXAMPLES]) + (", ..." if len(values) > _EXAMPLES else "")
    return f"{len(values)} {noun}{'s' if len(values) > 1 else ''} ({shown})"
