"""Consistent-Teacher: pseudo labels above a threshold per class that a mixture of two Gaussians gives at every step.

Wang et al., "Consistent-Teacher: Towards reducing inconsistent pseudo-targets in semi-supervised object detection",
CVPR 2023. The numbers and the order of things are those of the official code. The paper's other two parts, adaptive
assignment and FAM-3D, are options of the detector.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from detectors.consistent_retina import ConsistentRetina
from detectors.detector import Detector
from detectors.methods import mixture
from detectors.methods.method import EmaKeys, Losses, mean_count, rising
from detectors.methods.teacher import TeacherMethod
from detectors.padded import PaddedTargets
from harness.core import boxes as box_ops
from harness.core.stages import stage
from harness.core.steps import StepsOrPart, in_steps
from harness.core.types import UserError, View
from harness.core.validate import Limits, NotNegative, Share, Weight

_BELOW = 1e-5  # by so much an image's own limit lies below the score that it is


class ConsistentTeacher(TeacherMethod):
    """L = L_s + lambda_u L_u, each the detector's own losses; L_u counts little where most images have no pseudo label.

    The scores of which thresholds are made are those of the last steps, of all micro-batches in their order, and those
    of the micro-batch itself before them. (The official code has a queue on each GPU, of that GPU's own scores.)

    Args:
        detector, steps, reported, ema, lambda_u, burn_in, rise, joint_forward: see `TeacherMethod`.
        loss_from: step, or below 1 a fraction of the schedule, before which L_u counts 0 while scores are gathered.
        mixture: thresholds per class by `mixture.thresholds`; False: one for all, `score`.
        score: above it the teacher's boxes are pseudo labels, without mixtures.
        queue: scores of each class that are kept.
        candidate_score: score above which the teacher's boxes are looked at.
        smallest_side: sides of pseudo labels in the strong view must be longer, in pixels.
        background_weight: of L_u in a micro-batch in which fewer than half of the images have a pseudo label.

    Raises:
        UserError: see `TeacherMethod`; L_u would never count.
    """

    needs = ConsistentRetina
    fitting = "detector=consistent_retina, or with preset=small small_consistent_retina"
    deviations = (
        "one queue of scores over all micro-batches of a step, where the code has one for each GPU",
        "losses are divided by the weights of a micro-batch, where the code divides by their mean over GPUs",
    )
    measures = ("pseudo_boxes", "threshold", "labelled_share")
    queue: Tensor  # (C, n) scores, newest first; 0 stands for none

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 2.0,
        burn_in: StepsOrPart = 0,
        loss_from: StepsOrPart = 10_000,
        rise: StepsOrPart | None = None,
        mixture: bool = True,
        score: Share = 0.5,
        queue: Annotated[int, Limits(ge=4, le=10_000)] = 100,
        candidate_score: Share = 0.05,
        smallest_side: NotNegative = 0.0,
        background_weight: NotNegative = 0.01,
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
        )
        self.loss_from = in_steps(loss_from, steps)
        if self.loss_from >= steps:
            raise UserError(
                f"method.loss_from={loss_from} must be below schedule.steps={steps}, or unlabelled images never count: "
                "lower it, or train longer"
            )
        self.mixture = mixture
        self.score = score
        self.candidate_score = candidate_score
        self.smallest_side = smallest_side
        self.background_weight = background_weight
        self.threshold_key = "method.candidate_score" if mixture else "method.score"
        self.register_buffer("queue", torch.zeros(detector.num_classes, queue if mixture else 0))
        self._fresh: Tensor | None = None

    def unlabeled_weight(self, step: int) -> float:
        if step < self.loss_from:
            return 0.0
        return self.lambda_u * rising(step, max(self.unlabeled_from, self.loss_from), self.rise)

    def unlabeled_losses(self, features: list[Tensor], strong: View, weak: View, keys: Tensor) -> tuple[Losses, Losses]:
        with stage("teacher"):
            found, limits = self.label(weak)
            pseudo = found.to_view(weak, strong)
            pseudo = pseudo.keep(box_ops.is_large_enough(pseudo.boxes, self.smallest_side))
        self.labels = {"classification": pseudo}
        labelled = found.valid.any(1).float().mean()
        weight = torch.where(labelled < 0.5, self.background_weight, 1.0)
        terms = self.student.losses(features, strong, pseudo, keys)
        return {name: weight * value for name, value in terms.items()}, {
            "pseudo_boxes": mean_count(pseudo.valid),
            "threshold": limits,
            "labelled_share": labelled,
        }

    @torch.no_grad()
    def label(self, weak: View) -> tuple[PaddedTargets, Tensor]:
        """The teacher's boxes above their classes' thresholds, in the weak views; and the mean of these thresholds over
        the boxes that met them, 0-d."""
        found = self.teacher.find(self.teacher.features(weak.images), weak, self.candidate_score)
        if not self.mixture:
            return found.keep(found.scores > self.score).trim(), torch.full_like(found.scores[0, 0], self.score)
        found = found.keep(expected(found.scores, found.valid))
        fresh = self._fresh = scores_by_class(found, *self.queue.shape)
        limits = mixture.thresholds(pushed(self.queue, fresh))[(found.labels - 1).clamp(min=0)]
        mean = (limits * found.valid).sum() / found.valid.sum().clamp(min=1)
        return found.keep(found.scores > limits).trim(), mean

    def observe(self) -> dict[str, Tensor]:
        """The scores of the last forward."""
        fresh, self._fresh = self._fresh, None
        if not self.mixture:
            return {}
        return {"scores": torch.zeros_like(self.queue) if fresh is None else fresh}

    @torch.no_grad()
    def absorb(self, step: int, observed: dict[str, Tensor]) -> None:  # noqa: ARG002 - the same at every step
        """Puts the scores of all micro-batches into the queue, those of the last one to the front."""
        fresh = observed["scores"].flip(0).transpose(0, 1).flatten(1)
        self.queue.copy_(pushed(self.queue, fresh))


def expected(scores: Tensor, valid: Tensor) -> Tensor:
    """As many boxes of each image as their scores let one expect, and one more.

    Args:
        scores: (B, N), falling.
        valid: (B, N).

    Returns:
        (B, N): the first n + 1 boxes, n the rounded sum of the image's scores but less than the number of boxes, and
        those that score as well as the last of them.
    """
    sums = (scores * valid).sum(1)
    last = torch.minimum((sums + 0.5).floor().long(), valid.sum(1) - 1).clamp(min=0)
    return valid & (scores > scores.gather(1, last[:, None]) - _BELOW)


def scores_by_class(found: PaddedTargets, classes: int, room: int) -> Tensor:
    """(C, room): the scores of each class, image by image; the first ones, then 0."""
    labels = torch.arange(1, classes + 1, device=found.labels.device)
    own = (found.labels.flatten() == labels[:, None]) & found.valid.flatten()
    return _first(found.scores.flatten() * own, room)


def pushed(queue: Tensor, fresh: Tensor) -> Tensor:
    """The queue (C, n) after scores (C, m) came in: these first, in their order, 0 stands for none."""
    return _first(torch.cat([fresh, queue], 1), queue.shape[1])


def _first(scores: Tensor, room: int) -> Tensor:
    """(C, m) to (C, room): the first scores above 0 of each row, in their order, then 0."""
    place = (scores > 0).cumsum(1) - 1
    place = torch.where((scores > 0) & (place < room), place, room)  # one column to throw away
    return scores.new_zeros(len(scores), room + 1).scatter_(1, place, scores)[:, :room]
