"""The gallery: evaluation images with the truth and each method's boxes, unlabelled ones with its pseudo labels.

At one share of labels, side by side. Which images is decided by a hash of their ids, so that nobody picks them and
every report of a dataset shows the same. They are read from the data, which a report may be far away from: without it
there is no gallery, and a sentence why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from PIL import Image

from harness.config.saved import read_config
from harness.core.draws import first_by_hash
from harness.core.readback import content_of, decode_json
from harness.core.types import RunError, UserError
from harness.data.ground_truth import from_index
from harness.report.collect import Run
from harness.report.pictures import FoundBoxes, Line, line
from harness.report.statistics import Pair
from harness.report.tables import Row, Section

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from harness.data.datasets import Dataset
    from harness.data.index import CocoIndex
    from harness.engine.taught import KeptBox

PREDICTIONS = "predictions.json"
SHOWN_SCORE = 0.5
_UNREADABLE = (UserError, RunError, OSError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Gallery:
    """Images with truth and boxes."""

    caption: str
    lines: list[Line]
    pseudo_caption: str = ""  # of the pseudo labels, or why there are none; empty where no method makes any
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
        cfg, opened = _open(next(iter(runs.values())))
        truth = from_index(opened.val)
        images = first_by_hash(truth.image_ids, count)
        boxes = {label: _boxes(run, images) for label, run in runs.items()}
        lines = [line(opened.val, truth, image, _of_image(boxes, image)) for image in images.tolist()]
    except _UNREADABLE as error:
        return None, f"the evaluation images cannot be shown ({error})."
    caption = (
        f"The first {len(lines)} evaluation images by a hash of their ids; {section.column(percent)} of the labels, "
        f"fold {pair[0]}, seed {pair[1]}. White: the truth. Blue: right (same class, IoU of at least 0.5); orange: "
        f"wrong. Boxes with a score of at least {SHOWN_SCORE:g}."
    )
    labelling = {label: run for label, run in runs.items() if run.record.batch_unlabeled}
    try:
        pseudo_caption, pseudo = _pseudo_lines(cfg, opened, labelling, count) if labelling else ("", [])
    except _UNREADABLE as error:
        pseudo_caption, pseudo = f"The pseudo labels cannot be shown ({error}).", []
    return Gallery(caption, lines, pseudo_caption, pseudo), ""


def _of_image(boxes: dict[str, np.ndarray], image: int) -> dict[str, FoundBoxes]:
    return {label: FoundBoxes(rows[rows[:, 0] == image]) for label, rows in boxes.items()}


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


def _open(run: Run) -> tuple[DictConfig, Dataset]:
    """The configuration and the dataset of a run.

    Raises:
        UserError: it is not there, or not the one that the run was evaluated on.
    """
    from harness.engine import build

    assert run.folder is not None
    cfg = read_config(run.folder)
    opened = build.divided_dataset(cfg)
    if opened.val.sha256 != run.record.val_sha256:
        raise UserError(f"the data of {run.record.cell} has changed since it was evaluated")
    return cfg, opened


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


@dataclass(frozen=True)
class _Labels:
    """A run's pseudo labels: of which images they are kept, and what there is on one of them."""

    images: set[int]
    of: Callable[[int], FoundBoxes]
    all_are_kept: bool  # an image that is missing was left out of training


def _pseudo_lines(cfg: DictConfig, opened: Dataset, runs: dict[str, Run], count: int) -> tuple[str, list[Line]]:
    """Unlabelled images with the hidden truth and the pseudo labels of the runs that keep them; what they are."""
    index, known = _unlabelled(cfg, opened)
    labels, lacking = {}, []
    for label, run in runs.items():
        try:
            kept = _labels(run, opened.train.category_ids)
        except UserError as error:
            lacking.append(f"{label} ({error})")
            continue
        if kept is None:
            lacking.append(f"{label} (no pseudo labels lie beside its record, as with runs of older versions)")
        else:
            labels[label] = kept
    without = f" Not shown: {', '.join(lacking)}." if lacking else ""
    if not labels:
        return f"No pseudo labels.{without}", []
    some = [one.images for one in labels.values() if not one.all_are_kept] or [one.images for one in labels.values()]
    shared = set.intersection(*some).intersection(index.image_ids.tolist())
    images = first_by_hash(np.array(sorted(shared), np.int64), count).tolist()
    if not images:
        return f"No pseudo labels: none of those that were kept are of images in the data.{without}", []
    truth = from_index(index)
    if not len(truth.category_ids):  # of a folder, or of a list of pictures
        own = opened.train
        truth = replace(truth, category_ids=own.category_ids, category_names=tuple(own.category_names))
    lines = []
    for image in images:
        found = {f"{label}'s pseudo labels": one.of(image) for label, one in labels.items()}
        lines.append(line(index, truth, image, found, name="hidden truth", known=image in known))
    caption = (
        f"Pseudo labels on {len(lines)} unlabelled images, the first by a hash of their ids, beside the truth that "
        "training does not see: those that a stage 1 made once, and those that a teacher gives after its last step. "
        "Blue and orange as above; thin and grey: found and not used; yellow: the truth is unknown."
    )
    return caption + without, lines


def _unlabelled(cfg: DictConfig, opened: Dataset) -> tuple[CocoIndex, set[int]]:
    """The index that a run's unlabelled images are in, and those of them whose truth is known."""
    from harness.config import sections
    from harness.data import prepare

    options = sections.split_options(cfg)
    split = prepare.resolve_split(opened, options)
    _, unlabelled = prepare.sources(opened, split, options)
    known = prepare.known_truth(opened, split, options, unlabelled) if unlabelled is not None else None
    return opened.unlabeled_of(split), set(known.ids.tolist()) if known is not None else set()


def _labels(run: Run, category_ids: np.ndarray) -> _Labels | None:
    """The pseudo labels that lie in a run's folder.

    Raises:
        UserError: they are damaged.
    """
    from harness.engine import label_file, taught

    assert run.folder is not None
    if (run.folder / label_file.LABELS).is_file():
        ids, rows = label_file.kept_labels(run.folder, category_ids)
        images = set(ids.tolist())

        def of_stage_one(image: int) -> FoundBoxes:
            left_out = () if image in images else ("left out of training: nothing was found",)
            return FoundBoxes(rows[rows[:, 0] == image], notes=left_out)

        return _Labels(images, of_stage_one, all_are_kept=True)
    if not (run.folder / taught.PSEUDO_LABELS).is_file():
        return None
    kept = {one.image_id: one.boxes for one in taught.read_kept(run.folder).images}
    return _Labels(set(kept), lambda image: _of_teacher(image, kept[image]), all_are_kept=False)


def _of_teacher(image: int, boxes: list[KeptBox]) -> FoundBoxes:
    def rows(some: list[KeptBox]) -> np.ndarray:
        found = [(image, *box.bbox, box.score, box.category_id) for box in some]
        return np.array(found, np.float64).reshape(-1, 7)

    used, unused = [box for box in boxes if box.use is not None], [box for box in boxes if box.use is None]
    notes = [f"{n} for {use}" for use, n in Counter(box.use for box in used).items()]
    notes += [f"{n} not used: {why}" for why, n in Counter(box.why for box in unused).items()]
    return FoundBoxes(rows(used), rows(unused), tuple(notes))
