"""Unbiased Teacher: after a supervised burn-in an averaged teacher gives classes, never boxes, to learn from.

Liu et al., "Unbiased teacher for semi-supervised object detection", ICLR 2021. The numbers are those of the
official code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from detectors.detector import Detector
from detectors.faster_rcnn import FasterRcnn
from detectors.methods.adaptive import AdaptiveKeys
from detectors.methods.method import EmaKeys, Losses, mean_count
from detectors.methods.teacher import ThresholdTeacher, join_labeled
from detectors.padded import PaddedTargets
from harness.core.stages import stage
from harness.core.steps import StepsOrPart
from harness.core.types import Batch, UserError, View, Views
from harness.core.validate import Limits, Share, Weight, keys_of


class UnbiasedTeacher(ThresholdTeacher):
    """The labelled images' four terms, plus lambda_u times the two classification terms of the unlabelled images.

    Args:
        detector, steps, reported, ema, lambda_u, burn_in, average_burn_in, rise, joint_forward: see `TeacherMethod`.
        score, candidate_score, adaptive: see `ThresholdTeacher`.
        focal_gamma: of the RoI classification on all images; 0 is cross entropy.
        labeled_views: views of each labelled image, all of them learnt from.
        teacher_training_proposals: the teacher's RPN keeps as many proposals as in training (official), or as in tests.
    """

    needs = FasterRcnn
    student: FasterRcnn
    teacher: FasterRcnn
    terms = ("rpn_class", "roi_class")

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 4.0,
        burn_in: StepsOrPart = 2000,
        average_burn_in: bool = False,
        rise: StepsOrPart | None = None,
        score: Share = 0.7,
        candidate_score: Share = 0.05,
        adaptive: Annotated[Mapping[str, Any], keys_of(AdaptiveKeys)] | None = None,
        focal_gamma: Annotated[float, Limits(ge=0, le=100)] = 1.5,
        labeled_views: Annotated[Sequence[str], Limits(least=1)] = ("weak", "strong"),
        teacher_training_proposals: bool = True,
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
            average_burn_in=average_burn_in,
            score=score,
            candidate_score=candidate_score,
            adaptive=adaptive,
        )
        if not labeled_views:
            raise UserError("method.labeled_views is empty: name at least one view of the labelled images")
        self.focal_gamma = focal_gamma
        self.teacher_training_proposals = teacher_training_proposals
        self.views = Views(labeled=tuple(labeled_views), unlabeled=("weak", "strong"))

    def labeled_part(self, batch: Batch) -> tuple[View, PaddedTargets, Tensor]:
        """All labelled views as one batch; every view of an image draws its own samples."""
        return join_labeled(batch, self.views.labeled)

    def labeled_losses(self, features: list[Tensor], view: View, truth: PaddedTargets, keys: Tensor) -> Losses:
        """The detector's four terms, with a focal RoI classification."""
        return self.student.losses(features, view, truth, keys, focal_gamma=self.focal_gamma)

    def unlabeled_losses(self, features: list[Tensor], strong: View, weak: View, keys: Tensor) -> tuple[Losses, Losses]:
        with stage("teacher"):
            pseudo = self.label(weak).to_view(weak, strong)
        self.labels = {"classification": pseudo}
        terms = self.student.losses(features, strong, pseudo, keys, boxes=False, focal_gamma=self.focal_gamma)
        return terms, {"pseudo_boxes": mean_count(pseudo.valid), **self.thresholds()}

    @torch.no_grad()
    def label(self, weak: View) -> PaddedTargets:
        """The teacher's boxes above the threshold, in the weak views."""
        features = self.teacher.features(weak.images)
        found = self.teacher.find(features, weak, self.candidate_score, self.teacher_training_proposals)
        self.watch(found)
        return found.keep(self.certain(found)).trim()
