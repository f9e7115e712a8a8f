"""What a method takes for the truth of unlabelled images, box by box: for `view`, and a few images kept of every run.

Ground truth is not needed here, and is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from detectors.methods.method import Method
from harness.core import boxes as box_ops
from harness.core import readback
from harness.core.draws import first_by_hash
from harness.core.files import write_atomically
from harness.core.readback import Count, Share, Struct
from harness.core.types import Batch, ImageSource, MicroBatch, Target, View
from harness.engine.build import Data, Experiment

PSEUDO_LABELS = "pseudo_labels.json"  # beside record.json
KEPT_IMAGES = 8
_FOUND = 0.05  # score from which the teacher's boxes are told
_SAME = 0.9  # IoU from which a pseudo label is one of the teacher's boxes, which a matrix has rounded


@dataclass
class Labelled:
    """One unlabelled image with the boxes that were found and those that are taught."""

    image: int  # its id
    weak: View  # of this image alone
    strong: View
    found: Target  # by the teacher, in the weak view; none without a teacher
    uses: dict[str, Target]  # in the strong view, by what they teach


def label_batch(method: Method, batch: Batch, step: int) -> list[Labelled]:
    """The unlabelled images of a batch as the method labels them at a step; leaves the method as it was."""
    strong = batch.unlabeled.get(method.labels_view)
    if strong is None:
        return []
    weak = batch.unlabeled.get("weak", strong)
    labels, was_training = method.labels, method.training
    devices = [strong.images.device] if strong.images.device.type == "cuda" else []
    method.eval()  # BatchNorm keeps its statistics
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            nothing = [_no_boxes()] * len(weak)
            found = nothing if method.teacher is None else method.teacher.detect(weak, _FOUND)
            method(batch, step)
            uses = method.pseudo_labels
    finally:
        method.train(was_training)
        method.labels = labels
    each = []
    for row, image in enumerate(batch.unlabeled_ids.tolist()):
        one = torch.tensor([row])
        kept = {use: targets[row].to("cpu") for use, targets in uses.items()}
        each.append(Labelled(image, weak.rows(one), strong.rows(one), found[row].to("cpu"), kept))
    return each


def _no_boxes() -> Target:
    return Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


@dataclass
class Sorted:
    """N boxes of the strong view, and a few words on each."""

    target: Target
    words: list[str]
    rows: list[int]  # in `Labelled.found`; -1 for a box that the method made of others


def sort_out(one: Labelled) -> tuple[Sorted, Sorted]:
    """What of the boxes that were found is used, for what, and why the others are not.

    Returns:
        The boxes that are taught, and those of `found` that are not, both in the strong view.
    """
    found = one.found
    between = box_ops.between_views(one.weak.to_view.cpu(), one.strong.to_view.cpu())
    mapped = box_ops.transform_boxes(found.boxes[None], between)
    boxes = box_ops.clip_boxes(mapped, one.strong.sizes.cpu())[0]
    inside = box_ops.is_large_enough(boxes, 1.0)
    taken: dict[int, list[str]] = {}
    extra: list[tuple[Target, str]] = []
    for use, target in one.uses.items():
        for row in range(len(target)):
            same = (found.labels == target.labels[row]) & (
                box_ops.iou(boxes, target.boxes[row : row + 1])[:, 0] > _SAME
            )
            if same.any():
                taken.setdefault(int(same.nonzero()[0]), []).append(use)
            else:  # a method may move boxes before it teaches them
                extra.append((target[torch.tensor([row])], use))
    rows = torch.tensor(sorted(taken), dtype=torch.int64)
    kept = Target(boxes[rows], found.labels[rows], found.scores[rows])
    for target, _ in extra:
        kept = Target(*(torch.cat(parts) for parts in zip(parts_of(kept), parts_of(target), strict=True)))
    words = [" and ".join(taken[int(row)]) for row in rows] + [use for _, use in extra]
    lowest = min((float(found.scores[row]) for row in taken), default=None)
    left = torch.tensor([row for row in range(len(found)) if row not in taken], dtype=torch.int64)
    why = [_why(bool(inside[row]), float(found.scores[row]), lowest) for row in left.tolist()]
    rejected = Target(boxes[left], found.labels[left], found.scores[left])
    return Sorted(kept, words, [*rows.tolist(), *[-1] * len(extra)]), Sorted(rejected, why, left.tolist())


def parts_of(target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels and scores."""
    return target.boxes, target.labels, target.scores


def _why(inside: bool, score: float, lowest: float | None) -> str:
    if not inside:
        return "outside of the strong view"
    if lowest is None or score < lowest:
        return "score too low"
    return "another rule of the method, or another box in its place"


class KeptBox(Struct):
    """A box of an unlabelled image, in its stored pixels."""

    category_id: int
    bbox: tuple[float, float, float, float]  # x, y, width, height
    score: Share
    use: str | None  # what it teaches, such as "classification and regression"; null: nothing
    why: str | None  # why it is not used; null for one that is


class KeptImage(Struct):
    """An unlabelled image with the boxes that were found in it."""

    image_id: int
    boxes: list[KeptBox]


class KeptLabels(Struct):
    """pseudo_labels.json."""

    step: Count  # student steps made before
    images: list[KeptImage]  # by a hash of their ids


def keep(run: Experiment) -> None:
    """Writes what the method would teach of a few unlabelled images after its last step, beside the record.

    Nothing is written for a method that labels nothing while it trains. One process alone may call this. Weights,
    statistics, random numbers and what the pipeline counts stay as they are.

    Raises:
        UnusableImages: the pictures have gone.
    """
    data, method, steps = run.data, run.method, run.settings.schedule.steps
    if data.unlabeled is None or data.unlabeled.annotated or not method.views.unlabeled:
        return
    rows = _chosen(data, data.unlabeled)
    none = np.zeros(1, np.int64)
    micro = MicroBatch(steps - 1, 0, none, rows, none, np.arange(len(rows)))
    with torch.autocast(run.world.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"):
        each = label_batch(method, run.pipeline.batch_of(micro), steps - 1)
    sizes = dict(zip(data.unlabeled.ids[rows].tolist(), data.unlabeled.sizes[rows], strict=True))
    shown = {one.image: one for one in each if one.image in sizes}  # a bad picture was replaced by another
    if not any(one.uses for one in shown.values()):
        return
    ids = data.dataset.train.category_ids
    images = [KeptImage(image, list(_boxes(one, sizes[image], ids))) for image, one in shown.items()]
    write_atomically(run.settings.run_dir / PSEUDO_LABELS, msgspec.json.encode(KeptLabels(steps, images)))


def _chosen(data: Data, unlabeled: ImageSource) -> np.ndarray:
    """Rows of the images that are kept: if possible of those whose truth is known, to be shown beside it."""
    good = np.array([path not in data.bad_images for path in unlabeled.paths])
    known = good & np.isin(unlabeled.ids, data.hidden.ids) if data.hidden is not None else good
    ids = first_by_hash(unlabeled.ids[known if known.any() else good], KEPT_IMAGES)
    row_of = {int(image): row for row, image in enumerate(unlabeled.ids)}
    return np.array([row_of[image] for image in ids.tolist()], np.int64)


def _boxes(one: Labelled, size: np.ndarray, category_ids: np.ndarray) -> Iterator[KeptBox]:
    """The boxes of an image in its stored pixels, the surest first.

    Those of the teacher come from the weak view, which does not turn an image, so that they are not widened.
    """
    limit = torch.from_numpy(size)[None]
    found = _stored(one.found, one.weak, limit)
    for part, used in zip(sort_out(one), (True, False), strict=True):
        own = _stored(part.target, one.strong, limit)
        order = part.target.scores.argsort(descending=True, stable=True).tolist()
        for place in order:
            row = part.rows[place]
            x1, y1, x2, y2 = (found[row] if row >= 0 else own[place]).tolist()
            yield KeptBox(
                int(category_ids[int(part.target.labels[place]) - 1]),
                (round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)),
                round(float(part.target.scores[place]), 5),
                part.words[place] if used else None,
                None if used else part.words[place],
            )


def _stored(target: Target, view: View, limit: Tensor) -> Tensor:
    """(N, 4) boxes of a view in the stored pixels of its image."""
    inverse = torch.linalg.inv(view.to_view.cpu().double()).float()
    return box_ops.clip_boxes(box_ops.transform_boxes(target.boxes[None], inverse), limit)[0]


def read_kept(run_dir: Path) -> KeptLabels:
    """The pseudo labels that `keep` left with a run.

    Raises:
        UserError: the file is missing or damaged.
    """
    path, remedy = run_dir / PSEUDO_LABELS, "delete it, and reports show no pseudo labels of this run"
    return readback.decode_json(path, readback.content_of(path, remedy), KeptLabels, remedy)
