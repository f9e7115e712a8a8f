"""Runs, sorted into what may stand in one table, and averaged where that is honest.

Runs of different suites, datasets, split protocols, evaluation sets, detectors or score thresholds are never put in
one table, and runs whose configurations differ in anything but percent, fold and seed are never averaged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.identity import differences
from harness.core.record import BASELINE
from harness.core.types import RunRecord
from harness.report.collect import (
    ALL_LABELS,
    GIVEN,
    SHOTS,
    TABLE_KEYS,
    UNKNOWN_SHARE,
    Run,
    collect,
    kind_of,
    variable_part,
)
from harness.report.statistics import Pair, Summary, summarize

_ORDER = (
    BASELINE,
    "stac",
    "unbiased_teacher",
    "soft_teacher",
    "mean_teacher",
    "dense_teacher",
    "arsl",
    "mixpl",
    "consistent_teacher",
)  # then others, by name
_LABELS = {"stac": "STAC", "arsl": "ARSL", "mixpl": "MixPL", "consistent_teacher": "Consistent-Teacher"}
_EVALUATED_ON = {
    "holdout": ", evaluated on held-out training images",
    "tune": ", evaluated on the images that settings are chosen on",
}


def shots_text(shots: float) -> str:
    """ "1 shot", "5 shots"."""
    return f"{shots:g} shot{'' if shots == 1 else 's'}"


def method_label(name: str) -> str:
    """A method's name for people."""
    return _LABELS.get(name, name.replace("_", " ").title())


def borrows_stage_one(record: RunRecord) -> bool:
    """Whether a run of the paper's preset took its pseudo labels from a suite's baseline, not the paper's stage 1."""
    method = record.config.get("method")
    offline = method.get("offline") if isinstance(method, dict) else None
    in_suite = record.suite is not None and record.preset == "paper"
    return in_suite and isinstance(offline, dict) and not (offline.get("stage1_overrides") or record.labeller)


@dataclass
class Cell:
    """All runs of one method at one label ratio."""

    percent: float
    runs: list[Run]  # those that are ok
    missing: list[Run]
    pairs: list[tuple[Run, Run]]  # each with the baseline of the same split and seed, where both have a score
    anchor: str = ""  # of its runs in the page

    @property
    def href(self) -> str:
        """Address of what its numbers were made from: a record, or the list of them in the page."""
        return self.runs[0].href if len(self.runs) == 1 else f"#{self.anchor}" if self.runs and self.anchor else ""

    def of(self, key: str) -> Summary:
        """Mean, sample standard deviation and n of a record's field over the runs that have it."""
        return _summary(getattr(run.record, key) for run in self.runs)

    def mean(self, key: str) -> float | None:
        """Mean of a record's field over the runs that have it."""
        return self.of(key).mean

    def std(self, key: str) -> float | None:
        """Sample standard deviation; None for fewer than two runs."""
        return self.of(key).sd

    def network_ap(self, name: str) -> float | None:
        """Mean AP of one network over the runs that have it, whether or not it is the reported one."""
        return _summary(run.record.scores.get(name, {}).get("ap") for run in self.runs).mean

    def reported(self, key: str) -> float | None:
        """Mean of a metric of the reported networks, such as ar or voc_ap50."""
        return _summary(run.record.scores.get(run.record.reported_network, {}).get(key) for run in self.runs).mean

    def of_class(self, name: str, key: str) -> float | None:
        """Mean of a metric of one class over the runs that have it."""
        return _summary(run.record.per_class.get(name, {}).get(key) for run in self.runs).mean

    def error(self, kind: str, key: str) -> float | None:
        """Mean of `count` or `lost_ap50` of one kind of error."""
        return _summary(run.record.errors.get(kind, {}).get(key) for run in self.runs).mean

    @property
    def by_pair(self) -> dict[Pair, float]:
        """(fold, seed) -> AP."""
        return {run.pair: run.record.ap for run in self.runs if run.record.ap is not None}

    @property
    def n(self) -> int:
        """Runs that are ok and have a score."""
        return len(self.by_pair)

    @property
    def gains(self) -> list[float]:
        """Differences to the baseline, over folds and seeds that both have."""
        return [(own.record.ap or 0.0) - (other.record.ap or 0.0) for own, other in self.pairs]

    @property
    def gain(self) -> float | None:
        """Mean difference to the baseline."""
        return summarize(self.gains).mean

    @property
    def gain_std(self) -> float | None:
        """Sample standard deviation of that difference."""
        return summarize(self.gains).sd

    @property
    def reason(self) -> str:
        """Why runs are missing."""
        reasons = [f"{run.record.status}: {first_line(run.record.error)}" for run in self.missing]
        return "; ".join(dict.fromkeys(reasons)) or ("not part of this suite" if not self.runs else "")


@dataclass
class Row:
    """One method (in one configuration) over the label ratios."""

    method: str
    variant: str
    cells: dict[float, Cell]
    labeller: str | None = None  # who made its pseudo labels, where they are of a file
    named: str = ""  # the suite's variant that it is; `variant` is then what it has that others of this name have not
    only_variant: bool = False  # whether every row of its table is of that variant, which the title says then

    @property
    def configuration(self) -> str:
        """The suite's variant, and what is particular besides."""
        return ", ".join(note for note in (self.named, self.variant) if note)

    @property
    def label(self) -> str:
        """The method's name, with what is particular about its configuration."""
        borrows = any(borrows_stage_one(run.record) for cell in self.cells.values() for run in cell.runs)
        labels = f"labels by {self.labeller}" if self.labeller else ""
        own = self.variant if self.only_variant else self.configuration
        notes = [labels, own, "stage 1: the suite's baseline" if borrows else ""]
        shown = ", ".join(note for note in notes if note)
        return method_label(self.method) + (f" ({shown})" if shown else "")


@dataclass
class Section:
    """What may stand in one table: one suite, dataset, protocol, evaluation set and detector."""

    keys: dict[str, Any]
    rows: list[Row]
    percents: list[float]  # columns; shots where the splits are drawn by those
    reference: list[Row] = field(default_factory=list)  # trained on all labels
    plots: dict[str, str] = field(default_factory=dict)  # name -> SVG

    @property
    def runs(self) -> list[Run]:
        """Every run that is ok."""
        return [run for row in [*self.rows, *self.reference] for cell in row.cells.values() for run in cell.runs]

    @property
    def networks(self) -> list[str]:
        """The names of all networks that were scored: student, teacher, ..."""
        return list(dict.fromkeys(name for run in self.runs for name in run.record.scores))

    @property
    def missing(self) -> list[Run]:
        """Every run that is not."""
        return [run for row in [*self.rows, *self.reference] for cell in row.cells.values() for run in cell.missing]

    @property
    def place(self) -> str:
        """Dataset, protocol and suite."""
        suite = f"suite {self.keys['suite']}" if self.keys["suite"] else "single runs"
        text = f"{self.keys['dataset']}, split protocol {self.keys['protocol']}, {suite}"
        return text + _EVALUATED_ON.get(self.keys["evaluated_on"], "")

    @property
    def title(self) -> str:
        """Its place and its detector."""
        return f"{self.place}, detector {self.detector}"

    @property
    def detector(self) -> str:
        """Its detector, and in brackets the suite's variant if all rows are of one."""
        variants = {row.named for row in self.rows if row.only_variant}
        return " ".join([str(self.keys["detector"]), *(f"({name})" for name in variants)])

    @property
    def by_shots(self) -> bool:
        """Whether the columns are of so many labelled images for each class, not of percentages."""
        return self.keys["protocol"] == SHOTS

    def column(self, percent: float) -> str:
        """The heading of a column: "10 %", "5 shots"; the protocol is named where it draws by neither."""
        if self.by_shots:
            return shots_text(percent)
        text = "share unknown" if percent == UNKNOWN_SHARE else f"{percent:g} %"
        return f"{text} ({self.keys['protocol']})" if self.keys["protocol"] in GIVEN else text

    def of_labels(self, percent: float) -> str:
        """What a column is of, within a sentence: "10 % of the labels", "5 shots"."""
        return self.column(percent) if self.by_shots else f"{self.column(percent)} of the labels"

    def distinct(self, key: str) -> list[Any]:
        """The different values of a record's field, in order."""
        values = {json.dumps(getattr(run.record, key), default=str): getattr(run.record, key) for run in self.runs}
        return [values[name] for name in sorted(values)]


def load(folder: Path) -> tuple[list[Section], list[str]]:
    """Reads and sorts all records below a folder.

    Returns:
        Sections, and sentences about records that could not be used.

    Raises:
        UserError: there is no record.
    """
    runs, problems = collect(folder)
    by_table: dict[str, list[Run]] = {}
    for one in runs:
        keys = [getattr(one.record, key) for key in TABLE_KEYS]
        by_table.setdefault(json.dumps(keys), []).append(one)
    return [_section(by_table[key]) for key in sorted(by_table)], problems


def _name_variants(runs: list[Run], steps: int) -> None:
    """Says for each run of one method what its configuration has that the commonest one of so many steps has not."""
    parts = [variable_part(run.record) for run in runs]
    alike = [part for run, part in zip(runs, parts, strict=True) if run.record.steps == steps] or parts
    texts = Counter(json.dumps(part, sort_keys=True) for part in alike if part)
    if not texts:
        return
    commonest = json.loads(min(texts, key=lambda text: (-texts[text], text)))
    for one, part in zip(runs, parts, strict=True):
        differing = differences(commonest, part) if part else []
        values = [line.split(": ", 1)[0] + "=" + line.rsplit(" -> ", 1)[1] for line in differing]
        one.variant = ", ".join(values[:3]) + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def _place(kind: tuple[str, str, str]) -> tuple[int, str, str, str]:
    method, labeller, named = kind
    return (_ORDER.index(method) if method in _ORDER else len(_ORDER), method, labeller, named)


def _section(runs: list[Run]) -> Section:
    """Sorts the runs that share a table into rows and columns."""
    kinds = sorted({kind_of(run.record) for run in runs}, key=_place)
    percents = sorted({run.share for run in runs})
    parts = [percent for percent in percents if percent < ALL_LABELS or runs[0].record.protocol == SHOTS]
    columns = parts or percents
    rows, reference = [], []
    steps = _usual_steps(runs)
    for kind in kinds:
        _name_variants([run for run in runs if kind_of(run.record) == kind], steps)
    baselines = _baselines(runs)
    for method, labeller, named in kinds:
        own = [run for run in runs if kind_of(run.record) == (method, labeller, named)]
        for variant in sorted({run.variant for run in own}):
            row = Row(method, variant, {}, labeller or None, named)
            extra = Row(method, variant, {}, labeller or None, named)
            for percent in percents:
                here = [run for run in own if run.variant == variant and run.share == percent]
                cell = _cell(percent, here, baselines)
                if percent in columns:
                    row.cells[percent] = cell
                elif here:
                    extra.cells[percent] = cell
            if any(cell.runs or cell.missing for cell in row.cells.values()):
                rows.append(row)
            if extra.cells:
                reference.append(extra)
    names = {named for _, _, named in kinds}
    for row in [*rows, *reference]:
        row.only_variant = len(names) == 1 and names != {""}
    keys = {key: getattr(runs[0].record, key) for key in TABLE_KEYS}
    return Section(keys, rows, columns, reference)


def _usual_steps(runs: list[Run]) -> int:
    """The commonest number of steps of the methods, or of the baseline where there is nothing else."""
    fine = [run.record for run in runs if run.record.status == "ok"]
    counts = Counter(r.steps for r in fine if r.method != BASELINE) or Counter(r.steps for r in fine) or Counter([0])
    return min(counts, key=lambda steps: (-counts[steps], steps))


def _cell(percent: float, here: list[Run], baselines: dict[tuple[Any, ...], Run]) -> Cell:
    fine = sorted((run for run in here if run.record.status == "ok"), key=lambda run: run.pair)
    missing = [run for run in here if run.record.status != "ok"]
    found = [(run, _baseline_of(run.record, baselines)) for run in fine if run.record.method != BASELINE]
    pairs = [(run, other) for run, other in found if other is not None and run.record.ap is not None]
    return Cell(percent, fine, missing, pairs)


def _baselines(runs: list[Run]) -> dict[tuple[Any, ...], Run]:
    """The baseline of each variant, split, seed and number of steps; of several configurations the first."""
    known: dict[tuple[Any, ...], Run] = {}
    for run in sorted(runs, key=lambda run: run.variant):
        if run.record.method == BASELINE and run.record.status == "ok" and run.record.ap is not None:
            known.setdefault(_place_of(run.record), run)
    return known


def _baseline_of(record: RunRecord, baselines: dict[tuple[Any, ...], Run]) -> Run | None:
    """That of the run's variant, or else the one that is of none."""
    variant, *place = _place_of(record)
    return baselines.get((variant, *place)) or baselines.get((None, *place))


def _place_of(record: RunRecord) -> tuple[Any, ...]:
    return record.variant, record.percent, record.fold, record.seed, record.split_sha256, record.steps


def first_line(text: str | None) -> str:
    """The first line of an error, not too long for a table."""
    line = ((text or "").strip() or "no reason recorded").splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."


def _summary(values: Iterable[float | None]) -> Summary:
    return summarize([float(value) for value in values if value is not None])
