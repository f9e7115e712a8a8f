"""Mean-teacher pseudo-labelling, mmdetection's SemiBaseDetector: the teacher's confident boxes are taken for the truth.

The plain baseline of the teacher methods; it works with any detector.
"""

from __future__ import annotations

from typing import Literal

import torch

from detectors.detector import Detector, targets_of
from detectors.methods.method import EmaKeys, Losses, Method, first_step, mean_count, student_features, unlabeled_terms
from detectors.padded import PaddedTargets
from harness.core import boxes as box_ops
from harness.core.types import Batch, View, Views
from harness.core.validate import NotNegative, Share, Weight


class MeanTeacher(Method):
    """L = L_s + lambda_u L_u, each the detector's own losses; L_u is 0 for a micro-batch without any pseudo label.

    Args:
        detector, steps, reported, ema: see `Method`.
        lambda_u: weight of the unlabelled images' losses.
        burn_in: supervised steps at the start, or below 1 a fraction of the schedule; mmdetection has none.
        score: above it the teacher's boxes are pseudo labels.
        candidate_score: score above which the teacher's boxes are looked at.
        smallest_side: sides of pseudo labels in the strong view must be longer, in pixels.
        joint_forward: one backbone forward over labelled and unlabelled images together, or two.
    """

    views = Views(labeled=("labeled",), unlabeled=("weak", "strong"))
    teacher: Detector

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 4.0,
        burn_in: NotNegative = 0,
        score: Share = 0.9,
        candidate_score: Share = 0.05,
        smallest_side: NotNegative = 0.01,
        joint_forward: bool = False,
    ) -> None:
        super().__init__(detector, steps, reported=reported, ema=ema)
        self.unlabeled_from = first_step(burn_in, steps)
        self.lambda_u = lambda_u
        self.score = score
        self.candidate_score = candidate_score
        self.smallest_side = smallest_side
        self.joint_forward = joint_forward

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:
        labeled = batch.labeled["labeled"]
        truth = targets_of(labeled)
        metrics = {"labeled_boxes": mean_count(truth.valid)}
        weak, strong = batch.weak, batch.strong
        if step < self.unlabeled_from or weak is None or strong is None:
            supervised = self.student.losses(self.student.features(labeled.images), labeled, truth, batch.labeled_keys)
            zero = torch.zeros((), device=labeled.images.device)
            unsupervised = dict.fromkeys(supervised, zero)
            metrics["pseudo_boxes"] = zero
            self._labels = {}
        else:
            pseudo = self.label(weak, strong)
            (labeled, seen), (own, other) = student_features(self.student, (labeled, strong), self.joint_forward)
            supervised = self.student.losses(own, labeled, truth, batch.labeled_keys)
            unsupervised = self.student.losses(other, seen, pseudo, batch.unlabeled_keys)
            any_label = pseudo.valid.any().float()
            unsupervised = {name: any_label * value for name, value in unsupervised.items()}
            metrics["pseudo_boxes"] = mean_count(pseudo.valid)
            self._labels = {"classification": pseudo}
        return {**supervised, **unlabeled_terms(unsupervised, self.lambda_u)}, metrics

    @torch.no_grad()
    def label(self, weak: View, strong: View) -> PaddedTargets:
        """The teacher's boxes above the threshold, in the strong views."""
        found = self.teacher.find(self.teacher.features(weak.images), weak, self.candidate_score)
        labels = found.keep(found.scores > self.score).trim().to_view(weak, strong)
        return labels.keep(box_ops.is_large_enough(labels.boxes, self.smallest_side))
