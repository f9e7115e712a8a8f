"""Pages of views and pseudo labels: boxes where the pixels are, and every box of the teacher accounted for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.cli import main
from harness.config import compose
from harness.core.distributed import World
from harness.engine import annotate, look

pytestmark = pytest.mark.timeout(180)
HERE = World(0, 1, torch.device("cpu"))


def test_views_show_boxes_on_the_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bright squares on black: in every view the drawn box surrounds what is bright."""
    drawn: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(image: Image.Image, boxes: np.ndarray, *_: object) -> None:
        drawn.append((np.asarray(image).max(-1), boxes))

    monkeypatch.setattr(look.annotate, "draw_detections", keep)
    root = tmp_path / "squares"
    _squares(root)
    cfg = compose.load(
        [
            *("data=custom", f"data.root={root}", "split.percent=100", "pipeline=torchvision", "pipeline.threads=0"),
            *("view.images=4", "view.draws=3", f"cache_dir={tmp_path}/cache", "method=soft_teacher"),
        ]
    )
    page = look.views(cfg, HERE)
    assert len(page.rows) == 4
    assert len(page.rows[0][1]) == 1 + 3 * 3 + 2  # stored; labelled, weak, strong three times; test, pseudo
    plain = [(image, boxes) for image, boxes in drawn if len(boxes) and image.max() > 200 and np.median(image) < 20]
    assert len(plain) > 12
    for image, boxes in plain:
        rows, columns = np.nonzero(image > 128)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(seen - boxes[0]).max() < 0.06 * max(image.shape)


def _squares(root: Path) -> None:
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        images, boxes = [], []
        for n in range(1, 5):
            pixels = np.zeros((128, 128, 3), np.uint8)
            pixels[40 : 60 + 4 * n, 50:90] = 255
            Image.fromarray(pixels).save(root / part / f"{n}.png")
            images.append({"id": n, "file_name": f"{n}.png", "width": 128, "height": 128})
            box = {
                "id": n,
                "image_id": n,
                "category_id": 1,
                "bbox": [50, 40, 40, 20 + 4 * n],
                "area": 800,
                "iscrowd": 0,
            }
            boxes.append(box)
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square <b>"}]}
        (root / f"{part}.json").write_text(json.dumps(content))


def test_pages_of_a_run_are_written_as_one_file_and_a_picture(pets_run: Path, tmp_path: Path) -> None:
    assert main(["view", f"run_dir={pets_run}", f"out={tmp_path}", "view.images=3", "device=cpu"]) == 0
    text = (tmp_path / "view.html").read_text()
    assert text.count("<figure>") == 9
    assert text.count("hidden truth") >= 3
    assert not re.search(r'(src|href)="(?!data:)', text)  # self-contained
    with Image.open(tmp_path / "view.png") as image:
        assert image.width > 700


def test_names_in_a_page_are_text_and_nothing_else() -> None:
    panel = look.ViewPanel("<script>x</script>", Image.new("RGB", (20, 20)), ["a & b"])
    page = look.Page("<i>", ["<u>"], [("<img>.jpg", [panel])])
    text = look.as_html(page)
    assert "<script>" not in text
    assert "&lt;img&gt;.jpg" in text
    assert "a &amp; b" in text
    assert look.as_image(page).height > 20


def test_unused_boxes_are_grey_and_no_class_is() -> None:
    assert look._REJECTED not in {annotate.color_of(label) for label in range(1, 22)}
