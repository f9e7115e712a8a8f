"""Consistent-Teacher's detector: a RetinaNet with one square anchor per cell, and towers that others can look at.

Wang et al., CVPR 2023. Two of the paper's three parts are options of it: adaptive assignment and FAM-3D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detectors import losses
from detectors.assigners import adaptive
from detectors.backbones import Depth, Norm, Pyramid, SmallBackbone, Stages
from detectors.fam3d import Fam3d
from detectors.large_pyramid import large_pyramid
from detectors.matching import AnchorMatches, match_anchors
from detectors.one_stage import STRIDES, DenseOutput, OneStage, check_groups, focal_loss, one_hot
from detectors.padded import PaddedTargets, gather_rows
from detectors.rpn import CANDIDATES, Anchors
from detectors.simple_pyramid import SimplePyramid
from detectors.small_pyramid import small_pyramid
from detectors.timm_networks import TimmName
from detectors.weights import Generated
from harness.core import boxes as box_ops
from harness.core.types import UserError, View
from harness.core.validate import Channels, File, Limits, NotNegative, Pixels

Assignment = Literal["adaptive", "max_iou"]

_CODER = (10.0, 10.0, 5.0, 5.0)
_BOX_WEIGHT = 2.0  # of the box loss
_PRIOR = 0.01  # the first score of every class
_GROUPS, _SMALL_GROUPS = 32, 16  # of the towers' normalisation
_NMS_IOU = 0.6


class TowerHead(nn.Module):
    """A tower for classes and one for boxes, shared by all levels; boxes may be moved by FAM-3D.

    Args:
        channels: of the pyramid and the towers.
        num_classes: C.
        sides: of the levels' anchors, in strides.
        strides: of the levels, in pixels.
        convolutions: of each tower.
        groups: of its normalisation.
        fam3d: move boxes.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        sides: Sequence[float],
        strides: Sequence[int],
        convolutions: int,
        groups: int,
        fam3d: bool,
    ) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.class_tower = _tower(channels, convolutions, groups)
        self.box_tower = _tower(channels, convolutions, groups)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(channels, 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]
        nn.init.zeros_(self.deltas.bias)  # type: ignore[arg-type]
        self.scales = nn.Parameter(torch.ones(len(strides)))  # of the deltas of each level
        self.fam3d = Fam3d(2 * convolutions * channels, channels // 4, strides) if fam3d else None

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each level the logits (B, C, h, w), and boxes (B, 4, h, w) xyxy from the cell's corner, in anchors."""
        logits, boxes, seen = [], [], []
        for level, (side, scale) in enumerate(zip(self.sides, self.scales, strict=True)):
            of_class, of_box = _outputs(self.class_tower, features[level]), _outputs(self.box_tower, features[level])
            logits.append(self.cls_logits(of_class[-1]))
            boxes.append(self._boxes(scale * self.deltas(of_box[-1]).float(), side))
            seen.append((*of_class, *of_box))
        if self.fam3d is not None:
            boxes = self.fam3d([torch.cat(maps, 1) for maps in seen], boxes)
        return logits, [(box - _cells(box)) / side for box, side in zip(boxes, self.sides, strict=True)]

    @staticmethod
    def _boxes(deltas: Tensor, side: float) -> Tensor:
        """Deltas (B, 4, h, w) to boxes from the corner of the image, in strides."""
        cells = _cells(deltas).permute(1, 2, 0)
        anchors = torch.cat([cells[..., :2] - side / 2, cells[..., 2:] + side / 2], -1)
        return box_ops.decode(deltas.permute(0, 2, 3, 1), anchors, _CODER).permute(0, 3, 1, 2)


def _tower(channels: int, convolutions: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU()
        )
        for _ in range(convolutions)
    )


def _outputs(tower: nn.ModuleList, maps: Tensor) -> list[Tensor]:
    """What each layer of a tower gives."""
    found = []
    for layer in tower:
        maps = layer(maps)
        found.append(maps)
    return found


def _cells(maps: Tensor) -> Tensor:
    """(4, h, w): x, y, x, y of the cells of a map, on which their anchors are centred."""
    height, width = maps.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=maps.device, dtype=maps.dtype),
        torch.arange(width, device=maps.device, dtype=maps.dtype),
        indexing="ij",
    )
    return torch.stack([x, y, x, y])


class ConsistentRetina(OneStage):
    """Focal loss on classes, GIoU loss on boxes; what an anchor learns is decided anew at every step.

    Args:
        assignment: `adaptive`: see `detectors.assigners.adaptive`, on the detector's own predictions; a positive anchor
            counts as much in the box loss as its box overlaps already. `max_iou`: RetinaNet's, by the anchors alone,
            positive from an overlap of 0.5 and negative below 0.4; all positive anchors count 1.
        fam3d: see `detectors.fam3d`.
        overlap_weight: of the overlap in the cost of `adaptive`.
        strides: of the levels, in pixels.
        convolutions: of each tower.
        groups: of its normalisation.
        others: see `OneStage`.
    """

    def __init__(
        self,
        *,
        assignment: Assignment,
        fam3d: bool,
        overlap_weight: float,
        backbone: Pyramid | SimplePyramid,
        anchors: Anchors,
        strides: Sequence[int],
        convolutions: int = 4,
        groups: int = _GROUPS,
        **others: Any,
    ) -> None:
        super().__init__(backbone=backbone, anchors=anchors, nms_iou=_NMS_IOU, **others)
        self.assignment = assignment
        self.overlap_weight = overlap_weight
        self.strides = tuple(strides)
        sides = [float(base[0, 2] - base[0, 0]) for base in anchors.bases]
        self.head = TowerHead(
            backbone.out_channels,
            self.num_classes,
            sides=[side / stride for side, stride in zip(sides, strides, strict=True)],
            strides=strides,
            convolutions=convolutions,
            groups=groups,
            fam3d=fam3d,
        )

    def heads(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, A, C), and boxes (B, A, 4) from the anchor's centre, in its sides; no centerness."""
        logits, boxes = self.head(features)
        return _in_rows(logits), _in_rows(boxes), None

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """What `heads` says of boxes, in pixels."""
        center = (anchors[..., :2] + anchors[..., 2:]) / 2
        side = anchors[..., 2:] - anchors[..., :2]
        return torch.cat([center, center], -1) + deltas * torch.cat([side, side], -1)

    def losses(self, features: list[Tensor], view: View, targets: PaddedTargets, keys: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - nothing is drawn
        """`class` and `box`, both divided by the sum of the weights of positive anchors in the batch (at least 1)."""
        output = self.output(features, view)
        boxes = self.decode(output.deltas, output.anchors)
        matches, weights = self.assign(output, boxes, view, targets)
        count = weights.sum().clamp(min=1)
        labels = gather_rows(targets.labels, matches.target)
        classes = one_hot(labels, matches.positive, self.num_classes)
        learns = matches.positive | matches.negative
        wanted = torch.where(matches.positive[..., None], gather_rows(targets.boxes, matches.target), output.anchors)
        return {
            "class": (focal_loss(output, classes) * learns).sum() / count,
            "box": _BOX_WEIGHT * (losses.giou_loss(boxes, wanted) * weights).sum() / count,
        }

    @torch.no_grad()
    def assign(
        self, output: DenseOutput, boxes: Tensor, view: View, targets: PaddedTargets
    ) -> tuple[AnchorMatches, Tensor]:
        """What each anchor learns, and how much it counts as a positive one.

        Anchors beyond an image's own size, padded to multiples of 32, learn nothing (mmdetection's valid_flags).

        Args:
            output: of the heads.
            boxes: (B, A, 4) that it means.
            view: the images.
            targets: what lies in them.
        """
        within = CANDIDATES["padded"]
        assert within is not None
        usable = within(output.anchors, view.sizes)
        if self.assignment == "adaptive":
            sizes = zip(self.strides, output.level_sizes, strict=True)
            strides = torch.cat([boxes.new_full((size,), stride) for stride, size in sizes])
            return adaptive(
                output.logits,
                boxes,
                output.anchors,
                strides,
                targets,
                usable,
                overlap_weight=self.overlap_weight,
            )
        matches = match_anchors(output.anchors, targets, 0.5, 0.4, low_quality=True, usable=usable)
        return matches, matches.positive.float()


def _in_rows(levels: list[Tensor]) -> Tensor:
    """Maps (B, K, h, w) of all levels as (B, A, K)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)


def consistent_retina(
    *,
    num_classes: int,
    name: str,
    cache_dir: str | Path,
    backbone: TimmName | None = None,
    depth: Depth = 50,
    weights: File = "torchvision",
    norm: Norm | None = None,
    frozen_stages: Stages | None = None,
    caffe: bool | None = None,
    pyramid_channels: Channels = 256,
    anchor_sizes: Annotated[Sequence[Pixels], Limits(least=1)] = (64, 128, 256, 512, 1024),
    assignment: Assignment = "adaptive",
    fam3d: bool = True,
    overlap_weight: NotNegative = 2.0,
) -> ConsistentRetina:
    """Consistent-Teacher's detector on ResNet-FPN, levels at strides 8 to 128.

    Args:
        num_classes, name: see `Detector`.
        backbone: `timm:NAME` in place of the ResNet of this `depth`; see `timm_pyramid` for its weights.
        cache_dir, depth, weights, norm, frozen_stages, caffe: see `build_resnet`; scale and shift of a pre-trained
            network's BatchNorm are trained.
        pyramid_channels: of every pyramid level.
        anchor_sizes: sides of the levels' square anchors, in pixels.
        assignment, fam3d, overlap_weight: see `ConsistentRetina`.

    Raises:
        UserError: see `build_resnet`; not five sizes, or channels that do not fall into groups.
    """
    _check_sizes(anchor_sizes, len(STRIDES))
    check_groups(pyramid_channels, _GROUPS)
    pyramid, normalize, pretraining = large_pyramid(
        backbone,
        depth=depth,
        weights=weights,
        norm=norm,
        usual_norm="frozen_statistics",
        frozen_stages=frozen_stages,
        caffe=caffe,
        cache_dir=cache_dir,
        channels=pyramid_channels,
        first=1,
        extra=lambda: LastLevelP6P7(pyramid_channels, pyramid_channels),
    )
    return ConsistentRetina(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=_anchors(anchor_sizes, STRIDES),
        strides=STRIDES,
        assignment=assignment,
        fam3d=fam3d,
        overlap_weight=overlap_weight,
        normalize=normalize,
        pretraining=pretraining,
    )


def small_consistent_retina(
    *,
    num_classes: int,
    name: str,
    cache_dir: str | Path,
    weights: File = "generated",
    generated: Generated | None = None,
    backbone: TimmName | None = None,
    norm: Norm | None = None,
    frozen_stages: Stages | None = None,
    channels: Annotated[Sequence[Channels], Limits(least=4, most=4)] = (24, 32, 64, 96),
    pyramid_channels: Channels = 48,
    anchor_sizes: Annotated[Sequence[Pixels], Limits(least=1)] = (12, 18, 28),
    convolutions: Annotated[int, Limits(ge=1, le=8)] = 2,
    assignment: Assignment = "adaptive",
    fam3d: bool = True,
    overlap_weight: NotNegative = 2.0,
) -> ConsistentRetina:
    """Consistent-Teacher's detector for the CPU preset's pictures, levels at strides 4 to 16.

    Args:
        anchor_sizes: sides of the levels' square anchors, in pixels.
        convolutions: of each tower.
        assignment, fam3d, overlap_weight: see `ConsistentRetina`.
        others: see `detectors.faster_rcnn.small_faster_rcnn`.

    Raises:
        UserError: a file is missing or does not fit, not three sizes, or channels that do not fall into groups.
    """
    strides = SmallBackbone.strides
    _check_sizes(anchor_sizes, len(strides))
    check_groups(pyramid_channels, _SMALL_GROUPS)
    pyramid, normalize, pretraining = small_pyramid(
        backbone,
        weights=weights,
        generated=generated,
        norm=norm,
        frozen_stages=frozen_stages,
        cache_dir=cache_dir,
        widths=channels,
        channels=pyramid_channels,
    )
    return ConsistentRetina(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=_anchors(anchor_sizes, strides),
        strides=strides,
        assignment=assignment,
        fam3d=fam3d,
        overlap_weight=overlap_weight,
        convolutions=convolutions,
        groups=_SMALL_GROUPS,
        normalize=normalize,
        pretraining=pretraining,
        candidates=150,
        detections=50,
    )


def _anchors(sizes: Sequence[float], strides: Sequence[int]) -> Anchors:
    return Anchors([[float(size)] for size in sizes], (1.0,), rounded=False, strides=strides)


def _check_sizes(sizes: Sequence[float], levels: int) -> None:
    """Raises UserError for another number of anchors than of levels."""
    if len(sizes) != levels:
        raise UserError(f"detector.anchor_sizes={list(sizes)} must be {levels} numbers, one per pyramid level")
