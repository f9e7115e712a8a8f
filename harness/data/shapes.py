"""The generated dataset: JPEG files and COCO annotations of the drawings of `harness.data.drawing`, no download."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image

from harness.core.types import UserError
from harness.core.validate import Limits, Name, Seed
from harness.data.cache import build_once
from harness.data.datasets import Dataset, coco_dataset
from harness.data.drawing import CLASSES, GENERATOR_VERSION, render

SETS = {"train": 1, "tune": 2, "val": 3}  # name to seed; `tune` is for choices, `val` for reported numbers


def shapes_dataset(
    name: Name,
    cache_dir: Path,
    *,
    train_images: Annotated[int, Limits(ge=1, le=10_000_000)] = 800,
    val_images: Annotated[int, Limits(ge=1, le=10_000_000)] = 250,
    val_set: Literal["val", "tune"] = "val",
    size: Annotated[int, Limits(ge=40, le=4096)] = 64,
    max_objects: Annotated[int, Limits(ge=1, le=1000)] = 5,
    quality: Annotated[int, Limits(ge=1, le=95)] = 85,
    seed: Seed = 0,
) -> Dataset:
    """The dataset, generated on first use and read from the cache afterwards.

    Args:
        name: name of the dataset in records.
        cache_dir: it lies in the sub-folder `shapes`, once per set of parameters.
        train_images: number of training images.
        val_images: number of images in each of the two evaluation sets.
        val_set: `val` for numbers that are reported, `tune` for choosing a configuration.
        size: image height and width, pixels; everything that is drawn grows with it (boxes of 10 to 32 px at 64).
        max_objects: most objects in an image.
        quality: of the JPEG files, 1 to 95.
        seed: another one gives other images.

    Returns:
        Training and evaluation set in COCO terms.

    Raises:
        UserError: on a value that cannot be used, or if the cache cannot be written.
    """
    counts = {"train_images": train_images, "val_images": val_images, "max_objects": max_objects}
    for key, value in counts.items():
        if value < 1:
            raise UserError(f"data.{key}={value} must be at least 1")
    if val_set not in ("val", "tune"):
        raise UserError(f"data.val_set={val_set} must be val (for reported numbers) or tune (for choices)")
    if size < 40:
        raise UserError(f"data.size={size} must be at least 40 px")
    if not 1 <= quality <= 95:
        raise UserError(f"data.quality={quality} must lie in 1..95")
    if seed < 0:
        raise UserError(f"data.seed={seed} must not be negative")
    parameters = {**counts, "size": size, "quality": quality, "seed": seed, "version": GENERATOR_VERSION}
    folder = build_once(Path(cache_dir) / "shapes", parameters, lambda to: _write(to, parameters))
    return coco_dataset(name, folder, cache_dir, val_annotations=f"{val_set}.json", val_images=val_set)


def _write(folder: Path, parameters: dict[str, Any]) -> None:
    """Writes every set: `SET/000001.jpg` and on, and `SET.json`."""
    for name in SETS:
        count = parameters["train_images" if name == "train" else "val_images"]
        (folder / name).mkdir()
        annotations = _write_images(folder / name, name, count, parameters)
        (folder / f"{name}.json").write_text(json.dumps(annotations, separators=(",", ":")))


def _write_images(folder: Path, name: str, count: int, parameters: dict[str, Any]) -> dict[str, Any]:
    """Writes the JPEG files of one set and returns its COCO annotations; `area` is that of the box."""
    size = parameters["size"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        generator = np.random.default_rng([parameters["seed"], SETS[name], index])
        pixels, boxes, labels = render(generator, size, scale=size / 64, max_objects=parameters["max_objects"])
        file_name = f"{index + 1:06d}.jpg"
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=parameters["quality"])
        (folder / file_name).write_bytes(encoded.getvalue())
        images.append({"id": index + 1, "file_name": file_name, "width": size, "height": size})
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            width, height = round(x2 - x1, 2), round(y2 - y1, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label,
                    "bbox": [round(x1, 2), round(y1, 2), width, height],
                    "area": round(width * height, 4),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": outline} for number, outline in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
