"""A report's comparisons from records and matches: against scipy, bootstrap by hand, and worked examples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from harness.core.types import RunRecord
from harness.data.ground_truth import from_coco
from harness.engine.accumulate import scores
from harness.engine.matches import match, read_matches, write_matches
from harness.report import chance, report, resample_cache, tables
from harness.report.bootstrap import Resampled, average, difference, resample
from harness.report.chance import ImageChance
from harness.report.comparison import Analysis, analyse
from harness.report.costs import costs
from harness.report.parts import Part, part_of
from harness.report.text import labels_text, says
from harness.report.verdict import Standing
from tests.harness.engine.evaluations import random_predictions, random_truth
from tests.harness.report.test_report import AP, make

STAC = {"extra_steps": 1000, "batch_labeled": 16, "train_seconds": 720.0}


def _suite(folder: Path, **of_stac: Any) -> None:
    for (method, percent), values in AP.items():
        for fold, ap in enumerate(values, 1):
            changes = {"train_seconds": 360.0, "batch_labeled": 16} | ({**STAC, **of_stac} if method == "stac" else {})
            make(folder, method, percent, fold, ap, **changes)


def _section(folder: Path, problems: list[str] | None = None) -> tables.Section:
    (section,), found = tables.load(folder)
    if problems is not None:
        problems += found
    return section


def _analysis(folder: Path, resamples: int = 0, problems: list[str] | None = None) -> tuple[tables.Section, Analysis]:
    section = _section(folder)
    return section, analyse(section, ImageChance(section, resamples, [] if problems is None else problems), resamples)


def test_interval_and_p_value_are_scipys_paired_t_test(tmp_path: Path) -> None:
    _suite(tmp_path)
    _, analysis = _analysis(tmp_path)
    p_values = []
    for one in analysis.compared:
        percent = int(one.cell.percent)
        expected = stats.ttest_rel(AP["stac", percent], AP["supervised", percent])
        interval = expected.confidence_interval(0.95)
        runs = one.found.over_runs
        assert (runs.low, runs.high, runs.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
        p_values.append(expected.pvalue)
    assert [one.found.corrected_over for one in analysis.compared] == [2, 2]
    smaller, larger = sorted(p_values)
    adjusted = {smaller: min(1, 2 * smaller), larger: max(min(1, 2 * smaller), larger)}
    assert [one.found.p_holm for one in analysis.compared] == pytest.approx([adjusted[p] for p in p_values])


def test_two_folds_give_neither_interval_nor_p(tmp_path: Path) -> None:
    for fold in (1, 2):
        make(tmp_path, "supervised", 1, fold, 20.0)
        make(tmp_path, "stac", 1, fold, 25.0 + fold, images_unlabeled=16000)
    _, analysis = _analysis(tmp_path)
    (one,) = analysis.compared
    assert one.standing is Standing.UNKNOWN
    text = report.run(tmp_path, tmp_path / "out").with_suffix(".md").read_text()
    assert "| STAC | 1 % | +6.5 ± 0.7 (n=2) | n too small | - | - | - | - | no statement |" in text
    assert "2 pairs of runs: too few for a statement about chance" in text


def test_cost_has_the_first_stage_in_it(tmp_path: Path) -> None:
    _suite(tmp_path)
    section = _section(tmp_path)
    found = costs(section)
    base, stac = found["Supervised", 1.0], found["STAC", 1.0]
    assert (base.images, base.device_hours) == (16000, pytest.approx(0.1))
    assert (stac.images, stac.device_hours, stac.stage_one_images) == (32000, pytest.approx(0.3), 16000)
    assert stac.ratio(base) == pytest.approx(3.0)
    assert base.front_by_images  # cheapest
    assert stac.front_by_images  # best


def test_a_first_stage_that_nobody_recorded_is_unknown(tmp_path: Path) -> None:
    _suite(tmp_path, extra_steps=500)  # no baseline has 500 steps
    found = costs(_section(tmp_path))["STAC", 1.0]
    assert (found.images, found.device_hours) == (16000 + 500 * 16, None)
    assert not found.front_by_hours
    stage = {"steps": 500, "images_labeled": 7000, "train_seconds": 180.0, "world_size": 2}
    for fold in (1, 2, 3):
        make(tmp_path, "supervised", 1, fold, 0.0, suite=f"quick/stac-1-{fold}", cell="stage1", **stage)
    found = costs(_section(tmp_path))["STAC", 1.0]
    assert (found.images, found.device_hours) == (16000 + 7000, pytest.approx((720 + 2 * 180) / 3600))


def _longer(folder: Path, values: list[float], images: int = 32000) -> None:
    """The baseline with twice the steps, as a suite of the same name in another folder leaves it."""
    for fold, ap in enumerate(values, 1):
        config = {"schedule": {"steps": 2000}, "split": {"percent": 1, "fold": fold}, "seed": fold}
        make(folder / "equal", "supervised", 1, fold, ap, steps=2000, images_labeled=images, config=config)


def test_supervised_with_as_many_images_seen_is_a_row_and_a_comparison(tmp_path: Path) -> None:
    _suite(tmp_path)
    _longer(tmp_path, [25.0, 27.5, 29.5])
    section, analysis = _analysis(tmp_path)
    assert [row.label for row in section.rows] == ["Supervised", "Supervised (schedule.steps=2000)", "STAC"]
    one = next(one for one in analysis.compared if one.cell.percent == 1.0)
    assert one.equal_row is section.rows[1]
    equal = one.found.equal_compute
    assert equal is not None
    expected = stats.ttest_rel(AP["stac", 1], [25.0, 27.5, 29.5]).confidence_interval(0.95)
    assert (equal.low, equal.high) == pytest.approx((expected.low, expected.high))
    assert one.found.over_runs.mean == pytest.approx(6.0)  # still against the baseline of as many steps


def test_no_row_counts_as_equal_that_saw_six_percent_more(tmp_path: Path) -> None:
    _suite(tmp_path)
    _longer(tmp_path, [25.0, 27.5, 29.5], images=34000)
    part = part_of(1, _section(tmp_path), 0, 0, [], draw=False)
    assert all(one.equal_row is None for one in part.analysis.compared)
    suite = "ssodbench suite suite=quick 'suite.methods=[supervised]' suite.reference=false"
    assert part.commands == [f"{suite} schedule.steps=2000 runs_dir=DIR"]
    assert "No run of supervised saw as many images (within 5 %) as STAC" in part.compute


def test_who_wins_on_compute_alone_is_said(tmp_path: Path) -> None:
    for fold in range(1, 6):
        make(tmp_path, "supervised", 1, fold, 20.0 + fold)
        make(tmp_path, "stac", 1, fold, 26.0 + fold + 0.1 * (fold % 2), images_labeled=32000)
    _longer(tmp_path, [27.5, 27.9, 28.8, 30.3, 30.9])
    part = part_of(1, _section(tmp_path), 0, 0, [], draw=False)
    (one,) = part.analysis.compared
    assert one.standing is Standing.BETTER
    assert says(one) == "better, may come from compute alone"
    assert "the gain may come from compute alone: STAC." in part.compute
    assert part.commands == []


def _with_matches(folder: Path, runs: dict[tuple[str, int, int], float]) -> dict[tuple[str, int, int], np.ndarray]:
    """Records whose scores and matches come from one set of images; noise says how wrong the boxes are."""
    truth = random_truth(np.random.default_rng(0), 40)
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    found = {}
    for number, ((method, percent, fold), noise) in enumerate(runs.items()):
        rng = np.random.default_rng(number)
        rows = random_predictions(rng, truth)
        rows[:, 1:5] += rng.normal(0, noise, (len(rows), 4)) * rows[:, 3:5].mean(1, keepdims=True)
        rows[:, 3:5] = np.maximum(rows[:, 3:5], 1.0)
        matches = match(rows, from_coco(truth))
        ap = scores(matches)["ap"]
        write_matches(make(folder, method, percent, fold, ap) / "matches.npz", matches)
        found[method, percent, fold] = rows
    return found


RUNS = {
    **{("supervised", percent, fold): 0.2 - percent / 100 for percent in (1, 10) for fold in (1, 2)},
    **{("stac", 1, fold): 0.12 for fold in (1, 2)},
}


def test_interval_over_images_is_the_paired_bootstrap_of_the_means(tmp_path: Path) -> None:
    rows = _with_matches(tmp_path, RUNS)
    section, analysis = _analysis(tmp_path, 200)
    truth = from_coco(random_truth(np.random.default_rng(0), 40))
    drawn = {key: resample(match(found, truth), 200) for key, found in rows.items()}
    expected = difference(
        average([drawn["stac", 1, fold] for fold in (1, 2)]), average([drawn["supervised", 1, fold] for fold in (1, 2)])
    )
    one = next(one for one in analysis.compared if one.cell.percent == 1.0)
    assert one.found.over_images == expected
    assert one.found.over_images is not None
    assert one.found.over_images.value == pytest.approx(one.found.over_runs.mean)
    assert analysis.resamples == 200
    assert one.found.labels_needed is not None
    assert one.found.labels_needed.low is None  # two pairs
    assert one.labels_by_images is not None
    assert one.labels_by_images.labels == pytest.approx(one.found.labels_needed.labels)
    assert labels_text(one).startswith("= supervised with ")
    assert labels_text(one).endswith(", by images)")
    assert len(section.runs) == 6


def _report(folder: Path, name: str, cache_dir: Path | None) -> dict[str, bytes]:
    """Every file of a report; all are equally deep, so that addresses are the same."""
    out = folder / "out" / name
    report.run(folder / "runs", out, 60, 0, cache_dir)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many resamples were made, call by call."""
    made: list[int] = []

    def counting(matches: Any, resamples: int, seed: int) -> Resampled:
        made.append(resamples)
        return resample(matches, resamples, seed)

    monkeypatch.setattr(chance, "resample", counting)
    return made


def test_report_from_the_cache_is_the_same_byte_for_byte(tmp_path: Path, counted: list[int]) -> None:
    _with_matches(tmp_path / "runs", RUNS)
    without = _report(tmp_path, "without", None)
    assert counted == [60] * 6
    first, second = (_report(tmp_path, name, tmp_path / "cache") for name in ("first", "second"))
    assert counted == [60] * 12  # the second made none
    assert without == first == second
    assert "drawn anew 60\n" in without["report.md"].decode()


@pytest.mark.parametrize("damage", ["cut", "a flipped bit", "empty", "another archive", "a folder"])
def test_damaged_cache_is_made_again(tmp_path: Path, counted: list[int], damage: str) -> None:
    _with_matches(tmp_path / "runs", RUNS)
    before = _report(tmp_path, "before", tmp_path / "cache")
    kept = sorted((tmp_path / "cache/resamples").iterdir())
    assert len(kept) == 6
    content = bytearray(kept[2].read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "another archive":
        np.savez(kept[2], draws=np.zeros(3))
    elif damage == "a folder":
        kept[2].unlink()
        kept[2].mkdir()
    else:
        kept[2].write_bytes({"cut": content[:900], "a flipped bit": content, "empty": b""}[damage])
    counted.clear()
    assert _report(tmp_path, "after", tmp_path / "cache") == before
    assert counted == [60]
    assert _report(tmp_path, "again", tmp_path / "cache") == before
    assert counted == [60] * (2 if damage == "a folder" else 1)  # a file is mended


def test_cache_goes_by_content(tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other matches, another number of resamples and other code have entries of their own; a copy has not."""
    _with_matches(tmp_path / "runs", RUNS)
    _report(tmp_path, "one", tmp_path / "cache")
    shutil.copytree(tmp_path / "runs", tmp_path / "elsewhere")
    counted.clear()
    report.run(tmp_path / "elsewhere", tmp_path / "out/copy", 60, 0, tmp_path / "cache")
    assert counted == []
    report.run(tmp_path / "runs", tmp_path / "out/more", 61, 0, tmp_path / "cache")
    assert counted == [61] * 6
    counted.clear()
    matches = read_matches(tmp_path / "runs/quick/stac-1-1/matches.npz")
    matches.scores[:] = matches.scores * 0.5
    write_matches(tmp_path / "runs/quick/stac-1-1/matches.npz", matches)
    _report(tmp_path, "changed", tmp_path / "cache")
    assert counted == [60]
    counted.clear()
    monkeypatch.setattr(resample_cache, "_code", lambda: "other code")
    _report(tmp_path, "code", tmp_path / "cache")
    assert counted == [60] * 6


def test_cached_resamples_of_another_evaluation_are_refused_too(tmp_path: Path, counted: list[int]) -> None:
    _with_matches(tmp_path / "runs", RUNS)
    _report(tmp_path, "one", tmp_path / "cache")
    path = tmp_path / "runs/quick/stac-1-1/matches.npz"
    path.write_bytes((tmp_path / "runs/quick/supervised-10-1/matches.npz").read_bytes())
    counted.clear()
    text = _report(tmp_path, "two", tmp_path / "cache")["report.md"].decode()
    assert counted == []
    assert "is not of the evaluation in the record beside it" in text


def test_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, counted: list[int]) -> None:
    _with_matches(tmp_path / "runs", RUNS)
    (tmp_path / "cache").write_text("a file")
    one, two = (_report(tmp_path, name, tmp_path / "cache") for name in ("one", "two"))
    assert one == two
    assert counted == [60] * 12


def test_one_fold_has_an_interval_from_its_images(tmp_path: Path) -> None:
    _with_matches(tmp_path, {key: noise for key, noise in RUNS.items() if key[2] == 1})
    text = report.run(tmp_path, tmp_path / "out", resamples=50).with_suffix(".md").read_text()
    assert "one fold and seed: no statement about chance" in text
    assert "Resampling the evaluation images gives a 95 % interval" in text
    assert "drawn anew 50\ntimes" in text


@pytest.mark.parametrize("damage", ["cut", "foreign", "gone", "other arrays"])
def test_matches_that_cannot_be_used_are_named(tmp_path: Path, damage: str) -> None:
    _with_matches(tmp_path, RUNS)
    path = tmp_path / "quick/stac-1-1/matches.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        path.write_bytes((tmp_path / "quick/supervised-10-1/matches.npz").read_bytes())
    elif damage == "other arrays":
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **{**arrays, "matched": arrays["matched"][:, :3], "ignored": arrays["ignored"][:, :3]})
    else:
        path.unlink()
    problems: list[str] = []
    _, analysis = _analysis(tmp_path, 20, problems)
    one = next(one for one in analysis.compared if one.cell.percent == 1.0)
    assert one.found.over_images is None
    assert [path.name in problem for problem in problems] == ([] if damage == "gone" else [True])


def test_everything_is_in_report_json(tmp_path: Path) -> None:
    _suite(tmp_path)
    make(tmp_path, "supervised", 100, 1, 79.4)
    report.run(tmp_path, tmp_path / "out")
    content = json.loads((tmp_path / "out/report.json").read_text())
    (table,) = content["tables"]
    assert table["keys"]["dataset"] == "shapes"
    stac = next(row for row in table["rows"] if row["method"] == "stac")
    one = stac["cells"][0]
    assert one["scores"]["ap"] == {"mean": pytest.approx(28.0), "sd": pytest.approx(7**0.5), "n": 3}
    assert one["comparison"]["over_runs"]["mean"] == pytest.approx(6.0)
    assert one["comparison"]["labels_needed"]["labels"] == pytest.approx(8 * 10**0.15)
    assert stac["cells"][1]["compute"]["total_images"] == 32000
    assert [run["record"] for run in one["runs"]] == [f"../quick/stac-1-{fold}/record.json" for fold in (1, 2, 3)]
    assert all((tmp_path / "out" / run["record"]).is_file() for run in one["runs"])
    reference = next(row for row in table["rows"] if row["reference"])
    assert reference["cells"][0]["scores"]["ap"]["mean"] == pytest.approx(79.4)


def test_collected_records_give_the_report_of_the_folders(tmp_path: Path) -> None:
    _with_matches(tmp_path / "runs", RUNS)
    lines = []
    for path in sorted((tmp_path / "runs").rglob("record.json")):
        lines.append(json.dumps(json.loads(path.read_text())))
        (tmp_path / "kept" / path.parent.name).mkdir(parents=True)
        (tmp_path / "kept" / path.parent.name / "matches.npz").write_bytes(path.with_name("matches.npz").read_bytes())
    (tmp_path / "kept/records.jsonl").write_text("\n".join([*lines, '{"schema_version": 99}', "{"]) + "\n")
    first = report.run(tmp_path / "runs", tmp_path / "a", resamples=20).with_suffix(".md").read_text()
    second = report.run(tmp_path / "kept", tmp_path / "b", resamples=20).with_suffix(".md").read_text()
    told = [line for line in second.splitlines() if line.startswith("> ")]
    assert [line.split(" of ")[0] for line in told] == ["> line 7", "> line 8"]
    assert second.replace("\n\n".join(told) + "\n\n", "") == first
    assert 'href="../kept/records.jsonl"' in (tmp_path / "b/report.html").read_text()


def test_conditions_that_differ_are_footnotes_of_the_rows_that_differ(tmp_path: Path) -> None:
    same = {"batch_labeled": 16, "augment": "small", "pipeline": "dali"}
    for fold in (1, 2, 3):
        make(tmp_path, "supervised", 1, fold, 20.0, **same)
    make(tmp_path, "stac", 1, 1, 25.0, **{**same, "augment": "stac", "reported_network": "student"})
    make(
        tmp_path, "mean_teacher", 1, 1, 25.0, **same, augment_deviations=["no rotation"], method_deviations=["a count"]
    )
    part: Part = part_of(1, _section(tmp_path), 0, 0, [], draw=False)
    notes = {note.text.split(":")[0]: note for note in part.footnotes}
    assert notes["The networks reported differ"].rows == ("STAC",)
    assert notes["Augmentation policies differ"].text.endswith("small: Supervised, Mean Teacher; stac: STAC.")
    assert notes["Augmentation differs from the paper"].rows == ("Mean Teacher",)
    assert notes["The method differs from its code"].text == "The method differs from its code: a count."
    assert notes["The method differs from its code"].rows == ("Mean Teacher",)
    folds = next(note for note in part.footnotes if note.text.startswith("Folds differ"))
    assert folds.rows == ("STAC", "Mean Teacher")
    assert "1, 2, 3: Supervised; 1: STAC, Mean Teacher" in folds.text
    assert part.marks(part.section.rows[0]) == []
    text = report.run(tmp_path, tmp_path / "out").with_suffix(".md").read_text()
    assert "| STAC (a, b, c) |" in text
    assert "- (a) The networks reported differ: teacher: Supervised, Mean Teacher; student: STAC." in text


def test_operations_on_labelled_images_that_differ_are_listed(tmp_path: Path) -> None:
    views = {
        "supervised": {"labeled": {"resize": {"short": 64}, "flip": 0.5}},
        "stac": {"labeled": {"resize": {"short": 64}, "flip": 0.5, "cutout": {}}, "strong": {"flip": 1}},
        "mean_teacher": {"labeled": {"resize": {"short": 64}, "flip": 0.5}, "weak": {}},
        "soft_teacher": {"labeled": {"resize": {"short": 32}}},
        "mine": "damaged",
    }
    for method, view in views.items():
        config = {"split": {"percent": 1, "fold": 1}, "seed": 1, "augment": {"views": view}}
        make(tmp_path, method, 1, 1, 20.0, config=config)
    part = part_of(1, _section(tmp_path), 0, 0, [], draw=False)
    (note,) = (note for note in part.footnotes if note.text.startswith("Labelled images are augmented"))
    assert note.text.endswith("otherwise than with Supervised: STAC in cutout; Soft Teacher in flip, resize.")
    assert note.rows == ("STAC", "Soft Teacher")


def test_a_record_of_its_time_has_neither_classes_nor_errors(tmp_path: Path) -> None:
    _suite(tmp_path)
    part = part_of(1, _section(tmp_path), 0, 6, [], draw=False)
    assert (part.classes, part.kinds, part.more_scores) == ([], (), [])
    assert part.pictures is None
    assert part.no_pictures == "no run has predictions.json beside its record."
    assert RunRecord().per_class == {}
