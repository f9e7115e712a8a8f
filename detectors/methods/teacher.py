"""What teacher methods share: after a burn-in an averaged teacher labels the images that nobody labelled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detectors.detector import Detector, join_views, targets_of
from detectors.methods.method import Losses, Method, first_step, mean_count, rising, student_features, unlabeled_terms
from detectors.methods.watch import WINDOW, LabelWatch, TeacherWatch
from detectors.padded import PaddedTargets, concatenate
from harness.core.draws import stream_key
from harness.core.escape import plain
from harness.core.stages import stage
from harness.core.types import Batch, View, Views

FEW = 0.1  # pseudo labels per image, as a share of the labelled images' boxes, below which a warning is given


class TeacherMethod(Method):
    """L = L_s + lambda_u L_u. A method of this kind says what L_u is, in `unlabeled_losses`.

    Args:
        detector, steps, ema, reported, teacher_from: see `Method`.
        lambda_u: weight of the unlabelled images' losses.
        burn_in: supervised steps at the start, or below 1 a fraction of the schedule.
        rise: steps over which lambda_u grows from 0 after the burn-in, or below 1 a fraction of the schedule; None: it
            is there at once.
        joint_forward: one backbone forward over labelled and unlabelled images together, or two.
        average_burn_in: the teacher averages the student from the first step on; otherwise it begins as a copy of the
            student at the end of the burn-in.
    """

    views = Views(labeled=("labeled",), unlabeled=("weak", "strong"))
    teacher: Detector
    terms: tuple[str, ...] = ()  # names of the unlabelled losses; empty: those of the labelled images
    threshold_key = "method.score"  # what decides how many boxes are pseudo labels
    measures: tuple[str, ...] = ("pseudo_boxes",)  # names of the unlabelled images' metrics

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: Mapping[str, Any],
        reported: str,
        lambda_u: float,
        burn_in: float,
        rise: float | None = None,
        joint_forward: bool = False,
        average_burn_in: bool = True,
    ) -> None:
        start = first_step(burn_in, steps)
        super().__init__(detector, steps, reported=reported, ema=ema, teacher_from=0 if average_burn_in else start)
        self.unlabeled_from = start
        self.lambda_u = lambda_u
        self.rise = 0 if rise is None else round(rise * steps) if rise < 1 else int(rise)
        self.joint_forward = joint_forward
        self.teacher_watch, self.label_watch = TeacherWatch(start), LabelWatch()

    @abstractmethod
    def unlabeled_losses(self, features: list[Tensor], strong: View, weak: View, keys: Tensor) -> tuple[Losses, Losses]:
        """The terms of L_u, named by `terms`, and metrics, named by `measures`. Sets `self.labels`.

        Args:
            features: the student's, of the strong views.
            strong, weak: two views of the same B images.
            keys: (B,) random keys of the images.
        """

    def labeled_part(self, batch: Batch) -> tuple[View, PaddedTargets, Tensor]:
        """The labelled images as the student sees them, their boxes, and their random keys."""
        view = batch.labeled["labeled"]
        return view, targets_of(view), batch.labeled_keys

    def labeled_losses(self, features: list[Tensor], view: View, truth: PaddedTargets, keys: Tensor) -> Losses:
        """The terms of L_s: the detector's own losses."""
        return self.student.losses(features, view, truth, keys)

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:
        labeled, truth, keys = self.labeled_part(batch)
        metrics = {"labeled_boxes": mean_count(truth.valid)}
        if step < self.unlabeled_from or not batch.unlabeled:
            (view,), (features,) = student_features(self.student, (labeled,), joint=False)
            with stage("losses"):
                supervised = self.labeled_losses(features, view, truth, keys)
            zero = torch.zeros((), device=labeled.images.device)
            unsupervised = dict.fromkeys(self.terms or supervised, zero)
            metrics.update(dict.fromkeys(self.measures, zero))
            self.labels = {}
        else:
            weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
            seen, both = student_features(self.student, (labeled, strong), self.joint_forward)
            with stage("losses"):
                supervised = self.labeled_losses(both[0], seen[0], truth, keys)
                unsupervised, measured = self.unlabeled_losses(both[1], seen[1], weak, batch.unlabeled_keys)
            metrics.update(measured)
        return {**supervised, **unlabeled_terms(unsupervised, self.unlabeled_weight(step))}, metrics

    def unlabeled_weight(self, step: int) -> float:
        """What L_u is multiplied with at a step."""
        return self.lambda_u * rising(step, self.unlabeled_from, self.rise)

    def scored(self, steps: int, network: str, ap: float | None) -> None:
        if network == "teacher":
            self.teacher_watch.scored(steps, ap)

    def doubts(self, steps: Sequence[int], metrics: Mapping[str, Tensor]) -> list[str]:
        """Warns of a teacher that knows next to nothing when it begins, gets worse, or labels nothing or one class."""
        found = super().doubts(steps, metrics)
        if steps[-1] < self.unlabeled_from:
            return found
        boxes, usual = float(metrics["pseudo_boxes"]), float(metrics["labeled_boxes"])
        if self.unlabeled_from in steps and boxes < FEW * usual:
            found.append(
                f"the teacher gives {boxes:.2f} boxes per unlabelled image, where labelled ones have {usual:.2f}: it "
                "knows too little to teach yet; lengthen method.burn_in, or lower its score thresholds"
            )
        self.label_watch.take(boxes, next(iter(self.labels.values()), None))
        return found + self._teacher_fell() + self._labels_are_odd()

    def _teacher_fell(self) -> list[str]:
        fell = self.teacher_watch.fell()
        if not self.spells.begins("fell", fell is not None) or fell is None:
            return []
        return [
            f"the teacher has AP {fell[1]:.1f}, and had {fell[0]:.1f} at the end of the burn-in: its labels harm; "
            f"raise {self.threshold_key}, or lower method.lambda_u"
        ]

    def _class_name(self, label: int | None) -> str:
        """The name of a label in 1..C; its number where names were not given."""
        return plain(self.class_names[label - 1]) if label is not None and self.class_names else str(label)

    def _labels_are_odd(self) -> list[str]:
        found = []
        if self.spells.begins("none", self.label_watch.are_missing()):
            found.append(
                f"there were no pseudo labels at the last {WINDOW} log lines, so that nothing is learnt of unlabelled "
                f"images: lower {self.threshold_key}, or lengthen method.burn_in"
            )
        label = self.label_watch.only_class()
        if self.spells.begins("one class", label is not None and self.student.num_classes > 1):
            found.append(
                f"nearly all pseudo labels of the last {WINDOW} log lines are of class {self._class_name(label)} (of "
                f"{self.student.num_classes} classes): unless it is as common among human labels, "
                f"lower {self.threshold_key} so that others are found too, or lengthen method.burn_in"
            )
        return found


def join_labeled(batch: Batch, names: Sequence[str]) -> tuple[View, PaddedTargets, Tensor]:
    """Several views of the labelled images as one batch, their boxes, and keys by which each view draws its own."""
    views = [batch.labeled[name] for name in names]
    truth = concatenate([targets_of(view) for view in views])
    return join_views(views), truth, torch.cat([batch.labeled_keys ^ stream_key(name) for name in names])
