"""Statistics against numbers worked by hand, scipy's own tests, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.report import statistics
from harness.report.statistics import (
    LabelsNeeded,
    holm,
    labels_interval,
    labels_needed,
    labels_saved,
    paired,
    pareto_front,
    summarize,
    t_draws,
)


def _runs(*values: float) -> dict[tuple[int, int], float]:
    return {(fold, 1): value for fold, value in enumerate(values, 1)}


def test_mean_and_sample_standard_deviation() -> None:
    assert summarize([2.0, 4.0, 9.0]) == statistics.Summary(5.0, pytest.approx(math.sqrt(13)), 3)
    assert summarize([7.0]) == statistics.Summary(7.0, None, 1)
    assert summarize([]) == statistics.Summary(None, None, 0)


def test_paired_difference_worked_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3), t(2) at 97.5 % is 4.302653.
    found = paired(_runs(11, 12, 13, 50), _runs(10, 10, 10))
    assert (found.mean, found.sd, found.n, found.note) == (2.0, 1.0, 3, "")
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    # t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert not found.excludes_zero


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=3, max_size=12), st.sampled_from([0.9, 0.95])
)
def test_paired_agrees_with_scipy(values: list[tuple[int, int]], level: float) -> None:
    a, b = (_runs(*(value / 8 for value in column)) for column in zip(*values, strict=True))
    found = paired(a, b, level)
    if len({x - y for x, y in values}) == 1:
        assert (found.low, found.high, found.p, found.note) == (None, None, None, "all differences are equal")
        return
    test = stats.ttest_rel(list(a.values()), list(b.values()))
    low, high = test.confidence_interval(level)
    assert (found.low, found.high, found.p) == (pytest.approx(low), pytest.approx(high), pytest.approx(test.pvalue))
    assert found.excludes_zero == (low > 0 or high < 0)


def test_two_pairs_are_too_few_and_only_common_pairs_count() -> None:
    found = paired({(1, 1): 5.0, (1, 2): 6.0, (2, 1): 9.0}, {(1, 1): 4.0, (1, 2): 4.0, (3, 1): 0.0})
    assert (found.mean, found.n, found.low, found.high, found.p, found.note) == (
        1.5,
        2,
        None,
        None,
        None,
        "n too small",
    )
    assert not found.excludes_zero
    assert paired({}, {(1, 1): 4.0}).mean is None


def test_holm_worked_by_hand() -> None:
    # Sorted .01, .02, .03, .5: times 4, 3, 2, 1 gives .04, .06, .06, .5.
    assert holm([0.02, None, 0.5, 0.01, 0.03]) == pytest.approx([0.06, None, 0.5, 0.04, 0.06])
    # .01 x 3 = .03; .04 x 2 = .08; .05 x 1 = .05, not below the one before.
    assert holm([0.01, 0.04, 0.05]) == pytest.approx([0.03, 0.08, 0.08])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([None]) == [None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.3))
def test_holm_rejects_as_its_step_down_procedure_says(p_values: list[float], alpha: float) -> None:
    adjusted = [p for p in holm(p_values) if p is not None]
    rejected = 0
    for rank, p in enumerate(sorted(p_values)):
        if p * (len(p_values) - rank) > alpha:
            break
        rejected += 1
    assert sum(p <= alpha for p in adjusted) == rejected
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))


LABELS = np.array([10.0, 20.0, 40.0, 80.0])


def test_labels_needed_worked_by_hand() -> None:
    curve = np.array([20.0, 30.0, 34.0, 44.0])
    assert labels_needed(LABELS, curve, 30.0) == 20.0
    assert labels_needed(LABELS, curve, 25.0) == pytest.approx(10 * math.sqrt(2))  # half way in log labels
    assert labels_needed(LABELS, curve, 31.0) == pytest.approx(20 * 2**0.25)
    assert labels_needed(LABELS, curve, 20.0) == 10.0
    assert labels_needed(LABELS, curve, 19.9) == 0.0
    assert labels_needed(LABELS, curve, 44.0) == 80.0
    assert labels_needed(LABELS, curve, 44.1) == math.inf


def test_a_dip_in_the_curve_is_levelled_and_the_fewest_labels_of_a_level_count() -> None:
    curve = np.array([20.0, 34.0, 30.0, 48.0])  # the middle two become 32
    assert labels_needed(LABELS, curve, 32.0) == 20.0
    assert labels_needed(LABELS, curve, 40.0) == pytest.approx(40 * math.sqrt(2))
    assert labels_needed(LABELS, curve, 33.0) == pytest.approx(40 * 2 ** (1 / 16))


@given(st.lists(st.floats(0, 100), min_size=4, max_size=4), st.floats(0, 100), st.floats(0, 100))
def test_a_higher_ap_never_needs_fewer_labels(curve: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert labels_needed(LABELS, np.array(curve), low) <= labels_needed(LABELS, np.array(curve), high)


def test_the_interval_is_of_the_draws_and_infinite_ones_take_part() -> None:
    curve = np.array([20.0, 30.0, 40.0, 50.0])
    draws = np.array([[*curve, target] for target in np.linspace(30, 51, 101)])
    found = labels_interval(LABELS, curve, 45.0, draws, 0.9)
    assert found.labels == pytest.approx(40 * math.sqrt(2))
    assert found.low == pytest.approx(labels_needed(LABELS, curve, 30 + 0.21 * 5))  # the sixth smallest of 101
    assert found.high == labels_needed(LABELS, curve, 51 - 0.21 * 5)
    wide = labels_interval(LABELS, curve, 45.0, draws, 0.99)
    assert (wide.high, wide.measured) == (math.inf, (10.0, 80.0))
    together = np.array([[*(curve + shift), 45.0 + shift] for shift in np.linspace(-5, 5, 11)])
    found = labels_interval(LABELS, curve, 45.0, together)  # what moves curve and method alike cancels
    assert (found.low, found.high) == (pytest.approx(found.labels), pytest.approx(found.labels))


def test_statements() -> None:
    span = (10.0, 80.0)

    def say(labels: float, low: float | None, high: float | None) -> str:
        return LabelsNeeded(labels, low, high, span, 0.95, 5).statement

    assert say(46.2, 44.4, 48.9) == "46 (44 to 49)"
    assert say(46.2, 0.0, math.inf) == "46 (fewer than measured to more than measured)"
    assert say(46.2, None, None) == "46"
    assert say(math.inf, math.inf, math.inf) == "more than measured (80)"
    assert say(math.inf, 60.0, math.inf) == "more than measured (80); interval 60 to more than measured"
    assert say(0.0, None, None) == "fewer than measured (10)"


def test_labels_saved_over_folds() -> None:
    rng = np.random.default_rng(0)
    levels = np.array([20.0, 30.0, 40.0, 50.0])
    covered = 0
    for _ in range(
        200
    ):  # a method worth 40 sqrt(2) labels; what a fold's images are worth moves curve and method alike
        fold = rng.normal(0, 2, 5)
        curve = [_runs(*(level + fold + rng.normal(0, 0.5, 5))) for level in levels]
        method = _runs(*(45 + fold + rng.normal(0, 0.5, 5)))
        found = labels_saved(LABELS.tolist(), curve, method, draws=400)
        means = np.array([np.mean(list(point.values())) for point in curve])
        assert found.labels == labels_needed(LABELS, means, float(np.mean(list(method.values()))))
        assert found.low is not None
        assert found.high is not None
        assert found.high / found.low < 1.5
        covered += found.low < 40 * math.sqrt(2) < found.high
    assert 0.9 * 200 < covered < 0.99 * 200
    assert found == labels_saved(LABELS.tolist(), curve, method, draws=400)


def test_labels_saved_uses_common_pairs_and_says_when_they_are_too_few() -> None:
    curve = [{(1, 1): 20.0, (2, 1): 90.0}, {(1, 1): 30.0}]
    found = labels_saved([10, 20], curve, {(1, 1): 25.0, (3, 1): 0.0})
    assert found.labels == pytest.approx(10 * math.sqrt(2))
    assert (found.low, found.high, found.n, found.note) == (None, None, 1, "n too small")
    none_common = labels_saved([10, 20], [{(1, 1): 20.0}, {(1, 1): 30.0}], {(3, 1): 30.0})
    assert (none_common.labels, none_common.n) == (20.0, 0)


def test_draws_have_the_marginals_and_the_paired_differences_of_students_t() -> None:
    observed = np.array([[10.0, 14.0, 11.0], [12.0, 15.0, 9.0], [11.0, 17.0, 10.0], [13.0, 16.0, 14.0]])
    draws = t_draws(observed, 200_000)
    for column in range(3):
        low, high = np.quantile(draws[:, column], [0.025, 0.975])
        expected = stats.t.interval(0.95, 3, observed[:, column].mean(), stats.sem(observed[:, column]))
        np.testing.assert_allclose((low, high), expected, atol=0.1)
    low, high = np.quantile(draws[:, 1] - draws[:, 0], [0.025, 0.975])
    expected = stats.ttest_rel(observed[:, 1], observed[:, 0]).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), expected, atol=0.1)
    np.testing.assert_array_equal(draws[:5], t_draws(observed, 200_000)[:5])


def test_pareto_front() -> None:
    cost = [1.0, 2.0, 3.0, 3.0, None, 2.0, 4.0]
    ap = [10.0, 30.0, 25.0, 40.0, 99.0, 30.0, 40.0]
    assert pareto_front(cost, ap) == [True, True, False, True, False, True, False]
    assert pareto_front([1.0], [None]) == [False]
