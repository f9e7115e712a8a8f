"""Evaluation: boxes back to original pixels, pycocotools' numbers, labels back to category ids."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from harness.core.types import Target, View
from harness.data.ground_truth import from_coco
from harness.engine import evaluate
from tests.harness.engine.evaluations import random_predictions, random_truth


def _truth(rng: np.random.Generator, images: int = 12) -> dict[str, Any]:
    annotations = []
    for image in range(images):
        for _ in range(int(rng.integers(0, 5))):
            x, y, w, h = rng.uniform(0, 60, 2).tolist() + rng.uniform(5, 120, 2).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image * 7 + 3,
                    "category_id": int(rng.choice([2, 5, 90])),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return {
        "images": [
            {"id": image * 7 + 3, "width": 200, "height": 200, "file_name": f"{image}.jpg"} for image in range(images)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in (2, 5, 90)],
    }


def _noisy_results(rng: np.random.Generator, truth: dict[str, Any]) -> np.ndarray:
    rows = []
    for a in truth["annotations"]:
        for _ in range(2):
            box = np.array(a["bbox"]) + rng.normal(0, 4, 4)
            rows.append([a["image_id"], *box, rng.random(), a["category_id"] if rng.random() < 0.8 else 5])
    return np.array(rows)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_pycocotools_run_from_files(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = _truth(rng)
    rows = _noisy_results(rng, truth)
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "info": {}}))
    evaluate.write_predictions(tmp_path / "results.json", rows)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        check = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
        check.evaluate()
        check.accumulate()
        check.summarize()
    ours = evaluate.score(rows, truth)
    for name, expected in zip(evaluate.METRICS, check.stats[:6], strict=True):
        value = ours[name]
        assert (value is None and expected < 0) or value == pytest.approx(100 * expected, abs=0.05)


def test_perfect_and_empty_results() -> None:
    truth = _truth(np.random.default_rng(0))
    for a in truth["annotations"]:
        a["iscrowd"] = 0
    perfect = np.array([[a["image_id"], *a["bbox"], 0.9, a["category_id"]] for a in truth["annotations"]])
    assert evaluate.score(perfect, truth)["ap"] == pytest.approx(100.0)
    assert evaluate.score(np.zeros((0, 7)), truth)["ap"] == 0.0


class _Echo(nn.Module):
    """Finds the boxes that it is told, as they lie in the view."""

    def __init__(self, found: list[Target]) -> None:
        super().__init__()
        self.found = found

    def detect(self, view: View, score_threshold: float) -> list[Target]:
        assert not self.training
        return [t[t.scores > score_threshold] for t in self.found[: len(view)]]


def test_boxes_go_back_through_the_inverse_matrix_and_labels_to_category_ids() -> None:
    matrix = torch.tensor([[[2.0, 0, 0], [0, 0.5, 0], [0, 0, 1]]])
    view = View(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]]), matrix)
    found = Target(torch.tensor([[20.0, 5, 40, 10], [0, 0, 2, 2]]), torch.tensor([2, 1]), torch.tensor([0.8, 0.01]))

    def batches() -> Iterator[tuple[View, Tensor]]:
        yield view, torch.tensor([17])

    network = _Echo([found])
    network.train()
    rows = evaluate.predictions(evaluate.detect_all(network, batches(), 0.05), np.array([5, 90]))  # type: ignore[arg-type]
    np.testing.assert_allclose(rows, [[17, 10, 10, 10, 10, 0.8, 90]], rtol=1e-6)
    assert network.training


@pytest.mark.parametrize("seed", range(8))
def test_the_quick_scorer_gives_pycocotools_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=int(rng.integers(1, 40)))
    rows = random_predictions(rng, truth) if seed else np.zeros((0, 7))
    found, wanted = evaluate.quick_score(rows, from_coco(truth)), evaluate.score(rows, truth)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name] is None if value is None else found[name] == pytest.approx(value, rel=1e-12, abs=1e-12)
