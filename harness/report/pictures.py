"""Pictures with boxes for the gallery, as JPEGs inside the page: the truth, and what somebody found beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.data.ground_truth import GroundTruth

if TYPE_CHECKING:
    from harness.data.index import CocoIndex

_SIDE = 256  # px, the longer side of a picture
_QUALITY = 70
_MOST_NAMED = 8  # boxes of a picture; names on more hide it
_TRUTH, _RIGHT, _WRONG, _UNKNOWN, _UNUSED, _DARK = "#ffffff", "#4cc9f0", "#ff9f1c", "#ffe066", "#bdbdbd", "#000000"


@dataclass(frozen=True)
class Panel:
    """One picture: the truth, or what a method found."""

    caption: str
    alt: str
    source: str  # data URI
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """One image in all panels."""

    image_id: int
    panels: list[Panel]


@dataclass(frozen=True)
class FoundBoxes:
    """Boxes of one image as from `harness.engine.evaluate.predictions`, (N, 7) float64 each."""

    boxes: np.ndarray
    unused: np.ndarray = field(default_factory=lambda: np.zeros((0, 7)))
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Drawing:
    """A picture that boxes are drawn into again and again."""

    small: Image.Image
    scale: float  # of its pixels to the stored ones
    truth: GroundTruth

    def panel(
        self, caption: str, alt: str, layers: Iterable[tuple[np.ndarray, list[str]]], notes: tuple[str, ...] = ()
    ) -> Panel:
        """Boxes (N, 7) with N colours each, one layer over the other."""
        picture = self.small.copy()
        for rows, colours in layers:
            names = [self.truth.category_names[k] for k in self.truth.rows(rows)[1]]
            _draw(picture, rows[:, 1:5] * self.scale, names, colours)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_QUALITY)
        source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        return Panel(caption, alt, source, notes)


def line(
    index: CocoIndex,
    truth: GroundTruth,
    image: int,
    found: dict[str, FoundBoxes],
    *,
    name: str = "truth",
    known: bool = True,
) -> Line:
    """An image in panels: the truth, then what each method found.

    Args:
        index: that the image is in.
        truth: the objects of the index.
        image: its id.
        found: by the methods' names as shown.
        name: of the truth.
        known: whether the truth of the image is known.
    """
    with Image.open(Path(index.source([image]).paths[0])) as file:
        picture = file.convert("RGB")
    scale = _SIDE / max(picture.size)
    small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    drawing = _Drawing(small, scale, truth)
    own = np.flatnonzero((truth.image_ids[truth.images] == image) & ~truth.crowd)
    if known:
        objects = _count(len(own), "object", "objects")
        rows = np.column_stack([np.full(len(own), image), truth.xywh[own], np.ones(len(own)), _ids(truth, own)])
        first = drawing.panel(name, f"image {image}: {objects}", [(rows, [_TRUTH] * len(own))])
    else:
        first = drawing.panel(f"{name}: unknown", f"image {image}: nobody labelled it", [])
    return Line(image, [first, *(_panel(drawing, len(own), label, one, known) for label, one in found.items())])


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _ids(truth: GroundTruth, rows: np.ndarray) -> np.ndarray:
    return truth.category_ids[truth.classes[rows]]


def _panel(drawing: _Drawing, objects: int, label: str, found: FoundBoxes, known: bool) -> Panel:
    """What one method found on an image."""
    from harness.engine.errors import RIGHT, classify

    kinds = classify(found.boxes, drawing.truth).kinds if known else np.zeros(len(found.boxes), np.int64)
    shown = kinds >= RIGHT  # neither ignored nor left out
    right = kinds[shown] == RIGHT
    colours = [_RIGHT if one else _WRONG for one in right] if known else [_UNKNOWN] * len(right)
    wrong = int((~right).sum())
    said = f"{int(right.sum())} of {objects} found, {wrong} wrong" if known else _count(len(right), "box", "boxes")
    alt = f"{label}: {said}"
    layers = [(found.unused, [_UNUSED] * len(found.unused)), (found.boxes[shown], colours)]
    return drawing.panel(alt, alt, layers, found.notes)


def _draw(picture: Image.Image, xywh: np.ndarray, names: list[str], colours: list[str]) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for (x, y, w, h), name, colour in zip(xywh.tolist(), names, colours, strict=True):
        corners = [x, y, max(x + w, x + 1), max(y + h, y + 1)]
        if colour == _UNUSED:
            draw.rectangle(corners, outline=colour)
            continue
        draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=_DARK)
        draw.rectangle(corners, outline=colour, width=2)
        if h > 24 and len(names) <= _MOST_NAMED:
            draw.rectangle(draw.textbbox((x + 4, y + 3), name, font=font), fill=_DARK)
            draw.text((x + 4, y + 3), name, fill=colour, font=font)
