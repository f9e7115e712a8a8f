"""`ssodbench prepare`: what a dataset and its splits hold, as tables and as a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from harness.config import sections
from harness.config.schema import PrepareOptions
from harness.core.console import Console
from harness.core.escape import literal
from harness.core.files import write_atomically
from harness.core.types import UserError
from harness.data import prepare, split_files
from harness.data.datasets import CocoIndex, Dataset
from harness.data.images import ImageCheck
from harness.data.prepare import Checks
from harness.data.set_apart import set_apart
from harness.splits.protocols import SplitOptions

_FORMATS = {
    "coco_dataset": "COCO's",
    "voc_dataset": "Pascal VOC's",
    "yolo_dataset": "YOLO's",
    "shapes_dataset": "COCO's",
}
_PERCENTS, _FOLDS = (1.0, 2.0, 5.0, 10.0), (1, 2, 3, 4, 5)  # of the papers
_SHOTS = (1, 5, 10)
_LONG = 10_000  # pictures from which a check without a terminal reports each tenth
_SHOWN = 8  # classes named in a sentence
_FEW = 4  # classes up to which a table has a column for each


def run(cfg: DictConfig) -> int:
    """Says what the dataset and its splits hold; gives the exit code."""
    describe(cfg)
    return 0


def describe(cfg: DictConfig) -> dict[str, Any]:
    """Opens a dataset, checks it, and says what its splits hold.

    Args:
        cfg: the whole configuration; reads data, split, check, export_dir, prepare.percents, prepare.folds, cache_dir.

    Returns:
        What was written to `prepared.json`.

    Raises:
        UserError: after printing everything, if what was found rules out a training.
    """
    from harness.engine import build

    console = Console(highlight=False, soft_wrap=True)
    export_dir = Path(cfg.export_dir) if cfg.export_dir else None
    if export_dir:
        split_files.check_folder(export_dir)
    dataset = build.divided_dataset(cfg)
    level = str(cfg.check)
    options, wanted = sections.split_options(cfg), sections.prepare_options(cfg)
    unlabeled = dataset.reads_unlabeled(options.chosen)
    indices = prepare.parts(dataset, unlabeled)
    with _progress(console, sum(map(len, indices.values())), level) as advance:
        checks = prepare.inspect_dataset(dataset, level, len(os.sched_getaffinity(0)), advance, unlabeled)
    described = _described(options, wanted)
    found: dict[str, Any] = {
        "dataset": dataset.name,
        "format": _FORMATS.get(str(cfg.data._target_).rpartition(".")[2]),
        "category_ids": dataset.train.category_ids.tolist(),
        "classes": list(dataset.train.category_names),
        "parts": {part: _part(index, checks.pictures[part], level) for part, index in indices.items()},
        "findings": [asdict(finding) for finding in checks.findings],
        "warnings": prepare.found_in_files(indices, checks),
        "fatal": checks.fatal,
        "evaluated_on": dataset.evaluated_on,
        "tune": None if dataset.tune is None else _counts(dataset.tune),
        "splits": [_split(dataset.whole, one, checks, cfg.evaluation.get("set")) for one in described],
        "files": [],
    }
    chosen = found["splits"][described.index(options)] if options in described else {}
    _print(console, found)
    for line in chosen.get("warnings", ()):
        console.print(line, markup=False)
    if checks.fatal is None and export_dir:
        found["files"] = _export(dataset, _splits(options, wanted, (), [options.fold]), export_dir)
        for file in found["files"]:
            console.print(f"wrote {file}", markup=False)
    console.print(_write(found, export_dir, Path(cfg.cache_dir)), markup=False)
    for message in (checks.fatal, chosen.get("error")):
        if message:
            raise UserError(message)
    return found


def _described(options: SplitOptions, wanted: PrepareOptions) -> list[SplitOptions]:
    """Every split to describe: of a protocol that draws, those of the papers too."""
    if not options.chosen.draws:
        return _splits(options, wanted, (), [options.fold])
    return _splits(options, wanted, _SHOTS if options.chosen.amount == "shots" else _PERCENTS, (*_FOLDS, options.fold))


def _splits(
    options: SplitOptions, wanted: PrepareOptions, amounts: Sequence[float], folds: Sequence[int]
) -> list[SplitOptions]:
    """prepare.percents (or prepare.shots) x prepare.folds; where one is not set, what is given here and `options` has.

    Raises:
        UserError: the key that is set is not the one that the protocol draws by.
    """
    key = "shots" if options.chosen.amount == "shots" else "percent"
    given, other = (wanted.shots, "percents") if key == "shots" else (wanted.percents, "shots")
    if getattr(wanted, other) is not None:
        raise UserError(f"prepare.{other} says nothing of split.protocol={options.protocol}: leave it null")
    kind, draws = type(getattr(options, key)), sorted(set(wanted.folds or folds))
    values = sorted({kind(value) for value in given or (*amounts, getattr(options, key))})
    return [replace(options, fold=fold, **{key: value}) for value, fold in product(values, draws)]


def _part(index: CocoIndex, pictures: ImageCheck, level: str) -> dict[str, Any]:
    return {
        "name": index.name,
        "image_dir": index.image_dir,
        "sha256": index.sha256,
        **_counts(index),
        "findings": [asdict(finding) for finding in index.findings],
        "pictures": {
            "check": level,
            "checked": pictures.checked,
            "bad": {str(number): reason for number, reason in pictures.bad.items()},
            "findings": [asdict(finding) for finding in pictures.findings],
        },
    }


def _counts(index: CocoIndex) -> dict[str, Any]:
    return {
        "images": len(index),
        "boxes": int((~index.crowd).sum()),
        "crowd_boxes": int(index.crowd.sum()),
        "images_without_boxes": int((~index.boxed()).sum()),
        "boxes_per_class": _named(index, index.boxes_per_class()),
    }


def _named(index: CocoIndex, counts: np.ndarray) -> dict[str, int]:
    return dict(zip(index.category_names, counts.tolist(), strict=True))


def _split(whole: Dataset, options: SplitOptions, checks: Checks, evaluate_on: str | None) -> dict[str, Any]:
    """Counts of one split, or the error that says why there is none."""
    row: dict[str, Any] = {"protocol": options.protocol, "percent": options.percent, "fold": options.fold}
    if options.shots is not None:
        row |= {"percent": None, "shots": options.shots}
    try:
        dataset = set_apart(whole, options, evaluate_on)
        split = prepare.resolve_split(dataset, options)
    except UserError as error:
        return {**row, "error": str(error)}
    labeled, unlabeled = prepare.sources(dataset, split, options, checks)
    counts = np.bincount(labeled.labels - 1, minlength=dataset.train.num_classes)
    return {
        **row,
        "percent": split.percent,
        "sha256": split.sha256,
        **asdict(options.policy),
        "labeled_ids": len(split.labeled_ids),
        "unlabeled_ids": len(split.unlabeled_ids),
        "labeled_images": len(labeled),
        "unlabeled_images": len(unlabeled) if unlabeled else 0,
        "added_images": prepare.added_pictures(dataset, unlabeled),
        "labeled_boxes": len(labeled.boxes),
        "boxes_per_class": _named(dataset.train, counts),
        "classes_without_labeled_box": [
            name for name, count in zip(dataset.train.category_names, counts, strict=True) if not count
        ],
        "warnings": prepare.about_split(dataset, split, options, labeled) + prepare.about_evaluation(dataset),
    }


def _export(dataset: Dataset, wanted: list[SplitOptions], folder: Path) -> list[str]:
    """Writes splits as files; gives their paths."""
    splits = [prepare.resolve_split(dataset, options) for options in wanted]
    return [str(path) for path in split_files.export_all(dataset, splits, folder)]


def _write(found: dict[str, Any], export_dir: Path | None, cache_dir: Path) -> str:
    """Writes prepared.json beside the exported files, or in the cache under the dataset's name and hash; says where.

    A cache that can only be read is no error.

    Raises:
        UserError: the exported files' folder cannot be written.
    """
    short = found["parts"]["train"]["sha256"][:12]
    path = (export_dir or cache_dir / "prepared" / f"{found['dataset']}-{short}") / "prepared.json"
    try:
        write_atomically(path, json.dumps(found, indent=1).encode(), durable=False)
    except OSError as error:
        if export_dir is None:
            return f"not written to the cache: {path} ({error.strerror})"
        raise UserError(
            f"cannot write {path} ({error.strerror}): set export_dir to a folder that can be written"
        ) from error
    return f"wrote {path}"


@contextmanager
def _progress(console: Console, total: int, level: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line for each tenth of a long check."""
    words = {"quick": "looking at pictures", "headers": "reading headers", "full": "decoding pictures"}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(words.get(level, level), total=total)
        seen = 0

        def advance(done: int) -> None:
            nonlocal seen
            seen += done
            bar.advance(task, done)
            if not console.is_terminal and total >= _LONG and seen * 10 // total > (seen - done) * 10 // total:
                console.print(f"{words[level]}: {seen:,} of {total:,}")

        yield advance


def _seen(found: dict[str, Any]) -> str:
    """One sentence on what was recognised."""
    parts = found["parts"]
    what = {"train": "to train on", "val": "to evaluate on", "unlabeled": "without labels"}
    counts = [
        f"{entry['images']:,} {'picture' if entry['images'] == 1 else 'pictures'} {what[part]}"
        + (f" with {entry['boxes']:,} {'box' if entry['boxes'] == 1 else 'boxes'}" if part != "unlabeled" else "")
        for part, entry in parts.items()
    ]
    names = found["classes"]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    classes = f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"
    form = f"in {found['format']} format" if found["format"] else "in a format of your own"
    return f"{found['dataset']} is {form}: {'; '.join(counts)}; {classes}{_gaps(found['category_ids'])}"


def _gaps(ids: list[int]) -> str:
    """What is said of category ids that are not consecutive."""
    if not ids or ids[-1] - ids[0] + 1 == len(ids):
        return ""
    return f"; category ids from {ids[0]} to {ids[-1]} with gaps, which predictions keep"


def _print(console: Console, found: dict[str, Any]) -> None:
    console.print(_seen(found), markup=False)
    table = _table(f"data={found['dataset']}", "part")
    for heading in ("images", "without boxes", "boxes", "crowd", "checked", "bad"):
        table.add_column(heading, justify="right")
    table.add_column("sha256", no_wrap=True)
    for part, entry in found["parts"].items():
        counts = (entry["images"], entry["images_without_boxes"], entry["boxes"], entry["crowd_boxes"])
        pictures = entry["pictures"]
        cells = [f"{n:,}" for n in (*counts, pictures["checked"], len(pictures["bad"]))]
        table.add_row(part, *cells, entry["sha256"][:12])
    console.print(table)
    for line in _apart(found):
        console.print(line, markup=False)
    _print_classes(console, found)
    _print_findings(console, found)
    _print_splits(console, found)


def _apart(found: dict[str, Any]) -> list[str]:
    """What was taken out of the training part."""
    lines = []
    if found["evaluated_on"] == "holdout":
        lines.append("the evaluation images are labelled training images that split.holdout took out")
    if found["tune"]:
        use = ", and val is that set" if found["evaluated_on"] == "tune" else ""
        images, boxes = found["tune"]["images"], found["tune"]["boxes"]
        lines.append(f"split.tune took {images:,} images with {boxes:,} boxes out, to choose settings on{use}")
    return lines


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column(first)
    return table


def _print_classes(console: Console, found: dict[str, Any]) -> None:
    parts = [part for part in ("train", "val") if part in found["parts"]]
    counts = [found["parts"][part]["boxes_per_class"] for part in parts]
    title = f"boxes of the {len(found['classes'])} classes"
    if len(found["classes"]) > _FEW:
        listed = ", ".join(f"{name} {'/'.join(f'{c[name]:,}' for c in counts)}" for name in found["classes"])
        console.print(f"{title} ({'/'.join(parts)}): {listed}", markup=False, soft_wrap=False)
        return
    table = _table(title, "class")
    for part in parts:
        table.add_column(part, justify="right")
    for name in found["classes"]:
        table.add_row(literal(name), *(f"{c[name]:,}" for c in counts))
    console.print(table)


def _print_findings(console: Console, found: dict[str, Any]) -> None:
    for line in found["warnings"] or ["nothing wrong was found in the files"]:
        console.print(line, markup=False)


def _print_splits(console: Console, found: dict[str, Any]) -> None:
    splits = [row for row in found["splits"] if "error" not in row]
    if splits:
        console.print(_split_table(splits, found["classes"]))
    for message in {row["error"]: None for row in found["splits"] if "error" in row}:
        console.print(f"no split: {message}", markup=False)


def _split_table(splits: list[dict[str, Any]], classes: list[str]) -> Table:
    """Labelled images, those of them that a run shows, and their boxes.

    Each class has a column where they are few; otherwise there are the least, median and most, and how many have none.
    """
    first, few = splits[0], len(classes) <= _FEW
    kept = f"empty images: {first['empty_images']}, crowd boxes: {first['crowd_boxes']}, min side: {first['min_side']}"
    by_shots = first.get("shots") is not None
    whole = "; shots are images of each class, and every box on a labelled image is labelled" if by_shots else ""
    table = _table(f"splits by protocol {first['protocol']} ({kept}{whole})", "shots" if by_shots else "%")
    per_class = [literal(name) for name in classes] if few else ["least", "median", "most", "no box"]
    for heading in ("fold", "labelled", "shown", "boxes", *per_class):
        table.add_column(heading, justify="right")
    table.add_column("sha256", no_wrap=True)
    for row in splits:
        counts = list(row["boxes_per_class"].values())
        if not few:
            counts = [min(counts), int(np.median(counts)), max(counts), len(row["classes_without_labeled_box"])]
        cells = (row["labeled_ids"], row["labeled_images"], row["labeled_boxes"], *counts)
        table.add_row(
            f"{row['shots'] if by_shots else row['percent']:g}",
            str(row["fold"]),
            *(f"{n:,}" for n in cells),
            row["sha256"][:10],
        )
    return table
