"""What is kept of an evaluation: the same numbers as its parts give, under the names that records use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.core.record import read_record, write_record
from harness.core.types import RunRecord
from harness.data.ground_truth import from_coco
from harness.engine.analysis import analyse, errors_by_kind
from harness.engine.errors import KINDS
from harness.engine.voc_ap import voc_ap
from tests.harness.engine.evaluations import pycocotools, random_predictions, random_truth


def test_overall_and_per_class_scores_are_pycocotools() -> None:
    rng = np.random.default_rng(1)
    truth = random_truth(rng)
    rows = random_predictions(rng, truth)
    found = analyse(rows, from_coco(truth), voc=True)
    expected = pycocotools(rows, truth)
    assert found.scores["ap"] == pytest.approx(100 * expected.stats[0])
    assert found.scores["ar"] == pytest.approx(100 * expected.stats[8])
    assert found.scores["ar_m"] == pytest.approx(100 * expected.stats[10])
    each = [one["ap"] for one in found.per_class.values() if one["ap"] is not None]
    assert np.mean(each) == pytest.approx(found.scores["ap"])
    assert list(found.per_class) == ["class 2", "class 5", "class 90"]
    in_vocs_way = voc_ap(rows, from_coco(truth))
    assert found.scores["voc07_ap50"] == in_vocs_way.ap_11_points
    assert found.scores["voc_ap50"] == in_vocs_way.ap_all_points
    assert found.per_class["class 5"]["voc_ap50"] == in_vocs_way.class_all_points[1]
    assert "voc_ap50" not in analyse(rows, from_coco(truth)).scores


def test_a_record_holds_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    truth = random_truth(rng)
    rows = random_predictions(rng, truth)
    found, errors = analyse(rows, from_coco(truth)), errors_by_kind(rows, from_coco(truth))
    assert set(errors) == set(KINDS)
    record = RunRecord(status="ok", scores={"student": found.scores}, per_class=found.per_class, errors=errors)
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record
