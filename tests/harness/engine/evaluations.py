"""Random evaluations, and pycocotools' answer to them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CATEGORIES = (2, 5, 90)


def random_truth(rng: np.random.Generator, images: int = 25, most: int = 5) -> dict[str, Any]:
    """Objects of every size, some of them crowds or beside another one, some images without any."""
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        for _ in range(int(rng.integers(0, most))):
            x, y = rng.uniform(0, 200, 2).tolist()
            w, h = np.exp(rng.uniform(2, 5.3, 2)).tolist()
            category = int(rng.choice(CATEGORIES))
            last = annotations[-1] if annotations else None
            if last is not None and last["image_id"] == image * 7 + 3 and rng.random() < 0.4:
                x, y, w, h = (np.array(last["bbox"]) * rng.normal(1, 0.05, 4)).tolist()
                category = last["category_id"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image * 7 + 3,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h * float(rng.uniform(0.4, 1)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    return {
        "images": [{"id": image * 7 + 3, "width": 400, "height": 400} for image in range(images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORIES],
    }


def random_predictions(rng: np.random.Generator, truth: dict[str, Any], each: int = 4) -> np.ndarray:
    """(N, 7) boxes about the objects, some of the wrong class or far off, in random order.

    Scores are multiples of 1/997, so that images often share one, but the boxes of one image never do.
    """
    rows = []
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = [np.array(a["bbox"]) * rng.normal(1, 0.08, 4) for a in own for _ in range(each)]
        boxes += [np.concatenate([rng.uniform(0, 200, 2), np.exp(rng.uniform(2, 5.3, 2))]) for _ in range(3)]
        classes = [a["category_id"] for a in own for _ in range(each)] + [2, 5, 5]
        scores = rng.choice(997, len(boxes), replace=False) / 997
        for box, category, score in zip(boxes, classes, scores, strict=True):
            rows.append([image["id"], *box, score, category if rng.random() < 0.8 else 5])
    return rng.permutation(np.array(rows))


def pycocotools(rows: np.ndarray, truth: dict[str, Any]) -> COCOeval:
    """COCOeval after accumulate and summarize."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def replicated(rows: np.ndarray, truth: dict[str, Any], weights: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The evaluation with image number i weights[i] times, each copy an image of its own."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    parts = [np.zeros((0, 7))]
    for image, weight in zip(truth["images"], weights.tolist(), strict=True):
        own = rows[rows[:, 0] == image["id"]]
        for _ in range(weight):
            new = len(images) + 1
            images.append({**image, "id": new})
            for a in truth["annotations"]:
                if a["image_id"] == image["id"]:
                    annotations.append({**a, "image_id": new, "id": len(annotations) + 1})
            parts.append(np.column_stack([np.full(len(own), new), own[:, 1:]]))
    return np.concatenate(parts), {**truth, "images": images, "annotations": annotations}
