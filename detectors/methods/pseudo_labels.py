"""Pseudo labels: which detections become labels, and how good they are against a truth that no method saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from detectors.detector import Detector
from harness.core import boxes as box_ops
from harness.core.types import ImageSource, Target, View

Quality = dict[str, float | None]  # measure -> value; None is unknown


def confident(target: Target, threshold: float, keep_top1: bool) -> Target:
    """STAC's rule: scores of at least the threshold; if `keep_top1`, of at least min(threshold, best score).

    With it an image whose best box is uncertain still gives that box.
    """
    if not len(target):
        return target
    limit = min(threshold, float(target.scores.max())) if keep_top1 else threshold
    return target[target.scores >= limit]


@torch.no_grad()
def label_offline(
    detector: Detector,
    batches: Iterator[tuple[View, Tensor]],
    source: ImageSource,
    *,
    threshold: float = 0.9,
    keep_top1: bool = True,
    score_threshold: float = 0.05,
    float16: bool = True,
    drop_empty: bool = True,
) -> ImageSource:
    """Labels images once with a finished detector (stage 2 of STAC).

    Args:
        detector: it runs in evaluation mode.
        batches: views of the images, and their ids.
        source: the images; its own boxes are not looked at.
        threshold, keep_top1: see `confident`.
        score_threshold: detections start above this.
        float16: round boxes and scores to float16 as the official code stores them, before they meet the threshold.
        drop_empty: leave out images in which the detector found nothing, as the official code does. Those whose boxes
            are all below the threshold stay, without a box.

    Returns:
        The images of `batches`, in the order of `source`, with the pseudo labels in original pixels as their boxes.
    """
    rows = {int(image_id): row for row, image_id in enumerate(source.ids)}
    limit = float(np.float16(threshold)) if float16 else threshold  # the code compares in float16
    labels: dict[int, Target] = {}
    was_training = detector.training
    detector.eval()
    try:
        for view, ids in batches:
            inverse, _ = torch.linalg.inv_ex(view.to_view.double().cpu())
            for image_id, target, matrix in zip(
                ids.tolist(), detector.detect(view, score_threshold), inverse.float(), strict=True
            ):
                if len(target) or not drop_empty:
                    row = rows[image_id]
                    found = _in_original_pixels(target.to("cpu"), matrix, source, row)
                    labels[row] = confident(_in_float16(found) if float16 else found, limit, keep_top1)
    finally:
        detector.train(was_training)
    kept = sorted(labels)
    return source.select(kept).with_targets([labels[row] for row in kept])


def _in_original_pixels(target: Target, matrix: Tensor, source: ImageSource, row: int) -> Target:
    size = torch.from_numpy(source.sizes[row : row + 1])
    boxes = box_ops.clip_boxes(box_ops.transform_boxes(target.boxes, matrix)[None], size)[0]
    return Target(boxes, target.labels, target.scores)[box_ops.is_large_enough(boxes)]


def _in_float16(target: Target) -> Target:
    """Boxes and scores as float16 can hold them, in float32."""
    return Target(target.boxes.half().float(), target.labels, target.scores.half().float())


def quality(labels: Sequence[Target], truth: Sequence[Target], iou: float = 0.5) -> dict[str, float]:
    """Compares pseudo labels with the truth, image by image.

    By falling score each label takes the free true box of its class that it overlaps most, if by at least `iou`.

    Returns:
        `precision` and `recall` in 0..1 (0 where there is nothing to divide by), `iou`, the mean overlap of the pairs
        (0 without any), and the counts `labels` and `boxes`.
    """
    overlaps: list[float] = []
    for found, true in zip(labels, truth, strict=True):
        overlaps.extend(overlap for overlap, _ in _pairs(found.to("cpu"), true.to("cpu"), iou))
    number, possible = sum(map(len, labels)), sum(map(len, truth))
    return {
        "precision": len(overlaps) / max(1, number),
        "recall": len(overlaps) / max(1, possible),
        "iou": sum(overlaps) / max(1, len(overlaps)),
        "labels": float(number),
        "boxes": float(possible),
    }


def measure(labels: Sequence[Target], view: View, truth: Sequence[Target | None]) -> Quality:
    """`quality` of pseudo labels over those images of a view whose truth is known.

    Args:
        labels: of the view's B images, in its pixels.
        view: B images.
        truth: their boxes in original pixels; None where nobody knows them.

    Returns:
        As `quality`; where no image's truth is known, the number of labels alone, and None for the rest.
    """
    found, seen = _known(labels, view, truth)
    if not found:
        unknown: Quality = dict.fromkeys(("precision", "recall", "iou", "labels", "boxes"))
        return unknown | {"labels": float(sum(map(len, labels)))}
    return {**quality(found, seen)}


def measure_classes(
    labels: Sequence[Target], view: View, truth: Sequence[Target | None], num_classes: int
) -> np.ndarray:
    """`count_by_class` of pseudo labels over those images of a view whose truth is known; arguments as `measure`."""
    return count_by_class(*_known(labels, view, truth), num_classes)


def _known(labels: Sequence[Target], view: View, truth: Sequence[Target | None]) -> tuple[list[Target], list[Target]]:
    """Labels and truth, in the view, of the images whose truth is known."""
    known = [row for row, target in enumerate(truth) if target is not None]
    if not known:
        return [], []
    seen = box_ops.targets_in_view([t for t in truth if t is not None], view.rows(torch.tensor(known)))
    return [labels[row] for row in known], seen


def count_by_class(labels: Sequence[Target], truth: Sequence[Target], num_classes: int, iou: float = 0.5) -> np.ndarray:
    """Compares pseudo labels with the truth class by class, matched as in `quality`.

    Returns:
        (C, 3) int64: labels, those of them that are right, and true boxes.
    """
    counts = np.zeros((num_classes, 3), np.int64)
    for found, true in zip(labels, truth, strict=True):
        right = [label for _, label in _pairs(found.to("cpu"), true.to("cpu"), iou)]
        for column, classes in enumerate((found.labels.tolist(), right, true.labels.tolist())):
            counts[:, column] += np.bincount(classes, minlength=num_classes + 1).astype(np.int64)[1:]
    return counts


def shares_by_class(counts: np.ndarray, names: Sequence[str]) -> dict[str, Quality]:
    """Class -> `pseudo_precision` and `pseudo_recall` in percent, None where there is nothing to divide by.

    Args:
        counts: (C, 3) of `count_by_class`.
        names: of the C classes.
    """
    return {
        name: {
            "pseudo_precision": 100.0 * right / labels if labels else None,
            "pseudo_recall": 100.0 * right / boxes if boxes else None,
        }
        for name, (labels, right, boxes) in zip(names, counts.tolist(), strict=True)
    }


def _pairs(found: Target, true: Target, iou: float) -> list[tuple[float, int]]:
    """(overlap, class) of each label that has found a box."""
    if not len(found) or not len(true):
        return []
    overlap = box_ops.iou(found.boxes, true.boxes)
    overlap[found.labels[:, None] != true.labels[None]] = 0
    taken = []
    for row in found.scores.argsort(descending=True, stable=True).tolist():
        best, column = overlap[row].max(0)
        if best >= iou:
            taken.append((float(best), int(found.labels[row])))
            overlap[:, column] = 0
    return taken


def offline_quality(source: ImageSource, truth: ImageSource, num_classes: int) -> tuple[dict[str, float], np.ndarray]:
    """`quality` and `count_by_class` of pseudo labels made offline; images of `truth` without any were left out.

    Args:
        source: images with pseudo labels, in original pixels.
        truth: the same images and perhaps more, with their true boxes.
        num_classes: C.
    """
    rows = {int(image_id): row for row, image_id in enumerate(source.ids)}
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    labels = [source.target(rows[int(i)]) if int(i) in rows else empty for i in truth.ids]
    true = [truth.target(row) for row in range(len(truth))]
    return quality(labels, true), count_by_class(labels, true, num_classes)
