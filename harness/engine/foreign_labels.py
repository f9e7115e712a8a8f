"""Pseudo labels that somebody else made: a file in COCO's result form, as `ssodbench predict` writes it too."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from detectors.methods.pseudo_labels import confident
from harness.core import boxes as box_ops
from harness.core.types import ImageSource, Target, UserError

logger = logging.getLogger(__name__)

_KEY = "method.offline.labels"
_FORM = '[{"file_name": "a.jpg" or "image_id": 7, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]'


class _Box(msgspec.Struct):
    """An entry of the file."""

    category_id: int
    bbox: tuple[float, float, float, float]  # x, y, width, height in stored pixels
    score: float
    image_id: int | str | None = None  # a text is a file name
    file_name: str | None = None  # goes before image_id, which may be a numbering of the labeller's own


def read_labels(
    file: Path,
    source: ImageSource,
    category_ids: np.ndarray,
    *,
    threshold: float,
    keep_top1: bool = True,
    score_threshold: float = 0.05,
    drop_empty: bool = True,
) -> ImageSource:
    """Unlabelled images with the boxes that a file has for them.

    Args:
        file: a list of boxes. A file name is a picture's name, with as many of its folders as tell it from others.
        source: the unlabelled images; boxes of other images are counted and left out.
        category_ids: (C,) int64, of the dataset: the file goes by these.
        threshold, keep_top1: see `confident`.
        score_threshold: boxes are looked at from above this score on.
        drop_empty: leave out images for which the file has no box above it.

    Raises:
        UserError: the file cannot be read, or has no box for these images.
    """
    entries = _decode(file)
    rows = _Pictures(source, file)
    label_of = {int(number): label for label, number in enumerate(category_ids.tolist(), 1)}
    boxes: dict[int, list[tuple[Sequence[float], int, float]]] = defaultdict(list)
    others = 0
    for place, entry in enumerate(entries):
        if entry.category_id not in label_of:
            raise UserError(
                f"{_KEY}: [{place}].category_id of {file} is {entry.category_id}, which is no category of the data: "
                f"give its ids, {', '.join(map(str, list(label_of)[:10]))}{', ...' if len(label_of) > 10 else ''}"
            )
        if not 0 <= entry.score <= 1:
            raise UserError(f"{_KEY}: [{place}].score of {file} is {entry.score:g}: give scores of 0 to 1")
        row = rows.find(entry, place)
        if row is None:
            others += 1
        elif entry.score > score_threshold:
            boxes[row].append((entry.bbox, label_of[entry.category_id], entry.score))
    if others:
        logger.warning("%s: %s of its %s boxes are of images that are not unlabelled ones", file, others, len(entries))
    if not boxes:
        raise UserError(
            f"{_KEY}: {file} has no box with a score above {score_threshold:g} for any of the {len(source):,} "
            f"unlabelled images, the first of which is {os.path.basename(source.paths[0])} (image_id {source.ids[0]}): "
            "give their file names or image ids"
        )
    kept = sorted(boxes) if drop_empty else list(range(len(source)))
    found = [confident(_target(boxes.get(row, []), source.sizes[row]), threshold, keep_top1) for row in kept]
    return source.select(kept).with_targets(found)


def _decode(file: Path) -> list[_Box]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[_Box])
    except OSError as error:
        raise UserError(f"{_KEY}={file} cannot be read ({error.strerror}): name a file of boxes") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{_KEY}: {file} is no list of boxes ({error}): give {_FORM}") from error


class _Pictures:
    """The unlabelled images by id and by name."""

    def __init__(self, source: ImageSource, file: Path) -> None:
        self._file, self._paths = file, source.paths
        self._by_id = {int(number): row for row, number in enumerate(source.ids)}
        self._by_name: Mapping[str, list[int]] = defaultdict(list)
        for row, path in enumerate(source.paths):
            self._by_name[os.path.basename(path)].append(row)

    def find(self, entry: _Box, place: int) -> int | None:
        """The row of the image that an entry names; None for an image that is not there."""
        name = entry.file_name if entry.file_name is not None else entry.image_id
        if name is None:
            raise UserError(f"{_KEY}: [{place}] of {self._file} names no picture: give file_name or image_id")
        if isinstance(name, int):
            return self._by_id.get(name)
        tail = "/" + os.path.normpath(name).lstrip("/")
        rows = [row for row in self._by_name.get(os.path.basename(tail), []) if self._paths[row].endswith(tail)]
        if len(rows) > 1:
            raise UserError(
                f"{_KEY}: [{place}].file_name of {self._file} is {name}, which names {len(rows)} pictures, first "
                f"{self._paths[rows[0]]} and {self._paths[rows[1]]}: give their folders too"
            )
        return rows[0] if rows else None


def _target(found: list[tuple[Sequence[float], int, float]], size: np.ndarray) -> Target:
    """Boxes of one image as xyxy, cut at its borders, the surest first; those that are empty then are left out."""
    found = sorted(found, key=lambda one: -one[2])
    xywh = torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4)
    xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    boxes = box_ops.clip_boxes(xyxy[None], torch.from_numpy(size)[None])[0]
    labels = torch.tensor([label for _, label, _ in found], dtype=torch.int64)
    scores = torch.tensor([score for _, _, score in found], dtype=torch.float32)
    return Target(boxes, labels, scores)[box_ops.is_large_enough(boxes)]
