"""The quick scorer on what a trained network says: near copies, equal scores, crowds; against pycocotools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.config import compose
from harness.config.run import settings_of
from harness.core import distributed
from harness.data.ground_truth import from_index
from harness.engine import build
from harness.engine.accumulate import METRICS, accumulate
from harness.engine.evaluate import detect_all, predictions
from harness.engine.matches import match
from tests.harness.engine.evaluations import pycocotools

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "coco_tiny"
PLACES = dict(zip(METRICS, (0, 1, 2, 3, 4, 5, 8, 9, 10, 11), strict=True))  # in COCOeval.stats


def trained(overrides: list[str], steps: int, cache: Path) -> tuple[build.Experiment, np.ndarray]:
    """A small detector after a few steps, and its boxes on the evaluation images."""
    place = [f"cache_dir={cache}", "detector.weights=scratch", "method=supervised", "device=cpu", "split.percent=50"]
    settings = settings_of(compose.load([*place, *overrides, f"schedule.steps={steps}"]))
    torch.set_num_threads(1)
    run = build.experiment(settings, distributed.join("cpu"), build.data(settings))
    batches = run.pipeline.batches(0)
    for step in range(steps):
        run.method.before_step(step)
        losses, _ = run.method(next(batches), step)
        run.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        run.optimizer.step()
    found = detect_all(run.method.student, run.pipeline.images(run.data.val), 0.001)
    rows = predictions(found, run.data.dataset.val.category_ids)
    run.pipeline.close()
    return run, rows


def same_as_pycocotools(run: build.Experiment, rows: np.ndarray) -> None:
    """Every metric, and AP and recall of every class, size and overlap, whether scores are drawn or often equal."""
    val = run.data.dataset.val
    for decimals in (9, 2):  # two decimals make hundreds of boxes equal, within and across images
        rows = rows.copy()
        rows[:, 5] = rows[:, 5].round(decimals)
        expected = pycocotools(rows, val.coco_ground_truth())
        found = accumulate(match(rows, from_index(val)))
        metrics = found.metrics()
        for name, place in PLACES.items():
            value = expected.stats[place]
            wanted = np.nan if value < 0 else 100 * value
            np.testing.assert_allclose(metrics[name][0], wanted, rtol=0, atol=1e-10, err_msg=name)
        precision, recall = (expected.eval[key][..., -1] for key in ("precision", "recall"))
        ap = np.where((precision > -1).all(1), precision.mean(1), np.nan)
        np.testing.assert_allclose(found.ap[0], ap.transpose(2, 0, 1), rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            found.recall[0], np.where(recall > -1, recall, np.nan).transpose(2, 0, 1), atol=1e-12
        )
        if decimals == 9:
            assert 0 < expected.stats[1] < 1, "a network that finds something and not all"


@pytest.mark.timeout(300)
def test_on_drawn_shapes(tmp_path: Path) -> None:
    run, rows = trained(["data=shapes", "data.train_images=80", "data.val_images=40"], 60, tmp_path)
    assert len(rows) > 400
    same_as_pycocotools(run, rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the photographs")
def test_on_photographs(tmp_path: Path) -> None:
    """80 classes, crowds, areas of segments; evaluated on images that were trained on, so that something is found."""
    same = ["data.val_annotations=annotations/instances_train2017.json", "data.val_images=train2017"]
    run, rows = trained(["data=coco", f"data.root={PHOTOS}", *same], 120, tmp_path)
    assert len(rows) > 1000
    same_as_pycocotools(run, rows)
