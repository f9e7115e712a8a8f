"""What a method needs of a detector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectors.padded import PaddedTargets, pad
from harness.core.types import Normalize, Target, View


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained with a learning rate of their own."""

    parameters: tuple[nn.Parameter, ...]
    lr_scale: float = 1.0  # times the schedule's learning rate


class Detector(nn.Module, ABC):
    """A network that finds boxes. Features are lists of (B, channels, h, w) maps, finest first.

    Args:
        num_classes: C, without background.
        name: for records.
        normalize: what its pipeline must do to pixels; no detector resizes or normalises by itself.
        pretraining: where its first weights come from, in words.
    """

    backbone: nn.Module  # images to features
    backbone_lr_scale = 1.0  # learning rate of the backbone, without its pyramid, over that of the rest

    def __init__(self, *, num_classes: int, name: str, normalize: Normalize, pretraining: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.name = name
        self.normalize = normalize
        self.pretraining = pretraining

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images to feature maps."""
        return self.backbone(images)

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters, once each, by learning rate."""
        if self.backbone_lr_scale == 1:
            return [ParameterGroup(tuple(self.parameters()))]
        body = tuple(getattr(self.backbone, "body", self.backbone).parameters())
        known = set(map(id, body))
        rest = tuple(p for p in self.parameters() if id(p) not in known)
        return [ParameterGroup(rest), ParameterGroup(body, self.backbone_lr_scale)]

    @abstractmethod
    def losses(self, features: list[Tensor], view: View, targets: PaddedTargets, keys: Tensor) -> dict[str, Tensor]:
        """The detector's own training losses, always with the same keys.

        Args:
            features: of `view.images`.
            view: the images (only their shape and sizes are used).
            targets: what to find in them.
            keys: (B,) random keys of the images, for sampling.
        """

    @abstractmethod
    def find(self, features: list[Tensor], view: View, score_threshold: float) -> PaddedTargets:
        """Detections by falling score: above the threshold, after NMS, clipped to the valid size of the view."""

    @torch.no_grad()
    def detect(self, view: View, score_threshold: float) -> list[Target]:
        """Detections in each image of a view, in its pixels."""
        return self.find(self.features(view.images), view, score_threshold).unpad()


def targets_of(view: View) -> PaddedTargets:
    """The boxes a view carries."""
    assert view.targets is not None, "this view carries no boxes"
    return pad(view.targets)


def join_views(views: Sequence[View]) -> View:
    """Several views as one batch, padded with 0 to a common size; the boxes are left behind."""
    height = max(view.images.shape[2] for view in views)
    width = max(view.images.shape[3] for view in views)
    images = [F.pad(v.images, (0, width - v.images.shape[3], 0, height - v.images.shape[2])) for v in views]
    return View(
        images=torch.cat(images),
        sizes=torch.cat([view.sizes for view in views]),
        to_view=torch.cat([view.to_view for view in views]),
    )
