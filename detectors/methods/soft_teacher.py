"""Soft Teacher: an averaged teacher labels weak views, and says how much it trusts each background region and box.

Xu et al., "End-to-end semi-supervised object detection with Soft Teacher", ICCV 2021. The numbers and the order of
things are those of the official code; where the paper differs, an option says so.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from detectors import losses
from detectors.detector import Detector
from detectors.faster_rcnn import FasterRcnn
from detectors.methods.method import EmaKeys, Losses, mean_count
from detectors.methods.teacher import TeacherMethod
from detectors.padded import PaddedTargets
from detectors.roi import Rois
from detectors.rpn import Proposals
from harness.core import boxes as box_ops
from harness.core.draws import torch_normal, torch_uniform
from harness.core.stages import stage
from harness.core.steps import StepsOrPart
from harness.core.types import UserError, View
from harness.core.validate import Limits, NotNegative, Share, Weight


class SoftTeacher(TeacherMethod):
    """Total loss: the labelled images' four terms, plus lambda_u times the unlabelled images' four terms.

    Args:
        detector, steps, reported, ema, lambda_u, burn_in, rise, joint_forward: see `TeacherMethod`; the official code
            has no burn-in.
        candidate_score: score above which the teacher's boxes are looked at.
        initial_score: score above which they are pseudo labels at all.
        rpn_score, class_score: scores above which they are truth for the RPN, and for the RoI classification.
        box_uncertainty: uncertainty below which they are truth for the RoI regression.
        smallest_side: sides of pseudo labels in the strong view must be longer, in pixels (mmdetection 3: 0.01).
        jitter_count: K, jittered copies of each box; at least 2.
        jitter_scale: their displacement in units of the box's width and height.
        jitter: `gaussian` (code) or `uniform` (paper).
        uncertainty_scale: divide the deviation by width and height (`axes`, code) or by half of their sum
            (`half_perimeter`, paper).
        class_normalizer: `code` pools foreground and background into one sum of weights, `paper` averages each.
        teacher_training_proposals: the teacher's RPN keeps as many proposals as in training (official), or as in tests
            (mmdetection 3).
        use_teacher_proposals: the student's second stage looks at the teacher's proposals instead of its own.
    """

    needs = FasterRcnn
    student: FasterRcnn
    teacher: FasterRcnn
    terms = ("rpn_class", "rpn_box", "roi_class", "roi_box")
    threshold_key = "method.initial_score"
    measures = ("pseudo_boxes", "pseudo_class", "pseudo_box", "background_weight")

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "student",
        lambda_u: Weight = 4.0,
        burn_in: StepsOrPart = 0,
        rise: StepsOrPart | None = None,
        candidate_score: Share = 0.05,
        initial_score: Share = 0.5,
        rpn_score: Share = 0.9,
        class_score: Share = 0.9,
        box_uncertainty: NotNegative = 0.02,
        smallest_side: NotNegative = 0.0,
        jitter_count: Annotated[int, Limits(ge=2, le=1000)] = 10,
        jitter_scale: NotNegative = 0.06,
        jitter: Literal["gaussian", "uniform"] = "gaussian",
        uncertainty_scale: Literal["axes", "half_perimeter"] = "axes",
        class_normalizer: Literal["code", "paper"] = "code",
        teacher_training_proposals: bool = True,
        use_teacher_proposals: bool = False,
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
        for key, value, known in (
            ("jitter", jitter, ("gaussian", "uniform")),
            ("uncertainty_scale", uncertainty_scale, ("axes", "half_perimeter")),
            ("class_normalizer", class_normalizer, ("code", "paper")),
        ):
            if value not in known:
                raise UserError(f"method.{key}={value} is unknown: choose {' or '.join(known)}")
        if jitter_count < 2:
            raise UserError(f"method.jitter_count={jitter_count} gives no deviation: it must be at least 2")
        self.candidate_score = candidate_score
        self.initial_score = initial_score
        self.rpn_score = rpn_score
        self.class_score = class_score
        self.box_uncertainty = box_uncertainty
        self.smallest_side = smallest_side
        self.jitter_count = jitter_count
        self.jitter_scale = jitter_scale
        self.jitter = jitter
        self.uncertainty_scale = uncertainty_scale
        self.class_normalizer = class_normalizer
        self.teacher_training_proposals = teacher_training_proposals
        self.use_teacher_proposals = use_teacher_proposals

    def unlabeled_losses(self, features: list[Tensor], strong: View, weak: View, keys: Tensor) -> tuple[Losses, Losses]:
        rpn, roi = self.student.rpn, self.student.roi
        with stage("teacher"), torch.no_grad():
            teacher_features = self.teacher.features(weak.images)
            found, teacher_proposals = self.label(teacher_features, weak)
            uncertainty = self.uncertainty(teacher_features, weak, found, keys)
        labels = found.to_view(weak, strong)
        labels = labels.keep(box_ops.is_large_enough(labels.boxes, self.smallest_side))
        for_rpn = labels.keep(labels.scores > self.rpn_score)
        for_class = labels.keep(labels.scores > self.class_score)
        for_box = labels.keep(uncertainty < self.box_uncertainty)
        self.labels = {"classification": for_class, "rpn": for_rpn, "box": for_box}

        output = rpn(features, strong.images.shape[-2:])
        result = rpn.losses(output, for_rpn, strong.sizes, keys)
        if self.use_teacher_proposals:
            proposals = map_proposals(teacher_proposals, weak, strong)
        else:
            proposals = rpn.proposals(output, strong.sizes, training=True)
        rois, _ = roi.sample(proposals, for_class, keys)
        box_rois, count = roi.sample(proposals, for_box, keys, stream="roi_box", positives_only=True)
        logits, deltas = self.student.roi(  # both samplings in one call
            features, torch.cat([rois.boxes, box_rois.boxes]), torch.cat([rois.images, box_rois.images])
        )
        with stage("teacher"):
            background = self.background_score(teacher_features, weak, strong, rois)
        result["roi_class"] = self.class_loss(logits[: len(rois)], rois, background)
        result["roi_box"] = roi.box_loss(deltas[len(rois) :], box_rois, count)
        is_background = rois.weights * (rois.labels == 0)
        return result, {
            "pseudo_boxes": mean_count(labels.valid),
            "pseudo_class": mean_count(for_class.valid),
            "pseudo_box": mean_count(for_box.valid),
            "background_weight": (background * is_background).sum() / is_background.sum().clamp(min=1),
        }

    def label(self, features: list[Tensor], weak: View) -> tuple[PaddedTargets, Proposals]:
        """The teacher's boxes above the initial score in the weak views, and its proposals."""
        output = self.teacher.rpn(features, weak.images.shape[-2:])
        proposals = self.teacher.rpn.proposals(output, weak.sizes, self.teacher_training_proposals)
        found = self.teacher.detections(features, weak, proposals, self.candidate_score)
        return found.keep(found.scores > self.initial_score).trim(), proposals

    def uncertainty(self, features: list[Tensor], weak: View, found: PaddedTargets, keys: Tensor) -> Tensor:
        """How much the teacher's regression scatters when a box is moved a little.

        Args:
            features: the teacher's, of the weak views.
            weak: the views.
            found: (B, N) boxes in them.
            keys: (B,).

        Returns:
            (B, N): the deviation over K jittered copies relative to the box, averaged over its four sides; infinite for
            padding. No dependence on which other images are in the batch.
        """
        result = torch.full_like(found.scores, torch.inf)
        image, slot = found.valid.nonzero(as_tuple=True)
        if not len(image):
            return result
        count = self.jitter_count
        boxes, labels = found.boxes[image, slot], found.labels[image, slot]
        draw = torch_normal if self.jitter == "gaussian" else _torch_symmetric
        noise = draw(keys[image] + slot, count * 4, "jitter").view(-1, count, 4)
        size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)
        moved = (boxes[:, None] + noise * self.jitter_scale * size[:, None]).view(-1, 4)
        images, classes = image.repeat_interleave(count), labels.repeat_interleave(count)
        _, deltas = self.teacher.roi(features, moved, images)
        own = deltas[torch.arange(len(deltas), device=deltas.device), classes]
        refined = box_ops.decode(own, moved, self.teacher.roi.settings.coder)
        refined = box_ops.clip_boxes(refined, weak.sizes[images]).view(-1, count, 4)
        result[image, slot] = relative_deviation(refined, self.uncertainty_scale)
        return result

    @torch.no_grad()
    def background_score(self, features: list[Tensor], weak: View, strong: View, rois: Rois) -> Tensor:
        """(R,): the teacher's probability of background at the student's regions, seen in the weak view."""
        back = box_ops.between_views(strong.to_view, weak.to_view)[rois.images]
        boxes = box_ops.clip_boxes(box_ops.transform_boxes(rois.boxes[:, None], back)[:, 0], weak.sizes[rois.images])
        logits, _ = self.teacher.roi(features, boxes, rois.images)
        return logits.softmax(-1)[:, 0]

    def class_loss(self, logits: Tensor, rois: Rois, background: Tensor) -> Tensor:
        """Cross entropy in which a background region counts as much as the teacher believes in it.

        Args:
            logits: (R, C + 1).
            rois: the regions.
            background: (R,) the teacher's probability of background.
        """
        is_background = rois.labels == 0
        weights = rois.weights * torch.where(is_background, background, 1.0)
        if self.class_normalizer == "code":
            return losses.cross_entropy(logits, rois.labels, weights) / weights.sum().clamp(min=1)
        tiny = torch.finfo(torch.float32).tiny
        shares = [weights * is_background, weights * ~is_background]
        return sum(
            (losses.cross_entropy(logits, rois.labels, part / part.sum().clamp(min=tiny)) for part in shares),
            start=logits.new_zeros(()),
        )


def _torch_symmetric(keys: Tensor, count: int, stream: str) -> Tensor:
    """(B, count) uniform numbers in [-1, 1)."""
    return torch_uniform(keys, count, stream) * 2 - 1


def relative_deviation(refined: Tensor, scale: str) -> Tensor:
    """Scatter of K versions of each box.

    Args:
        refined: (n, K, 4).
        scale: `axes` or `half_perimeter`, see `SoftTeacher`.

    Returns:
        (n,): mean over the four coordinates of their standard deviation (K - 1 in the denominator), in units of the
        mean box's size, which counts as at least 1 px.
    """
    if not len(refined):
        return refined.new_zeros(0)  # std would warn
    mean = refined.mean(1)
    size = (mean[:, 2:] - mean[:, :2]).clamp(min=1)
    if scale == "half_perimeter":
        size = size.mean(1, keepdim=True).expand(-1, 2)
    return (refined.std(1) / size.repeat(1, 2)).mean(1)


def map_proposals(proposals: Proposals, source: View, destination: View) -> Proposals:
    """Proposals of one view in the pixels of another."""
    matrices = box_ops.between_views(source.to_view, destination.to_view)
    boxes = box_ops.clip_boxes(box_ops.transform_boxes(proposals.boxes, matrices), destination.sizes)
    return Proposals(boxes, proposals.valid & box_ops.is_large_enough(boxes))
