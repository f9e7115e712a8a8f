"""The YAML of a folder of pictures and annotations: its format, and what the CPU preset needs, measured on boxes."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harness.config import compose, layouts, sections
from harness.core.console import counted
from harness.core.escape import plain
from harness.core.files import trouble
from harness.core.types import UserError
from harness.data.datasets import CocoIndex, Dataset
from harness.engine import build

FORMATS = {"coco": "COCO", "custom": "COCO", "voc": "Pascal VOC", "yolo": "YOLO"}
_LEVELS = (1 / 6, 1 / 2, 5 / 6)  # quantiles of box sizes, one for each level of the small detector's pyramid
_SHORT, _SHORTEST, _LONGEST = 128, 64, 256  # px: the usual short side, and its bounds
_FINE = 8.0  # px: at least so large the smaller boxes should be, for a finest stride of 4
_STEP = 32  # px, of short sides
_DEEP = 2  # levels of folders in which pictures are looked for


@dataclass(frozen=True)
class Small:
    """`data.small`: what the CPU preset takes from a dataset, px."""

    short_side: int
    max_side: int
    anchor_sizes: list[int]


@dataclass(frozen=True)
class Recognized:
    """A dataset that was found in a folder."""

    form: str  # COCO, Pascal VOC, YOLO
    keys: dict[str, Any]  # of its YAML, `_target_` and `name` among them, without `small`
    dataset: Dataset


def recognize(root: Path, name: str, cache_dir: str) -> Recognized:
    """Looks at a folder, and opens what it finds.

    Raises:
        UserError: it holds no dataset that can be read, or one that cannot be used.
    """
    if why := trouble(root):
        raise UserError(f"there is no folder {root} ({why}): give the one that holds pictures and annotations")
    if not root.is_dir():
        raise UserError(f"{root} is a file: give the folder that holds pictures and annotations")
    said = layouts.suggestion(root)
    words = (
        shlex.split(said.removeprefix("say ").partition(" (each")[0]) if said and said.startswith("say data=") else []
    )
    if not words:
        raise UserError(said or _nothing(root))
    option = words[0].removeprefix("data=")
    overrides = [f"data.root={root.absolute()}", *(word for word in words[1:] if not word.startswith("data.root="))]
    if any(word.endswith(("TRAIN.txt]", "VAL.txt]")) for word in overrides):
        raise UserError(
            f"{root} looks like Pascal VOC's format, without lists of its pictures: write ImageSets/Main/train.txt and "
            "val.txt with one picture name per line, and start again"
        )
    cfg = compose.load([f"data={option}", *_with_folders(root, overrides), f"cache_dir={cache_dir}"])
    opened = build.dataset(sections.group(cfg, "data"), Path(cache_dir))
    return Recognized(FORMATS[option], _keys(sections.group(cfg, "data"), root, name), opened)


def _keys(data: Mapping[str, Any], root: Path, name: str) -> dict[str, Any]:
    """The keys of the YAML, without what suits the format's own dataset alone."""
    chosen = {"_target_": data["_target_"], **data}
    for key in ("small", "download", "classes"):
        chosen.pop(key, None)
    for key, value in chosen.items():
        places = value if isinstance(value, list) else [value]
        if key.startswith("unlabeled") and not all(place and (root / str(place)).exists() for place in places):
            chosen[key] = None
    return chosen | {"name": name}


def _nothing(root: Path) -> str:
    return (
        f"{root} holds nothing that is known: COCO's format has JSON files such as train.json and val.json, Pascal "
        "VOC's the folders Annotations, JPEGImages and ImageSets/Main, YOLO's a data.yaml with images and labels"
    )


def _with_folders(root: Path, overrides: Sequence[str]) -> list[str]:
    """The settings with the folders of pictures in the places that the annotations leave open."""
    given = dict(word.split("=", 1) for word in overrides)
    for part in ("train", "val"):
        if given.get(f"data.{part}_images") == "FOLDER":
            given[f"data.{part}_images"] = _folder_of(root, given[f"data.{part}_annotations"])
    return [f"{key}={value}" for key, value in given.items()]


def _folder_of(root: Path, annotations: str) -> str:
    """The folder below `root` in which the first picture of a COCO file lies."""
    try:
        first = json.loads((root / annotations).read_bytes())["images"][0]["file_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return "."  # opening the file says what is wrong with it
    folders = [root]
    for _ in range(_DEEP + 1):
        for folder in folders:
            if (folder / str(first)).is_file():
                return os.path.relpath(folder, root)
        folders = [Path(entry.path) for folder in folders for entry in _folders(folder)]
    raise UserError(
        f"{root / annotations} lists {plain(first)}, which lies in no folder of {root}: put the pictures there, or "
        "write the YAML by hand (README, Your own images)"
    )


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted((entry for entry in os.scandir(folder) if entry.is_dir()), key=lambda entry: entry.name)
    except OSError:
        return []


def measure(index: CocoIndex) -> Small:
    """Picture and anchor sizes for the CPU preset, from the boxes of a dataset.

    Pictures are made as small as the usual 128 px, or larger where a sixth of the boxes would then be below 8 px. The
    anchors of the three levels are the sizes below which a sixth, a half and five sixths of the boxes lie. Every class
    counts alike, however many boxes it has, as it does in AP.
    """
    usable = ~index.crowd
    image = np.repeat(np.arange(len(index)), np.diff(index.offsets))[usable]
    short, long = index.sizes.min(1).astype(float), index.sizes.max(1).astype(float)
    boxes, labels = index.boxes[usable], index.labels[usable]
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)) / short[image]  # as shares of the picture's short side
    shares = _quantiles(sides, 1.0 / np.bincount(labels)[labels])
    wanted = _SHORT if shares[0] * _SHORT >= _FINE else _FINE / shares[0]
    most = min(_LONGEST, max(_SHORTEST, float(np.median(short)) // _STEP * _STEP))  # nothing is gained by enlarging
    size = int(np.clip(np.ceil(wanted / _STEP) * _STEP, _SHORTEST, most))
    longest = int(np.ceil(size * min(2.0, float(np.quantile(long / short, 0.95)))))
    anchors = [max(4, round(float(share) * size)) for share in shares]
    for level in (1, 2):
        anchors[level] = max(anchors[level], anchors[level - 1] + 1)
    return Small(size, longest, anchors)


def _quantiles(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The values (3,) at `_LEVELS` of the whole weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    return values[order][np.searchsorted(reached, _LEVELS)]


def as_yaml(found: Recognized, small: Small) -> str:
    """The content of `data/NAME.yaml`."""
    train, val = found.dataset.train, found.dataset.val
    body = yaml.safe_dump(found.keys, sort_keys=False, allow_unicode=True, width=110)
    low, _, high = small.anchor_sizes
    return (
        f"# {found.form}'s format: {len(train):,} pictures to train on, {len(val):,} to evaluate, "
        f"{counted(len(train.category_names), 'class')}.\n"
        f"# Written by `ssodbench init`; change what does not suit.\n{body}"
        "small: # what the CPU preset takes from a dataset: px, and one anchor size for each level of the pyramid\n"
        f"  short_side: {small.short_side} # {low} to {high} px are two thirds of the boxes then, every class alike\n"
        f"  max_side: {small.max_side}\n  anchor_sizes: {small.anchor_sizes}\n"
    )
