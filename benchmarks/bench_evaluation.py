"""Matches, accumulation and bootstrap at the size of a small evaluation set and at COCO's.

    python -m pytest benchmarks/bench_evaluation.py --benchmark-only --timeout 3000

The detections are generated: 100 boxes on each image, of which two fifths lie about an object.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from harness.data.ground_truth import GroundTruth, from_coco
from harness.engine.accumulate import scores
from harness.engine.errors import error_table
from harness.engine.matches import match
from harness.report.bootstrap import resample

SIZES = {"250 images, 3 classes": (250, 3), "5,000 images, 80 classes": (5000, 80)}


def evaluation(images: int, classes: int) -> tuple[np.ndarray, dict[str, Any]]:
    """(N, 7) predictions and a COCO dictionary with 7 objects on an image, few classes having most of them."""
    rng = np.random.default_rng(0)
    annotations, rows = [], []
    for image in range(1, images + 1):
        count = max(1, rng.poisson(7))
        boxes = np.column_stack([rng.uniform(0, 400, (count, 2)), np.exp(rng.normal(3.9, 1, (count, 2)))])
        own = np.minimum(rng.geometric(0.06, count), classes)
        for box, k in zip(boxes.tolist(), own.tolist(), strict=True):
            place = {"id": len(annotations) + 1, "image_id": image, "category_id": k, "bbox": box}
            annotations.append({**place, "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.02)})
        near = rng.integers(0, count, 40)
        found = boxes[near] * rng.normal(1, 0.08, (40, 4))
        others = np.column_stack([rng.uniform(0, 400, (60, 2)), np.exp(rng.normal(3.9, 1, (60, 2)))])
        labels = np.concatenate([own[near], np.minimum(rng.geometric(0.06, 60), classes)])
        score = np.concatenate([rng.beta(2, 3, 40), rng.beta(1, 6, 60)]).astype(np.float32)
        rows.append(np.column_stack([np.full(100, image), np.concatenate([found, others]), score, labels]))
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)]
    truth = {"images": [{"id": i} for i in range(1, images + 1)], "annotations": annotations, "categories": categories}
    return np.concatenate(rows), truth


def by_pycocotools(rows: np.ndarray, truth: dict[str, Any]) -> COCOeval:
    """What `match` and `scores` replace."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        found = COCOeval(coco, coco.loadRes(rows), "bbox")
        found.evaluate()
        found.accumulate()
    return found


@pytest.fixture(scope="module", params=list(SIZES))
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, dict[str, Any], GroundTruth]:
    """One evaluation of each size; everything is compiled by a tiny one first."""
    rows, truth = evaluation(2, 3)
    resample(match(rows, from_coco(truth)), 2)
    error_table(rows, from_coco(truth))
    rows, truth = evaluation(*SIZES[request.param])
    return rows, truth, from_coco(truth)


def test_pycocotools(case: Any, benchmark: Any) -> None:
    benchmark.pedantic(by_pycocotools, case[:2], rounds=1)


def test_match_and_accumulate(case: Any, benchmark: Any) -> None:
    benchmark.pedantic(lambda: scores(match(case[0], case[2])), rounds=1)


def test_errors(case: Any, benchmark: Any) -> None:
    benchmark.pedantic(error_table, (case[0], case[2]), rounds=1)


def test_bootstrap_of_1000(case: Any, benchmark: Any) -> None:
    benchmark.pedantic(resample, (match(case[0], case[2]), 1000), rounds=1)
