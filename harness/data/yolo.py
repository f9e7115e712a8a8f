"""YOLO folders: one text file of boxes per picture, and ultralytics' `data.yaml` that names the parts and classes.

The labels of `DIR/images/x.jpg` are in `DIR/labels/x.txt`, one object per line: class number from 0, then centre x,
centre y, width and height as shares of the picture's sides; or class number and a polygon, whose hull is taken. A
picture without such a file shows no object.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harness.core.types import UserError
from harness.core.validate import File
from harness.data import annotation_cache
from harness.data.annotations import RawAnnotations, clean, finding
from harness.data.cache import build_once
from harness.data.datasets import (
    CocoIndex,
    Dataset,
    as_unlabeled,
    folder_index,
    make_index,
    require,
    with_ids_from,
    with_pictures,
)
from harness.data.images import SUFFIXES, list_pictures, read_sizes

_BEYOND = 1.01  # a share above this is no share: the coordinates are pixels


@dataclass(frozen=True)
class _Description:
    """The content of a `data.yaml`."""

    file: Path
    base: Path  # what its paths are relative to
    parts: dict[str, list[str]]
    names: list[str]


def yolo_dataset(
    name: str,
    root: str | Path,
    cache_dir: str | Path,
    description: str = "data.yaml",
    unlabeled: str | None = None,
    unlabeled_images: File | None = None,
    download: str = "",
) -> Dataset:
    """A dataset in YOLO's format.

    Args:
        name: how reports call it.
        root: folder that holds the description.
        cache_dir: root of the cache.
        description: ultralytics' `data.yaml`: keys train, val (each a folder, a list file or several of them; without
            val, split.holdout takes images to evaluate on), names (a list, or number to name), and path, the folder
            they are relative to (default: where the file lies).
        unlabeled: a folder of more pictures, relative to the same; opened only for split.protocol=full.
        unlabeled_images: likewise, in place of `unlabeled`; added to the unlabelled images of any protocol.
        download: where to get the files, for the message when they are missing.

    Images are numbered from 1 in the order of their names: training, then evaluation. Classes are numbered from 1.

    Raises:
        UserError: if a file is missing or cannot be used.
    """
    cache = Path(cache_dir)
    file = Path(root).expanduser() / description
    require(file, name, "description", ("yolo", file.parent, download))
    said = _read_description(file)
    train = yolo_index(said, "train", cache)
    opened = yolo_index(said, "val", cache) if "val" in said.parts else train.select([])
    val = with_ids_from(opened, len(train) + 1)
    no_val = "" if "val" in said.parts else f"{file} has no key val"
    if unlabeled_images:
        whole = Dataset(name, train, val, annotation_files=(file,), no_val=no_val)
        return with_pictures(whole, said.base / Path(unlabeled_images).expanduser(), cache)
    if unlabeled is None:
        return Dataset(name, train, val, None, "data.unlabeled names no folder", (file,), no_val=no_val)
    pictures = said.base / unlabeled
    require(pictures, name, "unlabeled", ("yolo", said.base, download), folder=True)
    return Dataset(
        name,
        train,
        val,
        lambda: as_unlabeled(folder_index(pictures, cache), train),
        annotation_files=(file,),
        no_val=no_val,
    )


def _read_description(file: Path) -> _Description:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as YAML ({' '.join(str(error).split())}): correct that file") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no keys: give ultralytics' data.yaml with train, val and names")
    return _Description(file, _base(file, content), _parts(file, content), _names(file, content))


def _base(file: Path, content: Mapping[str, Any]) -> Path:
    """`path` as ultralytics reads it, or else beside the file, where exported datasets lie."""
    given = content.get("path")
    if given is None:
        return file.parent
    path = Path(str(given)).expanduser()
    return (
        path
        if path.is_absolute() and path.exists()
        else next((folder for folder in (file.parent / path, path) if folder.exists()), file.parent)
    )


def _parts(file: Path, content: Mapping[str, Any]) -> dict[str, list[str]]:
    found = {}
    for part in ("train", "val"):
        value = content.get(part)
        if part == "val" and value is None:
            continue  # split.holdout takes images to evaluate on
        places = [value] if isinstance(value, str) else value
        if not isinstance(places, list) or not places or not all(isinstance(place, str) and place for place in places):
            raise UserError(f"{file} names no pictures under the key {part}: give a folder, a list file or several")
        found[part] = places
    return found


def _names(file: Path, content: Mapping[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, Mapping):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{file} must number its names from 0 without gaps: correct the key names")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file} has no class names: give the key names, a list or number: name")
    return [str(name) for name in names]


def _pictures(said: _Description, place: str) -> list[Path]:
    """The pictures of a folder and below it, or of a list file, in order."""
    path = said.base / place
    if not path.exists() and place.startswith("../"):
        path = said.base / place[3:]  # exports write ../train/images for what lies beside the file
    if path.is_dir():
        return [path / picture for picture, _ in list_pictures(path)]
    if not path.is_file():
        raise UserError(f"{said.file} names {place}, but {path} is not there: correct that file, or set data.root")
    lines = filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
    return [Path(line) if Path(line).is_absolute() else path.parent / line for line in lines]


def label_file(picture: Path) -> Path:
    """Where the boxes of a picture are: the last folder `images` of its path becomes `labels`, the suffix `.txt`."""
    parts = list(picture.parts)
    for number in reversed(range(len(parts) - 1)):
        if parts[number] == "images":
            parts[number] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def yolo_index(said: _Description, part: str, cache_dir: Path, threads: int = 8) -> CocoIndex:
    """Opens the pictures of one part; those whose header cannot be read are left out and counted.

    Headers and boxes are read once, and again when a name, size, inode or time has changed.
    """
    pictures = [picture for place in said.parts[part] for picture in _pictures(said, place)]
    pictures = [picture for picture in dict.fromkeys(pictures) if picture.suffix.lower() in SUFFIXES]
    if not pictures:
        raise UserError(f"{said.file} lists no picture under {part} ({', '.join(said.parts[part])}): correct that key")
    files = [os.path.relpath(picture, said.base) for picture in pictures]
    labels = [label_file(picture) for picture in pictures]
    parameters = {"form": "yolo", "names": said.names, "files": files, "state": [_state(p) for p in pictures + labels]}

    def build(to: Path) -> None:
        sizes = read_sizes(list(map(str, pictures)), threads)
        annotations = clean(_raw(said, part, files, labels, sizes))
        bad = np.array([isinstance(size, str) for size in sizes], bool)
        bare = np.array([not label.exists() for label in labels], bool) & ~bad
        annotations.findings += tuple(
            finding("pictures that cannot be read, left out", bad, lambda row: f"{files[row]} {sizes[row]}")
            + finding("pictures without a label file, taken for pictures without an object", bare, files.__getitem__)
        )
        annotation_cache.save_annotations(to, annotations)

    parameters["code"] = annotation_cache.code_sha256()
    folder = build_once(cache_dir / "annotations", parameters, build)
    annotations = annotation_cache.read_annotations(folder)
    content = [
        annotations.file_names,
        annotations.sizes.tolist(),
        annotations.xywh.tolist(),
        annotations.labels.tolist(),
    ]
    sha256 = hashlib.sha256(json.dumps([*content, annotations.offsets.tolist(), said.names]).encode()).hexdigest()
    return make_index(part, said.base, annotations, sha256)


def _state(path: Path) -> list[int] | None:
    try:
        s = path.stat()
    except OSError:
        return None
    return [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns]


def _raw(said: _Description, part: str, files: list[str], labels: list[Path], sizes: Sequence[Any]) -> RawAnnotations:
    usable = [row for row, size in enumerate(sizes) if not isinstance(size, str)]
    owners: list[int] = []
    classes: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    for number, row in enumerate(usable, 1):
        height, width = sizes[row]
        for label, (x, y, w, h) in _read_labels(labels[row], len(said.names)):
            owners.append(number)
            classes.append(label + 1)
            boxes.append(((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
    return RawAnnotations(
        f"{said.file} ({part})",
        np.arange(1, len(usable) + 1, dtype=np.int64),
        [files[row] for row in usable],
        np.array([sizes[row] for row in usable], np.int64).reshape(-1, 2),
        list(enumerate(said.names, 1)),
        np.array(owners, np.int64),
        np.array(classes, np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.zeros(len(boxes), bool),
        np.full(len(boxes), np.nan),
    )


def _read_labels(file: Path, num_classes: int) -> list[tuple[int, tuple[float, float, float, float]]]:
    """(class from 0, (centre x, centre y, width, height) as shares) of every line; nothing where there is no file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text file: give one line per object") from error
    return [_object(line.split(), f"{file}:{n}", num_classes) for n, line in enumerate(lines, 1) if line.strip()]


def _object(words: list[str], where: str, num_classes: int) -> tuple[int, tuple[float, float, float, float]]:
    try:
        label, *values = (float(word) for word in words)
    except ValueError as error:
        raise UserError(
            f"{where} holds something that is no number ({error}): write class, x, y, width, height"
        ) from error
    if label != int(label) or not 0 <= label < num_classes:
        raise UserError(
            f"{where} has the class {label:g}, but names in data.yaml has 0 to {num_classes - 1}: correct one"
        )
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise UserError(f"{where} has {len(values)} coordinates: write centre x, centre y, width, height, or a polygon")
    if not all(np.isfinite(values)) or max(values) > _BEYOND or min(values) < 1 - _BEYOND:
        raise UserError(f"{where} has coordinates outside 0 to 1: divide pixels by the picture's width and height")
    if len(values) > 4:
        xs, ys = values[::2], values[1::2]
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return int(label), (values[0], values[1], values[2], values[3])
