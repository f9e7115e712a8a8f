"""An annotation file of COCO's size, made up: 118,287 images, 860,001 boxes with polygons, 80 classes, about 450 MB."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

IMAGES, BOXES, CLASSES = 118_287, 860_001, 80
_CHUNK = 20_000
_POLYGONS = 500  # drawn once and used again: only their length matters


def write_annotations(path: Path, images: int = IMAGES, boxes: int = BOXES, seed: int = 0) -> Path:
    """Writes the file: ids in no order, category ids with gaps, 1 % of the images empty, 1 % of the boxes crowd."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(6 * images)[:images] + 1
    categories = np.sort(rng.permutation(CLASSES + 10)[:CLASSES]) + 1
    with path.open("w") as file:
        file.write('{"info": {"description": "generated"}, "licenses": [{"id": 1, "name": "none"}], "images": [')
        _write_chunks(file, (_image(int(i)) for i in ids))
        file.write('], "annotations": [')
        _write_chunks(file, _annotations(rng, ids[: images - images // 100], boxes, categories))
        file.write('], "categories": ')
        file.write(
            json.dumps([{"supercategory": "thing", "id": int(c), "name": f"class {c}"} for c in categories]) + "}"
        )
    return path


def _write_chunks(file: TextIO, entries: Iterable[str]) -> None:
    feed = iter(entries)
    between = ""
    while chunk := list(islice(feed, _CHUNK)):
        file.write(between + ", ".join(chunk))
        between = ", "


def _image(number: int) -> str:
    name = f"{number:012d}.jpg"
    return (
        f'{{"license": 1, "file_name": "{name}", "coco_url": "http://images.example.org/train2017/{name}", '
        f'"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", '
        f'"flickr_url": "http://example.org/{number}_z.jpg", "id": {number}}}'
    )


def _annotations(rng: np.random.Generator, image_ids: np.ndarray, boxes: int, categories: np.ndarray) -> Iterator[str]:
    polygons = []
    for _ in range(_POLYGONS):
        points = rng.uniform(0, 640, 2 * int(rng.integers(6, 45))).round(2)
        polygons.append(json.dumps([points.tolist()]))
    owners = rng.choice(image_ids, boxes).tolist()
    labels = rng.choice(categories, boxes).tolist()
    corner = rng.uniform(0, (500, 360), (boxes, 2)).round(2)
    size = rng.uniform(2, 120, (boxes, 2)).round(2)
    crowd = (rng.random(boxes) < 0.01).astype(int).tolist()
    shape = rng.integers(0, _POLYGONS, boxes).tolist()
    rows = np.concatenate([corner, size], 1).tolist()
    for n in range(boxes):
        x, y, w, h = rows[n]
        yield (
            f'{{"segmentation": {polygons[shape[n]]}, "area": {w * h * 0.7:.4f}, "iscrowd": {crowd[n]}, '
            f'"image_id": {owners[n]}, "bbox": [{x}, {y}, {w}, {h}], "category_id": {labels[n]}, "id": {n + 1}}}'
        )
