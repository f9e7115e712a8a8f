"""The gallery: which images, what is drawn, and what is said where the data is not there."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from harness.config import compose
from harness.config.saved import read_config
from harness.core.record import read_record, write_record
from harness.engine import build
from harness.report import report, tables
from harness.report.gallery import show
from tests.harness.report.test_report import make

SHAPES = ["data=shapes", "data.train_images=8", "data.val_images=12", "device=cpu"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on generated images: the baseline finds every object, the other one a corner of each picture."""
    folder = tmp_path_factory.mktemp("gallery")
    cfg = compose.load([*SHAPES, f"cache_dir={folder / 'cache'}"])
    opened = build.dataset(cfg.data, Path(cfg.cache_dir))
    truth = opened.val.coco_ground_truth()
    right = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
    ]
    corner = [{**box, "bbox": [0, 0, 3, 3]} for box in right]
    doubtful = [{**box, "score": 0.4} for box in right]
    for method, boxes in (("supervised", right + doubtful), ("stac", corner)):
        run_dir = make(folder, method, 10, 1, 50.0, val_sha256=opened.val.sha256)
        (run_dir / "predictions.json").write_text(json.dumps(boxes))
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return folder


def _section(folder: Path) -> tables.Section:
    return tables.load(folder)[0][0]


def _picture(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))


def test_truth_and_boxes_of_every_method_side_by_side(suite: Path) -> None:
    gallery, why = show(_section(suite), 4)
    assert gallery is not None, why
    assert len({line.image_id for line in gallery.lines}) == 4
    for line in gallery.lines:
        truth, baseline, stac = line.panels
        objects = int(truth.alt.split(": ")[1].split()[0])
        assert baseline.alt == f"Supervised: {objects} of {objects} found, 0 wrong"  # scores of 0.4 are not shown
        assert stac.alt == f"STAC: 0 of {objects} found, {objects} wrong"
        assert _picture(truth.source).size == (256, 256)
        if objects:
            plain, drawn = (np.asarray(_picture(panel.source), float) for panel in (truth, stac))
            assert np.abs(plain - drawn).max() > 50


def test_the_same_images_every_time_and_the_first_of_more(suite: Path) -> None:
    few, many = show(_section(suite), 2)[0], show(_section(suite), 5)[0]
    assert few is not None
    assert many is not None
    assert few.lines == many.lines[:2]
    ids = [line.image_id for line in many.lines]
    assert ids != sorted(ids)


def test_pseudo_labels_are_shown_beside_the_hidden_truth(suite: Path, tmp_path: Path) -> None:
    for path in sorted(suite.glob("quick/*/*")):
        (tmp_path / path.relative_to(suite)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(suite)).write_bytes(path.read_bytes())
    run_dir = tmp_path / "quick/stac-10-1"
    cfg = read_config(run_dir)
    train = build.dataset(cfg.data, Path(cfg.cache_dir)).train
    unlabelled = train.source(train.image_ids[2:7])
    offsets = np.array([0, *np.minimum(np.arange(1, 6), len(unlabelled.boxes))], np.int64)
    first = [int(unlabelled.offsets[row]) for row in range(5)]  # the first object of each image
    labels = {
        "ids": unlabelled.ids,
        "boxes": unlabelled.boxes[first],
        "labels": unlabelled.labels[first],
        "scores": np.full(5, 0.95, np.float32),
        "offsets": offsets,
        "made_by": np.array(json.dumps({"stage 1": None})),
        "steps": np.int64(3),
    }
    np.savez(run_dir / "pseudo_labels.npz", **labels)
    gallery, why = show(_section(tmp_path), 3)
    assert gallery is not None, why
    assert len(gallery.pseudo_lines) == 3
    for line in gallery.pseudo_lines:
        assert line.image_id in unlabelled.ids
        truth, made = line.panels
        objects = int(truth.alt.split(": ")[1].split()[0])
        assert made.alt == f"STAC's pseudo labels: 1 of {objects} found, 0 wrong"
    assert "Those of a teacher change" in report.run(tmp_path, tmp_path / "out", gallery=3).read_text()
    (run_dir / "pseudo_labels.npz").write_bytes(b"PK")
    assert "pseudo_labels.npz is damaged" in show(_section(tmp_path), 3)[1]


def test_the_page_holds_the_pictures(suite: Path, tmp_path: Path) -> None:
    page = report.run(suite, tmp_path, gallery=2).read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert "data:image/jpeg" not in report.run(suite, tmp_path, gallery=0).read_text()


@pytest.mark.parametrize("damage", ["other data", "no data", "no config", "predictions", "foreign boxes"])
def test_without_the_data_it_says_so(suite: Path, tmp_path: Path, damage: str) -> None:
    for path in sorted(suite.glob("quick/*/*")):
        (tmp_path / path.relative_to(suite)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(suite)).write_bytes(path.read_bytes())
    run_dir = tmp_path / "quick/supervised-10-1"
    if damage == "other data":
        for path in tmp_path.rglob("record.json"):
            write_record(path, replace(read_record(path), val_sha256="0" * 64))
    elif damage == "no data":
        for path in tmp_path.rglob("config.yaml"):
            cfg = compose.load(["data=custom", f"data.root={tmp_path / 'gone'}", f"cache_dir={tmp_path / 'cache'}"])
            path.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    elif damage == "no config":
        for path in tmp_path.rglob("config.yaml"):
            path.unlink()
    elif damage == "predictions":
        (run_dir / "predictions.json").write_text("{")
    else:
        boxes = json.loads((run_dir / "predictions.json").read_text())
        (run_dir / "predictions.json").write_text(json.dumps([{**box, "category_id": 99} for box in boxes]))
    gallery, why = show(_section(tmp_path), 3)
    assert gallery is None
    assert why.startswith("the evaluation images cannot be shown (")
    assert f"No pictures: {why[:40]}" in report.run(tmp_path, tmp_path / "out", gallery=3).read_text()
