"""The pyramid of the large detectors, on a ResNet or on one of timm's networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detectors.backbones import Pyramid, ResNetBackbone, build_resnet, pyramid_norm
from detectors.simple_pyramid import SimplePyramid
from detectors.timm_backbones import timm_pyramid
from harness.core.types import Normalize, UserError


def large_pyramid(
    backbone: str | None,
    *,
    depth: int,
    weights: str,
    norm: str | None,
    usual_norm: str,
    frozen_stages: int | None,
    caffe: bool | None,
    cache_dir: str | Path,
    channels: int,
    first: int,
    extra: Callable[[], ExtraFPNBlock],
) -> tuple[Pyramid | SimplePyramid, Normalize, str]:
    """The pyramid of a large detector, on a ResNet or on one of timm's networks; what it wants of pixels, and where its
    weights come from.

    Args:
        backbone: `timm:NAME`, or None for the ResNet of this `depth`.
        depth, weights, frozen_stages, caffe, cache_dir: see `build_resnet` and `timm_pyramid`.
        norm: None: group from scratch (of timm's networks: their own), `usual_norm` otherwise.
        usual_norm: of pre-trained networks.
        channels: of every level.
        first: index of the first level of strides 4, 8, 16 and 32 to use.
        extra: makes the block that adds coarser levels; after the backbone, as first weights are drawn in order.

    Raises:
        UserError: see `build_resnet` and `timm_pyramid`.
    """
    after = pyramid_norm(weights, norm, channels)
    if backbone is None:
        if norm is None and weights != "scratch":
            norm = usual_norm
        body, normalize, words = build_resnet(depth, weights, norm, frozen_stages, caffe, cache_dir)
        return Pyramid(body, channels, first, after, extra()), normalize, words
    if caffe:
        raise UserError("detector.caffe=true is of ResNets: leave it null with detector.backbone=timm:NAME")
    return timm_pyramid(
        backbone,
        weights=weights,
        norm=norm,
        usual_norm=usual_norm,
        frozen_stages=frozen_stages,
        cache_dir=cache_dir,
        strides=ResNetBackbone.strides[first:],
        channels=channels,
        after=after,
        extra=extra,
    )
