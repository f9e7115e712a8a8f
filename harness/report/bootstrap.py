"""Chance from the evaluation images: what a score would have been had other images been drawn.

A paired bootstrap (Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapters 13 and 16): every resample
draws as many images as there are, with replacement, and all runs are scored on the same drawn images, so that hard and
easy images cancel in differences. AP is computed anew on every resample as pycocotools would, images counted as often
as they were drawn (`harness.engine.accumulate`).

AP of a resample is too high: copied images bring fewer different wrong boxes, and rare classes are found whole or are
not there. With 250 images and 10 classes that was 0.7 AP. In differences nearly all of it cancels, and what is left is
taken off by moving the draws to the measured difference. Therefore there are intervals of differences here, and none of
a score alone.

What it says: whether a difference between these trained networks could come from which images they were evaluated on.
What it does not say: whether it would come back with other labelled images or another seed; for that there are
`harness.report.statistics.paired` and several folds. One run of each method is enough for this interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.core.draws import image_keys, uniform
from harness.core.types import UserError
from harness.engine.accumulate import accumulate
from harness.engine.matches import Matches

_CHUNK = 100  # resamples at a time, so that 5,000 images and 80 classes need a few MB


@dataclass(frozen=True)
class Resampled:
    """A run's scores on its evaluation images and on B resamples of them, in 0..100, NaN where no object counts."""

    image_ids: np.ndarray  # (I,) the images that were resampled
    seed: int
    point: Mapping[str, float]  # name as in `harness.engine.accumulate.METRICS` -> the score on the images themselves
    draws: Mapping[str, np.ndarray]  # name -> (B,)
    class_point: np.ndarray  # (K,) AP of each class
    class_draws: np.ndarray  # (B, K)


@dataclass(frozen=True)
class ImageInterval:
    """A difference and the interval that resampling the evaluation images gives."""

    value: float
    low: float
    high: float
    level: float
    resamples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def image_weights(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """(resamples, images) int32: how often each image is drawn; rows sum to `images`. Equal for equal arguments."""
    weights = np.empty((resamples, images), np.int32)
    for b in range(resamples):
        drawn = uniform(image_keys(seed, 0, [b]), images, "evaluation images")[0] * images
        weights[b] = np.bincount(drawn.astype(np.int64), minlength=images)
    return weights


def resample(matches: Matches, resamples: int = 1000, seed: int = 0) -> Resampled:
    """Scores a run on resamples of its evaluation images; of equal images, count and seed, all runs see the same ones.

    Args:
        matches: of the run's evaluation.
        resamples: B.
        seed: of the draws.
    """
    exact = accumulate(matches)
    weights = image_weights(len(matches.image_ids), resamples, seed)
    draws: dict[str, list[np.ndarray]] = {}
    classes = []
    for start in range(0, resamples, _CHUNK):
        part = accumulate(matches, weights[start : start + _CHUNK])
        for name, values in part.metrics().items():
            draws.setdefault(name, []).append(values)
        classes.append(part.per_class()["ap"])
    return Resampled(
        matches.image_ids,
        seed,
        {name: float(values[0]) for name, values in exact.metrics().items()},
        {name: np.concatenate(parts) for name, parts in draws.items()},
        exact.per_class()["ap"][0],
        np.concatenate(classes),
    )


def average(runs: Sequence[Resampled]) -> Resampled:
    """The mean over runs, draw by draw: a method's mean score, as chance in the evaluation images alone moves it.

    Raises:
        UserError: if the runs were not evaluated on the same images.
    """
    for other in runs[1:]:
        check_same_images(runs[0], other)
    return Resampled(
        runs[0].image_ids,
        runs[0].seed,
        {name: float(np.mean([run.point[name] for run in runs])) for name in runs[0].point},
        {name: np.mean([run.draws[name] for run in runs], axis=0) for name in runs[0].draws},
        np.mean([run.class_point for run in runs], axis=0),
        np.mean([run.class_draws for run in runs], axis=0),
    )


def difference(first: Resampled, second: Resampled, metric: str = "ap", level: float = 0.95) -> ImageInterval | None:
    """`first` minus `second` on the same images, with its centred percentile interval; None where no object counts.

    Raises:
        UserError: if the two were not evaluated on the same images.
    """
    check_same_images(first, second)
    return interval(first.point[metric] - second.point[metric], first.draws[metric] - second.draws[metric], level)


def class_differences(first: Resampled, second: Resampled, level: float = 0.95) -> list[ImageInterval | None]:
    """`difference` in AP for each class."""
    check_same_images(first, second)
    points, draws = first.class_point - second.class_point, first.class_draws - second.class_draws
    return [interval(float(points[k]), draws[:, k], level) for k in range(len(points))]


def interval(value: float, draws: np.ndarray, level: float) -> ImageInterval | None:
    """The centred percentile interval of a difference: draws from (1 - level) / 2 to (1 + level) / 2, moved by what
    their mean differs from the value, without draws that have no value. None where nothing is left.
    """
    draws = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(draws):
        return None
    low, high = np.quantile(draws - draws.mean() + value, [(1 - level) / 2, (1 + level) / 2])
    return ImageInterval(float(value), float(low), float(high), level, len(draws))


def check_same_images(first: Resampled, second: Resampled) -> None:
    """Refuses runs whose resamples are not the same images.

    Raises:
        UserError: if they are not.
    """
    if not np.array_equal(first.image_ids, second.image_ids):
        raise UserError(
            "two runs cannot be compared image by image, they were evaluated on different images: compare runs of one "
            "data set and evaluation set"
        )
    assert (first.seed, len(first.draws["ap"])) == (second.seed, len(second.draws["ap"])), "other resamples"


def labels_saved_draws(supervised: Sequence[Resampled], method: Resampled, metric: str = "ap") -> np.ndarray:
    """(B, P + 1) for `harness.report.statistics.labels_interval`: the curve's P points and the method, draw by draw.

    As in `interval`, each one's draws are moved to the measured score.

    Args:
        supervised: P runs (or averages over folds), by rising number of labels.
        method: the run (or average) whose AP is to be reached.
        metric: of `harness.engine.accumulate.METRICS`.

    Raises:
        UserError: if they were not evaluated on the same images.
    """
    for point in supervised:
        check_same_images(point, method)
    draws = np.stack([run.draws[metric] for run in [*supervised, method]], axis=1)
    return draws - np.nanmean(draws, axis=0) + [run.point[metric] for run in [*supervised, method]]
