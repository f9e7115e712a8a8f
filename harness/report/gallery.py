"""Pictures: evaluation images with the truth and each method's boxes side by side, for one share of labels.

Which images is decided by a hash of their ids, so that nobody picks them and every report of a dataset shows the same.
They are read from the data, which a report may be far away from: without it there is no gallery, and a sentence why.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.config.saved import read_config
from harness.core.readback import content_of, decode_json
from harness.core.types import RunError, UserError
from harness.data.ground_truth import GroundTruth, from_index
from harness.report.statistics import Pair
from harness.report.tables import Row, Run, Section

if TYPE_CHECKING:
    from harness.data.datasets import Dataset
    from harness.data.index import CocoIndex

PREDICTIONS = "predictions.json"
SHOWN_SCORE = 0.5
_SIDE = 256  # px, the longer side of a picture
_QUALITY = 70
_MOST_NAMED = 8  # boxes of a picture; names on more hide it
_TRUTH, _RIGHT, _WRONG, _DARK = "#ffffff", "#4cc9f0", "#ff9f1c", "#000000"


@dataclass(frozen=True)
class Panel:
    """One picture: the truth, or what a method found."""

    caption: str
    alt: str
    source: str  # data URI


@dataclass(frozen=True)
class Line:
    """One image in all panels."""

    image_id: int
    panels: list[Panel]


@dataclass(frozen=True)
class Gallery:
    """Images with truth and boxes."""

    caption: str
    lines: list[Line]
    pseudo_caption: str = ""
    pseudo_lines: list[Line] = field(default_factory=list)


class _Box(msgspec.Struct):
    """A line of predictions.json."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


def show(section: Section, count: int) -> tuple[Gallery | None, str]:
    """The gallery of a section.

    Args:
        section: one table.
        count: how many images.

    Returns:
        The gallery, or None and why there is none.
    """
    percent, pair, runs = _runs(section)
    if not runs:
        return None, f"no run has {PREDICTIONS} beside its record."
    try:
        opened = _open(next(iter(runs.values())))
        truth = from_index(opened.val)
        images = _chosen(truth.image_ids, count)
        boxes = {label: _boxes(run, images) for label, run in runs.items()}
        lines = [_line(opened.val, truth, image, boxes) for image in images.tolist()]
        pseudo = _pseudo_lines(opened, runs, count)
    except (UserError, RunError, OSError, ValueError, Image.DecompressionBombError) as error:
        return None, f"the evaluation images cannot be shown ({error})."
    caption = (
        f"The first {len(lines)} evaluation images by a hash of their ids; {section.column(percent)} of the labels, "
        f"fold {pair[0]}, seed {pair[1]}. White: the truth. Blue: right (same class, IoU of at least 0.5); orange: "
        f"wrong. Boxes with a score of at least {SHOWN_SCORE:g}."
    )
    pseudo_caption = (
        f"Pseudo labels that were made once, before training, on the first {len(pseudo)} unlabelled images by a hash "
        "of their ids, beside the truth that training does not see. Those of a teacher change with every step and are "
        "not kept."
    )
    return Gallery(caption, lines, pseudo_caption, pseudo), ""


def _runs(section: Section) -> tuple[float, Pair, dict[str, Run]]:
    """The smallest share of labels with boxes, the fold and seed that most rows have there, and their runs by label."""
    for percent in section.percents:
        cells: list[tuple[Row, Run]] = [
            (row, run)
            for row in section.rows
            for run in row.cells[percent].runs
            if run.folder is not None and (run.folder / PREDICTIONS).is_file()
        ]
        if cells:
            counts = Counter(run.pair for _, run in cells)
            pair = min(counts, key=lambda one: (-counts[one], one))
            return percent, pair, {row.label: run for row, run in cells if run.pair == pair}
    return 0.0, (0, 0), {}


def _open(run: Run) -> Dataset:
    """The dataset of a run.

    Raises:
        UserError: it is not there, or not the one that the run was evaluated on.
    """
    from harness.engine import build

    assert run.folder is not None
    cfg = read_config(run.folder)
    opened = build.divided_dataset(cfg)
    if opened.val.sha256 != run.record.val_sha256:
        raise UserError(f"the data of {run.record.cell} has changed since it was evaluated")
    return opened


def _chosen(image_ids: np.ndarray, count: int) -> np.ndarray:
    ranked = sorted(image_ids.tolist(), key=lambda image: hashlib.sha256(str(image).encode()).digest())
    return np.array(ranked[:count], np.int64)


def _boxes(run: Run, images: np.ndarray) -> np.ndarray:
    """(N, 7) the boxes of the images that are shown, as from `harness.engine.evaluate.predictions`."""
    assert run.folder is not None
    path = run.folder / PREDICTIONS
    remedy = "evaluate the run again"
    wanted = set(images.tolist())
    found = decode_json(path, content_of(path, remedy), list[_Box], remedy)
    rows = [
        (box.image_id, *box.bbox, box.score, box.category_id)
        for box in found
        if box.image_id in wanted and box.score >= SHOWN_SCORE
    ]
    return np.array(rows, np.float64).reshape(-1, 7)


def _pseudo_lines(opened: Dataset, runs: dict[str, Run], count: int) -> list[Line]:
    """Unlabelled training images with the truth and the pseudo labels of the runs that keep them."""
    from harness.engine.offline import LABELS, kept_labels

    folders = {label: run.folder for label, run in runs.items() if run.folder is not None}
    kept = {
        label: kept_labels(folder, opened.train.category_ids)
        for label, folder in folders.items()
        if (folder / LABELS).is_file()
    }
    if not kept:
        return []
    truth = from_index(opened.train)
    shared = set(truth.image_ids.tolist()).intersection(*(ids.tolist() for ids, _ in kept.values()))
    images = _chosen(np.array(sorted(shared), np.int64), count)
    boxes = {f"{label}'s pseudo labels": rows[np.isin(rows[:, 0], images)] for label, (_, rows) in kept.items()}
    return [_line(opened.train, truth, image, boxes) for image in images.tolist()]


def _line(index: CocoIndex, truth: GroundTruth, image: int, boxes: dict[str, np.ndarray]) -> Line:
    source = index.source([image])
    with Image.open(Path(source.paths[0])) as file:
        picture = file.convert("RGB")
    scale = _SIDE / max(picture.size)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size])
    own = np.flatnonzero((truth.image_ids[truth.images] == image) & ~truth.crowd)
    names = [truth.category_names[k] for k in truth.classes[own]]
    drawn = _drawn(small, truth.xywh[own] * scale, names, [_TRUTH] * len(own))
    objects = f"{len(own)} object{'' if len(own) == 1 else 's'}"
    panels = [Panel("truth", f"image {image}: {objects}", drawn)]
    panels += [_panel(small, scale, truth, len(own), label, rows[rows[:, 0] == image]) for label, rows in boxes.items()]
    return Line(image, panels)


def _panel(small: Image.Image, scale: float, truth: GroundTruth, objects: int, label: str, rows: np.ndarray) -> Panel:
    """What one method found on an image."""
    from harness.engine.errors import RIGHT, classify

    kinds = classify(rows, truth).kinds
    shown = kinds >= RIGHT  # neither ignored nor left out
    right = kinds[shown] == RIGHT
    names = [truth.category_names[k] for k in truth.rows(rows)[1][shown]]
    drawn = _drawn(small, rows[shown, 1:5] * scale, names, [_RIGHT if one else _WRONG for one in right])
    wrong = int((~right).sum())
    alt = f"{label}: {int(right.sum())} of {objects} found, {wrong} wrong"
    return Panel(alt, alt, drawn)


def _drawn(small: Image.Image, xywh: np.ndarray, names: list[str], colours: list[str]) -> str:
    """The picture with boxes, as a data URI."""
    picture = small.copy()
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for (x, y, w, h), name, colour in zip(xywh.tolist(), names, colours, strict=True):
        corners = [x, y, max(x + w, x + 1), max(y + h, y + 1)]
        draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=_DARK)
        draw.rectangle(corners, outline=colour, width=2)
        if h > 24 and len(names) <= _MOST_NAMED:
            draw.rectangle(draw.textbbox((x + 4, y + 3), name, font=font), fill=_DARK)
            draw.text((x + 4, y + 3), name, fill=colour, font=font)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
