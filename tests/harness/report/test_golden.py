"""The whole Markdown and JSON of one fixed set of records, so that no change of theirs goes unseen.

After a change that is meant, SSODBENCH_GOLDEN=write writes them anew; read the difference before committing it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from harness.report import report
from tests.harness.report.test_report import make

GOLDEN = Path(__file__).parents[2] / "data/report"
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


def _same(found: Any, golden: Any) -> bool:
    """Equal, but for the last digits of numbers."""
    if isinstance(found, dict) and isinstance(golden, dict):
        return found.keys() == golden.keys() and all(_same(found[key], golden[key]) for key in golden)
    if isinstance(found, list) and isinstance(golden, list):
        return len(found) == len(golden) and all(map(_same, found, golden))
    return bool(found == (pytest.approx(golden, rel=1e-6) if isinstance(golden, float) else golden))


def test_markdown_and_json_are_the_golden_ones(tmp_path: Path) -> None:
    _records(tmp_path)
    page = report.run(tmp_path, tmp_path / "report")
    if os.environ.get("SSODBENCH_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        for suffix in (".md", ".json"):
            (GOLDEN / f"report{suffix}").write_bytes(page.with_suffix(suffix).read_bytes())
    assert page.with_suffix(".md").read_text() == (GOLDEN / "report.md").read_text()
    found, golden = (json.loads((folder / "report.json").read_text()) for folder in (page.parent, GOLDEN))
    assert _same(found, golden)
