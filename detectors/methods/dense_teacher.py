"""Dense Teacher: the teacher's surest cells teach class, box and quality, without boxes, NMS or a threshold.

Zhou et al., "Dense Teacher: dense pseudo-labels for semi-supervised object detection", ECCV 2022. The numbers are
those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from detectors import losses
from detectors.detector import Detector
from detectors.methods.dense import DenseMethod
from detectors.methods.method import EmaKeys, Losses
from detectors.one_stage import ClassLoss, DenseOutput, DenseTargets, Wanted
from harness.core.steps import StepsOrPart, in_steps
from harness.core.validate import Limits, Share, Weight


class DenseTeacher(DenseMethod):
    """Of all cells of a micro-batch, the share S with the highest probability of a class is the foreground.

    With teacher p, student s, and F the sum over S of the best probability of a cell:
    L_class = [sum over S of |p - s|^2 BCE(s, p), and over the other cells of s^2 BCE(s, 0)] / F,
    L_box = mean over S of GIoU(student's box, teacher's), L_quality = mean over S of BCE(s, p) of the quality.
    Labelled images have the detector's own losses.

    Args:
        detector, steps, reported, ema, lambda_u, burn_in, rise, joint_forward: see `TeacherMethod`.
        class_weight, box_weight, quality_weight, labeled_views, label_score: see `DenseMethod`.
        average_from: step at which the teacher begins as a copy of the student, or below 1 a fraction of the schedule;
            at the latest the end of the burn-in.
        share: of the cells that are in S; one cell at least.
    """

    measures = ("pseudo_probability",)
    deviations = (
        "sums are divided by counts of one micro-batch, those of labelled images in the code by the mean over its GPUs",
    )

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 1.0,
        burn_in: StepsOrPart = 5000,
        average_from: StepsOrPart = 3001,
        rise: StepsOrPart | None = 5000,
        share: Annotated[float, Limits(gt=0, le=1)] = 0.01,
        class_weight: Weight = 4.0,
        box_weight: Weight = 1.0,
        quality_weight: Weight = 1.0,
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
            rise=rise,
            joint_forward=joint_forward,
            class_weight=class_weight,
            box_weight=box_weight,
            quality_weight=quality_weight,
            labeled_views=labeled_views,
            label_score=label_score,
        )
        self.teacher_from = min(in_steps(average_from, steps), self.unlabeled_from)
        self.share = share

    @property
    def class_loss(self) -> ClassLoss:
        return soft_class_loss

    def dense_targets(self, taught: DenseOutput) -> tuple[DenseTargets, Losses]:
        assert taught.quality is not None
        probability = taught.logits.sigmoid()
        best = probability.amax(-1)
        surest, place = best.flatten().topk(max(1, int(self.share * best.numel())))
        chosen = torch.zeros_like(best).flatten().index_fill(0, place, 1.0).view_as(best)
        count = torch.full_like(surest[0], len(place))
        targets = DenseTargets(
            Wanted(probability * chosen[..., None], torch.ones_like(count), surest.sum()),
            Wanted(self.teacher.decode(taught.deltas, taught.anchors), chosen, count),
            Wanted(taught.quality.sigmoid(), chosen, count),
        )
        return targets, {"pseudo_probability": surest.mean()}


def soft_class_loss(output: DenseOutput, wanted: Tensor) -> Tensor:
    """(B, A): quality focal loss of probabilities, summed over classes."""
    return losses.soft_focal(output.logits, wanted).sum(-1)
