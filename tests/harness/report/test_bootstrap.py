"""The bootstrap over evaluation images: against pycocotools on the drawn images, and its properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.core.types import UserError
from harness.data.ground_truth import from_coco
from harness.engine.matches import Matches, match
from harness.report.bootstrap import (
    average,
    class_differences,
    difference,
    image_weights,
    interval,
    labels_saved_draws,
    resample,
)
from harness.report.statistics import labels_interval
from tests.harness.engine.evaluations import pycocotools, random_predictions, random_truth, replicated


def _runs(seed: int = 0, images: int = 30) -> tuple[Matches, Matches]:
    """Two detectors on the same images; the second one places its boxes worse."""
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images)
    rows = random_predictions(rng, truth)
    worse = rows.copy()
    worse[:, 1:3] += rng.normal(0, 20, (len(rows), 2))
    return match(rows, from_coco(truth)), match(worse, from_coco(truth))


def test_weights_are_draws_with_replacement_and_the_same_every_time() -> None:
    weights = image_weights(40, 3000, seed=5)
    assert (weights.sum(1) == 40).all()
    np.testing.assert_array_equal(weights[:7], image_weights(40, 7, seed=5))
    assert (weights[:7] != image_weights(40, 7, seed=6)).any()
    # Each count is binomial(40, 1/40): mean 1, variance 0.975.
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.1)
    assert weights.var() == pytest.approx(0.975, abs=0.02)
    assert abs(np.corrcoef(weights[:, 0], weights[:, 1])[0, 1] + 1 / 39) < 0.06


def test_differences_are_pycocotools_on_the_drawn_images() -> None:
    rng = np.random.default_rng(1)
    truth = random_truth(rng, 12)
    first, second = random_predictions(rng, truth), random_predictions(rng, truth)
    a, b = (resample(match(rows, from_coco(truth)), 4, seed=3) for rows in (first, second))
    for draw, weights in enumerate(image_weights(12, 4, seed=3)):
        expected = [pycocotools(*replicated(rows, truth, weights)) for rows in (first, second)]
        for place, name in enumerate(("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")):
            stats = [one.stats[place] for one in expected]
            value = 100 * (stats[0] - stats[1]) if stats[0] >= 0 else np.nan  # -1: no object of that size was drawn
            np.testing.assert_allclose(a.draws[name][draw] - b.draws[name][draw], value, atol=1e-9)
        for run, one in zip((a, b), expected, strict=True):
            precision = one.eval["precision"][:, :, :, 0, -1]
            ap = np.where(precision > -1, 100 * precision, np.nan).mean((0, 1))
            np.testing.assert_allclose(run.class_draws[draw], ap, atol=1e-9)


def test_the_interval_holds_the_percentiles_of_the_paired_differences() -> None:
    a, b = (resample(run, 300) for run in _runs())
    found = difference(a, b)
    assert found is not None
    assert found.value == a.point["ap"] - b.point["ap"]
    draws = np.sort(a.draws["ap"] - b.draws["ap"])
    draws += found.value - draws.mean()
    assert (draws < found.low).sum() == 8  # 2.5 % of 300, between the eighth and the ninth
    assert (draws > found.high).sum() == 8
    assert found.excludes_zero
    unpaired = np.sqrt(a.draws["ap"].var() + b.draws["ap"].var())
    assert draws.std() < unpaired  # the same images are hard for both


def test_a_run_against_itself_differs_by_nothing() -> None:
    a = resample(_runs()[0], 50)
    found = difference(a, a)
    assert found is not None
    assert (found.value, found.low, found.high, found.excludes_zero) == (0, 0, 0, False)


def test_classes_and_averages() -> None:
    a, b = (resample(run, 60) for run in _runs())
    for k, one in enumerate(class_differences(a, b)):
        assert one is not None
        assert one.value == pytest.approx(a.class_point[k] - b.class_point[k])
        assert one.low <= one.high
    both = average([a, b])
    assert both.point["ap"] == pytest.approx((a.point["ap"] + b.point["ap"]) / 2)
    np.testing.assert_allclose(both.draws["ap"], (a.draws["ap"] + b.draws["ap"]) / 2)
    found, other = difference(both, b), difference(a, b)
    assert found is not None
    assert other is not None
    assert (found.low, found.high) == (pytest.approx(other.low / 2), pytest.approx(other.high / 2))


def test_what_has_no_object_has_no_interval() -> None:
    assert interval(float("nan"), np.array([1.0]), 0.95) is None
    assert interval(1.0, np.array([np.nan]), 0.95) is None
    found = interval(1.0, np.array([np.nan, 2.0, 4.0]), 1.0)
    assert found is not None
    assert (found.low, found.high, found.resamples) == (0.0, 2.0, 2)  # 2 and 4, moved to have the mean 1


def test_runs_on_other_images_are_refused() -> None:
    a = resample(_runs()[0], 5)
    other = replace(a, image_ids=a.image_ids + 1)
    for call in (lambda: difference(a, other), lambda: average([a, other]), lambda: labels_saved_draws([a], other)):
        with pytest.raises(UserError, match="different images"):
            call()


def test_draws_make_an_interval_of_labels_saved() -> None:
    better, worse = (resample(run, 200) for run in _runs())
    labels = np.array([10.0, 40.0])
    draws = labels_saved_draws([worse, better], average([worse, better]))
    assert draws.shape == (200, 3)
    middle = (worse.point["ap"] + better.point["ap"]) / 2
    found = labels_interval(labels, np.array([worse.point["ap"], better.point["ap"]]), middle, draws)
    assert found.labels == pytest.approx(20)  # half way, in every draw
    assert (found.low, found.high) == (pytest.approx(20), pytest.approx(20))
