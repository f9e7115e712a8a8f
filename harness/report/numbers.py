"""report.json: every number of the report, for machines.

Numbers are as they were computed; null is what is unknown, or has no interval. Labels needed that lie beyond what was
measured are null, and `beyond` says on which side. Paths of records are relative to the report's folder.
"""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import unquote

from harness.report.bootstrap import ImageInterval
from harness.report.collect import Run
from harness.report.comparison import LEVEL, Compared
from harness.report.costs import Cost
from harness.report.parts import Part
from harness.report.statistics import LabelsNeeded, Paired
from harness.report.tables import Cell, Row, Section

FORMAT = 1
SCORES = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
COSTS = (
    "images_per_s",
    "data_stall",
    "wall_seconds",
    "train_seconds",
    "eval_seconds",
    "steps",
    "extra_steps",
    "images_labeled",
    "images_unlabeled",
    "labeled_images",
    "labeled_boxes",
    "peak_memory_mb",
    "peak_gpu_memory_mb",
)
CLASS_KEYS = ("ap", "ap50", "ar", "pseudo_precision", "pseudo_recall")
PSEUDO = ("pseudo_precision", "pseudo_recall", "pseudo_iou")


def to_json(parts: list[Part], published: list[dict[str, Any]], problems: list[str]) -> bytes:
    """The report's numbers as indented JSON."""
    content = {
        "format": FORMAT,
        "level": LEVEL,
        "problems": problems,
        "tables": [_table(part) for part in parts],
        "published": [line for source in published for line in source["values"].values()],
    }
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"  # ASCII: names may not be valid UTF-8


def amount(section: Section, percent: float) -> dict[str, Any]:
    """What a column is of: the percentage that is labelled, or the shots that the split was drawn by."""
    return {"percent": None, "shots": int(percent)} if section.by_shots else {"percent": percent}


def _table(part: Part) -> dict[str, Any]:
    section = part.section
    return {
        "title": section.title,
        "keys": section.keys,
        "percents": [] if section.by_shots else section.percents,
        **({"shots": [int(shots) for shots in section.percents]} if section.by_shots else {}),
        "verdict": part.analysis.verdict,
        "resamples": part.analysis.resamples,
        "holm_over": part.analysis.corrected_over,
        "footnotes": [{"mark": note.mark, "text": note.text, "rows": note.rows} for note in part.footnotes],
        "rows": [_row(part, row, reference=False) for row in section.rows]
        + [_row(part, row, reference=True) for row in section.reference],
        "missing": [
            {"cell": run.record.cell, "status": run.record.status, "error": run.record.error} for run in section.missing
        ],
    }


def _row(part: Part, row: Row, reference: bool) -> dict[str, Any]:
    conditions = next((one for one in part.conditions if one.row is row), None)
    how = (
        {key: value for key, value in vars(conditions).items() if key not in ("row", "label")}
        if conditions is not None
        else None
    )
    return {
        "method": row.method,
        "variant": row.configuration,
        "labeller": row.labeller,
        "label": row.label,
        "reference": reference,
        "conditions": how,
        "cells": [_cell(part, row, cell) for cell in row.cells.values()],
    }


def _cell(part: Part, row: Row, cell: Cell) -> dict[str, Any]:
    one = part.analysis.of(row, cell)
    return {
        **amount(part.section, cell.percent),
        "n": cell.n,
        "missing": len(cell.missing),
        "reason": cell.reason,
        "scores": {key: vars(cell.of(key)) for key in SCORES} | {key: cell.reported(key) for key in part.more_scores},
        "networks": {name: cell.network_ap(name) for name in part.section.networks},
        "pseudo_labels": {key: vars(cell.of(key)) for key in PSEUDO},
        "compute": {key: cell.mean(key) for key in COSTS} | _cost(part.analysis.cost(row, cell)),
        "classes": {name: {key: cell.of_class(name, key) for key in CLASS_KEYS} for name in part.classes}
        if cell.runs
        else {},
        "errors": {k: {key: cell.error(k, key) for key in ("count", "lost_ap50")} for k in part.kinds},
        "comparison": _comparison(one) if one is not None else None,
        "runs": [_run(run) for run in cell.runs],
    }


def _cost(cost: Cost | None) -> dict[str, Any]:
    if cost is None:
        return {}
    totals = {"total_images": cost.images, "total_device_hours": cost.device_hours}
    return totals | {"front_by_images": cost.front_by_images, "front_by_hours": cost.front_by_hours}


def _comparison(one: Compared) -> dict[str, Any]:
    found = one.found
    return {
        "baseline": found.baseline,
        "says": one.standing.value,
        "over_runs": _paired(found.over_runs) | {"p_holm": found.p_holm},
        "over_images": _images(found.over_images),
        "labels": found.labels,
        "labels_needed": _needed(found.labels_needed),
        "labels_needed_by_images": _needed(one.labels_by_images),
        "compute_ratio": found.compute,
        "equal_compute": _paired(found.equal_compute) | {"baseline": one.equal_row.label}
        if found.equal_compute is not None and one.equal_row is not None
        else None,
        "by_compute_alone": one.by_compute_alone,
    }


def _paired(one: Paired) -> dict[str, Any]:
    return {key: getattr(one, key) for key in ("mean", "sd", "n", "low", "high", "p", "note")}


def _images(one: ImageInterval | None) -> dict[str, Any] | None:
    return {key: getattr(one, key) for key in ("value", "low", "high")} if one is not None else None


def _needed(one: LabelsNeeded | None) -> dict[str, Any] | None:
    if one is None:
        return None
    sides = {0.0: "fewer than measured", math.inf: "more than measured"}

    def number(value: float | None) -> float | None:
        return None if value is None or value in sides else value

    return {
        "labels": number(one.labels),
        "beyond": sides.get(one.labels),
        "low": number(one.low),
        "low_beyond": sides.get(one.low) if one.low is not None else None,
        "high": number(one.high),
        "high_beyond": sides.get(one.high) if one.high is not None else None,
        "measured": one.measured,
        "n": one.n,
        "note": one.note,
        "statement": one.statement,
    }


def _run(run: Run) -> dict[str, Any]:
    record = run.record
    keys = ("cell", "fold", "seed", *SCORES, "reported_network", "split_sha256", "config_sha256", "weights_sha256")
    return {key: getattr(record, key) for key in keys} | {"record": unquote(run.href, errors="surrogateescape") or None}
