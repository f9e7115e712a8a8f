"""A whole report of one fixed set of records, so that no change of it goes unseen.

Of report.html without its figures, which differ between versions of matplotlib, and without style.css and script.js,
which it holds word for word.

After a change that is meant, SSODBENCH_GOLDEN=write writes them anew; read the difference before committing it.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.report import report
from tests.harness.report.test_report import make

GOLDEN = Path(__file__).parents[2] / "data/report"
REFERENCE = Path(__file__).parents[3] / "results/reference"
CLASSES = ("cross", "ellipse")


def _records(folder: Path) -> None:
    """Three methods, two ratios, three folds; a cell that failed; the baseline on all labels and with equal compute."""
    base = {("supervised", 5): 40.0, ("supervised", 10): 50.0, ("stac", 5): 41.0, ("stac", 10): 50.5}
    base |= {("mean_teacher", 5): 46.0, ("mean_teacher", 10): 54.0, ("supervised", 100): 70.0}
    for number, ((method, percent), ap) in enumerate(base.items()):
        for fold in (1, 2, 3):
            value = ap + fold + (number + 3) * fold * fold % 7 / 10
            semi = method != "supervised"
            changes: dict[str, Any] = {
                "batch_labeled": 16,
                "batch_unlabeled": 16 if semi else 0,
                "images_unlabeled": 16000 if semi else 0,
                "extra_steps": 1000 if method == "stac" else 0,
                "train_seconds": 600.0 + 300 * semi,
                "augment": "small",
                "pipeline": "dali",
                "ap50": value + 20,
                "scores": {
                    "student": {"ap": value - 1},
                    "teacher": {"ap": value, "ar": value + 10, "voc07_ap50": value + 18, "voc_ap50": value + 21},
                },
                "per_class": {name: {"ap": value + k, "ar": value + 9 + k} for k, name in enumerate(CLASSES)},
                "errors": {
                    kind: {"count": 10.0 * k + fold, "lost_ap50": k + fold / 10}
                    for k, kind in enumerate(("class", "place", "both", "duplicate", "background", "missed"))
                },
                "environment": {"cpu": "a processor", "cores": 2, "threads": 1, "gpus": [], "packages": {"torch": "2"}},
                "commit": "0123456789abcdef",
            }
            if semi:
                changes |= {"pseudo_precision": 0.8, "pseudo_recall": 0.5, "pseudo_iou": 0.75}
            if (method, percent, fold) == ("mean_teacher", 10, 3):
                changes |= {"status": "failed", "error": "RunError: the loss is not finite"}
            make(folder, method, percent, fold, value, **changes)
    for fold in (1, 2, 3):
        config = {"schedule": {"steps": 2000}, "split": {"percent": 5, "fold": fold}, "seed": fold}
        equal = {"steps": 2000, "images_labeled": 32000, "batch_labeled": 16, "cell": f"longer-{fold}"}
        make(folder, "supervised", 5, fold, 44.0 + fold + fold % 2 / 5, **equal, train_seconds=1200.0, config=config)


@pytest.mark.parametrize("name", ["bccd-2cores", "raccoon-2cores", "bccd_small-2cores", "shapes-2cores"])
def test_the_records_that_we_measured_have_a_report(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "records.jsonl").write_bytes((REFERENCE / name / "records.jsonl").read_bytes())
    text = report.run(folder).with_suffix(".md").read_text()
    assert not [line for line in text.splitlines() if line.startswith("> ")]  # no record that could not be used
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    found = json.loads((folder / "report/report.json").read_text())["tables"]
    assert {table["keys"]["dataset"] for table in found} == {re.split("[_-]", name)[0]}
    detectors = [table["keys"]["detector"] for table in found]
    assert sorted(detectors) == sorted({record["detector"] for record in records})
    assert text.count("\n## ") == len(found) + (len(found) > 1)  # one more where they stand beside each other
    cells = [cell for table in found for row in table["rows"] for cell in row["cells"]]
    assert sorted(run["ap"] for cell in cells for run in cell["runs"]) == sorted(record["ap"] for record in records)


def _document(folder: Path) -> Path:
    (folder / "document.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\usepackage{graphicx}\\begin{document}\\input{report}\\end{document}"
    )
    return folder / "document.tex"


def test_latex_compiles_or_is_balanced(tmp_path: Path) -> None:
    _records(tmp_path)
    odd = {"dataset": "a_b & {c} 50 % #1 $x^2$ ~ \\end{table}", "suite": "[*]", "cell": "odd", "pretraining": "<i>|`"}
    make(tmp_path, "supervised", 5, 1, 40.0, **odd)
    make(tmp_path, "my_method", 5, 1, 44.0, **{**odd, "cell": "other", "error": "\\frac"})
    make(tmp_path, "supervised", 5, 1, 40.0, dataset="coco", cell="coco")
    folder = report.run(tmp_path, tmp_path / "report").parent
    text = (folder / "report.tex").read_text()
    assert text.count("\\begin{") == text.count("\\end{")
    bare = re.sub(r"\\\\|\\[{}%]", "", re.sub(r"(?m)^%.*$", "", text))
    assert bare.count("{") == bare.count("}")
    compiler = shutil.which("tectonic") or shutil.which("pdflatex")
    if compiler is not None:
        options = [] if compiler.endswith("tectonic") else ["-interaction=nonstopmode", "-halt-on-error"]
        done = subprocess.run(
            [compiler, *options, _document(folder).name], cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-3000:]
        assert (folder / "document.pdf").stat().st_size > 10_000


def _same(found: Any, golden: Any) -> bool:
    """Equal, but for the last digits of numbers."""
    if isinstance(found, dict) and isinstance(golden, dict):
        return found.keys() == golden.keys() and all(_same(found[key], golden[key]) for key in golden)
    if isinstance(found, list) and isinstance(golden, list):
        return len(found) == len(golden) and all(map(_same, found, golden))
    return bool(found == (pytest.approx(golden, rel=1e-6) if isinstance(golden, float) else golden))


def _stable(page: str) -> str:
    """The page without what others decide."""
    for name in ("style.css", "script.js"):
        content = (report.TEMPLATES / name).read_text().rstrip("\n")
        assert page.count(content) == 1
        page = page.replace(content, name)
    return re.sub(r'"data:image/svg\+xml;base64,[^"]*"', '"FIGURE"', page)


def _lines(path: Path) -> list[dict[str, float | str]]:
    """The rows of a CSV file, numbers as such."""

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def golden_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the fixed records, its page made stable; written as the golden one where that is asked for."""
    folder = tmp_path_factory.mktemp("golden")
    _records(folder)
    page = report.run(folder, folder / "report")
    page.write_text(_stable(page.read_text()))
    if os.environ.get("SSODBENCH_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        for suffix in (".md", ".json", ".html", ".csv"):
            (GOLDEN / f"report{suffix}").write_bytes(page.with_suffix(suffix).read_bytes())
    return page.parent


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_text_is_the_golden_one(golden_report: Path, name: str) -> None:
    assert (golden_report / name).read_text() == (GOLDEN / name).read_text()


def test_numbers_are_the_golden_ones(golden_report: Path) -> None:
    found, golden = (json.loads((folder / "report.json").read_text()) for folder in (golden_report, GOLDEN))
    assert _same(found, golden)


def test_table_is_the_golden_one(golden_report: Path) -> None:
    found, golden = (folder / "report.csv" for folder in (golden_report, GOLDEN))
    assert found.read_text().splitlines()[0] == golden.read_text().splitlines()[0]  # columns in their order
    assert _same(_lines(found), _lines(golden))
