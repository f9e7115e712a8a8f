"""Errors by kind at IoU 0.5, as TIDE defines them.

Bolya, Foley, Hays and Hoffman, "TIDE: A general toolbox for identifying object detection errors", ECCV 2020, arXiv
2008.08115, section 2.2. Within an image boxes choose in falling order of score (at most 100 of all classes): each takes
the object of its class of largest IoU that is still free, if that IoU is at least 0.5, and is right. A box that is not,
and of which more than half lies in a crowd of its class, is ignored. Every other box is an error of the first kind that
applies (the order is that of the authors' code, which decides between kinds that overlap in the paper):

  place        its largest IoU with an object of its class is between 0.1 and 0.5, both included
  class        its largest IoU with an object of another class is at least 0.5
  duplicate    its IoU with an object of its class that another box took is at least 0.5
  background   its largest IoU with any object is at most 0.1
  both         what remains: class and place are wrong

  missed       an object that no box took and to which no `place` or `class` error belongs

The paper calls place "localization" and missed "missed GT". Counts grow with every box of a low score that a detector
reports, so the paper weighs a kind by the AP50 that mending it alone would add (section 2.3). A `place` or `class`
error becomes right if its object is free and no box of a higher score would be mended to the same object; else it
vanishes. Errors of the kinds `duplicate`, `background` and `both` vanish. `missed` objects need no longer be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from harness.data.ground_truth import GroundTruth
from harness.engine.accumulate import average_precision
from harness.engine.matches import box_iou

KINDS = ("class", "place", "both", "duplicate", "background", "missed")
CLASS, PLACE, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
RIGHT, IGNORED, LEFT_OUT = -1, -2, -3  # LEFT_OUT: beyond the first MAX_BOXES of an image
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
MAX_BOXES = 100  # of an image, all classes together


@dataclass(frozen=True)
class Errors:
    """What each of N boxes and G objects is, in the order in which they were given."""

    kinds: np.ndarray  # (N,) int64: number in KINDS, or RIGHT, IGNORED, LEFT_OUT
    mends: np.ndarray  # (N,) int64: the object (row of the ground truth) that a mended box would find, -1 for none
    missed: np.ndarray  # (G,) bool


@dataclass(frozen=True)
class ErrorTable:
    """Errors of an evaluation by kind, and by class."""

    ap50: float  # 0..100, mean over the classes that have an object; TIDE's matching, which differs little from COCO's
    right: int
    counts: Mapping[str, int]  # name of KINDS -> how many
    lost: Mapping[str, float]  # name of KINDS -> AP50 that mending this kind alone would add, at least 0
    class_names: tuple[str, ...]
    class_counts: np.ndarray  # (K, 6) int64: of the class that the box says; missed: of the object's class


def error_table(predictions: np.ndarray, truth: GroundTruth) -> ErrorTable:
    """Errors by kind.

    Args:
        predictions: (N, 7): image id, x, y, width, height, score, category id. To count what a user would see, pass
            only those above the score at which boxes are shown.
        truth: the objects.

    Raises:
        UserError: if a prediction is of an image or category that the ground truth does not have.
    """
    errors = classify(predictions, truth)
    _, classes = truth.rows(predictions)
    counts = np.zeros((len(truth.category_ids), len(KINDS)), np.int64)
    wrong = errors.kinds >= 0
    np.add.at(counts, (classes[wrong], errors.kinds[wrong]), 1)
    counts[:, MISSED] = np.bincount(truth.classes[errors.missed], minlength=len(counts))
    ap50 = _ap50(errors, predictions, classes, truth, None)
    return ErrorTable(
        ap50,
        int((errors.kinds == RIGHT).sum()),
        {name: int(counts[:, kind].sum()) for kind, name in enumerate(KINDS)},
        {
            name: max(0.0, _ap50(errors, predictions, classes, truth, kind) - ap50) if len(truth) else 0.0
            for kind, name in enumerate(KINDS)
        },
        tuple(truth.category_names),
        counts,
    )


def classify(predictions: np.ndarray, truth: GroundTruth) -> Errors:
    """The kind of every box, and the missed objects; arguments as of `error_table`."""
    images, classes = truth.rows(predictions)
    order = np.lexsort((-predictions[:, 5], images))
    bounds = np.arange(len(truth.image_ids) + 1)
    kinds, mends = np.empty(len(order), np.int64), np.full(len(order), -1)
    missed = np.zeros(len(truth), bool)
    _classify(
        np.ascontiguousarray(predictions[order, 1:5]),
        classes[order],
        np.searchsorted(images[order], bounds),
        truth.xywh,
        truth.classes,
        truth.crowd,
        np.searchsorted(truth.images, bounds),
        kinds,
        mends,
        missed,
    )
    back = np.argsort(order)
    return Errors(kinds[back], mends[back], missed)


def _ap50(
    errors: Errors, predictions: np.ndarray, classes: np.ndarray, truth: GroundTruth, mended: int | None
) -> float:
    """Mean AP50 over the classes that have an object, in 0..100, one kind of error mended; NaN without any object."""
    keep = (errors.kinds == RIGHT) | ((errors.kinds >= 0) & (errors.kinds != mended))
    right = errors.kinds == RIGHT
    if mended in (CLASS, PLACE):
        found = (errors.kinds == mended) & (errors.mends >= 0)
        keep, right = keep | found, right | found
        classes = np.where(found, truth.classes[errors.mends], classes) if len(truth) else classes
    sought = ~truth.crowd & ~errors.missed if mended == MISSED else ~truth.crowd
    present = np.unique(truth.classes[~truth.crowd])
    objects = np.bincount(truth.classes[sought], minlength=len(truth.category_ids))
    rows = np.flatnonzero(keep)
    rows = rows[np.lexsort((-predictions[rows, 5], classes[rows]))]
    parts = np.searchsorted(classes[rows], [present, present + 1]).T
    values = [average_precision(right[rows[a:b]], objects[k]) for k, (a, b) in zip(present, parts, strict=True)]
    return 100.0 * float(np.mean(np.nan_to_num(values))) if values else float("nan")


@njit(cache=True, nogil=True)
def _take(overlaps: Any, box_classes: Any, object_classes: Any, crowd: Any, kinds: Any, used: Any) -> None:
    """Finds the boxes that are RIGHT and their objects, and the IGNORED ones. Of equal IoU the first object counts."""
    for d in range(len(box_classes)):
        best, chosen = 0.0, -1
        in_crowd = False
        for g in range(len(object_classes)):
            if object_classes[g] == box_classes[d]:
                if crowd[g]:
                    in_crowd |= overlaps[d, g] > FOREGROUND_IOU
                elif not used[g] and overlaps[d, g] > best:
                    best, chosen = overlaps[d, g], g
        if best >= FOREGROUND_IOU:
            used[chosen] = True
            kinds[d] = RIGHT
        elif in_crowd:
            kinds[d] = IGNORED


@njit(cache=True, nogil=True)
def _kind(overlaps: Any, box_class: int, object_classes: Any, crowd: Any) -> tuple[int, int]:
    """Kind of a wrong box, and the object it belongs to (-1 but for place and class).

    An object of its class with an IoU of more than 0.5 was taken by another box, or the box would be right.
    """
    same, other, at_same, at_other = 0.0, 0.0, -1, -1
    for g in range(len(object_classes)):
        if crowd[g]:
            continue
        overlap = overlaps[g]
        if object_classes[g] == box_class:
            if overlap > same:
                same, at_same = overlap, g
        elif overlap > other:
            other, at_other = overlap, g
    if BACKGROUND_IOU <= same <= FOREGROUND_IOU:
        return PLACE, at_same
    if other >= FOREGROUND_IOU:
        return CLASS, at_other
    if same > FOREGROUND_IOU:
        return DUPLICATE, -1
    return (BACKGROUND if max(same, other) <= BACKGROUND_IOU else BOTH), -1


@njit(cache=True, nogil=True)
def _classify(
    boxes: Any,
    box_classes: Any,
    box_offsets: Any,
    objects: Any,
    object_classes: Any,
    crowd: Any,
    object_offsets: Any,
    kinds: Any,
    mends: Any,
    missed: Any,
) -> None:
    """Fills `kinds`, `mends` and `missed`; boxes of image i are rows box_offsets[i]:box_offsets[i + 1], by score."""
    for i in range(len(box_offsets) - 1):
        a, b = box_offsets[i], min(box_offsets[i + 1], box_offsets[i] + MAX_BOXES)
        low, high = object_offsets[i], object_offsets[i + 1]
        kinds[b : box_offsets[i + 1]] = LEFT_OUT
        kinds[a:b] = BOTH
        own, crowds = object_classes[low:high], crowd[low:high]
        overlaps = np.empty((b - a, high - low))
        for d in range(b - a):
            for g in range(high - low):
                overlaps[d, g] = box_iou(boxes[a + d], objects[low + g], crowds[g])
        used, usable = np.zeros(high - low, np.bool_), np.zeros(high - low, np.bool_)
        _take(overlaps, box_classes[a:b], own, crowds, kinds[a:b], used)
        for d in range(b - a):
            if kinds[a + d] == BOTH:
                kinds[a + d], at = _kind(overlaps[d], box_classes[a + d], own, crowds)
                if at >= 0 and not used[at]:
                    if not usable[at]:
                        mends[a + d] = low + at
                    usable[at] = True
        for g in range(high - low):
            missed[low + g] = not (crowds[g] or used[g] or usable[g])
