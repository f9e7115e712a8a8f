"""What an evaluation says beyond COCO's AP: matches, AR, scores of every class, errors by kind, VOC's AP50."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.data.ground_truth import GroundTruth
from harness.engine.accumulate import class_scores, scores
from harness.engine.errors import error_table
from harness.engine.matches import Matches, match
from harness.engine.voc_ap import voc_ap

MATCHES = "matches.npz"  # beside record.json

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Analysis:
    """Of one network's evaluation."""

    matches: Matches
    scores: Metrics  # METRICS of `harness.engine.accumulate`; of VOC's data voc07_ap50 and voc_ap50 too; 0..100
    per_class: dict[str, Metrics]  # class name -> the same metrics


def analyse(predictions: np.ndarray, truth: GroundTruth, voc: bool = False) -> Analysis:
    """Compares the boxes of an evaluation with the ground truth.

    Args:
        predictions: (N, 7) as from `harness.engine.evaluate.predictions`.
        truth: the objects.
        voc: also score by Pascal VOC's AP at IoU 0.5, of 2007 (11 points) and of later years (all points).
    """
    matches = match(predictions, truth)
    overall = scores(matches)
    per_class = {one.name: dict(one.scores) for one in class_scores(matches)}
    if voc:
        found = voc_ap(predictions, truth)
        overall |= {"voc07_ap50": found.ap_11_points, "voc_ap50": found.ap_all_points}
        each = zip(found.class_names, found.class_11_points, found.class_all_points, strict=True)
        for name, eleven, every in each:
            per_class[name] |= {"voc07_ap50": eleven, "voc_ap50": every}
    return Analysis(matches, overall, per_class)


def errors_by_kind(predictions: np.ndarray, truth: GroundTruth) -> dict[str, Metrics]:
    """Kind of `harness.engine.errors.KINDS` -> how many boxes (or missed objects), and the AP50 that they cost."""
    found = error_table(predictions, truth)
    return {kind: {"count": float(found.counts[kind]), "lost_ap50": found.lost[kind]} for kind in found.counts}
