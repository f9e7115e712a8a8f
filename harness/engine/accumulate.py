"""From matches to AP and AR as pycocotools computes them, with a weight for each image.

An image of weight w counts as if it were w times in the evaluation, one of weight 0 as if it were not there. With
weights of 1 the numbers are pycocotools'. They are also those of pycocotools on a set with copied images (new ids, the
copies of an image next to each other), provided that no image has a right and a wrong box of one class and one score;
there the order of equal scores, which neither defines, decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from harness.engine.matches import SIZES, THRESHOLDS, Matches

METRICS = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar", "ar_s", "ar_m", "ar_l")
_RECALLS = np.linspace(0.0, 1.0, 101)
_SUFFIX = dict(zip(SIZES, ("", "_s", "_m", "_l"), strict=True))


@dataclass(frozen=True)
class Accumulated:
    """AP and AR of B weightings, in 0..1; NaN where no object counts."""

    ap: np.ndarray  # (B, 4 sizes, 10 thresholds, K classes), mean precision at the recalls 0, 0.01 ... 1
    recall: np.ndarray  # (B, 4, 10, K), of at most 100 boxes per image and class

    def metrics(self) -> dict[str, np.ndarray]:
        """Name of METRICS -> (B,) in 0..100, means over the classes that have an object."""
        return {name: _mean(values, -1) for name, values in self.per_class().items()}

    def per_class(self) -> dict[str, np.ndarray]:
        """Name of METRICS -> (B, K) in 0..100, NaN for classes without an object of that size."""
        found = {f"ap{_SUFFIX[size]}": self.ap[:, at].mean(1) for at, size in enumerate(SIZES)}
        found |= {f"ar{_SUFFIX[size]}": self.recall[:, at].mean(1) for at, size in enumerate(SIZES)}
        found |= {"ap50": self.ap[:, 0, 0], "ap75": self.ap[:, 0, 5]}
        return {name: 100.0 * found[name] for name in METRICS}


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class by the names of METRICS, in 0..100; None where no object of that size is."""

    category_id: int
    name: str
    objects: int  # that count at any size
    scores: Mapping[str, float | None]


def accumulate(matches: Matches, weights: np.ndarray | None = None) -> Accumulated:
    """AP and AR at every size, threshold and class.

    Args:
        matches: of an evaluation.
        weights: (B, I) whole numbers >= 0: how often each image counts; default: one row of ones.
    """
    if weights is None:
        weights = np.ones((1, len(matches.image_ids)))
    assert weights.shape[1] == len(matches.image_ids), "one weight for each image"
    shape = (len(weights), len(SIZES), len(THRESHOLDS), len(matches.category_ids))
    ap, recall = np.full(shape, np.nan), np.full(shape, np.nan)
    _accumulate(
        matches.offsets,
        matches.images,
        matches.matched,
        matches.ignored,
        matches.truth_images,
        matches.truth_classes,
        matches.counted,
        np.ascontiguousarray(weights, dtype=np.int32),
        _RECALLS,
        ap,
        recall,
    )
    return Accumulated(ap, recall)


def scores(matches: Matches) -> dict[str, float | None]:
    """The metrics of an evaluation by the names of METRICS, in 0..100; None where no object of that size is."""
    return {name: _number(values[0]) for name, values in accumulate(matches).metrics().items()}


def class_scores(matches: Matches) -> list[ClassScores]:
    """The metrics of every class, in the order of `matches.category_ids`."""
    found = accumulate(matches).per_class()
    objects = np.bincount(matches.truth_classes[matches.counted[0]], minlength=len(matches.category_ids))
    return [
        ClassScores(
            int(matches.category_ids[k]),
            matches.category_names[k],
            int(objects[k]),
            {name: _number(values[0, k]) for name, values in found.items()},
        )
        for k in range(len(matches.category_ids))
    ]


def average_precision(right: np.ndarray, objects: int) -> float:
    """Mean interpolated precision at the recalls 0, 0.01 ... 1, in 0..1; NaN without an object.

    Args:
        right: (N,) bool, whether each box found an object, in falling order of score.
        objects: how many there are to find.
    """
    if not objects:
        return float("nan")
    needed, flags = np.empty(len(_RECALLS), np.int64), right.astype(np.uint16)
    _needed(_RECALLS, objects, needed)
    ones = np.ones(len(flags), np.int32)
    return float(_curve(ones, flags, np.zeros_like(flags), 0, objects, needed, np.empty(len(_RECALLS)))[0])


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is left."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0.0).sum(axis) / there.sum(axis)


@njit(cache=True, nogil=True)
def _needed(recalls: Any, objects: int, needed: Any) -> None:
    """How many objects must be found to reach each recall, judged as found / objects >= recall in float64."""
    for r in range(len(recalls)):
        found = int(recalls[r] * objects)
        while found / objects < recalls[r]:
            found += 1
        needed[r] = found


@njit(cache=True, nogil=True)
def _curve(weight: Any, matched: Any, ignored: Any, bit: int, objects: int, needed: Any, best: Any) -> tuple[Any, Any]:
    """Mean interpolated precision, and recall, of the boxes of a class in falling order of score.

    Precision at a recall is the largest at that recall or beyond, and only a right box can be a largest one; so each of
    them enters the best of the last recall that it reaches, and the maximum runs backwards over the recalls at the end.
    """
    best[:] = 0.0
    right, total, reached = 0, 0, 0
    for d in range(len(weight)):
        if (ignored[d] >> bit) & 1:
            continue
        total += weight[d]
        if (matched[d] >> bit) & 1:
            right += weight[d]
            while reached < len(needed) and right >= needed[reached]:
                reached += 1
            best[reached - 1] = max(best[reached - 1], right / (total + 2.220446049250313e-16))
    largest, area = 0.0, 0.0
    for r in range(len(best) - 1, -1, -1):
        largest = max(largest, best[r])
        area += largest
    return area / len(best), right / objects


@njit(cache=True, nogil=True)
def _accumulate(
    offsets: Any,
    images: Any,
    matched: Any,
    ignored: Any,
    truth_images: Any,
    truth_classes: Any,
    counted: Any,
    weights: Any,
    recalls: Any,
    ap: Any,
    recall: Any,
) -> None:
    _, sizes, thresholds, classes = ap.shape
    longest = np.max(np.diff(offsets))
    needed, best = np.empty(len(recalls), np.int64), np.empty(len(recalls))
    weight = np.empty(longest, np.int32)
    right, left_out = np.empty((sizes, longest), np.uint16), np.empty((sizes, longest), np.uint16)
    for b in range(len(weights)):
        objects = np.zeros((sizes, classes), np.int64)
        for g in range(len(truth_images)):
            for size in range(sizes):
                if counted[size, g]:
                    objects[size, truth_classes[g]] += weights[b, truth_images[g]]
        for k in range(classes):
            n = 0  # the boxes on images that count, close together: a third of a resampled set does not
            for d in range(offsets[k], offsets[k + 1]):
                w = weights[b, images[d]]
                if w:
                    weight[n] = w
                    for size in range(sizes):
                        right[size, n], left_out[size, n] = matched[size, d], ignored[size, d]
                    n += 1
            for size in range(sizes):
                if objects[size, k]:
                    _needed(recalls, objects[size, k], needed)
                    for t in range(thresholds):
                        ap[b, size, t, k], recall[b, size, t, k] = _curve(
                            weight[:n], right[size, :n], left_out[size, :n], t, objects[size, k], needed, best
                        )
