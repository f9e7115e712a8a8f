"""Every run below a folder: its records, what a suite planned besides, copies counted once, and its share of labels."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.identity import without_circumstances
from harness.core.escape import file_name
from harness.core.files import refusal, trouble
from harness.core.readback import PlannedCell, content_of, read_plan
from harness.core.record import parse_record, read_record
from harness.core.types import RunRecord, UserError
from harness.report.statistics import Pair
from harness.splits.protocols import PROTOCOLS

ALL_LABELS = 100.0
UNKNOWN_SHARE = 0.0  # no run has labels for no image

# Split protocols that are told what is labelled, and draw nothing; those of them that label the whole training part.
GIVEN = tuple(name for name, protocol in PROTOCOLS.items() if not protocol.draws)
SHOTS = "shots"  # the protocol that draws so many images of each class, in place of a percentage
_WHOLE = tuple(name for name, protocol in PROTOCOLS.items() if protocol.takes_unlabeled_part)

# Runs that differ in one of these are never shown in one table.
TABLE_KEYS = (
    "suite",
    "dataset",
    "dataset_sha256",
    "val_sha256",
    "evaluated_on",
    "protocol",
    "empty_images",
    "crowd_boxes",
    "detector",
    "pretraining",
    "preset",
    "score_threshold",
)
COLLECTED = "records.jsonl"  # a record in each line; what else a run left may lie in a folder of the cell's name


@dataclass
class Run:
    """One record, and its folder (None for a cell that left no record)."""

    record: RunRecord
    folder: Path | None
    file: Path | None = None  # that the record was read from
    variant: str = ""  # what its configuration has that others of the same method have not
    share: float = UNKNOWN_SHARE  # its column: percentage of images that are labelled, or shots
    href: str = ""  # address of its record, seen from the report

    @property
    def pair(self) -> Pair:
        """Fold and seed, by which runs are paired."""
        return self.record.fold, self.record.seed


def kind_of(record: RunRecord) -> tuple[str, str, str]:
    """What is compared: a method, its labeller, and its variant in the suite; the latter "" where there are none."""
    return record.method, record.labeller or "", record.variant or ""


def collect(folder: Path) -> tuple[list[Run], list[str]]:
    """Reads all records below a folder.

    Returns:
        Runs, those among them that a suite planned and that left no record; and sentences about what could not be used.

    Raises:
        UserError: there is no record.
    """
    if not folder.is_dir():
        why = trouble(folder)
        raise UserError(
            f"{folder} is not a folder{f' ({why})' if why else ''}: give runs_dir=DIR with the records of runs"
        )
    runs: list[Run] = []
    problems: list[str] = []
    for path in find_records(folder, problems):
        runs += _read(path, problems)
    if not runs:
        raise UserError(f"{problems[0] if problems else f'there is no record.json below {folder}'}")
    runs += planned_without_record(folder, runs, problems)
    runs = _without_copies(runs, problems)
    _set_shares(runs)
    return runs, problems


def find_records(folder: Path, problems: list[str] | None = None) -> Iterator[Path]:
    """Every record.json and records.jsonl below a folder; not a run's own first stage, which lies in that run's folder.

    A sentence about each folder that cannot be read goes to `problems`.
    """

    def note(error: OSError) -> None:
        if problems is not None:
            problems.append(f"{refusal(error)}; what lies in it is left out")

    for parent, folders, files in os.walk(folder, onerror=note):
        folders.sort()
        if COLLECTED in files:
            yield Path(parent) / COLLECTED
        if "record.json" in files:
            yield Path(parent) / "record.json"
            folders.clear()


def _read(path: Path, problems: list[str]) -> list[Run]:
    """The runs of a record.json or records.jsonl; sentences about what cannot be used go to `problems`."""
    runs = []
    try:
        if path.name != COLLECTED:
            return [Run(read_record(path), path.parent, path)]
        lines = content_of(path, "give a folder with records").splitlines()
    except UserError as error:
        problems.append(str(error))
        return []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_record(path, line)
            runs.append(Run(record, path.parent / file_name(record.cell or f"line-{number}"), path))
        except UserError as error:
            problems.append(f"line {number} of {error}")
    return runs


def planned_without_record(folder: Path, runs: list[Run], problems: list[str]) -> list[Run]:
    """The cells that a suite planned and that left no record, each with the reason; adds plans that are damaged."""
    known = {(run.record.suite, run.record.cell) for run in runs}
    found = []
    for path in sorted(folder.rglob("suite.json")):
        try:
            plan = read_plan(path)
        except UserError as error:
            problems.append(str(error))
            continue
        of_suite = [run.record for run in runs if run.record.suite == plan.suite]
        for cell in plan.cells:
            if (plan.suite, cell.name) not in known:
                found.append(Run(_planned_record(plan.suite, cell, of_suite), None))
    return found


def _planned_record(suite: str, cell: PlannedCell, of_suite: list[RunRecord]) -> RunRecord:
    """A record for a cell that left none, to stand in the table of the suite's other records."""
    alike = [record for record in of_suite if record.protocol == cell.protocol]
    same = [record for record in alike if record.dataset == cell.dataset]
    template = (same or alike or [RunRecord(dataset=cell.dataset, protocol=cell.protocol)])[0]
    record = RunRecord(**{key: getattr(template, key) for key in TABLE_KEYS})
    record.suite, record.cell, record.method, record.variant = suite, cell.name, cell.method, cell.variant
    record.percent, record.fold, record.seed = cell.percent, cell.fold, cell.seed
    record.shots = cell.shots
    labellers = {other.labeller for other in of_suite if other.method == cell.method}
    record.labeller = labellers.pop() if len(labellers) == 1 else None
    record.status, record.error = cell.state, cell.reason or "not run"
    return record


def _set_shares(runs: list[Run]) -> None:
    """Sets each run's share: the percentage or shots that were drawn by, or the percentage that a list really is."""
    totals: dict[str, int] = {}
    for run in runs:  # of one split all runs count the same images, but a method may leave some unlabelled ones out
        images = run.record.labeled_images + run.record.unlabeled_images
        totals[run.record.split_sha256] = max(totals.get(run.record.split_sha256, 0), images)
    by_asked: dict[Any, float] = {}  # split.percent of the configuration -> share, for cells that left no record
    for run in runs:
        run.share = _share(run.record, totals[run.record.split_sha256])
        if run.folder is not None:
            by_asked[_split_of(run.record).get("percent")] = run.share
    for run in runs:
        if run.folder is None and run.record.protocol in GIVEN:
            run.share = by_asked.get(run.record.percent, UNKNOWN_SHARE)


def _share(record: RunRecord, images: int) -> float:
    """The percentage of `images` that a run has labelled, of lists three digits of it; or the shots drawn by."""
    if record.shots is not None:
        return float(record.shots)
    if record.protocol in _WHOLE:
        return ALL_LABELS
    if record.protocol not in GIVEN and record.percent is not None:
        return record.percent
    split = _split_of(record)
    # Older records repeat the percentage of the configuration, which means nothing unless the list was made for it.
    made_for_it = "{percent}" in str(split.get("index_file")) or "@" in str(split.get("index_file"))
    share = record.percent if record.percent != split.get("percent") or made_for_it else None
    if share is None and record.labeled_images:
        share = 100 * record.labeled_images / images
    return UNKNOWN_SHARE if share is None else float(f"{share:.3g}")


def _split_of(record: RunRecord) -> dict[str, Any]:
    """`split` of a run's configuration."""
    split = record.config.get("split")
    return {key: value for key, value in split.items() if _is_plain(value)} if isinstance(split, dict) else {}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _without_copies(runs: list[Run], problems: list[str]) -> list[Run]:
    """Counts a run once whose folder was copied, and the newest where one was run again elsewhere."""
    newest: dict[str, Run] = {}
    for one in sorted(runs, key=lambda run: (run.record.status == "ok", run.record.started)):
        r = one.record
        place = [*(getattr(r, key) for key in TABLE_KEYS), kind_of(r), variable_part(r), r.percent, r.fold, r.seed]
        place += [r.shots]
        key = json.dumps(place)
        if key in newest:
            problems.append(f"{newest[key].folder} is not counted: {one.folder} is a newer run of the same cell.")
        newest[key] = one
    return list(newest.values())


def variable_part(record: RunRecord) -> dict[str, Any]:
    """What a record's configuration says besides which split and seed: runs are averaged only where it is equal."""
    if not record.config:
        keys = ("steps", "augment", "pipeline", "batch_labeled", "batch_unlabeled", "micro_batch", "reported_network")
        return {key: getattr(record, key) for key in keys} if record.status == "ok" else {}
    plain = without_circumstances(copy.deepcopy(record.config))
    plain.pop("seed", None)
    split = plain.get("split")
    if isinstance(split, dict):
        plain["split"] = {key: value for key, value in split.items() if key not in ("percent", "fold", "shots")}
    return plain
