"""YOLO folders against hand-written files, and the same pictures as COCO."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from harness.core.types import UserError
from harness.data.datasets import coco_dataset
from harness.data.yolo import label_file, yolo_dataset


def write(
    root: Path, description: dict[str, Any] | str, labels: dict[str, str], size: tuple[int, int] = (40, 20)
) -> Path:
    """`labels`: picture under images/ without suffix -> its lines; "-" for no label file."""
    for name, lines in labels.items():
        picture = root / "images" / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(picture)
        if lines != "-":
            file = root / "labels" / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(lines)
    text = description if isinstance(description, str) else yaml.safe_dump(description)
    (root / "data.yaml").write_text(text)
    return root


GOOD = {"train": "images/train", "val": "images/val", "names": ["cat", "größerer Hund"]}
LABELS = {"train/b": "0 0.5 0.5 0.5 1\n1 0.25 0.25 0.1 0.2\n", "train/a": "-", "val/c": "1 0.5 0.5 1 1\n"}


def opened(root: Path, tmp_path: Path, **options: Any) -> Any:
    return yolo_dataset("pets", root, tmp_path / "cache", **options)


def test_hand_example(tmp_path: Path) -> None:
    """40 x 20 px: (0.5, 0.5, 0.5, 1) is x 10..30, y 0..20."""
    dataset = opened(write(tmp_path / "d", GOOD, LABELS), tmp_path)
    assert list(dataset.train.category_names) == ["cat", "größerer Hund"]
    assert list(dataset.train.file_names) == ["images/train/a.jpg", "images/train/b.jpg"]
    assert dataset.train.offsets.tolist() == [0, 0, 2]
    np.testing.assert_allclose(dataset.train.boxes, [[10, 0, 30, 20], [8, 3, 12, 7]], atol=1e-5)
    assert dataset.train.labels.tolist() == [1, 2]
    assert dataset.val.boxes.tolist() == [[0, 0, 40, 20]]
    assert dataset.val.image_ids.tolist() == [3]
    assert all(Path(path).exists() for path in dataset.train.source().paths)


@pytest.mark.parametrize(
    "description",
    [
        {**GOOD, "names": {0: "cat", 1: "dog"}},
        {**GOOD, "path": "."},
        {**GOOD, "path": "/nowhere/at/all", "nc": 2},
        {**GOOD, "train": ["images/train"]},
        {**GOOD, "train": "train.txt"},
        {**GOOD, "train": "../images/train"},
    ],
)
def test_ways_in_which_descriptions_are_written(tmp_path: Path, description: dict[str, Any]) -> None:
    root = write(tmp_path / "d", description, LABELS)
    (root / "train.txt").write_text("./images/train/a.jpg\nimages/train/b.jpg\n")
    assert len(opened(root, tmp_path).train.boxes) == 2


def test_polygon_is_its_hull(tmp_path: Path) -> None:
    root = write(tmp_path / "d", GOOD, {**LABELS, "train/b": "0 0.25 0.5 0.75 0 0.5 1\n"})
    np.testing.assert_allclose(opened(root, tmp_path).train.boxes, [[10, 0, 30, 20]], atol=1e-5)


def test_changed_labels_are_read_again(tmp_path: Path) -> None:
    root = write(tmp_path / "d", GOOD, LABELS)
    before = opened(root, tmp_path).train
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.5")
    after = opened(root, tmp_path).train
    assert (len(before.boxes), len(after.boxes)) == (2, 3)
    assert before.sha256 != after.sha256


def test_picture_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "d", GOOD, LABELS)
    (root / "images/train/a.jpg").write_text("404")
    train = opened(root, tmp_path).train
    assert list(train.file_names) == ["images/train/b.jpg"]
    assert any("images/train/a.jpg" in str(finding) and "left out" in str(finding) for finding in train.findings)


def test_same_as_coco(tmp_path: Path) -> None:
    """Random boxes written in both formats open as the same arrays."""
    rng = np.random.default_rng(0)
    labels, images, annotations = {}, [], []
    for number in range(1, 9):
        part = "train" if number <= 6 else "val"
        lines = []
        for _ in range(int(rng.integers(0, 4))):
            x, y = rng.uniform(0, 20), rng.uniform(0, 10)
            w, h = rng.uniform(1, 20), rng.uniform(1, 10)
            label = int(rng.integers(0, 2))
            lines.append(f"{label} {(x + w / 2) / 40:.9f} {(y + h / 2) / 20:.9f} {w / 40:.9f} {h / 20:.9f}")
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": [x, y, w, h]}
            )
        labels[f"{part}/{number}"] = "\n".join(lines)
        images.append({"id": number, "file_name": f"{part}/{number}.jpg", "width": 40, "height": 20})
    root = write(tmp_path / "d", {**GOOD, "names": ["cat", "dog"]}, labels)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for part, own in (("train", images[:6]), ("val", images[6:])):
        ids = {image["id"] for image in own}
        boxes = [a for a in annotations if a["image_id"] in ids]
        content = {"images": own, "annotations": boxes, "categories": categories}
        (root / f"{part}.json").write_text(json.dumps(content))
    coco = coco_dataset("pets", root, tmp_path / "cache", train_images="images", val_images="images")
    yolo = opened(root, tmp_path)
    for one, two in ((coco.train, yolo.train), (coco.val, yolo.val)):
        np.testing.assert_allclose(one.boxes, two.boxes, atol=1e-4)
        assert one.labels.tolist() == two.labels.tolist()
        assert one.offsets.tolist() == two.offsets.tolist()
        assert one.image_ids.tolist() == two.image_ids.tolist()


def test_unlabelled_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "d", GOOD, LABELS)
    shutil.copytree(root / "images/train", root / "more")
    more = opened(root, tmp_path, unlabeled="more").unlabeled
    assert len(more) == 2
    assert not len(more.boxes)


def test_where_labels_lie() -> None:
    assert label_file(Path("/a/images/b/images/c.jpg")) == Path("/a/images/b/labels/c.txt")
    assert label_file(Path("/a/b/c.jpeg")) == Path("/a/b/c.txt")


@pytest.mark.parametrize(
    ("description", "labels", "named"),
    [
        ({**GOOD, "names": []}, {}, "class names"),
        ({**GOOD, "names": {1: "cat"}}, {}, "number its names from 0"),
        ({"names": ["cat"], "val": "images/val"}, {}, "the key train"),
        ({**GOOD, "train": "elsewhere"}, {}, "elsewhere is not there"),
        ("- a list", {}, "no keys"),
        ("{", {}, "cannot be read as YAML"),
        (GOOD, {"train/b": "2 0.5 0.5 0.5 0.5"}, r"b\.txt:1 has the class 2"),
        (GOOD, {"train/b": "0.5 0.5 0.5 0.5 0.5"}, r"has the class 0\.5"),
        (GOOD, {"train/b": "\n0 10 10 5 5"}, r"b\.txt:2 has coordinates outside 0 to 1"),
        (GOOD, {"train/b": "0 nan 0.1 0.1 0.1"}, "outside 0 to 1"),
        (GOOD, {"train/b": "0 0.5 0.5"}, "has 2 coordinates"),
        (GOOD, {"train/b": "cat 0.5 0.5 0.5 0.5"}, "no number"),
    ],
)
def test_mistakes(tmp_path: Path, description: Any, labels: dict[str, str], named: str) -> None:
    root = write(tmp_path / "d", description, {**LABELS, **labels})
    with pytest.raises(UserError, match=named):
        opened(root, tmp_path)
