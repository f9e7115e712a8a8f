"""What the training loop needs of a method. A method owns loss, teacher and state; the loop owns time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detectors.detector import Detector, ParameterGroup, join_views
from detectors.methods import ema
from detectors.methods.pseudo_labels import Quality, measure, measure_classes
from detectors.methods.watch import LossWatch, Spells
from detectors.padded import PaddedTargets
from harness.core import validate
from harness.core.stages import stage
from harness.core.steps import in_steps
from harness.core.types import Batch, Target, UserError, View, Views
from harness.core.validate import Limits, Share, keys_of

__all__ = ["Detector", "Ema", "Losses", "Method"]

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Ema:
    """How the teacher follows the student; the values of `method.ema` in the configuration."""

    momentum: Share
    ramp: bool = False  # let the momentum grow as `detectors.methods.ema.ramp` says, up to the one above
    gamma: Annotated[float, Limits(gt=0, le=1e6)] | None = None  # of the ramp; None: 1
    interval: Annotated[int, Limits(ge=1, le=10**6)] | None = None  # student steps from one update to the next; None: 1
    first: Annotated[int, Limits(ge=0, le=10**9)] | None = None  # step of the first update, since it began; None: 0
    update: Literal["before", "after"] = "after"  # before or after the student's step
    buffers: bool | None = None  # average buffers too; None: if BatchNorm keeps statistics, which would be stale

    def momentum_at(self, step: int) -> float | None:
        """The momentum of an update, counted in steps since the teacher began; None where there is no update."""
        if step < (self.first or 0) or (step - (self.first or 0)) % (self.interval or 1):
            return None
        return ema.ramp(step, self.momentum, self.gamma or 1.0) if self.ramp else self.momentum

    def of(self, detector: nn.Module) -> Ema:
        """The same with `buffers` decided for this detector.

        Raises:
            UserError: the detector's statistics would never reach the teacher.
        """
        moving = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in detector.modules())
        if moving and self.buffers is False:
            raise UserError(
                "method.ema.buffers=false leaves the teacher with stale statistics, since this detector trains "
                "BatchNorm: take null or true, or a detector without it"
            )
        return replace(self, buffers=moving if self.buffers is None else self.buffers)


EmaKeys = Annotated[Mapping[str, Any], keys_of(Ema)]


class Method(nn.Module, ABC):
    """Base of every method: a student and, if `ema` is given, a teacher that averages it.

    Args:
        detector: the student, with its first weights.
        steps: length of the schedule in student steps.
        reported: `student` or `teacher`: whose numbers are the result, declared before training.
        ema: fields of `Ema`, or None for no teacher.
        teacher_from: step at which the teacher begins to average; it is a copy of the student until then.

    Raises:
        UserError: the method cannot train this detector, an option is wrong, or there is no such network to report.
    """

    needs: type[Detector] = Detector  # type: ignore[type-abstract]  # the kind of detector it can train
    fitting = "a detector of that kind"  # the same for people
    aligned_views: tuple[str, ...] = ()  # of unlabelled images: must show the same pixels in the same places
    deviations: tuple[str, ...] = ()  # from the paper's code that no option undoes, for the record
    views: Views
    labels_view = "strong"  # the view of unlabelled images in which `labels` are given
    unlabeled_from = 0  # first step that needs unlabelled images

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        reported: str = "student",
        ema: Mapping[str, Any] | None = None,
        teacher_from: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(detector, self.needs):
            raise UserError(
                f"detector={detector.name} does not fit method {type(self).__name__}, which works on the stages of "
                f"{self.needs.__name__}: choose {self.fitting}, or another method"
            )
        self.student = detector
        self.steps = steps
        self.reported = reported
        self.ema = validate.make_checked(Ema, ema, "method.ema").of(detector) if ema is not None else None
        self.teacher_from = teacher_from
        self.teacher: Detector | None = None
        if self.ema is not None:
            self.teacher = deepcopy(detector)
            self.teacher.requires_grad_(False)
            self.teacher.eval()
        # What the last forward took for the truth of unlabelled images, in pixels of their view `labels_view`: by the
        # use that was made of it, the one that decides classes first.
        self.labels: dict[str, PaddedTargets] = {}
        self.spells, self.loss_watch = Spells(), LossWatch()  # for `doubts`
        self.class_names: Sequence[
            str
        ] = ()  # of the C classes, for `doubts`; set by who builds the method for a dataset
        if reported not in self.networks():
            raise UserError(f"method.reported={reported} does not exist here: choose {' or '.join(self.networks())}")

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:
        """Losses, weighted and ready to be summed, and metrics: 0-d tensors, under the same keys on every call."""

    def train(self, mode: bool = True) -> Method:
        """Sets the student's mode; the teacher's statistics are never its own."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def before_step(self, step: int) -> None:
        """Called before the forward of a student step."""
        self._average(step, "before")

    def after_step(self, step: int) -> None:
        """Called after the optimiser has made a student step."""
        self._average(step, "after")

    def _average(self, step: int, when: str) -> None:
        if self.teacher is None or self.ema is None:
            return
        if step <= self.teacher_from and when == "before":
            with stage("ema"):
                ema.copy(self.teacher, self.student)
        elif when == self.ema.update and step >= self.teacher_from:
            momentum = self.ema.momentum_at(step - self.teacher_from)
            if momentum is not None:
                with stage("ema"):
                    ema.update(self.teacher, self.student, momentum, bool(self.ema.buffers))

    def observe(self) -> dict[str, Tensor]:
        """What the last forward saw that the method's own state is to be made of, such as scores for a threshold.

        The loop gathers it over the micro-batches of a step, on whatever device each of them ran, and hands it to
        `absorb`. A buffer that is changed in `forward` instead would differ between the devices.

        Returns:
            Named tensors, detached, on the training device. Names and shapes are the same for all micro-batches of a
            step; what has no fixed size is padded.
        """
        return {}

    def absorb(self, step: int, observed: dict[str, Tensor]) -> None:
        """Takes up what the forwards of a step observed: once per step, after the optimiser, the same on every rank.

        Args:
            step: the student step.
            observed: (K, ...) what `observe` gave, in the order of the step's K micro-batches.
        """

    def expect(self, images: int, boxes: Sequence[int]) -> None:
        """Told once, by who builds the method for a dataset, what was labelled.

        Args:
            images: how many labelled images there are.
            boxes: (C,) of each class in all of them.
        """

    def missing(self) -> list[tuple[int, int]]:
        """The micro-batches, as (step, lane), whose images the method's state needs and does not have.

        Pixels are too large for a checkpoint that all lanes share, and the pipeline gives them again. So a method that
        keeps some has in its state which they were; where a run is taken up, those of this process's lanes are made
        anew and handed to `remember`, in this order.
        """
        return []

    def remember(self, batch: Batch, step: int) -> None:
        """Takes up a micro-batch of `missing`, as it was at its step."""

    def class_measures(self) -> dict[str, Tensor]:
        """What the method knows of each class at the end, for the record: name -> (C,) in 0..100."""
        return {}

    def trainable(self) -> nn.Module:
        """What the optimiser changes."""
        return self.student

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters of `trainable()`, once each, by learning rate."""
        return self.student.parameter_groups()

    def networks(self) -> dict[str, Detector]:
        """The networks that can be evaluated: `student` and, where there is one, `teacher`."""
        both = {"student": self.student}
        return both if self.teacher is None else {**both, "teacher": self.teacher}

    def inspect(self, batch: Batch, truth: Sequence[Target | None]) -> dict[str, Quality]:
        """Measures what the last forward took for the truth of unlabelled images. No loss ever sees the result.

        Args:
            batch: what the last forward saw.
            truth: the boxes of each of its unlabelled images, in original pixels; None where nobody knows them.

        Returns:
            Use of the pseudo labels -> measure -> value; the first use is the one that a record reports. Empty without
            pseudo labels. Waits for the device.
        """
        view = batch.unlabeled.get(self.labels_view)
        if view is None:
            return {}
        return {use: measure(labels, view, truth) for use, labels in self.pseudo_labels.items()}

    def inspect_classes(self, batch: Batch, truth: Sequence[Target | None]) -> np.ndarray | None:
        """Counts the pseudo labels that `inspect` measures first, class by class; arguments as there.

        Returns:
            (C, 3) int64: labels, those of them that are right, and true boxes. None without pseudo labels.
        """
        view = batch.unlabeled.get(self.labels_view)
        first = next(iter(self.pseudo_labels.values()), None)
        if view is None or first is None:
            return None
        return measure_classes(first, view, truth, self.student.num_classes)

    def doubts(self, steps: Sequence[int], metrics: Mapping[str, Tensor]) -> list[str]:  # noqa: ARG002
        """What the user should be warned of, each in one sentence: once when it begins to be true.

        Args:
            steps: those that were made since this was last asked for.
            metrics: of the last of them, means over its micro-batches and ranks; and `labeled_loss`, the sum of the
                labelled images' losses.
        """
        loss = metrics.get("labeled_loss")
        if loss is None or not self.spells.begins("diverges", self.loss_watch.diverges(float(loss))):
            return []
        return [
            f"the student diverges: its loss on labelled images is {float(loss):.3g}, as high as in the beginning or "
            "higher; lower schedule.optimizer.lr, or set schedule.clip_norm"
        ]

    def scored(self, steps: int, network: str, ap: float | None) -> None:
        """Called after an evaluation, before `doubts` is asked for the next time.

        Args:
            steps: student steps made so far.
            network: of `networks`.
            ap: 0..100; None where there is none.
        """

    @property
    def pseudo_labels(self) -> dict[str, list[Target]]:
        """`labels` without padding, image by image. Waits for the device."""
        return {name: labels.unpad() for name, labels in self.labels.items()}


def rising(step: int, start: int, length: int) -> float:
    """0 at step `start`, then growing linearly to 1 over `length` steps; 1 throughout if that is 0.

    For weights of losses: Dense Teacher and ARSL let those of unlabelled images rise.
    """
    return min(1.0, max(0.0, (step - start) / length)) if length else 1.0


def first_step(burn_in: float, steps: int) -> int:
    """Length of a purely supervised beginning in steps.

    Args:
        burn_in: steps, or below 1 a fraction of the schedule.
        steps: length of the schedule.

    Raises:
        UserError: nothing would be left of the schedule.
    """
    first = in_steps(burn_in, steps)
    if not 0 <= first < steps:
        raise UserError(f"method.burn_in={burn_in} must be below schedule.steps={steps}: lower it, or train longer")
    return first


def student_features(student: Detector, views: Sequence[View], joint: bool) -> tuple[list[View], list[list[Tensor]]]:
    """Features of several views of a step.

    Args:
        student: the detector.
        views: what it shall see.
        joint: one forward over all of them, padded to a common size, so that BatchNorm sees them together; otherwise
            one forward for each, as in the papers.

    Returns:
        The views as they were seen (without boxes), and the features of each.
    """
    if not joint or len(views) == 1:
        with stage("student"):
            return list(views), [student.features(view.images) for view in views]
    counts = [len(view) for view in views]
    joined = join_views(views)
    with stage("student"):
        levels = [level.split(counts) for level in student.features(joined.images)]
    seen = [
        View(images, sizes, to_view)
        for images, sizes, to_view in zip(
            joined.images.split(counts), joined.sizes.split(counts), joined.to_view.split(counts), strict=True
        )
    ]
    return seen, [[level[part] for level in levels] for part in range(len(views))]


def unlabeled_terms(losses: Losses, weight: float) -> Losses:
    """Losses of unlabelled images, weighted, under names of their own."""
    return {f"unlabeled_{name}": weight * value for name, value in losses.items()}


def mean_count(mask: Tensor) -> Tensor:
    """Marks per image of a (B, N) mask, 0-d float32."""
    return mask.sum(1).float().mean()
