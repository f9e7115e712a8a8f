"""What a reader must know before comparing numbers: sets apart of the data, and pseudo labels of somebody else."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from harness.config import compose
from harness.config.names import cell_name
from harness.report import figures, plots, report, tables
from tests.harness.report.test_report import make

SEEN = "which may have seen these images, their labels or the evaluation images; what it cost is not counted"


def _texts(folder: Path) -> dict[str, str]:
    """The report in its forms, lines joined."""
    page = report.run(folder, folder / "out", 0, 0)
    texts = {suffix: page.with_suffix(suffix).read_text() for suffix in (".html", ".md", ".tex", ".json", ".csv")}
    texts[".html"] = html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", texts[".html"], flags=re.DOTALL))
    return {suffix: " ".join(text.split()) if suffix != ".csv" else text for suffix, text in texts.items()}


def test_evaluation_on_held_out_images_is_told_and_stands_alone(tmp_path: Path) -> None:
    make(tmp_path, "supervised", 5, 1, 40.0)
    made = {"val_sha256": "c" * 64, "eval_images": 30, "cell": "held"}
    make(tmp_path, "supervised", 5, 1, 44.0, evaluated_on="holdout", **made)
    texts = _texts(tmp_path)
    titles = [table["title"] for table in json.loads(texts[".json"])["tables"]]
    usual = "shapes, split protocol soft_teacher, suite quick"
    held = f"{usual}, evaluated on held-out training images"
    assert titles == [f"{usual}, detector small", f"{held}, detector small"]
    for form in (".html", ".md"):
        assert titles[1] in texts[form]
        assert texts[form].count("30 images, taken from the labelled ones by split.holdout, sha256 cccccccccc") == 1
        assert "250 images, sha256 bbbbbbbbbb" in texts[form]
    keys = [table["keys"]["evaluated_on"] for table in json.loads(texts[".json"])["tables"]]
    assert keys == [line["evaluated_on"] for line in csv.DictReader(io.StringIO(texts[".csv"]))] == ["val", "holdout"]


def test_evaluation_on_the_images_that_settings_are_chosen_on_is_told(tmp_path: Path) -> None:
    make(tmp_path, "supervised", 5, 1, 40.0, evaluated_on="tune", tune_images=25, tune_boxes=60)
    texts = _texts(tmp_path)
    for form in (".html", ".md"):
        assert "suite quick, evaluated on the images that settings are chosen on" in texts[form]
        assert "250 images of split.tune, which settings are chosen on, sha256" in texts[form]
        assert "25 images with 60 boxes, labels beside those of the training" in texts[form]


def test_rows_that_had_more_labels_to_choose_settings_on_are_marked(tmp_path: Path) -> None:
    make(tmp_path, "supervised", 5, 1, 40.0)
    make(tmp_path, "stac", 5, 1, 44.0, tune_images=25, tune_boxes=60)
    texts = _texts(tmp_path)
    said = "Labelled images for choosing settings, beside those of the training, differ: 0: Supervised; 25: STAC."
    for form in (".html", ".md", ".tex"):
        assert said in texts[form]
    (note,) = json.loads(texts[".json"])["tables"][0]["footnotes"]
    assert (note["text"], note["rows"]) == (said, ["STAC"])
    assert "25 images with 60 boxes" in texts[".md"]  # though the first run has none


def test_nothing_is_said_of_sets_apart_where_there_are_none(tmp_path: Path) -> None:
    make(tmp_path, "supervised", 5, 1, 40.0)
    text = "".join(_texts(tmp_path).values())
    for word in ("split.holdout", "split.tune", "choosing settings", "labels by", "made by"):
        assert word not in text


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """STAC with its own labels, and with those of two others; nothing but the labeller tells their records apart."""
    for fold in (1, 2, 3):
        make(tmp_path, "supervised", 5, fold, 40.0 + fold)
        make(tmp_path, "stac", 5, fold, 42.0 + fold + 0.1 * fold, batch_unlabeled=16)
        for number, labeller in enumerate(("OWL", "a & b")):
            values = {"labeller": labeller, "cell": f"stac-{number}-{fold}", "batch_unlabeled": 16}
            make(tmp_path, "stac", 5, fold, 60.0 + 10 * number + fold, **values)
    return tmp_path


def test_two_labellers_never_share_a_row(foreign: Path) -> None:
    (section,), problems = tables.load(foreign)
    assert problems == []
    rows = {row.label: row.cells[5.0] for row in section.rows}
    assert list(rows) == ["Supervised", "STAC", "STAC (labels by OWL)", "STAC (labels by a & b)"]
    assert [cell.n for cell in rows.values()] == [3] * 4
    assert [cell.mean("ap") for cell in rows.values()] == pytest.approx([42.0, 44.2, 62.0, 72.0])
    looks = figures.look(section.rows)
    assert len(set(looks.values())) == 4
    assert looks["STAC"] == figures.look(section.rows[:2])["STAC"]


def test_labels_of_somebody_else_are_told_beside_the_numbers(foreign: Path) -> None:
    texts = _texts(foreign)
    for form, label, labeller in (
        (".html", "a & b", "a & b"),
        (".md", "a &amp; b", "a &amp; b"),
        (".tex", r"a \& b", r"a \& b"),
    ):
        assert f"Pseudo labels come from a file made by OWL, {SEEN}: STAC (labels by OWL)." in texts[form]
        assert f"made by {labeller}, {SEEN}: STAC (labels by {label})." in texts[form]
    (table,) = json.loads(texts[".json"])["tables"]
    assert [row["labeller"] for row in table["rows"]] == [None, None, "OWL", "a & b"]
    assert any("STAC (labels by a & b)" in sentence for sentence in table["verdict"])  # the best is named in full
    lines = list(csv.DictReader(io.StringIO(texts[".csv"])))
    assert [line["labeller"] for line in lines] == ["", "", "OWL", "a & b"]
    console = Console(record=True, width=200)
    report.show(foreign, console)
    assert "STAC (labels by OWL)" in console.export_text()


def test_labels_of_somebody_else_are_not_set_beside_published_numbers(foreign: Path) -> None:
    section = tables.load(foreign)[0][0]
    section.keys["detector"] = "faster_rcnn_r50"
    line = {"ap": "20.0", "backbone": "R50 FPN", "protocol": "stac"}
    published = [{"method": "STAC", "values": {"5": line}}]
    assert [row.label for row, *_ in plots.published_pairs([section], published)] == ["STAC"]


def test_cell_that_left_no_record_stands_with_the_others_of_its_labeller(tmp_path: Path) -> None:
    make(tmp_path, "stac", 5, 1, 60.0, labeller="OWL")
    cell = {"name": "stac-5-2", "method": "stac", "percent": 5, "fold": 2, "seed": 2, "state": "failed"}
    cell |= {"reason": "out of memory", "dataset": "shapes", "protocol": "soft_teacher"}
    (tmp_path / "quick/suite.json").write_text(json.dumps({"suite": "quick", "cells": [cell]}))
    ((row,),) = [section.rows for section in tables.load(tmp_path)[0]]
    assert (row.label, len(row.cells[5.0].missing)) == ("STAC (labels by OWL)", 1)


def test_runs_of_different_labellers_have_folders_of_their_own() -> None:
    common = ["data=shapes", "method=stac"]
    names = [
        cell_name(compose.load([*common, *own]))
        for own in (
            [],
            ["method.offline.labels=x.json", "method.offline.labeller=OWL"],
            ["method.offline.labels=x.json", "method.offline.labeller='A B'"],
        )
    ]
    assert names[0].startswith("shapes_stac_soft_teacher")  # as ever
    assert names[1].startswith("shapes_stac_OWL_soft_teacher")
    assert names[2].startswith("shapes_stac_A-B_soft_teacher")


def test_variants_of_a_suite_have_rows_of_their_own_and_their_own_baselines(tmp_path: Path) -> None:
    """Nothing but the name need tell their records apart; the gain of `wide` is over the supervised runs of `wide`."""
    for fold in (1, 2, 3):
        for variant, base, gain in (("base", 40.0, 2.0), ("wide", 45.0, 1.0)):
            for method, ap in (("supervised", base + fold), ("stac", base + fold + gain + 0.1 * fold)):
                make(tmp_path, method, 5, fold, ap, variant=variant, cell=f"{method}-{variant}-{fold}")
    rows = json.loads(_texts(tmp_path)[".json"])["tables"][0]["rows"]
    labels = ["Supervised (base)", "Supervised (wide)", "STAC (base)", "STAC (wide)"]
    assert [row["label"] for row in rows] == labels
    assert [row["variant"] for row in rows] == ["base", "wide"] * 2
    (section,), _ = tables.load(tmp_path)
    assert [row.cells[5.0].gain for row in section.rows[2:]] == pytest.approx([2.2, 1.2])


def test_a_baseline_without_a_variant_stands_for_all(tmp_path: Path) -> None:
    make(tmp_path, "supervised", 5, 1, 40.0)
    make(tmp_path, "stac", 5, 1, 43.0, variant="wide", cell="wide")
    (section,), _ = tables.load(tmp_path)
    assert section.rows[1].cells[5.0].gain == pytest.approx(3.0)
