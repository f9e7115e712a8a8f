"""Mean-teacher pseudo-labelling, mmdetection's SemiBaseDetector: the teacher's confident boxes are taken for the truth.

The plain baseline of the teacher methods; it works with any detector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from detectors.detector import Detector
from detectors.methods.adaptive import AdaptiveKeys
from detectors.methods.method import EmaKeys, Losses, mean_count
from detectors.methods.teacher import ThresholdTeacher
from detectors.padded import PaddedTargets
from harness.core import boxes as box_ops
from harness.core.stages import stage
from harness.core.steps import StepsOrPart
from harness.core.types import View
from harness.core.validate import NotNegative, Share, Weight, keys_of


class MeanTeacher(ThresholdTeacher):
    """L = L_s + lambda_u L_u, each the detector's own losses; L_u is 0 for a micro-batch without any pseudo label.

    Args:
        detector, steps, reported, ema, lambda_u, burn_in, rise, joint_forward: see `TeacherMethod`; mmdetection has no
            burn-in.
        score, candidate_score, adaptive: see `ThresholdTeacher`.
        smallest_side: sides of pseudo labels in the strong view must be longer, in pixels.
    """

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 4.0,
        burn_in: StepsOrPart = 0,
        rise: StepsOrPart | None = None,
        score: Share = 0.9,
        candidate_score: Share = 0.05,
        adaptive: Annotated[Mapping[str, Any], keys_of(AdaptiveKeys)] | None = None,
        smallest_side: NotNegative = 0.01,
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
            score=score,
            candidate_score=candidate_score,
            adaptive=adaptive,
        )
        self.smallest_side = smallest_side

    def unlabeled_losses(self, features: list[Tensor], strong: View, weak: View, keys: Tensor) -> tuple[Losses, Losses]:
        with stage("teacher"):
            pseudo = self.label(weak, strong)
        self.labels = {"classification": pseudo}
        any_label = pseudo.valid.any().float()
        terms = self.student.losses(features, strong, pseudo, keys)
        return {name: any_label * value for name, value in terms.items()}, {
            "pseudo_boxes": mean_count(pseudo.valid),
            **self.thresholds(),
        }

    @torch.no_grad()
    def label(self, weak: View, strong: View) -> PaddedTargets:
        """The teacher's boxes above the threshold, in the strong views."""
        found = self.teacher.find(self.teacher.features(weak.images), weak, self.candidate_score)
        self.watch(found)
        labels = found.keep(self.certain(found)).trim().to_view(weak, strong)
        return labels.keep(box_ops.is_large_enough(labels.boxes, self.smallest_side))
