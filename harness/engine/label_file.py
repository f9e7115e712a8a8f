"""pseudo_labels.npz: the pseudo labels that a run was trained on, in its folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import numpy as np

from harness.core import checksum, readback
from harness.core.files import write_atomically
from harness.core.readback import Count
from harness.core.types import ImageSource, UserError
from harness.data.annotations import positions

LABELS = "pseudo_labels.npz"  # in the run's folder


def write_label_file(path: Path, source: ImageSource, made_by: dict[str, str | None], steps: int) -> None:
    """Writes the boxes of a source of images, what made them, and how many steps that took.

    Args:
        path: of the file.
        source: images with pseudo labels, in original pixels.
        made_by: what the labels depend on.
        steps: of stage 1.
    """
    content = io.BytesIO()
    np.savez(
        content,
        ids=source.ids,
        boxes=source.boxes,
        labels=source.labels,
        scores=source.scores,
        offsets=source.offsets,
        made_by=json.dumps(made_by),
        steps=steps,
    )
    write_atomically(path, checksum.sealed(content.getvalue()))


def kept_labels(run_dir: Path, category_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pseudo labels that a run was trained on.

    Args:
        run_dir: its folder.
        category_ids: (C,) of the dataset.

    Returns:
        (K,) int64 image ids, and (N, 7) float64 boxes as from `harness.engine.evaluate.predictions`.

    Raises:
        UserError: they are missing, damaged, or of other classes.
    """
    found = decode_label_file(run_dir / LABELS)
    if len(found.labels) and not 1 <= found.labels.min() <= found.labels.max() <= len(category_ids):
        raise UserError(f"{run_dir / LABELS} has labels of classes that the data has not: give the run's own data")
    images = np.repeat(found.ids, np.diff(found.offsets))
    xywh = np.column_stack([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]])
    return found.ids, np.column_stack([images, xywh, found.scores, category_ids[found.labels - 1]]).astype(np.float64)


class StoredLabels(msgspec.Struct):
    """pseudo_labels.npz. K images with M boxes."""

    ids: np.ndarray  # (K,) int64, of images
    boxes: np.ndarray  # (M, 4) float32 xyxy, original pixels
    labels: np.ndarray  # (M,) int64 in 1..C
    scores: np.ndarray  # (M,) float32
    offsets: np.ndarray  # (K + 1,) int64
    made_by: dict[str, str | None]
    steps: Count  # of stage 1


def decode_label_file(path: Path) -> StoredLabels:
    """pseudo_labels.npz by schema.

    Raises:
        UserError: it is missing, damaged, or holds what no stage 1 gives.
    """
    remedy = "put the file back as the run wrote it, or start anew in another run_dir=DIR"
    content = readback.content_of(path, remedy)
    try:
        checksum.verify(path)
        with np.load(io.BytesIO(content)) as archive:
            arrays = {name: archive[name] for name in StoredLabels.__struct_fields__ if name in archive}
        arrays["made_by"] = msgspec.json.decode(str(arrays["made_by"]))
        arrays["steps"] = arrays["steps"].item()
    except (msgspec.DecodeError, KeyError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else readback.reason(error)
        raise readback.damaged(path, what, remedy) from error
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise readback.damaged(path, f"{type(error).__name__}: {error}", remedy) from error
    try:
        found = readback.convert(arrays, StoredLabels)
    except ValueError as error:
        raise readback.damaged(path, str(error), remedy) from error
    if wrong := _misfit(found):
        raise readback.damaged(path, wrong, remedy)
    return found


def _misfit(found: StoredLabels) -> str | None:
    """What of the arrays does not fit the others."""
    images, boxes = len(np.atleast_1d(found.ids)), len(np.atleast_1d(found.labels))
    expected = {
        "ids": ((images,), np.int64),
        "boxes": ((boxes, 4), np.float32),
        "labels": ((boxes,), np.int64),
        "scores": ((boxes,), np.float32),
        "offsets": ((images + 1,), np.int64),
    }
    for name, (shape, kind) in expected.items():
        array = getattr(found, name)
        if array.shape != shape or array.dtype != kind:
            return f"{name} is {array.dtype} of shape {list(array.shape)}, not {kind.__name__} of {list(shape)}"
    if found.offsets[0] != 0 or found.offsets[-1] != boxes or (np.diff(found.offsets) < 0).any():
        return f"offsets do not divide the {boxes} boxes"
    if not np.isfinite(found.boxes).all() or not ((found.scores >= 0) & (found.scores <= 1)).all():
        return "a box or a score is not a number that it can be"
    return "a label is below 1" if (found.labels < 1).any() else None


def read_label_file(path: Path, unlabeled: ImageSource, classes: int) -> tuple[ImageSource, StoredLabels]:
    """The unlabelled images that have pseudo labels, with them; and what the file says.

    Raises:
        UserError: it is missing or damaged, or has images or classes that the data has not.
    """
    found = decode_label_file(path)
    rows = positions(unlabeled.ids, found.ids)
    remedy = "start anew in another run_dir=DIR"
    if (rows < 0).any():
        raise readback.damaged(path, f"image {found.ids[rows < 0][0]} is not an unlabelled one", remedy)
    if (found.labels > classes).any():
        raise readback.damaged(path, f"a label is above the number of classes, {classes}", remedy)
    source = unlabeled.select(rows).with_boxes(found.boxes, found.labels, found.scores, found.offsets)
    return source, found
