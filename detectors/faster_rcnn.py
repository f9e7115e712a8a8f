"""Faster R-CNN on a feature pyramid, with its stages open to methods that use them one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detectors.backbones import Depth, Norm, Pyramid, ResNetBackbone, SmallBackbone, Stages
from detectors.detector import Detector
from detectors.large_pyramid import large_pyramid
from detectors.padded import PaddedTargets
from detectors.roi import RoiSettings, RoiStage
from detectors.rpn import Anchors, Proposals, Rpn, RpnSettings
from detectors.simple_pyramid import SimplePyramid
from detectors.small_pyramid import small_pyramid
from detectors.timm_networks import TimmName
from detectors.weights import Generated
from harness.core.types import Normalize, UserError, View
from harness.core.validate import Channels, File, Limits, Pixels, Positive, keys_of

# Where the codebases differ. Methods are compared on equal detectors, so the style is the detector's, not the method's.
# `norm`: of a pre-trained ResNet.
STYLES: dict[str, dict[str, Any]] = {
    "torchvision": {"norm": "frozen", "rpn": {}, "roi": {}},
    "detectron": {  # detectron2 as Unbiased Teacher configures it
        "norm": "frozen",
        "rpn": {"beta": 0.0, "fixed_normalizer": True, "positive_fraction": 0.25, "train_proposals": (2000, 1000)},
        "roi": {"beta": 0.0, "aligned": True, "sampling_ratio": 0},
    },
    "mmdetection": {  # mmdetection 2.16 as Soft Teacher configures it
        "norm": "frozen",
        "rpn": {"beta": 0.0, "train_proposals": (2000, 1000), "low_quality_iou": 0.3, "candidates": "padded"},
        "roi": {"beta": 0.0, "aligned": True, "sampling_ratio": 0},
    },
    "tensorpack": {  # as STAC configures it
        "norm": "frozen_statistics",
        "rpn": {
            "fixed_normalizer": True,
            "train_proposals": (2000, 2000),
            "low_quality_iou": 0.3,
            "low_quality_of": "anchor",
            "candidates": "inside",
        },
        "roi": {"beta": 0.0, "aligned": True, "sampling_ratio": 2, "batch": 64},
    },
}


class FasterRcnn(Detector):
    """Backbone and pyramid, RPN, RoI stage.

    Args:
        num_classes: C, without background.
        name: for records.
        backbone: images to features.
        strides: of the feature maps; a further, coarser map is for the RPN alone.
        anchors: of each cell of each map.
        rpn: numbers of the first stage.
        roi: numbers of the second stage.
        normal_init: heads start from normal weights, as detectron's, instead of torch's default for linear layers.
        normalize, pretraining: see `Detector`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        name: str,
        backbone: Pyramid | SimplePyramid,
        anchors: Anchors,
        rpn: RpnSettings,
        roi: RoiSettings,
        normal_init: bool,
        normalize: Normalize,
        pretraining: str,
    ) -> None:
        super().__init__(num_classes=num_classes, name=name, normalize=normalize, pretraining=pretraining)
        self.backbone = backbone
        self.rpn = Rpn(backbone.out_channels, anchors, rpn)
        self.roi = RoiStage(backbone.out_channels, list(backbone.strides), num_classes, roi)
        if normal_init:
            self._normal_init()

    def _normal_init(self) -> None:
        """detectron's first weights of the second stage."""
        for layer in self.roi.head.layers:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for predictor, std in ((self.roi.head.classes, 0.01), (self.roi.head.boxes, 0.001)):
            nn.init.normal_(predictor.weight, std=std)
            nn.init.zeros_(predictor.bias)

    def losses(
        self,
        features: list[Tensor],
        view: View,
        targets: PaddedTargets,
        keys: Tensor,
        *,
        boxes: bool = True,
        focal_gamma: float = 0.0,
    ) -> dict[str, Tensor]:
        """`rpn_class`, `rpn_box`, `roi_class`, `roi_box`.

        Args:
            features, view, targets, keys: see `Detector.losses`.
            boxes: False leaves both box losses out: they are not computed.
            focal_gamma: of the RoI classification, see `losses.cross_entropy`.
        """
        output = self.rpn(features, view.images.shape[-2:])
        result = self.rpn.losses(output, targets, view.sizes, keys, boxes)
        proposals = self.rpn.proposals(output, view.sizes, training=True)
        rois, count = self.roi.sample(proposals, targets, keys)
        logits, deltas = self.roi(features, rois.boxes, rois.images)
        result["roi_class"] = self.roi.class_loss(logits, rois, focal_gamma)
        if boxes:
            result["roi_box"] = self.roi.box_loss(deltas, rois, count)
        return result

    def find(
        self, features: list[Tensor], view: View, score_threshold: float, training_proposals: bool = False
    ) -> PaddedTargets:
        """Detections; `training_proposals` takes the number of proposals that training has, as teachers do."""
        output = self.rpn(features, view.images.shape[-2:])
        proposals = self.rpn.proposals(output, view.sizes, training_proposals)
        return self.detections(features, view, proposals, score_threshold)

    def detections(
        self, features: list[Tensor], view: View, proposals: Proposals, score_threshold: float
    ) -> PaddedTargets:
        """The second stage on all proposals."""
        batch, count = proposals.valid.shape
        images = torch.arange(batch, device=proposals.boxes.device).repeat_interleave(count, output_size=batch * count)
        logits, deltas = self.roi(features, proposals.boxes.view(-1, 4), images)
        return self.roi.detections(logits, deltas, proposals, view.sizes, score_threshold)


Style = Annotated[str, Limits(one_of=tuple(STYLES))]


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise UserError(f"detector.style={style} is unknown: choose one of {', '.join(STYLES)}")


def _anchors(style: str, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[int]) -> Anchors:
    """One size per level; whole pixels, at distances that depend on the image, in torchvision's style alone."""
    like_torchvision = style == "torchvision"
    levels = [[float(size)] for size in sizes]
    return Anchors(levels, ratios, rounded=like_torchvision, strides=None if like_torchvision else strides)


def _settings(kind: type, style: str, part: str, given: Mapping[str, Any] | None) -> Any:
    """A settings dataclass: its defaults, then the style's numbers, then those that the user gave."""
    chosen = {key: value for key, value in (given or {}).items() if value is not None}
    known = [f.name for f in fields(kind)]
    for key in chosen:
        if key not in known:
            raise UserError(f"detector.{part}.{key} is unknown: choose one of {', '.join(known)}")
    merged = {**STYLES[style][part], **chosen}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()})


def small_faster_rcnn(
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
    anchor_ratios: Annotated[Sequence[Positive], Limits(least=1)] = (1.0,),
    style: Style = "torchvision",
    rpn: Annotated[Mapping[str, Any], keys_of(RpnSettings, partial=True)] | None = None,
    roi: Annotated[Mapping[str, Any], keys_of(RoiSettings, partial=True)] | None = None,
) -> FasterRcnn:
    """The CPU preset's detector: half a million parameters, trainable BatchNorm everywhere.

    Args:
        num_classes, name: see `Detector`.
        cache_dir: where generated first weights lie, and for timm's downloads.
        weights: `generated`, `scratch`, the path of a file with the backbone's state, or `later` for those of a whole
            detector, which will replace them.
        generated: the weights that `generated` means.
        backbone: `timm:NAME` in place of the small one; `weights` are then those of `timm_pyramid`.
        norm, frozen_stages: of that network, see `timm_pyramid`; None: its BatchNorm is `batch`.
        channels: of the small backbone.
        pyramid_channels: of every pyramid level.
        anchor_sizes: one for each of the three levels, in pixels.
        anchor_ratios: height / width.
        style: key of `STYLES`.
        rpn, roi: numbers that differ from the style's.

    Raises:
        UserError: a file is missing or does not fit, or a key is unknown.
    """
    _check_style(style)
    if len(anchor_sizes) != 3:
        raise UserError(f"detector.anchor_sizes={list(anchor_sizes)} must be three numbers, one per pyramid level")
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
    return FasterRcnn(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=_anchors(style, anchor_sizes, anchor_ratios, SmallBackbone.strides),
        rpn=_settings(RpnSettings, style, "rpn", rpn),
        roi=_settings(RoiSettings, style, "roi", roi),
        normal_init=style != "torchvision",
        normalize=normalize,
        pretraining=pretraining,
    )


def faster_rcnn(
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
    anchor_sizes: Annotated[Sequence[Pixels], Limits(least=1)] = (32, 64, 128, 256, 512),
    anchor_ratios: Annotated[Sequence[Positive], Limits(least=1)] = (0.5, 1.0, 2.0),
    style: Style = "torchvision",
    rpn: Annotated[Mapping[str, Any], keys_of(RpnSettings, partial=True)] | None = None,
    roi: Annotated[Mapping[str, Any], keys_of(RoiSettings, partial=True)] | None = None,
) -> FasterRcnn:
    """Faster R-CNN on ResNet-FPN, the detector of the papers, or on one of timm's networks.

    Args:
        num_classes, name: see `Detector`.
        backbone: `timm:NAME` in place of the ResNet of this `depth`; see `timm_pyramid` for its weights.
        cache_dir, depth, weights, frozen_stages, caffe: see `build_resnet`.
        norm: see `build_resnet`; None: group from scratch, the style's otherwise.
        pyramid_channels: of every pyramid level.
        anchor_sizes: one for each of the five levels, in pixels.
        anchor_ratios: height / width.
        style: key of `STYLES`: candidate anchors and their matching, box losses, normalisers, proposal counts,
            RoIAlign, normalisation of the backbone, first weights of the heads.
        rpn, roi: numbers that differ from the style's.

    Raises:
        UserError: see `build_resnet`; an unknown key.
    """
    _check_style(style)
    if len(anchor_sizes) != 5:
        raise UserError(f"detector.anchor_sizes={list(anchor_sizes)} must be five numbers, one per pyramid level")
    pyramid, normalize, pretraining = large_pyramid(
        backbone,
        depth=depth,
        weights=weights,
        norm=norm,
        usual_norm=STYLES[style]["norm"],
        frozen_stages=frozen_stages,
        caffe=caffe,
        cache_dir=cache_dir,
        channels=pyramid_channels,
        first=0,
        extra=LastLevelMaxPool,
    )
    return FasterRcnn(
        num_classes=num_classes,
        name=name,
        backbone=pyramid,
        anchors=_anchors(style, anchor_sizes, anchor_ratios, (*ResNetBackbone.strides, 64)),
        rpn=_settings(RpnSettings, style, "rpn", rpn),
        roi=_settings(RoiSettings, style, "roi", roi),
        normal_init=style != "torchvision",
        normalize=normalize,
        pretraining=pretraining,
    )
