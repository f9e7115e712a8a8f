"""STAC: pseudo labels made once by a finished supervised detector, then learnt under strong augmentation.

Sohn et al., "A simple semi-supervised learning framework for object detection", 2020. Stage 1 is a supervised run;
stage 2, `label_offline` in `pseudo_labels.py` beside this file, turns its detections into the boxes of the unlabelled
images; this file is stage 3, in which a new detector learns from both.
"""

from __future__ import annotations

from typing import Literal

import torch

from detectors.detector import Detector, targets_of
from detectors.faster_rcnn import FasterRcnn
from detectors.methods.method import EmaKeys, Losses, Method, mean_count, student_features, unlabeled_terms
from harness.core.stages import stage
from harness.core.types import Batch, UserError, Views
from harness.core.validate import Weight


class Stac(Method):
    """L = L_s + lambda_u L_u, each the detector's own losses; the official code halves both.

    Args:
        detector, steps, reported, ema: see `Method`.
        lambda_u: weight of the unlabelled images' losses.
        mean_of_branches: halve both terms, as the official code does.
        unlabeled_rpn_loss: False sets the unlabelled images' RPN terms to 0, as the code's NO_PRN_LOSS does (which also
            takes proposals that stage 1 stored; here they are the student's own).
        joint_forward: one backbone forward over labelled and unlabelled images together, or two.
    """

    views = Views(labeled=("labeled",), unlabeled=("strong",))

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        lambda_u: Weight = 2.0,
        mean_of_branches: bool = True,
        unlabeled_rpn_loss: bool = True,
        joint_forward: bool = False,
        reported: Literal["student", "teacher"] = "student",
        ema: EmaKeys | None = None,
    ) -> None:
        super().__init__(detector, steps, reported=reported, ema=ema)
        self.lambda_u = lambda_u
        self.weight = 0.5 if mean_of_branches else 1.0
        if not unlabeled_rpn_loss and not isinstance(detector, FasterRcnn):
            raise UserError(
                f"method.unlabeled_rpn_loss=false does not fit detector={detector.name}, which has no RPN: "
                "choose true, or a Faster R-CNN"
            )
        self.unlabeled_rpn_loss = unlabeled_rpn_loss
        self.joint_forward = joint_forward

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:  # noqa: ARG002 - the same at every step
        labeled, strong = batch.labeled["labeled"], batch.unlabeled["strong"]
        truth, pseudo = targets_of(labeled), targets_of(strong)
        views, features = student_features(self.student, (labeled, strong), self.joint_forward)
        with stage("losses"):
            supervised = self.student.losses(features[0], views[0], truth, batch.labeled_keys)
            unsupervised = self.student.losses(features[1], views[1], pseudo, batch.unlabeled_keys)
        if not self.unlabeled_rpn_loss:
            unsupervised.update({name: torch.zeros_like(unsupervised[name]) for name in ("rpn_class", "rpn_box")})
        self.labels = {"classification": pseudo}
        losses = {name: self.weight * value for name, value in supervised.items()}
        losses.update(unlabeled_terms(unsupervised, self.weight * self.lambda_u))
        score = (pseudo.scores * pseudo.valid).sum() / pseudo.valid.sum().clamp(min=1)
        return losses, {
            "labeled_boxes": mean_count(truth.valid),
            "pseudo_boxes": mean_count(pseudo.valid),
            "pseudo_score": score.to(torch.float32),
        }
