"""Tables of several detectors beside each other: which stand together, and that nothing is averaged over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.report import report, tables
from harness.report.overview import overviews
from tests.harness.report.test_report import make

AP = {("small", "supervised"): 40.0, ("small", "stac"): 44.0, ("fcos", "supervised"): 30.0, ("fcos", "arsl"): 29.0}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two detectors, each a variant of the suite with a baseline of its own; 10 % of one alone."""
    for (detector, method), ap in AP.items():
        for fold in (1, 2):
            make(
                *(tmp_path, method, 5, fold, ap + fold),
                detector=detector,
                variant="faster" if detector == "small" else "dense",
                cell=f"{detector}-{method}-{fold}",
            )
    make(tmp_path, "supervised", 10, 1, 60.0, detector="small", variant="faster", cell="ten")
    return tmp_path


def test_detectors_of_one_suite_stand_beside_each_other(runs: Path) -> None:
    (found,) = overviews(tables.load(runs)[0])
    assert found.title == "shapes, split protocol soft_teacher, suite quick: 2 detectors"
    assert found.percents == [5.0, 10.0]
    shown = {(section.keys["detector"], row.method): row.cells[5.0].mean("ap") for section, row in found.rows}
    assert shown == {key: ap + 1.5 for key, ap in AP.items()}
    gains = {row.method: row.cells[5.0].gain for _, row in found.rows}
    assert gains == {"supervised": None, "stac": 4.0, "arsl": -1.0}  # over the baseline of the same detector


def test_the_report_has_their_table_in_every_form(runs: Path) -> None:
    page = report.run(runs, resamples=0)
    markdown, tex = (page.with_suffix(suffix).read_text() for suffix in (".md", ".tex"))
    lines = [line for line in markdown.splitlines() if line.startswith(("| small (faster) |", "| fcos (dense) |"))]
    assert lines == [
        "| fcos (dense) | Supervised | 31.5 ± 0.7 (n=2) | - |",
        "| fcos (dense) | ARSL | 30.5 ± 0.7 (n=2) [−1.0 ± 0.0] | - |",
        "| small (faster) | Supervised | 41.5 ± 0.7 (n=2) | 60.0 (n=1) |",
        "| small (faster) | STAC | 45.5 ± 0.7 (n=2) [+4.0 ± 0.0] | - |",
    ]
    assert tex.index("fcos (dense) & Supervised & 31.5") < tex.index("small (faster) & Supervised & 41.5")
    html = page.read_text()
    assert '<h2 id="detectors1">' in html
    assert '<a href="#detectors1">' in html
    svg = (page.parent / "detectors_1.svg").read_text()
    assert all(f"<!-- {text} -->" in svg for text in ("fcos (dense)", "small (faster)", "STAC", "ARSL"))


def test_a_variant_is_named_once_where_all_rows_are_of_it(runs: Path) -> None:
    sections, _ = tables.load(runs)
    assert [section.title.partition("suite quick, ")[2] for section in sections] == [
        "detector fcos (dense)",
        "detector small (faster)",
    ]
    assert {row.label for section in sections for row in section.rows} == {"Supervised", "STAC", "ARSL"}
    make(runs, "stac", 5, 1, 50.0, detector="small", variant="wide", cell="wide")
    sections, _ = tables.load(runs)
    assert {row.label for row in sections[1].rows} == {"Supervised (faster)", "STAC (faster)", "STAC (wide)"}


@pytest.mark.parametrize("key", ["dataset", "protocol", "evaluated_on", "suite", "val_sha256", "preset"])
def test_what_differs_in_more_than_the_detector_does_not(tmp_path: Path, key: str) -> None:
    make(tmp_path, "supervised", 5, 1, 40.0)
    make(tmp_path, "supervised", 5, 1, 30.0, detector="fcos", cell="other", **{key: "tune"})
    assert overviews(tables.load(tmp_path)[0]) == []
    assert not list(report.run(tmp_path, resamples=0).parent.glob("detectors_*"))


def test_one_detector_has_no_overview(tmp_path: Path) -> None:
    make(tmp_path, "supervised", 5, 1, 40.0)
    make(tmp_path, "stac", 5, 1, 41.0)
    assert overviews(tables.load(tmp_path)[0]) == []
