"""Draws the image grids of this folder: every view of every shipped policy, with the boxes mapped by its matrix.

    python docs/augment/make_grids.py [FOLDER]

The pictures are generated, so that the grids show the same on every machine. One row is one image; each view is drawn
twice, except those without random numbers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from harness.core.draws import image_keys
from harness.core.types import ImageSource, Normalize, View
from harness.data.drawing import render
from pipelines.dali.pipeline import DaliPipeline
from pipelines.policy import Policy

AUGMENT = Path(__file__).parents[2] / "harness" / "conf" / "augment"
CELL, TITLE, SIDE = 150, 14, 320
CENTERED = Normalize(std=(1.0, 1.0, 1.0))


def pictures(folder: Path, count: int) -> ImageSource:
    """Generated shapes at a photograph's size."""
    paths, boxes, counts = [], [], []
    for number in range(count):
        image, found, _ = render(np.random.default_rng([7, number]), 64)
        large = Image.fromarray(image).resize((SIDE + 80, SIDE), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number}.png")
        large.save(paths[-1])
        boxes.append(found * np.array([(SIDE + 80) / 64, SIDE / 64] * 2, dtype=np.float32))
        counts.append(len(found))
    total = sum(counts)
    return ImageSource(
        paths=[str(path) for path in paths],
        ids=np.arange(count, dtype=np.int64),
        sizes=np.tile(np.array([SIDE, SIDE + 80], dtype=np.int64), (count, 1)),
        boxes=np.concatenate(boxes),
        labels=np.ones(total, dtype=np.int64),
        scores=np.ones(total, dtype=np.float32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def load(path: Path) -> Policy:
    """A shipped policy."""
    whole = OmegaConf.create(
        {"data": {"small": {"short_side": 128, "max_side": None}}, "augment": OmegaConf.load(path)}
    )
    config = OmegaConf.to_container(whole["augment"], resolve=True)
    assert isinstance(config, dict)
    return Policy.from_config({str(key): value for key, value in config.items()})


def cell(view: View, row: int) -> Image.Image:
    """One image of a view with its boxes, fitted into a cell of the grid."""
    height, width = view.sizes[row].tolist()
    centered = view.images[row, :, :height, :width].permute(1, 2, 0)
    pixels = (centered + torch.tensor(CENTERED.mean)).round().clamp(0, 255).byte().numpy()
    scale = min(CELL / height, CELL / width)
    image = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    assert view.targets is not None
    for box in view.targets[row].boxes.tolist():
        draw.rectangle([v * scale for v in box], outline=(255, 255, 0))
    result = Image.new("RGB", (CELL, CELL), (255, 255, 255))
    result.paste(image)
    return result


def grid(policy: Policy, source: ImageSource) -> Image.Image:
    """Rows are images, columns are views."""
    pipeline = DaliPipeline(policy, CENTERED, eval_batch=len(source))
    positions = np.arange(len(source))
    columns: list[tuple[str, list[Image.Image]]] = []
    for name, view in policy.views.items():
        if name == "pseudo":  # the same as test, or the stored image
            continue
        random = view.flip or view.color or view.affine or view.erase or view.zoom
        for step in range(2 if random else 1):
            drawn = pipeline.render(source, name, positions, image_keys(1, step, positions))
            columns.append((name, [cell(drawn, row) for row in range(len(source))]))
    pipeline.close()
    result = Image.new("RGB", (len(columns) * (CELL + 4), TITLE + len(source) * (CELL + 4)), (255, 255, 255))
    draw = ImageDraw.Draw(result)
    for number, (name, cells) in enumerate(columns):
        draw.text((number * (CELL + 4) + 2, 1), name, fill=(0, 0, 0))
        for row, image in enumerate(cells):
            result.paste(image, (number * (CELL + 4), TITLE + row * (CELL + 4)))
    return result


def main() -> None:
    """Writes one JPEG file per policy."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        source = pictures(Path(temporary), 3)
        for path in sorted(AUGMENT.glob("*.yaml")):
            grid(load(path), source).save(folder / f"{path.stem}.jpg", quality=80)


if __name__ == "__main__":
    main()
