"""What a result cost: images that students saw and hours that devices worked, the first stage included.

A device hour is an hour of training on one device (a GPU, or a CPU process): evaluation, start and labelling are left
out. Hours of different machines cannot be compared; images seen can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.core.record import BASELINE, read_record
from harness.core.types import RunRecord, UserError
from harness.report.collect import Run
from harness.report.statistics import pareto_front, summarize
from harness.report.tables import Cell, Row, Section

EQUAL = 0.05  # images seen that differ by less than this share are as many


@dataclass(frozen=True)
class Cost:
    """Means over the runs of a cell, stage 1 included; None where a run does not say."""

    images: float | None
    device_hours: float | None
    stage_one_images: float
    front_by_images: bool = False  # no other cell of the column has as much AP for as few images
    front_by_hours: bool = False

    def ratio(self, other: Cost) -> float | None:
        """Device hours as a multiple of another's, or images where hours are unknown."""
        for own, its in ((self.device_hours, other.device_hours), (self.images, other.images)):
            if own and its:
                return own / its
        return None


def costs(section: Section) -> dict[tuple[str, float], Cost]:
    """(label of a row, percent) -> its cost, with the Pareto fronts among the cells of each column."""
    baselines = {_place(run.record): run for run in section.runs if run.record.method == BASELINE}
    known: dict[tuple[str, float], tuple[Cell, Cost]] = {}
    for row in [*section.rows, *section.reference]:
        for cell in row.cells.values():
            if cell.runs:
                known[row.label, cell.percent] = cell, _cost(cell, baselines)
    found = {}
    for percent in {percent for _, percent in known}:
        column = {key: pair for key, pair in known.items() if key[1] == percent}
        alone = len(column) == 1  # a front of one says nothing
        ap = [None if alone else cell.mean("ap") for cell, _ in column.values()]
        by_images = pareto_front([cost.images for _, cost in column.values()], ap)
        by_hours = pareto_front([cost.device_hours for _, cost in column.values()], ap)
        for (key, (_, cost)), images, hours in zip(column.items(), by_images, by_hours, strict=True):
            found[key] = Cost(cost.images, cost.device_hours, cost.stage_one_images, images, hours)
    return {key: found[key] for key in known}


def _cost(cell: Cell, baselines: dict[tuple[Any, ...], Run]) -> Cost:
    own = [(_images(run.record), _hours(run.record)) for run in cell.runs]
    first = [_stage_one(run, baselines) for run in cell.runs]
    images = [a + b for (a, _), (b, _) in zip(own, first, strict=True)]
    hours = [None if a is None or b is None else a + b for (_, a), (_, b) in zip(own, first, strict=True)]
    return Cost(_mean(images), _mean(hours), _mean([count for count, _ in first]) or 0.0)


def _stage_one(run: Run, baselines: dict[tuple[Any, ...], Run]) -> tuple[float, float | None]:
    """Images and device hours of the run that made the pseudo labels, if there was one.

    It lies in the run's own folder, or is the baseline's run of the same split, seed and steps; of another one the
    hours are unknown, and its batch is taken to be the run's own labelled one.
    """
    record = run.record
    if not record.extra_steps:
        return 0.0, 0.0
    for stage in (_inner(run), baselines.get((*_place(record)[:-1], record.extra_steps))):
        if stage is not None and stage.record.steps == record.extra_steps:
            return _images(stage.record), _hours(stage.record)
    return float(record.extra_steps * record.batch_labeled), None


def _inner(run: Run) -> Run | None:
    path = run.folder / "stage1/record.json" if run.folder is not None else None
    try:
        return Run(read_record(path), path.parent, path) if path is not None and path.is_file() else None
    except UserError:
        return None


def _place(record: RunRecord) -> tuple[Any, ...]:
    return record.variant, record.percent, record.fold, record.seed, record.split_sha256, record.steps


def _images(record: RunRecord) -> float:
    return float(record.images_labeled + record.images_unlabeled)


def _hours(record: RunRecord) -> float | None:
    return record.train_seconds * record.world_size / 3600 if record.train_seconds else None


def _mean(values: Iterable[float | None]) -> float | None:
    """None where one is unknown."""
    listed = list(values)
    return None if None in listed else summarize([value for value in listed if value is not None]).mean


def as_many_images(section: Section, found: dict[tuple[str, float], Cost], row: Row, percent: float) -> Row | None:
    """The baseline's row whose runs saw as many images as a method's, stage 1 included; the nearest of several."""
    wanted = found[row.label, percent].images
    near = []
    for other in section.rows:
        cost = found.get((other.label, percent))
        comparable = other.method == BASELINE and other.named in (row.named, "")
        if comparable and cost is not None and cost.images and wanted:
            near.append((abs(cost.images / wanted - 1), other.label, other))
    best = min(near, default=None, key=lambda one: one[:2])
    return best[2] if best is not None and best[0] <= EQUAL else None
