"""The gallery: which images, what is drawn, and what is said where the data is not there."""

from __future__ import annotations

import base64
import html
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from harness.config import compose, sections
from harness.config.saved import read_config
from harness.core.record import read_record, write_record
from harness.core.types import ImageSource
from harness.data import prepare
from harness.data.datasets import Dataset
from harness.data.ground_truth import from_index
from harness.engine import build
from harness.report import pictures, report, tables
from harness.report.gallery import show
from harness.report.pictures import Panel
from tests.harness.report.test_report import make

SHAPES = ["data=shapes", "data.train_images=8", "data.val_images=12", "device=cpu", "split.percent=25"]


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
        drawn = 16 if method == "stac" else 0
        run_dir = make(folder, method, 10, 1, 50.0, val_sha256=opened.val.sha256, batch_unlabeled=drawn)
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


def _copy(suite: Path, folder: Path) -> Path:
    """Another folder with the same runs; that of the one that learns from unlabelled images."""
    for path in sorted(suite.glob("quick/*/*")):
        (folder / path.relative_to(suite)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(suite)).write_bytes(path.read_bytes())
    return folder / "quick/stac-10-1"


def _unlabelled(run_dir: Path) -> tuple[Dataset, ImageSource]:
    """The data of a run, and its unlabelled images with their true boxes."""
    cfg = read_config(run_dir)
    opened = build.divided_dataset(cfg)
    split = prepare.resolve_split(opened, sections.split_options(cfg))
    return opened, opened.train.source(split.unlabeled_ids)


def _keep_first_box(run_dir: Path, source: ImageSource) -> None:
    """As stage 1 leaves them: of each image one of its true boxes, where it has any."""
    boxes = [source.rows(row) for row in range(len(source))]
    labelled = source.with_targets(
        [source.target(row)[torch.arange(min(1, b.stop - b.start))] for row, b in enumerate(boxes)]
    )
    made = {"made_by": np.array(json.dumps({"stage 1": None})), "steps": np.int64(3)}
    arrays = {key: getattr(labelled, key) for key in ("ids", "boxes", "labels", "scores", "offsets")}
    np.savez(run_dir / "pseudo_labels.npz", **arrays, **made)


def _objects(panel: Panel) -> int:
    return int(panel.alt.split(": ")[1].split()[0])


def test_labels_of_a_stage_one_are_shown_beside_the_hidden_truth(suite: Path, tmp_path: Path) -> None:
    run_dir = _copy(suite, tmp_path)
    _, unlabelled = _unlabelled(run_dir)
    _keep_first_box(run_dir, unlabelled)
    gallery, why = show(_section(tmp_path), 3)
    assert gallery is not None, why
    assert len(gallery.pseudo_lines) == 3
    for line in gallery.pseudo_lines:
        assert line.image_id in unlabelled.ids
        truth, made = line.panels
        assert truth.caption == "hidden truth"
        objects = _objects(truth)
        assert made.alt == f"STAC's pseudo labels: {min(1, objects)} of {objects} found, 0 wrong"


def _keep_of_teacher(run_dir: Path, opened: Dataset, source: ImageSource, images: list[int]) -> None:
    """As a run of a teacher leaves them: every true box is taught, a corner box was found and is not."""
    kept = []
    for image in images:
        target = source.target(source.ids.tolist().index(image))
        ids = opened.train.category_ids
        boxes = [
            {
                "category_id": int(ids[label - 1]),
                "bbox": [x, y, x2 - x, y2 - y],
                "score": 0.9,
                "use": "box",
                "why": None,
            }
            for (x, y, x2, y2), label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True)
        ]
        corner = {"category_id": int(ids[0]), "bbox": [0, 0, 40, 40], "score": 0.1, "use": None, "why": "score too low"}
        kept.append({"image_id": image, "boxes": [*boxes, corner]})
    (run_dir / "pseudo_labels.json").write_text(json.dumps({"step": 5, "images": kept}))


def test_labels_of_a_teacher_are_shown_and_those_it_does_not_use(suite: Path, tmp_path: Path) -> None:
    run_dir = _copy(suite, tmp_path)
    opened, unlabelled = _unlabelled(run_dir)
    images = unlabelled.ids.tolist()[:4]
    _keep_of_teacher(run_dir, opened, unlabelled, images)
    gallery, why = show(_section(tmp_path), 3)
    assert gallery is not None, why
    assert len(gallery.pseudo_lines) == 3
    assert {line.image_id for line in gallery.pseudo_lines} < set(images)
    for line in gallery.pseudo_lines:
        truth, made = line.panels
        objects = _objects(truth)
        assert made.alt == f"STAC's pseudo labels: {objects} of {objects} found, 0 wrong"
        assert made.notes == ((f"{objects} for box",) if objects else ()) + ("1 not used: score too low",)
        grey = np.abs(np.asarray(_picture(made.source), float)[60:100, 160] - 189).max(-1)
        assert grey.min() < 40  # the right side of the corner box; 64 px of the picture are 256 here
    page = report.run(tmp_path, tmp_path / "out", gallery=3).read_text()
    assert "1 not used: score too low" in page
    assert "those that a teacher gives after its last step" in page


def test_stage_one_that_left_an_image_out_stands_beside_a_teacher(suite: Path, tmp_path: Path) -> None:
    run_dir = _copy(suite, tmp_path)
    opened, unlabelled = _unlabelled(run_dir)
    _keep_first_box(run_dir, unlabelled.select([0]))
    other = shutil.copytree(run_dir, tmp_path / "quick/mean_teacher-10-1")
    (other / "pseudo_labels.npz").unlink()
    record = replace(read_record(other / "record.json"), method="mean_teacher", cell="mean_teacher-10-1")
    write_record(other / "record.json", record)
    _keep_of_teacher(other, opened, unlabelled, unlabelled.ids.tolist()[:2])
    gallery, _ = show(_section(tmp_path), 5)
    assert gallery is not None
    notes = {line.image_id: line.panels[1].notes for line in gallery.pseudo_lines}
    first, second = unlabelled.ids.tolist()[:2]
    assert notes == {first: (), second: ("left out of training: nothing was found",)}


def test_labels_of_images_whose_truth_nobody_knows_are_neither_right_nor_wrong(suite: Path, tmp_path: Path) -> None:
    run_dir = _copy(suite, tmp_path)
    opened, unlabelled = _unlabelled(run_dir)
    _keep_of_teacher(run_dir, opened, unlabelled, unlabelled.ids.tolist()[:1])
    truth = from_index(opened.train)
    boxes = np.array([[unlabelled.ids[0], 1, 1, 9, 9, 0.9, opened.train.category_ids[0]]])
    image = int(unlabelled.ids[0])
    shown = pictures.line(
        opened.train, truth, image, {"T": pictures.FoundBoxes(boxes)}, name="hidden truth", known=False
    )
    assert [panel.alt for panel in shown.panels] == [f"image {image}: nobody labelled it", "T: 1 box"]


@pytest.mark.parametrize("damage", ["missing", "damaged stage 1", "damaged teacher", "foreign image", "foreign class"])
def test_without_pseudo_labels_the_evaluation_images_are_shown_and_it_is_said(
    suite: Path, tmp_path: Path, damage: str
) -> None:
    run_dir = _copy(suite, tmp_path)
    box = {"category_id": 99, "bbox": [0, 0, 4, 4], "score": 0.5, "use": "box", "why": None}
    first = int(_unlabelled(run_dir)[1].ids[0])
    said = "STAC (no pseudo labels lie beside its record"
    if damage == "damaged stage 1":
        (run_dir / "pseudo_labels.npz").write_bytes(b"PK")
        said = "pseudo_labels.npz is damaged"
    elif damage == "damaged teacher":
        (run_dir / "pseudo_labels.json").write_text("{")
        said = "pseudo_labels.json is damaged"
    elif damage != "missing":
        image = first if damage == "foreign class" else 9999
        kept = {"step": 5, "images": [{"image_id": image, "boxes": [box]}]}
        (run_dir / "pseudo_labels.json").write_text(json.dumps(kept))
        said = "category 99" if damage == "foreign class" else "none of those that were kept are of images in the data"
    gallery, why = show(_section(tmp_path), 3)
    assert gallery is not None, why
    assert len(gallery.lines) == 3
    assert gallery.pseudo_lines == []
    assert said in gallery.pseudo_caption
    assert said in html.unescape(report.run(tmp_path, tmp_path / "out", gallery=3).read_text())


def test_the_page_holds_the_pictures(suite: Path, tmp_path: Path) -> None:
    page = report.run(suite, tmp_path, gallery=2).read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert "data:image/jpeg" not in report.run(suite, tmp_path, gallery=0).read_text()


@pytest.mark.parametrize("damage", ["other data", "no data", "no config", "predictions", "foreign boxes"])
def test_without_the_data_it_says_so(suite: Path, tmp_path: Path, damage: str) -> None:
    _copy(suite, tmp_path)
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
