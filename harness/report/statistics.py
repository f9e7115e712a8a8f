"""Chance from the labelled images and the seeds: means, paired differences, labels saved, and who is on the front.

Runs are paired by fold and seed: both methods learnt from the same labelled images. The t interval takes the
differences of the (fold, seed) pairs for independent, which they are not quite: folds of one data set overlap, seeds of
one fold share its labelled images, and all runs are evaluated on the same images. Chance in the evaluation images is
measured apart, in `harness.report.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

Pair = tuple[int, int]  # fold, seed
ENOUGH = 3  # fewer differences give neither interval nor p value
TOO_SMALL = "n too small"
NO_SPREAD = "all differences are equal"


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of n values; None where n is too small for it."""

    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """A mean difference over (fold, seed) pairs; interval and p value are None where `note` says why."""

    mean: float | None
    sd: float | None
    n: int
    low: float | None
    high: float | None
    p: float | None
    level: float
    note: str = ""

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def summarize(values: Sequence[float]) -> Summary:
    """Mean ± sample standard deviation (n - 1 in the denominator)."""
    n = len(values)
    return Summary(
        float(np.mean(values)) if n else None,
        float(np.std(values, ddof=1)) if n > 1 else None,
        n,
    )


def paired(first: Mapping[Pair, float], second: Mapping[Pair, float], level: float = 0.95) -> Paired:
    """`first` minus `second` over the (fold, seed) pairs that both have.

    The interval is mean ± t(n - 1) sd / sqrt(n), the p value the two-sided one of the paired t test (Student, 1908).
    """
    differences = [first[pair] - second[pair] for pair in sorted(first.keys() & second.keys())]
    one = summarize(differences)
    if one.mean is None or one.sd is None or one.n < ENOUGH:
        return Paired(one.mean, one.sd, one.n, None, None, None, level, TOO_SMALL)
    if one.sd <= 1e-9 * max(abs(one.mean), 1.0):  # rounding alone: t would divide by nothing
        return Paired(one.mean, one.sd, one.n, None, None, None, level, NO_SPREAD)
    error = one.sd / math.sqrt(one.n)
    half = float(stats.t.ppf((1 + level) / 2, one.n - 1)) * error
    p = float(2 * stats.t.sf(abs(one.mean) / error, one.n - 1))
    return Paired(one.mean, one.sd, one.n, one.mean - half, one.mean + half, p, level)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction ("A simple sequentially rejective multiple test procedure", 1979).

    Args:
        p_values: of all comparisons of a table; None where a comparison has none. Those count for nothing.

    Returns:
        Adjusted p values in the same order: the i-th smallest of m is multiplied by m - i + 1, and none is smaller than
        that of a smaller p value. To reject where they are below 0.05 makes one wrong rejection in the whole table at
        most 5 % likely.
    """
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, at) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[at] = largest
    return adjusted


# Labels saved


@dataclass(frozen=True)
class LabelsNeeded:
    """How many labelled images supervised training would need for an AP.

    Numbers of images; `math.inf` means more than were measured, 0 means fewer. Low and high are None where no interval
    could be made, and `note` says why.
    """

    labels: float
    low: float | None
    high: float | None
    measured: tuple[float, float]  # the fewest and the most labelled images of the supervised curve
    level: float
    n: int  # (fold, seed) pairs, or resamples of the evaluation images
    note: str = ""

    @property
    def statement(self) -> str:
        """ "46 (44 to 49)", "more than measured (80)", "46 (44 to more than measured)"."""
        first, last = (f"{value:,.0f}" for value in self.measured)
        words = {0.0: f"fewer than measured ({first})", math.inf: f"more than measured ({last})"}
        text = words.get(self.labels, f"{self.labels:,.0f}")
        if self.low is None or self.high is None:
            return text
        if self.low == self.high and self.low in words:
            return text
        ends = {0.0: "fewer than measured", math.inf: "more than measured"}
        low, high = (ends.get(value, f"{value:,.0f}") for value in (self.low, self.high))
        return f"{text} ({low} to {high})" if self.labels not in words else f"{text}; interval {low} to {high}"


def labels_needed(labels: np.ndarray, ap: np.ndarray, target: float) -> float:
    """How many labelled images a curve needs to reach an AP.

    The curve is made monotone by isotonic regression (pool adjacent violators; Barlow et al., 1972) and is linear in
    log(labels) between the points. Where it is flat, the fewest labels that reach the AP count.

    Args:
        labels: (P,) labelled images, ascending.
        ap: (P,) AP there.
        target: the AP to reach.

    Returns:
        Labelled images; 0 below the first point, `math.inf` beyond the last.
    """
    ascends = bool((np.diff(ap) >= 0).all())  # then the regression changes nothing, and most draws are quick
    curve = np.asarray(ap if ascends else optimize.isotonic_regression(ap).x)
    if target < curve[0]:
        return 0.0
    if target > curve[-1]:
        return math.inf
    at = int(np.searchsorted(curve, target, side="left"))  # the first point that reaches it
    if at == 0 or curve[at] == target:
        return float(labels[at])
    share = (target - curve[at - 1]) / (curve[at] - curve[at - 1])
    start, end = math.log(labels[at - 1]), math.log(labels[at])
    return math.exp(start + share * (end - start))


def labels_interval(
    labels: np.ndarray, ap: np.ndarray, target: float, draws: np.ndarray, level: float = 0.95
) -> LabelsNeeded:
    """Labels needed, with the percentile interval over draws of the whole comparison.

    Each draw has its own curve and its own AP to reach, so that what moves both together cancels. Draws that ask for
    more or fewer labels than were measured take part as the largest and the smallest.

    Args:
        labels: (P,) labelled images, ascending.
        ap: (P,) the supervised AP there.
        target: the AP that the method reached.
        draws: (B, P + 1) draws of the P supervised APs and, last, of the method's: from `harness.report.bootstrap` for
            chance in the evaluation images, from `t_draws` for chance in the labelled images.
        level: of the interval.
    """
    draws = draws[~np.isnan(draws).any(1)]
    found = np.sort([labels_needed(labels, row[:-1], row[-1]) for row in draws])
    last = len(found) - 1  # order statistics, outward: infinite ones cannot be averaged; less what rounding adds
    low = found[math.floor((1 - level) / 2 * last + 1e-9)]
    high = found[math.ceil((1 + level) / 2 * last - 1e-9)]
    span = (float(labels[0]), float(labels[-1]))
    return LabelsNeeded(labels_needed(labels, ap, target), float(low), float(high), span, level, len(draws))


def labels_saved(
    labels: Sequence[float],
    supervised: Sequence[Mapping[Pair, float]],
    method: Mapping[Pair, float],
    level: float = 0.95,
    draws: int = 2000,
) -> LabelsNeeded:
    """How many labelled images supervised training would need for what a method reached, from runs of several folds.

    The point is made from means over the (fold, seed) pairs that the method and every ratio of the supervised curve
    have; where there is none such, from the means of what each has. The interval is `labels_interval` over `t_draws`,
    so it rests on the same assumption as the paired t interval; with fewer than three common pairs there is none.

    Args:
        labels: (P,) labelled images of each ratio of the supervised curve, ascending.
        supervised: P mappings (fold, seed) -> AP.
        method: (fold, seed) -> AP of the method at its ratio.
        level: of the interval.
        draws: how many draws make it.
    """
    counts = np.asarray(labels, np.float64)
    assert len(counts) == len(supervised), "one point of the curve for each number of labels"
    assert (np.diff(counts) > 0).all(), "labels ascend"
    pairs = sorted(set(method).intersection(*supervised))
    span = (float(counts[0]), float(counts[-1]))
    if len(pairs) < ENOUGH:
        used = pairs or None
        means = np.array([_mean(point, used) for point in supervised])
        needed = labels_needed(counts, means, _mean(method, used))
        return LabelsNeeded(needed, None, None, span, level, len(pairs), TOO_SMALL)
    observed = np.array([[*(point[pair] for point in supervised), method[pair]] for pair in pairs])
    means = observed.mean(0)
    found = labels_interval(counts, means[:-1], float(means[-1]), t_draws(observed, draws), level)
    return LabelsNeeded(found.labels, found.low, found.high, span, level, len(pairs))


def _mean(values: Mapping[Pair, float], pairs: Sequence[Pair] | None) -> float:
    return float(np.mean([values[pair] for pair in pairs] if pairs else list(values.values())))


def t_draws(observed: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Draws of a vector of means, from few observations of the vector.

    Multivariate t with n - 1 degrees of freedom about the means, its scale the sample covariance over n; n >= 2. Chosen
    because along every direction it is Student's t: the percentile interval of one entry is its t interval, that of the
    difference of two entries the paired t interval.

    Args:
        observed: (n, P) one row for each (fold, seed) pair.
        draws: B.
        seed: of the draws.

    Returns:
        (B, P) float64, the same for the same arguments.
    """
    n = len(observed)
    generator = np.random.Generator(np.random.PCG64(seed))
    centred = observed - observed.mean(0)
    normal = generator.standard_normal((draws, n)) @ centred / math.sqrt(n * (n - 1))
    scale = np.sqrt(generator.chisquare(n - 1, (draws, 1)) / (n - 1))
    return observed.mean(0) + normal / scale


def pareto_front(cost: Sequence[float | None], ap: Sequence[float | None]) -> list[bool]:
    """Which points no other beats: none is at least as good in AP and in cost, and better in one of them.

    Args:
        cost: compute of each point, in any one unit; less is better. None: unknown, never on the front.
        ap: of each point; more is better.
    """
    points = list(zip(cost, ap, strict=True))
    known = [(c, a) for c, a in points if c is not None and a is not None]
    return [
        c is not None and a is not None and not any(x <= c and y >= a and (x < c or y > a) for x, y in known)
        for c, a in points
    ]
