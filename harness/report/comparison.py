"""A table's methods against its baseline: chance, labels saved, compute, and what may be said of it.

The baseline of a run is the supervised run of the same fold, seed, split and number of student steps. Rules of the
verdict's sentences are in `harness.report.verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from harness.core.record import BASELINE
from harness.report.bootstrap import labels_saved_draws
from harness.report.chance import ImageChance
from harness.report.collect import Run
from harness.report.costs import Cost, as_many_images, costs
from harness.report.statistics import (
    ENOUGH,
    LabelsNeeded,
    Paired,
    holm,
    labels_interval,
    labels_saved,
    paired,
    summarize,
)
from harness.report.tables import Cell, Row, Section, method_label
from harness.report.verdict import Comparison, Standing, standing, verdict

LEVEL = 0.95


@dataclass(frozen=True)
class Compared:
    """A cell of the table, against the baseline's cell of its column."""

    row: Row
    cell: Cell
    found: Comparison
    labels_by_images: LabelsNeeded | None = None  # the interval from resampled evaluation images
    equal_row: Row | None = None  # the baseline with as many images seen

    @property
    def standing(self) -> Standing:
        """What its runs allow to say."""
        return standing(self.found)

    @property
    def by_compute_alone(self) -> bool:
        """Whether it is better than the baseline, but not shown to be better than one that saw as many images."""
        equal = self.found.equal_compute
        return self.standing is Standing.BETTER and equal is not None and equal.low is not None and equal.low <= 0


@dataclass
class Analysis:
    """What a section's numbers say together."""

    compared: list[Compared] = field(default_factory=list)
    costs: dict[tuple[str, float], Cost] = field(default_factory=dict)  # label of a row, percent
    verdict: list[str] = field(default_factory=list)
    resamples: int = 0  # of the evaluation images, 0 where no run has matches

    def of(self, row: Row, cell: Cell) -> Compared | None:
        """The comparison of a cell."""
        return next((one for one in self.compared if one.row is row and one.cell is cell), None)

    def cost(self, row: Row, cell: Cell) -> Cost | None:
        """The cost of a cell."""
        return self.costs.get((row.label, cell.percent))

    @property
    def corrected_over(self) -> int:
        """How many comparisons Holm's correction is over."""
        return sum(one.found.over_runs.p is not None for one in self.compared)


def analyse(section: Section, chance: ImageChance, resamples: int) -> Analysis:
    """Compares every method of a section with its baseline.

    Args:
        section: one table.
        chance: of the evaluation images.
        resamples: what `chance` drew.
    """
    spent = costs(section)
    cells = [(row, cell) for row in section.rows if row.method != BASELINE for cell in row.cells.values() if cell.pairs]
    over_runs = [_over_pairs(cell.pairs) for _, cell in cells]
    adjusted = holm([one.p for one in over_runs])
    corrected = sum(p is not None for p in adjusted)
    curves = {row.named: _Curve(section, row.named) for row, _ in cells}
    compared = []
    for (row, cell), runs, p in zip(cells, over_runs, adjusted, strict=True):
        equal_row = as_many_images(section, spent, row, cell.percent)
        base = next(iter(_baselines(section.rows, row.named)), None)
        base_cost = spent.get((base.label, cell.percent)) if base is not None else None
        found = Comparison(
            row.label,
            method_label(BASELINE),
            cell.percent,
            _labels(cell),
            runs,
            p,
            corrected,
            chance.difference(cell, LEVEL),
            curves[row.named].needed(cell),
            spent[row.label, cell.percent].ratio(base_cost) if base_cost is not None else None,
            _against(cell, equal_row.cells[cell.percent]) if equal_row is not None else None,
            section.column(cell.percent) if section.by_shots else "",
        )
        compared.append(Compared(row, cell, found, curves[row.named].needed_by_images(cell, chance), equal_row))
    drawn = resamples if chance.of_run else 0
    return Analysis(compared, spent, verdict([one.found for one in compared]), drawn)


def _baselines(rows: Sequence[Row], named: str) -> list[Row]:
    """Rows of the baseline: of the same variant of the suite, or else of none."""
    plain = [row for row in rows if row.method == BASELINE and not row.variant]
    return [row for row in plain if row.named == named] or [row for row in plain if not row.named]


def _over_pairs(pairs: Sequence[tuple[Run, Run]]) -> Paired:
    first = {run.pair: run.record.ap for run, _ in pairs if run.record.ap is not None}
    second = {run.pair: other.record.ap for run, other in pairs if other.record.ap is not None}
    return paired(first, second, LEVEL)


def _against(cell: Cell, other: Cell) -> Paired | None:
    """A cell against another one, paired by fold and seed where the split is the same."""
    splits = {run.pair: run.record.split_sha256 for run in other.runs}
    own = {run.pair: run.record.ap for run in cell.runs if splits.get(run.pair) == run.record.split_sha256}
    found = paired({pair: ap for pair, ap in own.items() if ap is not None}, other.by_pair, LEVEL)
    return found if found.n else None


def _labels(cell: Cell) -> float:
    return summarize([float(run.record.labeled_images) for run in cell.runs]).mean or 0.0


class _Curve:
    """The baseline's AP over the number of labelled images, its runs on all labels included.

    Args:
        section: one table.
        named: the variant of the suite.
    """

    def __init__(self, section: Section, named: str) -> None:
        rows = [*_baselines(section.rows, named), *_baselines(section.reference, named)]
        cells = [cell for row in rows for cell in row.cells.values()]
        points = {_labels(cell): cell for cell in cells if cell.n and _labels(cell) > 0}
        self.cells = [points[labels] for labels in sorted(points)]

    def _of(self, cells: Sequence[Cell], cell: Cell) -> LabelsNeeded:
        return labels_saved([_labels(one) for one in cells], [one.by_pair for one in cells], cell.by_pair, LEVEL)

    def needed(self, cell: Cell) -> LabelsNeeded | None:
        """How many labels the baseline needs for a cell's AP, with the interval over folds and seeds.

        The baseline on all labels is left out where it has fewer than three pairs and the ratios have more: without it
        there is an interval, and "more than measured" is said of the last ratio.
        """
        if len(self.cells) < 2 or not cell.n:
            return None
        found = self._of(self.cells, cell)
        if found.n < ENOUGH and len(self.cells) > 2:
            shorter = self._of(self.cells[:-1], cell)
            if shorter.n >= ENOUGH and not math.isinf(shorter.labels):
                return shorter
        return found

    def needed_by_images(self, cell: Cell, chance: ImageChance) -> LabelsNeeded | None:
        """The same of these trained networks, with the interval from resampled evaluation images."""
        pairs = set(cell.by_pair).intersection(*(one.by_pair for one in self.cells))
        if len(self.cells) < 2 or not pairs:
            return None
        means = [chance.mean_of([run for run in one.runs if run.pair in pairs]) for one in [*self.cells, cell]]
        known = [one for one in means if one is not None]
        if len(known) < len(means):
            return None
        ap = np.array([one.point["ap"] for one in known])
        draws = labels_saved_draws(known[:-1], known[-1])
        if np.isnan(draws).any(1).all() or np.isnan(ap).any():
            return None
        labels = np.array([_labels(one) for one in self.cells])
        return labels_interval(labels, ap[:-1], float(ap[-1]), draws, LEVEL)


def shown_labels(one: Compared) -> LabelsNeeded | None:
    """Labels needed as the first table says it: with the interval over runs, or over images where that is missing."""
    over_runs, over_images = one.found.labels_needed, one.labels_by_images
    if over_runs is None or over_runs.low is not None or over_images is None:
        return over_runs
    return replace(over_runs, low=over_images.low, high=over_images.high)
