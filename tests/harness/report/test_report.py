"""Reports of records written here: means, spreads and pairings against hand-worked numbers, and what is kept apart."""

import csv
import html.parser
import io
import json
import re
import statistics
from urllib.parse import unquote

import pandas as pd
import pytest
from rich.console import Console

from harness.config.targets import CONF_DIR
from harness.core.readback import read_metrics
from harness.core.record import write_record
from harness.core.types import RunRecord, UserError
from harness.report import curves, figures, plots, report, tables
from harness.report import text as formatting


def make(folder, method, percent, fold, ap, **changes):
    """Writes a record; gives its folder."""
    values = {
        "status": "ok",
        "cell": f"{method}-{percent:g}-{fold}",
        "suite": "quick",
        "method": method,
        "percent": float(percent),
        "fold": fold,
        "seed": fold,
        "ap": ap,
        "scores": {"student": {"ap": ap}},
        "dataset": "shapes",
        "dataset_sha256": "a" * 64,
        "val_sha256": "b" * 64,
        "protocol": "soft_teacher",
        "split_sha256": f"{percent}-{fold}",
        "labeled_images": int(8 * percent),
        "eval_images": 250,
        "detector": "small",
        "pretraining": "generated patches of other classes",
        "preset": "small",
        "reported_network": "teacher",
        "score_threshold": 0.05,
        "steps": 1000,
        "images_labeled": 16000,
        "images_per_s": 200.0,
        "data_stall": 0.034,
        "wall_seconds": 754.0,
        "config": {"schedule": {"steps": 1000}, "split": {"percent": percent, "fold": fold}, "seed": fold},
    }
    run_dir = folder / f"{changes.get('suite', 'quick')}/{changes.get('cell', values['cell'])}"
    write_record(run_dir / "record.json", RunRecord(**(values | changes)))
    return run_dir


AP = {
    ("supervised", 1): [20.0, 24.0, 22.0],
    ("supervised", 10): [60.0, 61.0, 65.0],
    ("stac", 1): [26.0, 27.0, 31.0],
    ("stac", 10): [66.0, 65.0, 72.0],
}


@pytest.fixture
def runs(tmp_path):
    for (method, percent), values in AP.items():
        for fold, ap in enumerate(values, 1):
            extra = {"extra_steps": 1000, "pseudo_precision": 0.5, "pseudo_recall": 0.25, "pseudo_iou": 0.75}
            make(tmp_path, method, percent, fold, ap, **(extra if method == "stac" else {}))
    return tmp_path


def read(path):
    return path.read_text(encoding="utf-8")


def table_rows(markdown):
    """Cells of each row of every Markdown table."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")
    ]


def test_means_spreads_and_paired_gains(runs):
    report.run(runs)
    frame = pd.read_csv(runs / "report/report.csv").set_index(["method", "percent"])
    for (method, percent), values in AP.items():
        line = frame.loc[(method, percent)]
        assert line["n"] == 3
        assert line["ap"] == pytest.approx(statistics.mean(values))
        assert line["ap_std"] == pytest.approx(statistics.stdev(values))
        if method == "stac":
            gains = [a - b for a, b in zip(values, AP["supervised", percent], strict=True)]
            assert line["gain"] == pytest.approx(statistics.mean(gains))
            assert line["gain_std"] == pytest.approx(statistics.stdev(gains))
            assert line["gain_n"] == 3
            assert line["extra_steps"] == 1000
        else:
            assert pd.isna(line["gain"])


def test_markdown_table(runs):
    make(runs, "supervised", 100, 1, 79.4)
    report.run(runs)
    rows = table_rows(read(runs / "report/report.md"))
    assert ["method", "1 % (8 images)", "10 % (80 images)"] in rows
    assert ["Supervised", "22.0 ± 2.0 (n=3)", "62.0 ± 2.6 (n=3)"] in rows
    # 8 images give 22, 80 give 62: 28 lies 6 / 40 of the way from log 8 to log 80, so 8 * 10 ** 0.15 = 11.3 are needed.
    stac = next(row for row in rows if row[0].startswith("STAC"))
    assert stac[0] == "STAC (a)"
    assert stac[1].startswith("**28.0 ± 2.6 (n=3) [+6.0 ± 3.0]**<br>\\= supervised with 11 (")
    # Fold 1 alone has all 800 labels: 66 lies 6 / 19.4 of the way from 60 to 79.4, so it is 80 * 10 ** 0.309 = 163.
    assert stac[2] == "**67.7 ± 3.8 (n=3) [+5.7 ± 1.5]**<br>\\= supervised with 163"
    assert ["Supervised, 100 % of the labels (reference)", "79.4 (n=1)", ""] in rows
    costs = ["28.0", "32,000", "unknown", "images", "200.0", "3.4 %", "12.6 min", "1,000", "1,000", "16,000", "0", "-"]
    assert ["STAC", "1 %", *costs] in rows
    assert ["STAC", "10 %", "0.50", "0.25", "0.75"] in rows
    text = read(runs / "report/report.md")
    assert "Every run took the same number of student steps (1,000). Beyond that, STAC needs a finished run" in text
    assert "first weights: generated patches of other classes" in text


def test_pairs_only_the_same_fold_and_steps(tmp_path):
    make(tmp_path, "supervised", 1, 1, 20.0)
    make(tmp_path, "stac", 1, 1, 26.0)
    make(tmp_path, "stac", 1, 2, 90.0)
    longer = {"steps": 2000, "config": {"schedule": {"steps": 2000}}, "cell": "longer"}
    make(tmp_path, "soft_teacher", 1, 1, 30.0, **longer)
    section = report.load(tmp_path)[0][0]
    by_method = {row.method: row.cells[1.0] for row in section.rows}
    assert by_method["stac"].gains == [6.0]
    assert by_method["soft_teacher"].gains == []
    assert formatting.gain(by_method["stac"]) == "+6.0 (n=1)"
    assert "Student steps differ" in formatting.cost_statement(section)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("suite", "other"),
        ("dataset_sha256", "c" * 64),
        ("val_sha256", "c" * 64),
        ("protocol", "stac"),
        ("empty_images", "keep"),
        ("detector", "retinanet"),
        ("pretraining", "none"),
        ("preset", "paper"),
        ("score_threshold", 0.001),
    ],
)
def test_what_cannot_be_compared_is_never_in_one_table(tmp_path, key, value):
    make(tmp_path, "supervised", 10, 1, 60.0)
    make(tmp_path, "supervised", 10, 2, 10.0, **{key: value, "cell": "other"})
    sections, _ = tables.load(tmp_path)
    assert len(sections) == 2
    assert sorted(section.rows[0].cells[10.0].mean("ap") for section in sections) == [10.0, 60.0]
    assert len({str(section.keys[key]) for section in sections}) == 2


def test_other_configurations_of_a_method_are_never_averaged(tmp_path):
    for fold in (1, 2):
        make(tmp_path, "supervised", 10, fold, 60.0)
    make(tmp_path, "supervised", 10, 3, 10.0, config={"schedule": {"steps": 5}, "split": {"percent": 10, "fold": 3}})
    section = tables.load(tmp_path)[0][0]
    assert [(row.label, row.cells[10.0].n) for row in section.rows] == [
        ("Supervised", 2),
        ("Supervised (schedule.steps=5)", 1),
    ]


def test_where_it_ran_does_not_matter(tmp_path):
    config = {"schedule": {"steps": 1000}, "runs_dir": "elsewhere", "device": "cuda", "data": {"root": "x"}}
    make(tmp_path, "supervised", 10, 1, 60.0, config=config)
    make(
        tmp_path,
        "supervised",
        10,
        2,
        62.0,
        config=config | {"runs_dir": "here", "device": "cpu", "data": {"root": "y"}},
    )
    assert tables.load(tmp_path)[0][0].rows[0].cells[10.0].n == 2


def test_missing_cells_have_their_reason(runs):
    make(runs, "stac", 10, 1, None, status="failed", error="RunError: the loss is not finite\ndetails")
    make(runs, "soft_teacher", 1, 1, None, status="interrupted", error="interrupted by SIGTERM")
    shared = {"fold": 1, "seed": 1, "dataset": "shapes", "protocol": "soft_teacher"}
    skipped = {"name": "soft_teacher-10-1", "method": "soft_teacher", "percent": 10.0, "state": "skipped"}
    fine = {"name": "supervised-1-1", "method": "supervised", "percent": 1.0, "state": "ok", "reason": None}
    cells = [skipped | shared | {"reason": "its first stage failed"}, fine | shared]
    planned = {"suite": "quick", "cells": cells}
    (runs / "quick/suite.json").write_text(json.dumps(planned))
    page = read(report.run(runs))
    text = read(runs / "report/report.md")
    assert ["Soft Teacher", "-", "-"] in table_rows(text)
    stac = next(row for row in table_rows(text) if row[0].startswith("STAC"))
    assert stac[1].startswith("28.0 ± 2.6 (n=3) [+6.0 ± 3.0]") or stac[1].startswith("**28.0 ± 2.6 (n=3) [+6.0 ± 3.0]")
    assert "68.5 ± 4.9 (n=2) [+5.5 ± 2.1]" in stac[2]
    for reason in ("the loss is not finite", "interrupted by SIGTERM", "its first stage failed"):
        assert reason in text
        assert reason in page
    assert len(tables.load(runs)[0]) == 1


def test_a_copied_folder_counts_once(runs):
    make(runs, "stac", 1, 1, 26.0, cell="copy", started="2030-01-01")
    sections, problems = tables.load(runs)
    assert {row.method: row.cells[1.0].n for row in sections[0].rows} == {"supervised": 3, "stac": 3}
    assert "is not counted" in problems[0]


def test_first_stages_within_a_run_are_not_runs(runs):
    make(runs / "quick/stac-1-1", "supervised", 1, 9, 0.0)
    assert {run.record.fold for run in tables.load(runs)[0][0].runs} == {1, 2, 3}


def test_damaged_records_are_named_and_the_rest_is_shown(runs):
    (runs / "quick/stac-1-1/record.json").write_text("{")
    assert "stac-1-1" in read(report.run(runs))
    assert tables.load(runs)[0][0].rows[1].cells[1.0].n == 2


@pytest.mark.parametrize("content", [None, "{"])
def test_no_record_at_all(tmp_path, content):
    if content:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json"):
        report.run(tmp_path)
    assert not (tmp_path / "report").exists()


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        report.run(tmp_path / "missing")


class Checker(html.parser.HTMLParser):
    """Tags that are opened and closed in order, and every address that a page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        assert tag != "img" or dict(attrs)["alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_file_and_well_formed(runs):
    write_curves(runs / "quick/stac-1-1")
    make(runs, "soft_teacher", 1, 1, 30.0, cell="<b>&", pretraining="a <script> & more")
    page = read(report.run(runs))
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    records = {str(path.relative_to(runs)) for path in runs.rglob("record.json")}
    links = [address for address in checker.addresses if not address.startswith(("data:image/svg+xml;base64,", "#"))]
    assert {unquote(link) for link in links} == {f"../{record}" for record in records} | {"report.json"}
    assert page.count("<script>") == 1  # its own
    assert page.count("data:image/svg+xml") >= 3


def write_curves(run_dir):
    lines = []
    for step in range(9, 100, 10):
        lines.append({"kind": "train", "step": step, "loss": 100.0 / (step + 1)})
        quality = {"box": {"precision": step / 100, "recall": None, "iou": 0.5}}
        quality["rpn"] = {"precision": 0.0, "recall": 0.0, "iou": 0.0, "labels": 0.0}
        lines.append({"kind": "pseudo", "step": step, "quality": quality})
        lines += [
            {"kind": "eval", "step": step, "network": n, "metrics": {"ap": v}}
            for n, v in (("student", 1.0), ("teacher", 2.0))
        ]
    text = "\n".join(json.dumps(line) for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '\n{"kind": "tr')


def test_curves_are_read_from_metrics(tmp_path):
    write_curves(tmp_path)
    lines = read_metrics(tmp_path).lines
    assert curves.eval_curve(lines, "teacher").to_dict() == dict.fromkeys(range(10, 101, 10), 2.0)
    assert curves.loss_curve(lines)[10] == 10.0
    assert curves.pseudo_curves(lines, "precision")["box"][100] == 0.99
    assert set(curves.pseudo_curves(lines, "precision")) == {"box"}  # no label, no precision
    assert curves.pseudo_curves(lines, "recall")["rpn"][100] == 0.0


def test_figures_are_the_same_for_the_same_records(runs):
    write_curves(runs / "quick/stac-1-1")
    section = tables.load(runs)[0][0]
    first = plots.draw(section)
    assert set(first) == {"ap_by_ratio", "learning_curves", "pseudo_labels"}
    assert plots.draw(section) == first


def test_methods_keep_their_colour():
    rows = [tables.Row(name, "", {}) for name in ("supervised", "soft_teacher", "mine", "other")]
    looks = figures.look(rows)
    assert looks["Soft Teacher"] == figures.look(rows[1:])["Soft Teacher"]
    assert len(set(looks.values())) == 4


def test_every_method_of_ours_has_a_colour_and_a_marker_of_its_own():
    rows = [tables.Row(path.stem, "", {}) for path in (CONF_DIR / "method").glob("*.yaml")]
    alone = [figures.look([row])[row.label] for row in rows]
    assert list(figures.look(rows).values()) == alone
    for part in zip(*alone, strict=True):
        assert len(set(part)) == len(rows)


def test_console_tables(runs):
    console = Console(file=io.StringIO(), width=120)
    report.show(runs, console)
    text = console.file.getvalue()
    assert "28.0 ± 2.6 (n=3) [+6.0 ± 3.0]" in text
    assert "At 1 % labels, " in text
    assert "shapes, split protocol soft_teacher, suite quick" in text


def test_latex_has_no_bare_special_characters(runs):
    make(runs, "my_method", 1, 1, 30.0, pretraining="50 % of a_b & {c}")
    report.run(runs)
    text = read(runs / "report/report.tex")
    assert "22.0 $\\pm$ 2.0 (n=3)" in text
    assert "50 \\% of a\\_b \\& \\{c\\}" in text
    for line in text.splitlines():
        assert "±" not in line
        assert "_" not in line.replace("\\_", "")
        assert line.lstrip().startswith("%") or not re.search(r"(?<!\\)%", line)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 5  # sections of three and of two


def test_published_numbers():
    with report.PUBLISHED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = {(row["method"], row["percent"]): row for row in rows}
    assert len(known) == len(rows)
    assert float(known["Soft Teacher (repository, 0.05)", "10"]["ap"]) == 33.78
    assert float(known["Unbiased Teacher (paper)", "1"]["ap"]) == 20.75
    for row in rows:
        assert 0 < float(row["ap"]) < 100
        assert row["ap_status"] in ("read", "recalled", "third_party")
        assert bool(row["ap_std"]) == bool(row["std_status"])
        for key in ("protocol", "network", "score_threshold", "images_per_step", "backbone", "source"):
            assert row[key], (row["method"], key)


def test_published_numbers_are_marked_and_apart(tmp_path):
    runs = tmp_path
    make(runs, "supervised", 10, 1, 20.0, dataset="coco", protocol="stac")
    text = read(report.run(runs).with_name("report.md"))
    own, published = text.split("## Published COCO numbers")
    assert "33.78" in published
    assert "33.78" not in own
    assert "| 13.97‡ ± 0.35† |" in published
    assert "| full: 64 (1:1)" not in published
    assert "40 (1:4); full: 64 (1:1)" in published


def test_ours_stand_beside_the_published_numbers_of_the_same_method(tmp_path):
    make(tmp_path, "supervised", 10, 1, 20.0, dataset="coco", protocol="stac", detector="faster_rcnn_r50")
    make(tmp_path, "soft_teacher", 10, 1, 30.0, dataset="coco", protocol="stac", detector="faster_rcnn_r50")
    make(tmp_path, "soft_teacher", 7, 1, 30.0, dataset="coco", protocol="stac", detector="faster_rcnn_r50")
    sections = tables.load(tmp_path)[0]
    pairs = {
        (row.method, theirs, ours, alike) for row, theirs, ours, alike in plots.published_pairs(sections, published())
    }
    assert ("supervised", 23.86, 20.0, True) in pairs  # STAC's paper
    assert ("soft_teacher", 33.8, 30.0, True) in pairs  # mmdetection
    assert ("soft_teacher", 33.78, 30.0, False) in pairs  # the authors'
    assert {method for method, *_ in pairs} == {"supervised", "soft_teacher"}
    assert not [theirs for _, theirs, *_ in pairs if theirs in (26.7, 36.06)]  # Supervised Faster R-CNN, PseCo
    page = read(report.run(tmp_path))
    assert "Our AP against published AP" in page
    assert read(tmp_path / "report/published.svg") == plots.published_against_ours(sections, published())


def published():
    return report.published([])


def test_published_numbers_are_for_coco_alone(runs):
    page = read(report.run(runs))
    assert "Published" not in page
    assert "33.78" not in read(runs / "report/report.md")
    assert not (runs / "report/published.svg").exists()


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formatting.number, 1234.56, "1,234.6"),
        (formatting.number, None, "-"),
        (formatting.signed, 1.25, "+1.2"),
        (formatting.signed, -1.26, "\N{MINUS SIGN}1.3"),
        (formatting.signed, -0.01, "+0.0"),
        (formatting.share, 0.034, "3.4 %"),
        (formatting.seconds, 62.3, "62 s"),
        (formatting.seconds, 754, "12.6 min"),
        (formatting.seconds, 9000, "2.5 h"),
        (formatting.metric, "ap_s", "APs"),
    ],
)
def test_numbers_to_text(function, value, text):
    assert function(value) == text


def test_stage_one_of_a_suite_is_not_the_papers(tmp_path):
    method = {"name": "stac", "offline": {"stage1": "supervised", "stage1_overrides": []}}
    changes = {"suite": "coco", "preset": "paper"}
    make(tmp_path, "supervised", 1, 1, 9.0, **changes)
    make(tmp_path, "stac", 1, 1, 13.0, config={"method": method}, **changes)
    own = {**method, "offline": {"stage1": "supervised", "stage1_overrides": ["augment=stac"]}}
    make(tmp_path / "own", "stac", 1, 1, 14.0, config={"method": own}, suite="mine", preset="paper")
    report.run(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| STAC (stage 1: the suite's baseline) | **13.0" in text
    assert "- stage 1 of STAC: the supervised baseline of this suite, not the paper's own" in text
    assert "| STAC | 14.0" in text
    assert text.count("baseline of this suite") == 1


@pytest.mark.parametrize(
    ("threads", "gpus", "told"),
    [((1, 1), [], False), ((1, 2), [], True), ((1, [1, 2]), [], True), ((1, 2), ["x"], False)],
)
def test_other_numbers_of_threads_are_told(tmp_path, threads, gpus, told):
    for fold, count in enumerate(threads, 1):
        make(tmp_path, "supervised", 1, fold, 9.0, environment={"threads": count, "gpus": gpus})
    report.run(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert ("runs differ in CPU threads" in text) == told
    assert ("1 then 2 threads per process" in text) == (threads == (1, [1, 2]))


def _shots(folder, shots, fold, ap, method="supervised", **more):
    """A run of which each class is on so many images."""
    values = {
        "protocol": "shots",
        "shots": shots,
        "labeled_images": 2 * shots + fold,
        "labeled_boxes": 5 * shots + fold,
        "labeled_by_class": {"a": shots, "b": shots + fold},
        "cell": f"{method}-{shots}-{fold}",
        "split_sha256": f"{shots}-{fold}",
        "config": {"schedule": {"steps": 1000}, "split": {"percent": 10, "shots": shots, "fold": fold}, "seed": fold},
    }
    share = (3.0 * shots + fold) / 10  # differs by fold
    return make(folder, method, share, fold, ap, **(values | more))


@pytest.fixture
def shots_runs(tmp_path):
    for shots in (1, 5, 100):
        for fold in (1, 2, 3):
            _shots(tmp_path, shots, fold, 10.0 * fold + shots / 10)
            _shots(tmp_path, shots, fold, 12.0 * fold + shots / 10, "stac")
    return tmp_path


def test_shots_are_columns_over_all_folds(shots_runs):
    report.run(shots_runs)
    rows = table_rows(read(shots_runs / "report/report.md"))
    headings = ["method", "1 shot (3 to 5 images)", "5 shots (11 to 13 images)", "100 shots (201 to 203 images)"]
    assert headings in rows
    assert ["Supervised", *(f"{20 + shots / 10:.1f} ± 10.0 (n=3)" for shots in (1, 5, 100))] in rows
    assert sum(row[0] == "Stac" or row[0].startswith("STAC") for row in rows) > 0
    text = read(shots_runs / "report/report.md")
    assert "every box on a labelled image is labelled" in text
    assert "5 shots: each class on 5 to 8 labelled images, with 26 to 28 boxes on all of them" in text
    assert "At 1 shot, " in text
    assert "5 shots of the labels" not in text
    assert "% labels" not in text
    for name in ("report.html", "report.tex"):
        page = read(shots_runs / f"report/{name}")
        assert "5 shots" in page
        assert "every box on a labelled image is labelled" in page
    frame = pd.read_csv(shots_runs / "report/report.csv")
    assert frame["percent"].isna().all()
    assert sorted(set(frame["shots"])) == [1, 5, 100]
    table = json.loads(read(shots_runs / "report/report.json"))["tables"][0]
    assert (table["percents"], table["shots"]) == ([], [1, 5, 100])
    assert [(cell["percent"], cell["shots"]) for cell in table["rows"][0]["cells"]] == [
        (None, 1),
        (None, 5),
        (None, 100),
    ]
    console = Console(file=io.StringIO(), width=200)
    report.show(shots_runs, console)
    assert "100 shots" in console.file.getvalue()


def test_shots_and_percentages_are_no_one_table(shots_runs):
    make(shots_runs, "supervised", 5, 1, 33.0, cell="apart")
    sections, _ = tables.load(shots_runs)
    assert sorted(section.by_shots for section in sections) == [False, True]


def test_shots_are_not_compared_with_what_was_published(tmp_path):
    """ "10 shots" of COCO is no 10 %."""
    for fold in (1, 2):
        _shots(tmp_path, 10, fold, 20.0, dataset="coco", detector="faster_rcnn_r50")
    report.run(tmp_path)
    assert "Published" not in read(tmp_path / "report/report.md")
    (section,) = tables.load(tmp_path)[0]
    assert not list(plots.published_pairs([section], report.published([])))


def test_a_cell_of_shots_that_left_no_record_stands_in_its_column(shots_runs):
    cell = {"name": "lost", "method": "stac", "percent": None, "shots": 5, "fold": 4, "seed": 4, "state": "failed"}
    plan = {"suite": "quick", "cells": [{**cell, "reason": "no luck", "dataset": "shapes", "protocol": "shots"}]}
    (shots_runs / "quick" / "suite.json").write_text(json.dumps(plan))
    (section,) = tables.load(shots_runs)[0]
    (missing,) = section.missing
    assert missing.share == 5.0
