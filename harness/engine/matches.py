"""Which boxes of an evaluation found an object: what AP is made of, image by image, small enough to keep.

The rules are those of pycocotools' `COCOeval.evaluateImg` (and so of COCO's server): within an image and class the
boxes choose in falling order of score; each takes the object of largest IoU that is still free, objects that are not
counted (crowds, sizes outside the range) only when no counted one is left; of equal IoU the later object. At most 100
boxes per image and class take part. A box is ignored if it took an object that is not counted, or if it took none and
its own area lies outside the range. Numbers are float64 and computed in the order of pycocotools' C code.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from harness.core.files import write_atomically
from harness.core.types import UserError
from harness.data.ground_truth import GroundTruth

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU; the same floats as pycocotools'
SIZES = ("all", "small", "medium", "large")
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]], np.float64)  # px^2, both ends included
MAX_BOXES = 100  # of an image and class
_FORMAT = 1


@dataclass(frozen=True)
class Matches:
    """D boxes against G objects on I images of K classes, at each of the SIZES and THRESHOLDS.

    Boxes lie by class, then falling score, then image: row d is of class k for offsets[k] <= d < offsets[k + 1].
    Bit t of `matched` and `ignored` is for threshold t: a box is right where it is matched and not ignored, wrong where
    it is neither.
    """

    image_ids: np.ndarray  # (I,) int64, ascending
    category_ids: np.ndarray  # (K,) int64, ascending
    category_names: list[str]
    offsets: np.ndarray  # (K + 1,) int64
    images: np.ndarray  # (D,) int32, row of `image_ids`
    scores: np.ndarray  # (D,) float64
    matched: np.ndarray  # (4, D) uint16, one row for each of SIZES
    ignored: np.ndarray  # (4, D) uint16
    truth_images: np.ndarray  # (G,) int32
    truth_classes: np.ndarray  # (G,) int32, row of `category_ids`
    counted: np.ndarray  # (4, G) bool: the object is one that a detector should find


def match(predictions: np.ndarray, truth: GroundTruth) -> Matches:
    """Compares the boxes of an evaluation with the ground truth.

    Args:
        predictions: (N, 7) float64 as from `harness.engine.evaluate.predictions`: image id, x, y, width, height in
            original pixels, score, category id. In any order; of equal scores within an image the earlier row is first.
        truth: the objects.

    Raises:
        UserError: if a prediction is of an image or category that the ground truth does not have.
    """
    images, classes = truth.rows(predictions)
    order = np.lexsort((-predictions[:, 5], images, classes))
    group = (classes * len(truth.image_ids) + images)[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    order, group = order[rank < MAX_BOXES], group[rank < MAX_BOXES]
    matched, ignored = _match_groups(predictions[order, 1:5], group, truth)

    images, classes, scores = images[order], classes[order], predictions[order, 5]
    ranked = np.lexsort((images, -scores, classes))  # stable: within an image the order stays
    return Matches(
        truth.image_ids,
        truth.category_ids,
        list(truth.category_names),
        np.searchsorted(classes, np.arange(len(truth.category_ids) + 1)),
        images[ranked].astype(np.int32),
        scores[ranked],
        np.ascontiguousarray(matched[:, ranked]),
        np.ascontiguousarray(ignored[:, ranked]),
        truth.images.astype(np.int32),
        truth.classes.astype(np.int32),
        _counted(truth),
    )


def _counted(truth: GroundTruth) -> np.ndarray:
    """(4, G) which objects count at each size."""
    return ~truth.crowd & (truth.areas >= AREAS[:, :1]) & (truth.areas <= AREAS[:, 1:])


def _match_groups(xywh: np.ndarray, group: np.ndarray, truth: GroundTruth) -> tuple[np.ndarray, np.ndarray]:
    """`matched` and `ignored` of boxes that are sorted by `group` (class and image), and in it by falling score."""
    owner = truth.classes * len(truth.image_ids) + truth.images
    by_group = np.argsort(owner, kind="stable")
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    first = np.searchsorted(owner[by_group], group[starts], "left")
    last = np.searchsorted(owner[by_group], group[starts], "right")
    matched = np.zeros((len(AREAS), len(group)), np.uint16)
    ignored = np.zeros_like(matched)
    _match(
        np.ascontiguousarray(xywh),
        np.append(starts, len(group)),
        first,
        last,
        truth.xywh[by_group],
        truth.crowd[by_group],
        np.ascontiguousarray(_counted(truth)[:, by_group]),
        AREAS,
        np.minimum(THRESHOLDS, 1 - 1e-10),
        matched,
        ignored,
    )
    return matched, ignored


@njit(cache=True, nogil=True)
def box_iou(a: Any, b: Any, crowd: bool) -> float:
    """IoU of two boxes (x, y, width, height); for a crowd `b`, the share of `a` that lies in it."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    if width <= 0:
        return 0.0
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if height <= 0:
        return 0.0
    shared = width * height
    return shared / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - shared)


@njit(cache=True, nogil=True)
def _choose(overlaps: Any, order: Any, counted: Any, crowd: Any, taken: Any, threshold: float) -> int:
    """The object that a box takes, of those in `order`, counted ones first; -1 for none."""
    best, chosen = threshold, -1
    for g in order:
        if taken[g] and not crowd[g]:
            continue
        if chosen >= 0 and counted[chosen] and not counted[g]:
            break
        if overlaps[g] >= best:
            best, chosen = overlaps[g], g
    return chosen


@njit(cache=True, nogil=True)
def _match(
    boxes: Any,
    starts: Any,
    first: Any,
    last: Any,
    objects: Any,
    crowd: Any,
    counted: Any,
    areas: Any,
    thresholds: Any,
    matched: Any,
    ignored: Any,
) -> None:
    """Fills `matched` and `ignored` for every group: boxes starts[i]:starts[i + 1], objects first[i]:last[i]."""
    for i in range(len(first)):
        a, b, low, high = starts[i], starts[i + 1], first[i], last[i]
        overlaps = np.empty((b - a, high - low))
        for d in range(b - a):
            for g in range(high - low):
                overlaps[d, g] = box_iou(boxes[a + d], objects[low + g], crowd[low + g])
        for size in range(len(areas)):
            here = counted[size, low:high]
            order = np.concatenate((np.flatnonzero(here), np.flatnonzero(~here)))
            for t in range(len(thresholds)):
                taken, bit = np.zeros(high - low, np.bool_), np.uint16(1 << t)
                for d in range(b - a):
                    chosen = _choose(overlaps[d], order, here, crowd[low:high], taken, thresholds[t])
                    if chosen >= 0:
                        taken[chosen] = True
                        matched[size, a + d] |= bit
                        outside = not here[chosen]
                    else:
                        area = boxes[a + d, 2] * boxes[a + d, 3]
                        outside = area < areas[size, 0] or area > areas[size, 1]
                    if outside:
                        ignored[size, a + d] |= bit


def write_matches(path: Path, matches: Matches) -> None:
    """Writes matches atomically as a compressed .npz; scores that float32 holds are written as such."""
    arrays: dict[str, Any] = {**vars(matches), "format": np.int64(_FORMAT)}
    arrays["category_names"] = np.array(matches.category_names, dtype=np.str_)
    single = matches.scores.astype(np.float32)
    arrays["scores"] = single if np.array_equal(single, matches.scores) else matches.scores
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def read_matches(path: Path) -> Matches:
    """Reads what `write_matches` wrote.

    Raises:
        UserError: the file is missing, damaged, or was written by another version of ssodbench.
    """
    remedy = "evaluate the run again to make it"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = dict(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    if int(arrays.pop("format", -1)) != _FORMAT or set(arrays) != set(Matches.__dataclass_fields__):
        raise UserError(f"{path} was written by another version of ssodbench: {remedy}")
    arrays["category_names"] = arrays["category_names"].tolist()
    arrays["scores"] = arrays["scores"].astype(np.float64)
    return Matches(**arrays)
