"""Splits written as two COCO annotation files, the form that Soft Teacher and mmdetection read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from harness.core.files import make_folder
from harness.core.types import Split, UserError
from harness.data.datasets import CocoIndex, Dataset
from harness.splits.protocols import PROTOCOLS

_MARK = "split exported by ssodbench"
_BEGIN = f'{{"info":{{"description":"{_MARK}"'.encode()  # an earlier export is known by it without reading all of it


def export_all(dataset: Dataset, splits: Sequence[Split], folder: Path) -> list[Path]:
    """Writes splits as COCO annotation files without polygons: every file of them, or none.

    The unlabelled file of a split holds the annotations that the dataset has, as the original scripts write it; what
    reads it for training is expected to ignore them.

    Returns:
        Of each split the labelled and the unlabelled file.

    Raises:
        UserError: a file that is no earlier export is in the way, or the folder cannot be written.
    """
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
    """File name -> the images that it lists: their index and their ids."""
    labeled, unlabeled = PROTOCOLS[split.protocol].exported_names(dataset.train.name, split)
    return {
        labeled: (dataset.train, split.labeled_ids),
        unlabeled: (dataset.unlabeled_of(split), split.unlabeled_ids),
    }


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
