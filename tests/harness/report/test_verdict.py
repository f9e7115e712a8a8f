"""The verdict: its sentences, and that none says what the numbers do not carry."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.report.bootstrap import ImageInterval
from harness.report.statistics import NO_SPREAD, TOO_SMALL, LabelsNeeded, Paired, holm, paired
from harness.report.verdict import Comparison, Standing, standing, verdict


def _paired(mean: float, half: float, n: int = 5, p: float = 0.01) -> Paired:
    return Paired(mean, half / 2, n, mean - half, mean + half, p, 0.95)


def _single(mean: float, n: int = 1) -> Paired:
    return Paired(mean, None, n, None, None, None, 0.95, TOO_SMALL)


def _comparison(runs: Paired, method: str = "STAC", p_holm: float | None = None) -> Comparison:
    return Comparison(method, "Supervised", 5.0, 40.0, runs, runs.p if p_holm is None else p_holm, 4)


GOOD = replace(
    _comparison(_paired(3.2, 2.1), "Soft Teacher"),
    labels_needed=LabelsNeeded(46.2, 43.8, 48.9, (10, 80), 0.95, 5),
    equal_compute=_paired(2.0, 0.5),
    compute=2.31,
)


def test_a_method_that_is_better() -> None:
    assert verdict([GOOD]) == [
        "At 5 % labels, Soft Teacher is better than Supervised, by +3.2 AP (95 % interval +1.1 to +5.3 over 5 pairs of "
        "runs, p = 0.01 after Holm's correction over 4).",
        "Supervised would need 46 (44 to 49) labelled images for what Soft Teacher reached with 40.",
        "Against Supervised with as many images seen, the mean difference of Soft Teacher is +2.0 AP (95 % interval "
        "+1.5 to +2.5, n = 5), so compute alone does not explain it.",
    ]


def test_several_methods_are_counted_and_not_ranked() -> None:
    others = [_comparison(_paired(1.0, 0.4)), _comparison(_paired(-2.0, 0.5), "Mean Teacher")]
    first = verdict([*others, GOOD, _comparison(_single(9.0), "New")])[0]
    assert first == (
        "At 5 % labels, 2 of 4 methods are better than Supervised; the largest mean difference of them is that of Soft "
        "Teacher, +3.2 AP (95 % interval +1.1 to +5.3 over 5 pairs of runs, p = 0.01 after Holm's correction over 4); "
        "worse than Supervised: Mean Teacher (\N{MINUS SIGN}2.0 AP (95 % interval \N{MINUS SIGN}2.5 to "
        "\N{MINUS SIGN}1.5 over 5 pairs of runs, p = 0.01 after Holm's correction over 4)); "
        "too few runs for a statement: New."
    )


def test_one_fold_gives_no_statement_about_chance_but_the_images_have_one() -> None:
    one = replace(GOOD, over_runs=_single(3.2), p_holm=None, equal_compute=None)
    one = replace(one, over_images=ImageInterval(3.2, 0.04, 5.0, 0.95, 1000))
    assert verdict([one]) == [
        "At 5 % labels, the largest mean difference to Supervised is that of Soft Teacher, +3.2 AP; one fold and seed: "
        "no statement about chance.",
        "Resampling the evaluation images gives a 95 % interval +0.04 to +5.00 for the mean difference of these "
        "trained networks, which is beyond the chance of which images were evaluated; it says nothing about other "
        "labelled images.",
        "Soft Teacher took 2.3 times the compute of Supervised; there is no run of Supervised with as many images seen "
        "to compare it with.",
    ]
    zero = replace(one, over_images=ImageInterval(3.2, -1.0, 5.0, 0.95, 1000))
    assert ", which includes 0; it says nothing" in verdict([zero])[1]


def test_two_folds_and_equal_differences_give_none_either() -> None:
    assert "2 pairs of runs: too few for a statement about chance" in verdict([_comparison(_single(3.2, 2))])[0]
    same = replace(_single(3.2, 4), note=NO_SPREAD)
    assert "all 4 pairs of runs differ by the same" in verdict([_comparison(same)])[0]


def test_nothing_established_and_all_worse() -> None:
    assert verdict([_comparison(_paired(0.6, 1.0), p_holm=0.5)])[0] == (
        "At 5 % labels, no gain over Supervised is established; the largest mean difference is that of STAC, +0.6 AP "
        "(95 % interval \N{MINUS SIGN}0.4 to +1.6 over 5 pairs of runs, p = 0.5 after Holm's correction over 4)."
    )
    assert verdict([_comparison(_paired(-2.0, 0.5))])[0].endswith("; it is worse than Supervised.")


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (LabelsNeeded(46, 38, 60, (10, 80), 0.95, 5), "46 (38 to 60) .* an interval that includes 40: .* is open"),
        (LabelsNeeded(46, None, None, (10, 80), 0.95, 2, TOO_SMALL), r"46 .* without an interval \(n too small\)"),
        (
            LabelsNeeded(math.inf, math.inf, math.inf, (10, 80), 0.95, 5),
            r"with 40 .* needs more than measured \(80\) for",
        ),
        (LabelsNeeded(0.0, 0.0, 0.0, (50, 80), 0.95, 5), r"fewer than measured \(50\)"),
    ],
)
def test_labels(needed: LabelsNeeded, words: str) -> None:
    sentence = verdict([replace(GOOD, labels_needed=needed)])[1]
    assert re.search(words.replace("46 (38 to 60)", r"46 \(38 to 60\)"), sentence)


def test_compute_that_explains_the_difference() -> None:
    assert "may come from compute alone" in verdict([replace(GOOD, equal_compute=_paired(0.2, 0.5))])[2]
    assert "did more for Supervised" in verdict([replace(GOOD, equal_compute=_paired(-2, 0.5))])[2]
    assert "one fold and seed: no statement" in verdict([replace(GOOD, equal_compute=_single(1.0))])[2]


def test_the_smallest_ratio_is_spoken_of_unless_another_is_asked_for() -> None:
    other = replace(GOOD, percent=1.0)
    assert verdict([GOOD, other])[0].startswith("At 1 % labels")
    assert verdict([GOOD, other], 5.0)[0].startswith("At 5 % labels")
    assert verdict([GOOD], 2.0) == verdict([]) == []


_ap = st.integers(-40, 40).map(lambda value: value / 8)


def test_what_is_established_at_other_ratios_is_told() -> None:
    here = replace(_comparison(_paired(1.0, 3.0, p=0.4)), percent=1.0)
    worse = replace(_comparison(_paired(-2.0, 0.5), "Mean Teacher"), percent=10.0)
    open_there = replace(_comparison(_paired(0.5, 1.0, p=0.3), "New"), percent=10.0)
    first, *_, last = verdict([here, GOOD, worse, open_there])
    assert first.startswith("At 1 % labels, no gain over Supervised is established; the largest")
    assert last == (
        "At other shares of labels, better than Supervised: Soft Teacher at 5 % labels (+3.2 AP (95 % interval +1.1 to "
        "+5.3 over 5 pairs of runs, p = 0.01 after Holm's correction over 4)); worse than Supervised: Mean Teacher at "
        "10 % labels (\N{MINUS SIGN}2.0 AP (95 % interval \N{MINUS SIGN}2.5 to \N{MINUS SIGN}1.5 over 5 pairs of "
        "runs, p = 0.01 after Holm's correction over 4))."
    )


@st.composite
def _tables(draw: st.DrawFn) -> list[Comparison]:
    """Comparisons as a report makes them, from random runs."""
    count = draw(st.integers(1, 4))
    runs = [{(n, 1): draw(_ap) for n in range(draw(st.integers(1, 6)))} for _ in range(2 * count)]
    zero = {(n, 1): 0.0 for n in range(6)}
    differences, equal = ([paired(one, zero) for one in part] for part in (runs[:count], runs[count:]))
    table = []
    for n, p in enumerate(holm([one.p for one in differences])):
        ends = sorted((draw(_ap), draw(_ap)))
        images = ImageInterval(sum(ends) / 2, ends[0], ends[1], 0.95, 1000)
        low, labels, high = sorted(draw(st.sampled_from([0.0, 10.0, 39.0, 41.0, 80.0, math.inf])) for _ in range(3))
        needed = LabelsNeeded(labels, low, high, (10, 80), 0.95, 5)
        table.append(
            Comparison(
                f"M{'abcd'[n]}",
                "Base",
                draw(st.sampled_from([1.0, 5.0])),
                40,
                differences[n],
                p,
                count,
                draw(st.sampled_from([images, None])),
                draw(st.sampled_from([needed, replace(needed, low=None, high=None, note=TOO_SMALL), None])),
                draw(st.sampled_from([None, 2.0])),
                draw(st.sampled_from([None, equal[n]])),
            )
        )
    return table


@settings(max_examples=400, deadline=None)
@given(_tables())
def test_no_sentence_says_what_the_numbers_do_not_carry(table: list[Comparison]) -> None:
    elsewhere = [sentence for sentence in verdict(table) if sentence.startswith("At other shares of labels")]
    sentences = [sentence for sentence in verdict(table) if sentence not in elsewhere]
    text = " ".join(sentences)
    percent = min(one.percent for one in table)
    here = [one for one in table if one.percent == percent]

    def established(one: Comparison, sign: int) -> bool:
        ends = (one.over_runs.low, one.over_runs.high)
        apart = None not in ends and all(sign * end > 0 for end in ends if end is not None)
        return apart and one.over_runs.n >= 3 and one.p_holm is not None and one.p_holm <= 0.05

    better, worse = ([one for one in here if established(one, sign)] for sign in (1, -1))
    there = {one.method for one in table if one not in here and (established(one, 1) or established(one, -1))}
    assert there == {one.method for one in table if f"{one.method} at " in " ".join(elsewhere)}
    assert 1 <= len(sentences) <= 3
    assert all(sentence.endswith(".") for sentence in sentences)
    assert text.startswith(f"At {percent:g} % labels")
    assert ("better" in text) == bool(better)
    assert ("worse" in text) == bool(worse)
    if better and len(here) > 1:
        assert f"{len(better)} of {len(here)} methods" in text
    if all(one.over_runs.n < 3 for one in here):
        assert "statement about chance" in text
        assert "interval" not in sentences[0]
    named = [one for one in here if one.method in text]
    if "beyond the chance of which images" in text:
        assert any(one.over_images is not None and one.over_images.excludes_zero for one in named)
    if "compute alone does not explain it" in text:
        assert any(one.equal_compute is not None and (one.equal_compute.low or 0) > 0 for one in named)
    if "labelled images for what" in text:
        assert better
        if "open" not in text and "without an interval" not in text:
            assert any(n.low > 40 or n.high < 40 for one in better if (n := one.labels_needed) and n.low is not None)  # type: ignore[operator]


@settings(max_examples=200, deadline=None)
@given(_tables())
def test_every_signed_number_is_one_of_the_table(table: list[Comparison]) -> None:
    numbers: list[float] = []
    for one in table:
        for found in (one.over_runs, one.equal_compute):
            numbers += [v for v in (found.mean, found.low, found.high) if v is not None] if found else []
        numbers += [one.over_images.low, one.over_images.high] if one.over_images else []
    text = " ".join(verdict(table)).replace("\N{MINUS SIGN}", "-")
    for said in re.findall(r"[+-]\d+\.\d+", text):
        digits = len(said.split(".")[1])
        assert any(abs(float(said) - number) <= 0.5001 * 10**-digits for number in numbers), said
        # An end of an interval that reads as 0 is 0.
    for low, high in re.findall(r"interval ([+-]\d+\.\d+) to ([+-]\d+\.\d+)", text):
        for said in (low, high):
            assert float(said) != 0 or any(abs(number) < 1e-4 for number in numbers)


@settings(max_examples=100, deadline=None)
@given(_tables())
def test_standing_needs_three_pairs_an_interval_beside_zero_and_the_corrected_p(table: list[Comparison]) -> None:
    for one in table:
        if standing(one) in (Standing.BETTER, Standing.WORSE):
            assert one.over_runs.n >= 3
            assert one.over_runs.excludes_zero
            assert one.p_holm is not None
            assert one.p_holm <= 0.05
            assert (one.over_runs.mean or 0) * (1 if standing(one) is Standing.BETTER else -1) > 0
