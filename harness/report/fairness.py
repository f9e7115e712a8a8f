"""What moves numbers besides the method: a column for each condition, and a footnote where a table's rows differ in it.

Suite, dataset, evaluation set, split protocol, detector, first weights, preset and score threshold never differ within
a table (`harness.report.collect.TABLE_KEYS`). What else may differ is told here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.core.record import BASELINE
from harness.core.types import RunRecord
from harness.report.tables import Cell, Row, Section

MARKS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Conditions:
    """How the runs of a row were made; several values are joined."""

    row: Row
    label: str
    network: str
    batch: str  # labelled + unlabelled images of a student step
    micro_batch: str
    steps: str
    stage_one_steps: str
    folds: str
    seeds: str
    augment: str
    pipeline: str
    precision: str
    tune: str  # labelled images that settings may be chosen on


@dataclass(frozen=True)
class Footnote:
    """What some rows of a table do otherwise than the first one."""

    mark: str
    text: str
    rows: tuple[str, ...]  # labels


def conditions(section: Section) -> list[Conditions]:
    """One for each row that has a run, the reference last."""
    named = [(row, row.label) for row in section.rows] + [
        (row, f"{row.label}, all labels") for row in section.reference
    ]
    return [_conditions(row, label) for row, label in named if _records(row)]


def _conditions(row: Row, label: str) -> Conditions:
    records = _records(row)

    def values(read: Callable[[RunRecord], Any]) -> str:
        found = sorted({read(record) for record in records})
        return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in found)

    return Conditions(
        row,
        label,
        values(lambda r: r.reported_network or "-"),
        values(lambda r: f"{r.batch_labeled} + {r.batch_unlabeled}"),
        values(lambda r: r.micro_batch),
        values(lambda r: r.steps),
        values(lambda r: r.extra_steps),
        _folds(row),
        values(lambda r: r.seed),
        values(lambda r: r.augment or "-"),
        values(lambda r: r.pipeline or "-"),
        values(lambda r: str(r.config.get("precision") or "-")),
        values(lambda r: r.tune_images),
    )


def _records(row: Row) -> list[RunRecord]:
    return [run.record for cell in row.cells.values() for run in cell.runs]


def _folds(row: Row) -> str:
    """ "1, 2, 3", or "1, 2, 3 (5 %: 1, 2)" where a ratio has others than the most have."""
    each = {cell.percent: _listed(cell) for cell in row.cells.values() if cell.runs}
    usual = max(each.values(), key=lambda text: (list(each.values()).count(text), len(text)))
    others = [f"{percent:g} %: {text}" for percent, text in each.items() if text != usual]
    return usual + (f" ({'; '.join(others)})" if others else "")


def _listed(cell: Cell) -> str:
    return ", ".join(str(fold) for fold in sorted({run.record.fold for run in cell.runs}))


# What is compared, as a column of Conditions -> how the footnote says it.
_DIFFERING = {
    "network": "The networks reported differ",
    "batch": "Images per student step differ (labelled + unlabelled)",
    "steps": "Student steps differ",
    "stage_one_steps": "Steps of a first stage come on top",
    "folds": "Folds differ, so that means are over other labelled images; paired differences are not affected",
    "augment": "Augmentation policies differ",
    "pipeline": "Data pipelines differ",
    "precision": "Numerical precision differs",
    "tune": "Labelled images for choosing settings, beside those of the training, differ",
}


def footnotes(section: Section) -> list[Footnote]:
    """What the rows of a table differ in, the first row (the baseline, where there is one) against the others.

    Unlabelled images in a step are what tells a semi-supervised method from the baseline: that it draws none is told,
    but is no mark of its own where labelled images are as many.
    """
    rows = [one for one in conditions(section) if one.row in section.rows]
    found: list[tuple[str, tuple[str, ...]]] = []
    for key, words in _DIFFERING.items():
        by_value: dict[str, list[str]] = {}
        for one in rows:
            if getattr(one, key) != "-":  # of an older record, which does not say
                by_value.setdefault(str(getattr(one, key)), []).append(one.row.label)
        if len(by_value) < 2:
            continue
        listed = "; ".join(f"{value}: {', '.join(labels)}" for value, labels in by_value.items())
        first = next(iter(by_value))
        found.append((f"{words}: {listed}.", tuple(label for v, ls in by_value.items() if v != first for label in ls)))
    found += [*_foreign_labels(section), *_labelled_views(section), *_deviations(section)]
    return [Footnote(_mark(number), text, labels) for number, (text, labels) in enumerate(found)]


def _foreign_labels(section: Section) -> list[tuple[str, tuple[str, ...]]]:
    """Pseudo labels of which nobody here knows how they were made: such a row is not a result with few labels."""
    made: dict[str, list[str]] = {}
    for row in section.rows:
        if row.labeller:
            made.setdefault(row.labeller, []).append(row.label)
    return [
        (
            f"Pseudo labels come from a file made by {labeller}, which may have seen these images, their labels or the "
            f"evaluation images; what it cost is not counted: {', '.join(labels)}.",
            tuple(labels),
        )
        for labeller, labels in made.items()
    ]


def _labelled_views(section: Section) -> list[tuple[str, tuple[str, ...]]]:
    """Operations on labelled images that differ from those of the first row: there the methods could be alike."""
    views = {row.label: _labelled_view(row) for row in section.rows}
    known = {label: view for label, view in views.items() if view}
    if not known:
        return []
    first, own = next(iter(known.items()))
    by_keys: dict[str, list[str]] = {}
    for label, view in known.items():
        keys = sorted(key for key in own.keys() | view.keys() if own.get(key) != view.get(key))
        if keys:
            by_keys.setdefault(", ".join(keys), []).append(label)
    listed = "; ".join(f"{', '.join(labels)} in {keys}" for keys, labels in by_keys.items())
    rows = tuple(label for labels in by_keys.values() for label in labels)
    return [(f"Labelled images are augmented otherwise than with {first}: {listed}.", rows)] if rows else []


def _labelled_view(row: Row) -> dict[str, Any]:
    """Operation -> its values, of the first run's view of labelled images."""
    for record in _records(row):
        augment = record.config.get("augment")
        views = augment.get("views") if isinstance(augment, dict) else None
        view = views.get("labeled") if isinstance(views, dict) else None
        if isinstance(view, dict):
            return view
    return {}


def _deviations(section: Section) -> list[tuple[str, tuple[str, ...]]]:
    """Where an augmentation policy, or a method in what no option undoes, differs from its paper."""
    by_text: dict[str, list[str]] = {}
    for row in section.rows:
        records = _records(row)
        lines = {f"Augmentation differs from the paper: {line}." for one in records for line in one.augment_deviations}
        lines |= {f"The method differs from its code: {line}." for one in records for line in one.method_deviations}
        for line in sorted(lines):
            by_text.setdefault(line, []).append(row.label)
    return [(line, tuple(labels)) for line, labels in by_text.items()]


def _mark(number: int) -> str:
    return MARKS[number % len(MARKS)] * (1 + number // len(MARKS))


def marks(notes: list[Footnote], row: Row) -> list[str]:
    """The marks that a row carries."""
    return [note.mark for note in notes if row.label in note.rows]


def equal_compute_command(section: Section, images: float) -> str | None:
    """How to train the baseline of a suite until it has seen so many images."""
    records = [run.record for run in section.runs if run.record.method == BASELINE and run.record.batch_labeled]
    if section.keys["suite"] is None or not records:
        return None
    steps = round(images / records[0].batch_labeled)
    words = [f"suite={section.keys['suite']}", f"suite.methods=[{BASELINE}]", "suite.reference=false"]
    return shlex.join(["ssodbench", "suite", *words, f"schedule.steps={steps}", "runs_dir=DIR"])
