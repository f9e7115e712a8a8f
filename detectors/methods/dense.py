"""What methods without pseudo boxes share: every cell of the teacher teaches the same cell of the student.

Nothing is suppressed or turned into boxes on the way, so both must see the same pixels in the same place.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detectors.detector import Detector
from detectors.fcos import Fcos
from detectors.methods.method import Losses, Method
from detectors.methods.teacher import TeacherMethod, join_labeled
from detectors.one_stage import ClassLoss, DenseOutput, DenseTargets
from detectors.padded import PaddedTargets
from harness.core.stages import stage
from harness.core.types import Batch, UserError, View, Views


class DenseMethod(TeacherMethod):
    """L = L_s + lambda_u (w_c L_class + w_b L_box + w_q L_quality), of targets that a teacher's dense output gives.

    Args:
        detector, steps, others: see `TeacherMethod`.
        class_weight, box_weight, quality_weight: w_c, w_b, w_q.
        labeled_views: views of each labelled image, all of them learnt from.
        label_score: the teacher's detections above it are called pseudo labels by records and reports; no loss knows.
    """

    needs = Fcos
    fitting = "detector=fcos_iou or fcos, with preset=small small_fcos_iou or small_fcos"
    student: Fcos
    teacher: Fcos
    terms = ("class", "box", "quality")
    aligned_views = ("weak", "strong")
    threshold_key = "method.burn_in"  # no threshold decides what is learnt
    _labels: dict[str, PaddedTargets] | None
    _shown: tuple[DenseOutput, View, View] | None  # the last forward's: teacher's output, its view, and the strong one

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        class_weight: float,
        box_weight: float,
        quality_weight: float,
        labeled_views: Sequence[str],
        label_score: float,
        **others: Any,
    ) -> None:
        super().__init__(detector, steps, **others)
        if not labeled_views:
            raise UserError("method.labeled_views is empty: name at least one view of the labelled images")
        self.weights = (class_weight, box_weight, quality_weight)
        self.label_score = label_score
        self.views = Views(labeled=tuple(labeled_views), unlabeled=("weak", "strong"))

    @abstractmethod
    def dense_targets(self, taught: DenseOutput) -> tuple[DenseTargets, Losses]:
        """What the student's cells are to say, from what the teacher's say, and metrics, named by `measures`."""

    @property
    @abstractmethod
    def class_loss(self) -> ClassLoss:
        """Of the unlabelled images."""

    def labeled_part(self, batch: Batch) -> tuple[View, PaddedTargets, Tensor]:
        return join_labeled(batch, self.views.labeled)

    def unlabeled_losses(self, features: list[Tensor], strong: View, weak: View, keys: Tensor) -> tuple[Losses, Losses]:  # noqa: ARG002 - nothing is drawn
        with stage("teacher"), torch.no_grad():
            seen = on_canvas_of(weak, strong)
            taught = self.teacher.output(self.teacher.features(seen.images), seen)
            targets, measured = self.dense_targets(taught)
        self._shown, self._labels = (taught, seen, strong), None
        found = self.student.loss(self.student.output(features, strong), targets, self.class_loss)
        pairs = zip(self.terms, self.weights, found.values(), strict=True)
        return {name: weight * value for name, weight, value in pairs}, measured

    @property
    def labels(self) -> dict[str, PaddedTargets]:
        """The teacher's detections, looked for when somebody asks: no step waits for them."""
        if self._labels is None:
            assert self._shown is not None
            taught, weak, strong = self._shown
            found = self.teacher.detections(taught, weak, self.label_score)
            self._labels = {"dense": found.trim().to_view(weak, strong)}
        return self._labels

    @labels.setter
    def labels(self, labels: dict[str, PaddedTargets]) -> None:
        self._labels = labels
        self._shown = None

    def doubts(self, steps: Sequence[int], metrics: Mapping[str, Tensor]) -> list[str]:
        """Warns of a student that diverges and of a teacher that gets worse: every image teaches, labels or not."""
        found = Method.doubts(self, steps, metrics)
        return found if steps[-1] < self.unlabeled_from else found + self._teacher_fell()


def on_canvas_of(view: View, other: View) -> View:
    """A view padded with 0 to the canvas of another one of the same geometry; the boxes are left behind."""
    height, width = other.images.shape[-2:]
    missing = (0, width - view.images.shape[-1], 0, height - view.images.shape[-2])
    return View(F.pad(view.images, missing), view.sizes, view.to_view)
