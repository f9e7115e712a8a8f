"""What teacher methods share: after a burn-in an averaged teacher labels the images that nobody labelled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detectors.detector import Detector, join_views, targets_of
from detectors.methods.adaptive import AdaptiveKeys, AdaptiveThresholds
from detectors.methods.method import Losses, Method, first_step, mean_count, rising, student_features, unlabeled_terms
from detectors.methods.watch import WINDOW, LabelWatch, TeacherWatch
from detectors.padded import PaddedTargets, concatenate
from harness.core.draws import stream_key
from harness.core.escape import plain
from harness.core.stages import stage
from harness.core.steps import in_steps
from harness.core.types import Batch, UserError, View, Views
from harness.core.validate import make_checked

FEW = 0.1  # pseudo labels per image, as a share of the labelled images' boxes, below which a warning is given
THRESHOLDS = ("lowest_threshold", "mean_threshold", "highest_threshold")  # of the classes


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
        self.rise = 0 if rise is None else in_steps(rise, steps)
        self.joint_forward = joint_forward
        self.teacher_watch, self.label_watch = TeacherWatch(start), LabelWatch()

    @abstractmethod
    def unlabeled_losses(self, features: list[Tensor], strong: View, weak: View, keys: Tensor) -> tuple[Losses, Losses]:
        """The terms of L_u, named by `terms`, and metrics, named by `measures`. Sets `self.labels`.

        Args:
            features: the student's, of `taught_view`.
            strong: that view; the strong one of the B images, unless a method gives another.
            weak: the weak view of the images.
            keys: (B,) random keys of the images.
        """

    def labeled_part(self, batch: Batch) -> tuple[View, PaddedTargets, Tensor]:
        """The labelled images as the student sees them, their boxes, and their random keys."""
        view = batch.labeled["labeled"]
        return view, targets_of(view), batch.labeled_keys

    def taught_view(self, batch: Batch, step: int) -> View:  # noqa: ARG002 - what others draw by
        """What the student sees of the unlabelled images."""
        return batch.unlabeled["strong"]

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
            taught = self.taught_view(batch, step)
            seen, both = student_features(self.student, (labeled, taught), self.joint_forward)
            with stage("losses"):
                supervised = self.labeled_losses(both[0], seen[0], truth, keys)
                weak = batch.unlabeled["weak"]
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


class ThresholdTeacher(TeacherMethod):
    """A teacher method whose pseudo labels are the boxes above one score, or above a score for each class.

    Args:
        detector, steps, others: see `TeacherMethod`.
        score: the threshold; with `adaptive` that of all classes until enough images have been seen.
        candidate_score: score above which the teacher's boxes are looked at.
        adaptive: fields of `AdaptiveKeys`, for thresholds that follow from the labelled images; None for one score.
    """

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        score: float,
        candidate_score: float,
        adaptive: Mapping[str, Any] | None,
        **others: Any,
    ) -> None:
        super().__init__(detector, steps, **others)
        self.score = score
        self.candidate_score = candidate_score
        self.adaptive: AdaptiveThresholds | None = None
        if adaptive is not None:
            keys = make_checked(AdaptiveKeys, adaptive, "method.adaptive")
            if candidate_score > keys.floor:
                raise UserError(
                    f"method.candidate_score={candidate_score} keeps scores from the thresholds that may be as low as "
                    f"method.adaptive.floor={keys.floor}: lower the first or raise the second"
                )
            self.adaptive = AdaptiveThresholds(detector.num_classes, score, keys)
            self.measures = (*self.measures, *THRESHOLDS)
        self._scores: dict[str, Tensor] = {}  # what the last forward saw, for `observe`

    def expect(self, images: int, boxes: Sequence[int]) -> None:
        if self.adaptive is not None:
            self.adaptive.expect(images, boxes)

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:
        self._scores = {}
        if self.adaptive is not None and step >= self.unlabeled_from:
            # As many rows as the micro-batch has images, since each has another number of unlabelled ones.
            none = self.adaptive.best.new_zeros(batch.images_seen, *self.adaptive.best.shape[1:])
            self._scores = {"best_scores": none, "scored": none.new_zeros(len(none), dtype=torch.bool)}
        return super().forward(batch, step)

    def watch(self, found: PaddedTargets) -> None:
        """Notes the scores of all boxes that the teacher found in unlabelled images."""
        if self.adaptive is not None and self._scores:
            self._scores["best_scores"][: len(found)] = self.adaptive.best_scores(found)
            self._scores["scored"][: len(found)] = True

    def certain(self, found: PaddedTargets) -> Tensor:
        """(B, N) bool: which boxes are pseudo labels, valid or not."""
        return found.scores > self.score if self.adaptive is None else self.adaptive.passes(found)

    def thresholds(self) -> Losses:
        """Metrics: the lowest, the mean and the highest threshold of a class."""
        if self.adaptive is None:
            return {}
        scores = self.adaptive.thresholds
        return dict(zip(THRESHOLDS, (scores.amin(), scores.mean(), scores.amax()), strict=True))

    def observe(self) -> dict[str, Tensor]:
        observed, self._scores = self._scores, {}
        return observed

    def absorb(self, step: int, observed: dict[str, Tensor]) -> None:  # noqa: ARG002
        if self.adaptive is not None and observed:
            self.adaptive.absorb(observed["best_scores"].flatten(0, 1), observed["scored"].flatten())

    def class_measures(self) -> dict[str, Tensor]:
        return {} if self.adaptive is None else {"pseudo_threshold": 100 * self.adaptive.thresholds}
