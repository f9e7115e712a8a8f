"""`ssodbench prepare` says what it recognised: the same three pictures in each format, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from harness import cli

pytestmark = pytest.mark.timeout(120)

# Part -> picture -> (class, x, y, width, height) px, in pictures of 64 x 48.
PARTS: dict[str, dict[str, list[tuple[int, int, int, int, int]]]] = {
    "train": {"grüne Äpfel 苹果.jpg": [(0, 4, 8, 16, 24), (1, 8, 8, 32, 32)], "b c.jpg": [(0, 0, 0, 64, 48)]},
    "val": {"d.jpg": [(1, 2, 4, 20, 20)]},
}
NAMES = ["größerer Hund", "猫 cat"]


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def coco(root: Path, names: list[str], ids: list[int]) -> list[str]:
    for part, pictures in PARTS.items():
        for name in pictures:
            draw(root / part / name)
        images = [{"id": n, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(pictures)]
        kept = [
            (n, b)
            for n, boxes in enumerate(pictures.values())
            for b in boxes
            if len(names) > 1 or part == "val" or not b[0]
        ]
        rows = [
            {"id": n, "image_id": image, "category_id": ids[min(b[0], len(ids) - 1)], "bbox": list(b[1:]), "iscrowd": 0,
             "area": b[3] * b[4]}
            for n, (image, b) in enumerate(kept)
        ]  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
        content = {"images": images, "annotations": rows, "categories": categories}
        (root / f"{part}.json").write_text(json.dumps(content, ensure_ascii=part == "val"))
    return ["data=custom", f"data.root={root}"]


def yolo(root: Path) -> list[str]:
    for part, pictures in PARTS.items():
        for name, boxes in pictures.items():
            draw(root / "images" / part / name)
            lines = [f"{c} {(x + w / 2) / 64} {(y + h / 2) / 48} {w / 64} {h / 48}" for c, x, y, w, h in boxes]
            file = (root / "labels" / part / name).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines))
    said = {"train": "images/train", "val": "images/val", "names": NAMES}
    (root / "data.yaml").write_text(yaml.safe_dump(said, allow_unicode=True), encoding="utf-8")
    return ["data=yolo", f"data.root={root}"]


def voc(root: Path) -> list[str]:
    for part, pictures in PARTS.items():
        for name, boxes in pictures.items():
            draw(root / "JPEGImages" / name)
            objects = "".join(
                f"<object><name>{NAMES[c]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for c, x, y, w, h in boxes
            )
            file = (root / "Annotations" / name).with_suffix(".xml")
            file.parent.mkdir(parents=True, exist_ok=True)
            size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
            file.write_text(text, encoding="utf-8")
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text("\n".join(Path(name).stem for name in pictures), encoding="utf-8")
    places = [f"data.{part}=[ImageSets/Main/{part}.txt]" for part in PARTS]
    return ["data=voc", f"data.root={root}", "data.unlabeled=null", "data.classes=null", *places]


def prepared(tmp_path: Path, keys: list[str]) -> dict[str, Any]:
    more = ["split.percent=100", "check=full", f"cache_dir={tmp_path}/cache", f"export_dir={tmp_path}/out"]
    assert cli.main(["prepare", *keys, *more]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out" / "prepared.json").read_text())
    return found


@pytest.mark.parametrize(("form", "make"), [("COCO's", coco), ("YOLO's", yolo), ("Pascal VOC's", voc)])
def test_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, make: Any) -> None:
    """Names of pictures and classes have spaces and letters beyond ASCII."""
    root = tmp_path / "meine Bilder"
    keys = make(root, NAMES, [1, 2]) if make is coco else make(root)
    found = prepared(tmp_path, keys)
    out = capsys.readouterr().out
    assert (
        f"in {form} format: 2 pictures to train on with 3 boxes; 1 picture to evaluate on with 1 box; 2 classes" in out
    )
    assert all(name in out for name in NAMES)
    assert "gaps" not in out
    assert found["format"] == form
    assert found["parts"]["train"]["boxes_per_class"] == {NAMES[0]: 2, NAMES[1]: 1}
    assert found["parts"]["train"]["pictures"]["bad"] == {}
    assert "nothing wrong was found in the files" in out


def test_category_ids_with_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(tmp_path, coco(tmp_path / "data", NAMES, [3, 90]))
    assert "; category ids from 3 to 90 with gaps, which predictions keep" in capsys.readouterr().out
    assert found["category_ids"] == [3, 90]
    assert found["parts"]["train"]["boxes_per_class"] == {NAMES[0]: 2, NAMES[1]: 1}


def test_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(tmp_path, coco(tmp_path / "data", ["one thing"], [7]))
    out = capsys.readouterr().out
    assert "2 pictures to train on with 2 boxes; 1 picture to evaluate on with 1 box; 1 class (one thing)" in out
    assert "gaps" not in out
    assert found["parts"]["train"]["boxes_per_class"] == {"one thing": 2}
