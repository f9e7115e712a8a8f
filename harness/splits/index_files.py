"""Index files: the lists that say which images are labelled, in the forms that papers and users write them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from harness.core.escape import plain
from harness.core.files import read_bytes
from harness.core.readback import reason
from harness.core.types import UserError

T = TypeVar("T")
_SPLIT_NAME = re.compile(r"\.(\d+)@([\d.]+?)(-unlabeled)?$")  # of Soft Teacher's files: FOLD@PERCENT


def index_path(pattern: str, percent: float, fold: int) -> Path:
    """The named file: {percent} and {fold} stand for the split's values, other braces for themselves."""
    return Path(pattern.replace("{percent}", f"{percent:g}").replace("{fold}", str(fold))).expanduser()


def names_percent(pattern: str) -> bool:
    """Whether a file name says which percentage it is made for: by {percent}, or as Soft Teacher's files do."""
    return "{percent}" in pattern or bool(_SPLIT_NAME.search(Path(pattern).stem))


def read_positions(path: Path) -> dict[str, dict[str, list[int]]]:
    """Unbiased Teacher's index file: {percent: {fold: [positions]}}.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    remedy = "give a JSON file {percent: {fold: [positions]}} such as Unbiased Teacher's dataseed/COCO_supervision.txt"
    index: dict[str, dict[str, list[int]]] = {}
    for percent, folds in _fit(path, _json(path, _read(path)), dict[str, Any], "", remedy).items():
        key = f"[{percent[:20]!r}]"
        for fold, rows in _fit(path, folds, dict[str, Any], key, remedy).items():
            index.setdefault(percent, {})[fold] = _fit(path, rows, list[int], f"{key}[{fold[:20]!r}]", remedy)
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
        return _fit(path, entry, list[int], "", remedy), None
    if isinstance(entry, Mapping) and "labeled" in entry:
        rest = entry.get("unlabeled")
        labeled = _fit(path, entry["labeled"], list[int], "labeled", remedy)
        return labeled, None if rest is None else _fit(path, rest, list[int], "unlabeled", remedy)
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
    match = _SPLIT_NAME.search(path.stem)
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

    id: int


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
