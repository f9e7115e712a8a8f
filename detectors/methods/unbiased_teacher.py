"""Unbiased Teacher: after a supervised burn-in an averaged teacher gives classes, never boxes, to learn from.

Liu et al., "Unbiased teacher for semi-supervised object detection", ICLR 2021. The numbers are those of the
official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from detectors.detector import Detector, join_views, targets_of
from detectors.faster_rcnn import FasterRcnn
from detectors.methods.method import EmaKeys, Losses, Method, first_step, mean_count, student_features, unlabeled_terms
from detectors.padded import PaddedTargets, concatenate
from harness.core.draws import stream_key
from harness.core.types import Batch, UserError, View, Views
from harness.core.validate import Limits, NotNegative, Share, Weight


class UnbiasedTeacher(Method):
    """The labelled images' four terms, plus lambda_u times the two classification terms of the unlabelled images.

    Args:
        detector, steps, reported, ema: see `Method`.
        lambda_u: weight of the unlabelled terms.
        burn_in: supervised steps at the start, or below 1 a fraction of the schedule.
        average_burn_in: the teacher averages the student from the first step on; otherwise it begins as a copy at the
            end of the burn-in.
        score: above it the teacher's boxes are pseudo labels.
        candidate_score: score above which the teacher's boxes are looked at.
        focal_gamma: of the RoI classification on all images; 0 is cross entropy.
        labeled_views: views of each labelled image, all of them learnt from.
        teacher_training_proposals: the teacher's RPN keeps as many proposals as in training (official), or as in tests.
        joint_forward: one backbone forward over labelled and unlabelled images together, or two.
    """

    needs = FasterRcnn
    student: FasterRcnn
    teacher: FasterRcnn

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 4.0,
        burn_in: NotNegative = 2000,
        average_burn_in: bool = False,
        score: Share = 0.7,
        candidate_score: Share = 0.05,
        focal_gamma: Annotated[float, Limits(ge=0, le=100)] = 1.5,
        labeled_views: Annotated[Sequence[str], Limits(least=1)] = ("weak", "strong"),
        teacher_training_proposals: bool = True,
        joint_forward: bool = False,
    ) -> None:
        start = first_step(burn_in, steps)
        super().__init__(detector, steps, reported=reported, ema=ema, teacher_from=0 if average_burn_in else start)
        if not labeled_views:
            raise UserError("method.labeled_views is empty: name at least one view of the labelled images")
        self.unlabeled_from = start
        self.lambda_u = lambda_u
        self.score = score
        self.candidate_score = candidate_score
        self.focal_gamma = focal_gamma
        self.teacher_training_proposals = teacher_training_proposals
        self.joint_forward = joint_forward
        self.views = Views(labeled=tuple(labeled_views), unlabeled=("weak", "strong"))

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:
        labeled = [batch.labeled[name] for name in self.views.labeled]
        truth = concatenate([targets_of(view) for view in labeled])
        # Every view of an image draws its own samples.
        keys = torch.cat([batch.labeled_keys ^ stream_key(name) for name in self.views.labeled])
        weak, strong = batch.weak, batch.strong
        metrics = {"labeled_boxes": mean_count(truth.valid)}
        if step < self.unlabeled_from or weak is None or strong is None:
            seen, features = self._student_features(labeled, None)
            supervised = self.student.losses(features[0], seen[0], truth, keys, focal_gamma=self.focal_gamma)
            zero = torch.zeros((), device=keys.device)
            unsupervised = {"rpn_class": zero, "roi_class": zero}
            metrics["pseudo_boxes"] = zero
            self._labels = {}
        else:
            pseudo = self.label(weak).to_view(weak, strong)
            seen, features = self._student_features(labeled, strong)
            supervised = self.student.losses(features[0], seen[0], truth, keys, focal_gamma=self.focal_gamma)
            unsupervised = self.student.losses(
                features[1], seen[1], pseudo, batch.unlabeled_keys, boxes=False, focal_gamma=self.focal_gamma
            )
            metrics["pseudo_boxes"] = mean_count(pseudo.valid)
            self._labels = {"classification": pseudo}
        return {**supervised, **unlabeled_terms(unsupervised, self.lambda_u)}, metrics

    def _student_features(self, labeled: list[View], strong: View | None) -> tuple[list[View], list[list[Tensor]]]:
        """Features of all labelled views as one batch, and of the strong views."""
        views = [join_views(labeled)] + ([strong] if strong is not None else [])
        return student_features(self.student, views, self.joint_forward)

    @torch.no_grad()
    def label(self, weak: View) -> PaddedTargets:
        """The teacher's boxes above the threshold, in the weak views."""
        features = self.teacher.features(weak.images)
        found = self.teacher.find(features, weak, self.candidate_score, self.teacher_training_proposals)
        return found.keep(found.scores > self.score).trim()
