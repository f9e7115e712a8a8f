"""Pascal VOC's AP at IoU 0.5, in the challenge's two ways.

Everingham et al., "The Pascal visual object classes (VOC) challenge", IJCV 2010, section 4.2, and the development kit's
VOCevaldet.m. The boxes of a class choose in falling order of score over all images. Each looks at the object of its
class and image with the largest IoU, taken or not (of equal IoU the first). If that IoU is at least 0.5, the box is
ignored when the object is difficult, right when the object is still free, and wrong (a duplicate) when it is taken. Any
other box is wrong. Difficult objects are not counted among those to find.

AP of VOC2007: the mean, over recalls 0, 0.1 ... 1, of the largest precision at that recall or beyond. AP since VOC2010:
the area below that largest precision, at every recall. The mean is over the classes that have an object.

The kit counts pixels from 1 and includes a box's last pixel. Boxes here are continuous, [xmin - 1, xmax] in the kit's
numbers (`harness.data.voc`), which gives the same areas and overlaps. Recalls are compared as fractions, so that 3 of
10 is 0.3; with floats, VOCevaldet.m and its copies can miss a recall that is reached exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from harness.data.ground_truth import GroundTruth
from harness.engine.matches import box_iou

IOU = 0.5
_RIGHT, _WRONG, _IGNORED = 1, 0, -1


@dataclass(frozen=True)
class VocScores:
    """AP50 in 0..100 of each class and their mean; None where there is no object to find."""

    ap_11_points: float | None
    ap_all_points: float | None
    class_names: tuple[str, ...]
    class_11_points: tuple[float | None, ...]
    class_all_points: tuple[float | None, ...]
    objects: tuple[int, ...]  # of each class, without the difficult ones


def voc_ap(predictions: np.ndarray, truth: GroundTruth) -> VocScores:
    """VOC's AP of an evaluation.

    Args:
        predictions: (N, 7): image id, x, y, width, height, score, category id. Of equal scores the earlier row
            is first.
        truth: the objects, the difficult ones marked as crowd, as `data.difficult=crowd` reads them.

    Raises:
        UserError: if a prediction is of an image or category that the ground truth does not have.
    """
    images, classes = truth.rows(predictions)
    order = np.lexsort((-predictions[:, 5], classes))
    verdicts = _verdicts(predictions[order, 1:5], classes[order], images[order], truth)
    objects = np.bincount(truth.classes[~truth.crowd], minlength=len(truth.category_ids))
    bounds = np.searchsorted(classes[order], np.arange(len(objects) + 1))
    curves = []
    for k, count in enumerate(objects.tolist()):
        own = verdicts[bounds[k] : bounds[k + 1]]
        curves.append((own[own != _IGNORED] == _RIGHT, count))
    eleven = [eleven_points(right, count) for right, count in curves]
    every = [all_points(right, count) for right, count in curves]
    return VocScores(
        _mean(eleven), _mean(every), tuple(truth.category_names), tuple(eleven), tuple(every), tuple(objects.tolist())
    )


def eleven_points(right: np.ndarray, objects: int) -> float | None:
    """AP of VOC2007 in 0..100.

    Args:
        right: (N,) bool, in falling order of score, ignored boxes left out.
        objects: how many there are to find; without any there is no AP.
    """
    if not objects:
        return None
    found, precision = _precisions(right)
    points = [np.max(precision[10 * found >= point * objects], initial=0.0) for point in range(11)]
    return 100.0 * float(np.mean(points))


def all_points(right: np.ndarray, objects: int) -> float | None:
    """AP since VOC2010 in 0..100; arguments as of `eleven_points`."""
    if not objects:
        return None
    _, precision = _precisions(right)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return 100.0 * float(envelope[right].sum()) / objects


def _precisions(right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) objects found and (N,) precision after each box."""
    found = np.cumsum(right)
    return found, found / np.arange(1, len(right) + 1)


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _verdicts(xywh: np.ndarray, classes: np.ndarray, images: np.ndarray, truth: GroundTruth) -> np.ndarray:
    """(N,) _RIGHT, _WRONG or _IGNORED for boxes in falling order of score within each class."""
    owner = truth.classes * len(truth.image_ids) + truth.images
    by_group = np.argsort(owner, kind="stable")
    group = classes * len(truth.image_ids) + images
    verdicts = np.zeros(len(xywh), np.int64)
    _judge(
        np.ascontiguousarray(xywh),
        np.searchsorted(owner[by_group], group, "left"),
        np.searchsorted(owner[by_group], group, "right"),
        truth.xywh[by_group],
        truth.crowd[by_group],
        verdicts,
    )
    return verdicts


@njit(cache=True, nogil=True)
def _judge(boxes: Any, first: Any, last: Any, objects: Any, difficult: Any, verdicts: Any) -> None:
    """Fills `verdicts`; the objects of box d's class and image are rows first[d]:last[d]."""
    taken = np.zeros(len(objects), np.bool_)
    for d in range(len(boxes)):
        best, chosen = -1.0, -1
        for g in range(first[d], last[d]):
            overlap = box_iou(boxes[d], objects[g], False)
            if overlap > best:
                best, chosen = overlap, g
        if best < IOU:
            verdicts[d] = _WRONG
        elif difficult[chosen]:
            verdicts[d] = _IGNORED
        else:
            verdicts[d] = _WRONG if taken[chosen] else _RIGHT
            taken[chosen] = True
