"""ARSL: one score joins class and box quality; cells near a sure one learn its box too.

Liu et al., "Ambiguity-resistant semi-supervised learning for dense object detection", CVPR 2023. Formulas and numbers
are those of the official code (PaddleDetection, configs/semi_det/arsl).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from detectors import losses
from detectors.detector import Detector
from detectors.methods.dense import DenseMethod
from detectors.methods.method import EmaKeys, Losses, mean_count
from detectors.one_stage import ClassLoss, DenseOutput, DenseTargets, Wanted
from detectors.padded import PaddedTargets, gather_rows
from harness.core import boxes as box_ops
from harness.core.steps import StepsOrPart
from harness.core.types import UserError, View
from harness.core.validate import Limits, Share, Weight

FEWEST = 10  # positive cells of an image in which none is above the threshold


@dataclass
class Cells:
    """What the teacher's A cells are in each of B images."""

    scores: Tensor  # (B, A, C) probability of the class times quality
    best: Tensor  # (B, A) the highest over classes
    labels: Tensor  # (B, A) int64 in 0..C - 1, its class
    positive: Tensor  # (B, A) bool
    hard: Tensor  # (B, A) bool: candidates below the threshold
    thresholds: Tensor  # (B,)


class Arsl(DenseMethod):
    """L_u = 2 L_class + 2 L_box + 0.5 L_quality over cells that each image's own scores sort into three kinds.

    With v the best joint score of a cell: candidates have v >= `candidate_score`, positives v >= the threshold
    min(`highest_threshold`, mean + standard deviation of the image's candidates), the other candidates are hard. A
    positive learns v for its class and the teacher's box; a hard cell all of the teacher's scores, and a box if `mine`
    finds positives that it belongs to; others that there is nothing.
    Labelled images: the class loss of a positive wants the IoU of its prediction, boxes are weighted by centerness.

    Args:
        detector, steps, reported, ema, lambda_u, burn_in, average_burn_in, rise, joint_forward: see `TeacherMethod`.
        class_weight, box_weight, quality_weight, labeled_views, label_score: see `DenseMethod`.
        labeled_quality_weight: of the IoU loss of labelled images.
        candidate_score, highest_threshold: see above.
        mining_iou: overlap of a hard cell's box with that of a positive.
        mined: in each image so many hard cells, and so many positives, those with the highest v, are compared.
    """

    measures = ("pseudo_cells", "mined_cells", "threshold")
    deviations = (
        "IoU and GIoU have no 1 added to their areas, as the code has in units of the stride",
        "labelled and unlabelled cells alike are at their centres; the code's reader puts labelled ones at a corner",
        "of an image the hard cells and positives with the highest scores are compared, at most method.mined of each",
    )

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 1.0,
        burn_in: StepsOrPart = 30_000,
        average_burn_in: bool = False,
        rise: StepsOrPart | None = 2000,
        class_weight: Weight = 2.0,
        box_weight: Weight = 2.0,
        quality_weight: Weight = 0.5,
        labeled_quality_weight: Weight = 0.5,
        candidate_score: Share = 0.1,
        highest_threshold: Share = 0.4,
        mining_iou: Share = 0.6,
        mined: Annotated[int, Limits(ge=1, le=100_000)] = 1000,
        labeled_views: Annotated[Sequence[str], Limits(least=1)] = ("weak", "strong"),
        label_score: Share = 0.5,
        joint_forward: bool = False,
    ) -> None:
        super().__init__(
            detector,
            steps,
            ema=ema,
            reported=reported,
            lambda_u=lambda_u,
            burn_in=burn_in,
            average_burn_in=average_burn_in,
            rise=rise,
            joint_forward=joint_forward,
            class_weight=class_weight,
            box_weight=box_weight,
            quality_weight=quality_weight,
            labeled_views=labeled_views,
            label_score=label_score,
        )
        if self.student.quality != "iou":
            raise UserError(
                f"method=arsl joins the class with the box's IoU, which detector={detector.name} does not tell: set "
                "detector.quality=iou, or take detector=fcos_iou, with preset=small small_fcos_iou"
            )
        self.labeled_quality_weight = labeled_quality_weight
        self.candidate_score = candidate_score
        self.highest_threshold = highest_threshold
        self.mining_iou = mining_iou
        self.mined = mined

    @property
    def class_loss(self) -> ClassLoss:
        return joint_class_loss

    def labeled_losses(self, features: list[Tensor], view: View, truth: PaddedTargets, keys: Tensor) -> Losses:  # noqa: ARG002 - nothing is drawn
        """The joint class loss of a positive wants its IoU; the box loss is a mean weighted by centerness."""
        output = self.student.output(features, view)
        targets = self.student.targets(output, view, truth)
        assert targets.quality is not None
        targets.classes.values = targets.classes.values * targets.quality.values[..., None]
        near = self.student.centerness(output.anchors, targets.boxes.values) * targets.boxes.weights
        targets.boxes = Wanted(targets.boxes.values, near, _some(near.sum()))
        found = self.student.loss(output, targets, joint_class_loss)
        return {**found, "iou": self.labeled_quality_weight * found["iou"]}

    def dense_targets(self, taught: DenseOutput) -> tuple[DenseTargets, Losses]:
        assert taught.quality is not None
        cells = self.sort(taught)
        boxes, joined = self.mine(taught, cells)
        best = cells.best * (cells.positive | cells.hard)
        own = torch.zeros_like(cells.scores).scatter(2, cells.labels[..., None], cells.best[..., None])
        alone = (cells.positive & ~cells.hard)[..., None]
        wanted = own * alone + cells.scores * cells.hard[..., None]
        learns = cells.positive | joined
        weights = best * learns
        targets = DenseTargets(
            Wanted(wanted, torch.ones_like(best[0, 0]), _some((best * cells.positive).sum())),
            Wanted(boxes, weights, _some(weights.sum())),
            Wanted(taught.quality.sigmoid(), learns, learns.sum()),
        )
        return targets, {
            "pseudo_cells": mean_count(cells.positive),
            "mined_cells": mean_count(joined),
            "threshold": cells.thresholds.mean(),
        }

    def sort(self, taught: DenseOutput) -> Cells:
        """Which cells are positive and which are hard, by each image's own scores.

        Where no cell reaches the threshold, the ten best are positive, whether they are hard or not.
        """
        assert taught.quality is not None
        scores = taught.logits.sigmoid() * taught.quality.sigmoid()[..., None]
        best, labels = scores.max(-1)
        candidate = best >= self.candidate_score
        count = candidate.sum(1)
        mean = (best * candidate).sum(1) / count.clamp(min=1)
        spread = ((best - mean[:, None]).square() * candidate).sum(1) / (count - 1).clamp(min=1)
        thresholds = (mean + spread.sqrt()).clamp(max=self.highest_threshold)
        above = candidate & (best >= thresholds[:, None])
        top = torch.zeros_like(above).scatter(1, best.topk(min(FEWEST, best.shape[1]), dim=1).indices, True)
        positive = torch.where(above.any(1, keepdim=True), above, top)
        return Cells(scores, best, labels, positive, candidate & ~above, thresholds)

    def mine(self, taught: DenseOutput, cells: Cells) -> tuple[Tensor, Tensor]:
        """The boxes (B, A, 4) that cells learn, and which hard cells (B, A) learn one.

        A hard cell learns one if there are positives of its class, on its level or the next, whose boxes contain its
        point and overlap its own box: the mean of their boxes, weighted by their scores.
        """
        boxes = self.teacher.decode(taught.deltas, taught.anchors)
        hard, is_hard = _first(cells.best, cells.hard, self.mined)
        positive, is_positive = _first(cells.best, cells.positive, self.mined)
        points, levels = self.teacher.centers(taught.anchors)[hard], taught.levels  # (B, H, 2)
        theirs = gather_rows(boxes, positive)  # (B, P, 4)
        match = is_hard[:, :, None] & is_positive[:, None]
        match &= gather_rows(cells.labels, hard)[:, :, None] == gather_rows(cells.labels, positive)[:, None]
        match &= (levels[hard][:, :, None] - levels[positive][:, None]).abs() <= 1
        match &= ((points[:, :, None] > theirs[:, None, :, :2]) & (points[:, :, None] < theirs[:, None, :, 2:])).all(-1)
        match &= box_ops.iou(gather_rows(boxes, hard), theirs) >= self.mining_iou
        votes = match * gather_rows(cells.best, positive)[:, None]
        sums = torch.stack(
            [(votes * side[:, None]).sum(-1) for side in theirs.unbind(-1)], -1
        )  # autocast rounds products
        found = match.any(-1)
        mean = torch.where(found[..., None], sums / _some(votes.sum(-1, keepdim=True)), gather_rows(boxes, hard))
        boxes = boxes.scatter(1, hard[..., None].expand_as(mean), mean)
        return boxes, torch.zeros_like(cells.hard).scatter(1, hard, found)


def joint_class_loss(output: DenseOutput, wanted: Tensor) -> Tensor:
    """(B, A): focal loss of the joint score of class and quality, summed over classes."""
    assert output.quality is not None
    return losses.joint_focal(output.logits, output.quality[..., None], wanted).sum(-1)


def _first(scores: Tensor, mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(B, K) the cells of the highest scores that a mask (B, A) marks, and which of these K are such."""
    most = min(most, mask.shape[1])
    if mask.device.type == "cpu":  # where counting costs no waiting
        most = min(most, max(1, int(mask.sum(1).max())))
    index = torch.where(mask, scores, -1.0).topk(most, dim=1).indices
    return index, gather_rows(mask, index)


def _some(total: Tensor) -> Tensor:
    """A divisor, which is never 0."""
    return total.clamp(min=torch.finfo(torch.float32).tiny)
