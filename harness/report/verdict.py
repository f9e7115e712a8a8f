"""What a table of results says, in at most four plain sentences made by rules.

The rules, for the smallest label ratio that has a comparison (or the one asked for):

1. *The difference.* A method is "better" than the baseline only if its paired t interval over (fold, seed) pairs lies
   above 0 and its p value after Holm's correction over the table's comparisons is at most 1 - level; "worse" likewise
   below 0. Otherwise no difference is established. Fewer than three pairs, or pairs that all differ by the same, have
   no interval and allow no statement about chance. The sentence counts the methods that are better and gives the
   largest mean difference of them; it never says that this method beats the other ones, which was not tested.
2. *Labels, or images.* If that method is better and its labels saved are known: how many labelled images the baseline
   would need. A saving is spoken of as open where the interval includes the labels that the method used, and where
   there is no interval this is said. In every other case: the interval from resampling the evaluation images of the
   trained networks, which says nothing about other labelled images, and the sentence says so.
3. *Compute.* The difference to the baseline with as many images seen, where such runs exist: what includes 0 may come
   from compute alone. Without such runs, the ratio of compute and that the comparison is missing.
4. *Elsewhere.* What is better or worse at other label ratios, by the first rule, if anything is.

Numbers have one digit after the point, and more where an end of an interval would look like 0 and is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from harness.report.bootstrap import ImageInterval
from harness.report.statistics import NO_SPREAD, LabelsNeeded, Paired


class Standing(Enum):
    """What the runs allow to say about a difference."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "open"  # there is an interval, and no difference is established
    UNKNOWN = "unknown"  # there is no interval


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline at one label ratio; differences are AP, method minus baseline."""

    method: str  # names as shown
    baseline: str
    percent: float
    labels: float  # labelled images that the method used
    over_runs: Paired
    p_holm: float | None = None  # p value of `over_runs` after Holm's correction
    corrected_over: int = 1  # how many comparisons the correction is over
    over_images: ImageInterval | None = None
    labels_needed: LabelsNeeded | None = None  # by the baseline, for the method's AP
    compute: float | None = None  # of the method, as a multiple of the baseline's
    equal_compute: Paired | None = None  # difference to the baseline with as many images seen
    share: str = ""  # how its column is called, where that is no percentage


def standing(one: Comparison) -> Standing:
    """Rule 1."""
    runs = one.over_runs
    if runs.low is None or runs.high is None:
        return Standing.UNKNOWN
    if not runs.excludes_zero or one.p_holm is None or one.p_holm > 1 - runs.level + 1e-12:
        return Standing.OPEN
    return Standing.BETTER if runs.low > 0 else Standing.WORSE


def verdict(comparisons: Sequence[Comparison], percent: float | None = None) -> list[str]:
    """The sentences, none for no comparison.

    Args:
        comparisons: of a table, all against one baseline.
        percent: the label ratio to speak of; default: the smallest that has a comparison.
    """
    known = [one for one in comparisons if one.over_runs.mean is not None]
    if percent is None:
        percent = min((one.percent for one in known), default=None)
    here = [one for one in known if one.percent == percent]
    if not here:
        return []
    by_standing = {kind: [one for one in here if standing(one) is kind] for kind in Standing}
    leaders = by_standing[Standing.BETTER] or by_standing[Standing.OPEN] + by_standing[Standing.WORSE] or here
    best = max(leaders, key=lambda one: one.over_runs.mean or 0.0)
    others = [one for one in known if one.percent != percent]
    sentences = [_difference(best, by_standing, len(here)), _second(best), _compute(best), _elsewhere(others)]
    return [sentence for sentence in sentences if sentence]


def _difference(best: Comparison, by_standing: dict[Standing, list[Comparison]], count: int) -> str:
    where = f"At {_where(best)}, "
    better, unknown = by_standing[Standing.BETTER], by_standing[Standing.UNKNOWN]
    if better and count == 1:
        text = f"{best.method} is better than {best.baseline}, by {_with_interval(best)}"
    elif better:
        verb = "is" if len(better) == 1 else "are"
        text = f"{len(better)} of {count} methods {verb} better than {best.baseline}"
        text += f"; the largest mean difference of them is that of {best.method}, {_with_interval(best)}"
    elif len(unknown) == count:
        text = f"the largest mean difference to {best.baseline} is that of {best.method}, "
        text += f"{_signed(best.over_runs.mean)} AP; {_no_chance(best.over_runs)}"
    else:
        text = f"no gain over {best.baseline} is established"
        text += f"; the largest mean difference is that of {best.method}, {_with_interval(best)}"
    if worse := by_standing[Standing.WORSE]:
        named = ", ".join(f"{one.method} ({_with_interval(one)})" for one in worse if one is not best)
        text += f"; worse than {best.baseline}: {named}" if named else f"; it is worse than {best.baseline}"
    if unknown and len(unknown) < count:
        text += f"; too few runs for a statement: {', '.join(one.method for one in unknown)}"
    return where + text + "."


def _elsewhere(others: Sequence[Comparison]) -> str:
    """What is established in the other columns; empty for nothing."""
    parts = []
    for kind, word in ((Standing.BETTER, "better"), (Standing.WORSE, "worse")):
        named = [f"{one.method} at {_where(one)} ({_with_interval(one)})" for one in others if standing(one) is kind]
        parts += [f"{word} than {others[0].baseline}: {', '.join(named)}"] if named else []
    return f"At other shares of labels, {'; '.join(parts)}." if parts else ""


def _where(one: Comparison) -> str:
    return one.share or f"{one.percent:g} % labels"


def _no_chance(runs: Paired) -> str:
    if runs.note == NO_SPREAD:
        return f"all {runs.n} pairs of runs differ by the same, so there is no statement about chance"
    if runs.n == 1:
        return "one fold and seed: no statement about chance"
    return f"{runs.n} pairs of runs: too few for a statement about chance"


def _second(best: Comparison) -> str:
    if standing(best) is Standing.BETTER and best.labels_needed is not None:
        return _labels(best, best.labels_needed)
    return _images(best.over_images) if best.over_images is not None else ""


def _labels(best: Comparison, needed: LabelsNeeded) -> str:
    used = f"{best.labels:,.0f}"
    text = f"{best.baseline} would need {needed.statement} labelled images for what {best.method} reached with {used}"
    if math.isinf(needed.labels):
        text = f"{best.method} reached with {used} labelled images what {best.baseline} needs {needed.statement} for"
    elif needed.labels == 0.0:
        text = f"{best.baseline} reached with {needed.statement} labelled images what {best.method} did with {used}"
    if needed.low is None or needed.high is None:
        return f"{text}, without an interval ({needed.note or 'none was made'})."
    if needed.low <= best.labels <= needed.high:
        return f"{text}, an interval that includes {used}: whether labels are saved is open."
    return text + "."


def _images(images: ImageInterval) -> str:
    text = f"Resampling the evaluation images gives a {_interval(images.low, images.high, images.level)} for the"
    text += " mean difference of these trained networks"
    if images.excludes_zero:
        text += ", which is beyond the chance of which images were evaluated"
    else:
        text += ", which includes 0"
    return text + "; it says nothing about other labelled images."


def _compute(best: Comparison) -> str:
    equal = best.equal_compute
    if equal is not None and equal.mean is not None:
        text = f"Against {best.baseline} with as many images seen, the mean difference of {best.method} is"
        if equal.low is None or equal.high is None:
            return f"{text} {_signed(equal.mean)} AP; {_no_chance(equal)}."
        text += f" {_signed(equal.mean)} AP ({_interval(equal.low, equal.high, equal.level)}, n = {equal.n}), "
        if equal.low > 0:
            return text + "so compute alone does not explain it."
        if equal.high < 0:
            return text + f"so the same compute did more for {best.baseline}."
        return text + "which includes 0: the difference may come from compute alone."
    if best.compute is None:
        return ""
    text = f"{best.method} took {best.compute:.1f} times the compute of {best.baseline}"
    return f"{text}; there is no run of {best.baseline} with as many images seen to compare it with."


def _with_interval(one: Comparison) -> str:
    runs = one.over_runs
    text = f"{_signed(runs.mean)} AP"
    if runs.low is None or runs.high is None:
        return f"{text} (n = {runs.n})"
    text += f" ({_interval(runs.low, runs.high, runs.level)} over {runs.n} pairs of runs"
    return f"{text}{_p_value(one)})"


def _p_value(one: Comparison) -> str:
    if one.p_holm is None:
        return ""
    p = "p < 0.001" if one.p_holm < 0.001 else f"p = {one.p_holm:.2g}"
    return f", {p} after Holm's correction over {one.corrected_over}" if one.corrected_over > 1 else f", {p}"


def _interval(low: float, high: float, level: float) -> str:
    """95 % interval +1.1 to +5.3."""
    digits = digits_of(low, high)
    return f"{100 * level:g} % interval {_signed(low, digits)} to {_signed(high, digits)}"


def digits_of(low: float, high: float) -> int:
    """How many digits after the point an interval needs, so that neither end looks like 0 and is not."""
    return next((d for d in (1, 2, 3) if all(round(end, d) or not end for end in (low, high))), 4)


def _signed(value: float | None, digits: int = 1) -> str:
    assert value is not None
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
