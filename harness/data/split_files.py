"""Splits as files: the form that Soft Teacher and mmdetection read, and the lists of ids that a user may give."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from harness.config.split_names import SPLIT_NAME
from harness.core.escape import plain
from harness.core.files import make_folder, read_bytes
from harness.core.readback import reason
from harness.core.types import Split, UserError
from harness.data.datasets import CocoIndex, Dataset

T = TypeVar("T")
_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_MARK = "split exported by ssodbench"
_BEGIN = f'{{"info":{{"description":"{_MARK}"'.encode()  # an earlier export is known by it without reading all of it


def file_names(train: str, split: Split) -> tuple[str, str]:
    """Names of the labelled and the unlabelled file of a split, as Soft Teacher's configurations expect them."""
    if split.protocol == "full":
        return f"{train}.json", "instances_unlabeled2017.json"
    if split.protocol == "annotated":
        return f"{train}.annotated.json", f"{train}.annotated-unlabeled.json"
    stem = f"{train}.{split.fold}@{split.percent:g}"
    return f"{stem}.json", f"{stem}-unlabeled.json"


def export(dataset: Dataset, split: Split, folder: Path) -> tuple[Path, Path]:
    """Writes a split as two COCO annotation files, without polygons.

    The unlabelled file holds the annotations that the dataset has, as the original scripts write it; what reads it for
    training is expected to ignore them.

    Returns:
        The labelled and the unlabelled file.

    Raises:
        UserError: a file that is no earlier export is in the way, or the folder cannot be written.
    """
    labeled, unlabeled = export_all(dataset, [split], folder)
    return labeled, unlabeled


def export_all(dataset: Dataset, splits: Sequence[Split], folder: Path) -> list[Path]:
    """`export` of several splits: every file of them, or none."""
    check_folder(folder)
    parts = {folder / name: part for split in splits for name, part in _parts(dataset, split).items()}
    partials = {path: path.with_name(f"{path.name}.partial") for path in parts}
    try:
        for path in parts:
            _check_free(path, dataset)
        make_folder(folder)
        for path, (index, ids) in parts.items():
            partials[path].write_bytes(_encode(index, ids))
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot export to {folder} ({error.strerror}): set export_dir to a folder that can be written, "
            "with space for the files"
        ) from error
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
    return list(parts)


def _parts(dataset: Dataset, split: Split) -> dict[str, tuple[CocoIndex, np.ndarray]]:
    """What each file of a split holds, by its name."""
    labeled, unlabeled = file_names(dataset.train.name, split)
    other = dataset.unlabeled if split.protocol == "full" else dataset.train
    assert other is not None
    return {labeled: (dataset.train, split.labeled_ids), unlabeled: (other, split.unlabeled_ids)}


def _encode(index: CocoIndex, ids: np.ndarray) -> bytes:
    content = index.coco_ground_truth(ids)
    assert next(iter(content)) == "info"
    return msgspec.json.encode(content | {"info": {"description": _MARK, "source": index.name}})


def check_folder(folder: Path) -> None:
    """Raises UserError if files cannot be exported to a folder because something else has its name."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"export_dir={folder} cannot be made, {path} is a file: give a folder")


def _check_free(path: Path, dataset: Dataset) -> None:
    """Raises UserError unless the path is free, or holds an earlier export that no part of the dataset is read from."""
    if path.is_dir():
        raise UserError(f"cannot export to {path}, which is a folder: give another export_dir")
    if not path.exists():
        return
    if any(file.exists() and file.samefile(path) for file in dataset.annotation_files):
        raise UserError(
            f"{path} is an annotation file of data={dataset.name} and is not replaced: give another export_dir"
        )
    with path.open("rb") as file:
        begin = file.read(len(_BEGIN))
    if begin != _BEGIN:
        raise UserError(f"{path} is there and is no earlier export: move it away, or give another export_dir")


def read_index(path: Path) -> dict[str, dict[str, list[int]]]:
    """Unbiased Teacher's index file: {percent: {fold: [positions]}}.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    remedy = "give a JSON file {percent: {fold: [positions]}} such as Unbiased Teacher's dataseed/COCO_supervision.txt"
    index: dict[str, dict[str, list[int]]] = {}
    for percent, folds in _fit(path, _json(path, _read(path)), dict[str, Any], "", remedy).items():
        key = f"[{percent[:20]!r}]"
        for fold, rows in _fit(path, folds, dict[str, Any], key, remedy).items():
            index.setdefault(percent, {})[fold] = _fit(path, rows, list[_Id], f"{key}[{fold[:20]!r}]", remedy)
    return index


def _fit(path: Path, value: Any, kind: type[T], key: str, remedy: str) -> T:
    """The value, which is at `key` of the file, checked against its schema."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        where = f"{key}: " if key else ""
        raise UserError(f"split.index_file={path} does not fit ({where}{reason(error)}): {remedy}") from error


def read_ids(path: Path, percent: float, fold: int) -> tuple[Any, Any]:
    """Labelled and unlabelled image ids from a file; the second is None where the file does not give them.

    Args:
        path: a JSON list of labelled ids; a JSON object {"labeled": [...], "unlabeled": [...]}, the second optional; a
            labelled COCO annotation file such as `instances_train2017.1@10.json`, beside which the one whose name ends
            in `-unlabeled.json` is read too; or a text file with one labelled id per line.
        percent, fold: of the split asked for, which must be those in the name of such a COCO file.
    """
    content = _read(path)
    if path.suffix.lower() != ".json" and content.lstrip()[:1] not in (b"[", b"{"):
        return _text(path, content), None
    entry = _json(path, content)
    remedy = "give image ids, which are whole numbers"
    if isinstance(entry, list):
        return _fit(path, entry, list[_Id], "", remedy), None
    if isinstance(entry, Mapping) and "labeled" in entry:
        rest = entry.get("unlabeled")
        labeled = _fit(path, entry["labeled"], list[_Id], "labeled", remedy)
        return labeled, None if rest is None else _fit(path, rest, list[_Id], "unlabeled", remedy)
    if isinstance(entry, Mapping) and "images" in entry:
        _check_name(path, percent, fold)
        partner = path.with_name(f"{path.stem}-unlabeled.json")
        rest = _json(partner, _read(partner)) if partner.exists() else None
        return _image_ids(path, entry), None if rest is None else _image_ids(partner, rest)
    raise UserError(
        f'split.index_file={path} is neither a list of image ids, nor {{"labeled": [...]}}, nor a COCO annotation '
        "file: give one of them"
    )


def _check_name(path: Path, percent: float, fold: int) -> None:
    match = SPLIT_NAME.search(path.stem)
    if not match:
        return
    if match.group(3):
        raise UserError(f"split.index_file={path} is the unlabelled half of a split: give the file without -unlabeled")
    if (int(match.group(1)), float(match.group(2))) != (fold, float(percent)):
        raise UserError(
            f"split.index_file={path} is fold {match.group(1)} at {match.group(2)} %, not split.fold={fold} "
            f"split.percent={percent:g}: set these keys to what the file holds"
        )


class _Image(msgspec.Struct):
    """An image of a COCO annotation file."""

    id: _Id


def _image_ids(path: Path, entry: Any) -> list[int]:
    remedy = "give a COCO annotation file whose images have ids"
    images = entry.get("images") if isinstance(entry, Mapping) else None
    return [image.id for image in _fit(path, images, list[_Image], "images", remedy)]


def _text(path: Path, content: bytes) -> list[int]:
    words = content.split()
    for word in words:
        if not re.fullmatch(rb"-?[0-9]{1,18}", word):
            shown = plain(word[:40].decode(errors="replace"))
            raise UserError(f"split.index_file={path} has the line '{shown}', no image id: give one per line")
    return [int(word) for word in words]


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"cannot read split.index_file={path} ({error.strerror}): give an existing file") from error


def _json(path: Path, content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"split.index_file={path} is not JSON ({reason(error)}): give an index file") from error
