"""The supervised baseline: labelled images alone."""

from __future__ import annotations

from typing import Literal

from detectors.detector import Detector, targets_of
from detectors.methods.method import EmaKeys, Losses, Method, mean_count, student_features
from harness.core.stages import stage
from harness.core.types import Batch, Views


class Supervised(Method):
    """The detector's own losses on one view of the labelled images.

    Args:
        detector, steps, reported, ema: see `Method`.
        labeled_view: the view to learn from: `labeled`, or `strong` for the strongly augmented baseline.
    """

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        labeled_view: str = "labeled",
        reported: Literal["student", "teacher"] = "student",
        ema: EmaKeys | None = None,
    ) -> None:
        super().__init__(detector, steps, reported=reported, ema=ema)
        self.labeled_view = labeled_view
        self.views = Views(labeled=(labeled_view,))

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:  # noqa: ARG002 - the same at every step
        view = batch.labeled[self.labeled_view]
        targets = targets_of(view)
        _, (features,) = student_features(self.student, (view,), joint=False)
        with stage("losses"):
            losses = self.student.losses(features, view, targets, batch.labeled_keys)
        return losses, {"labeled_boxes": mean_count(targets.valid)}
