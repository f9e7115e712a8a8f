"""The pyramid of the small detectors: strides 4, 8 and 16, on a backbone of our own or on one of timm's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from detectors.backbones import Pyramid, SmallBackbone
from detectors.simple_pyramid import SimplePyramid
from detectors.timm_backbones import timm_pyramid
from detectors.weights import LATER, Generated, load_backbone
from harness.core.types import Normalize, UserError

_NORMALIZE = Normalize(mean=(120.0, 120.0, 120.0), std=(60.0, 60.0, 60.0))


def small_pyramid(
    backbone: str | None,
    *,
    weights: str,
    generated: Generated | None,
    norm: str | None,
    frozen_stages: int | None,
    cache_dir: str | Path,
    widths: Sequence[int],
    channels: int,
) -> tuple[Pyramid | SimplePyramid, Normalize, str]:
    """A pyramid with its first weights, what it wants of pixels, and where the weights come from.

    Args:
        backbone: `timm:NAME` in place of the small one.
        weights: `generated`, `scratch`, `later`, the path of a file, or those of `timm_pyramid`.
        generated: the weights that `generated` means.
        norm, frozen_stages: of timm's network; None: its BatchNorm is `batch`.
        cache_dir: for timm's downloads.
        widths: of the small backbone's stem and blocks.
        channels: of every level.

    Raises:
        UserError: a file is missing or does not fit, or a key is for timm's networks alone.
    """
    if backbone is not None:
        return timm_pyramid(
            backbone,
            weights=weights,
            norm=norm,
            usual_norm="batch",
            frozen_stages=frozen_stages,
            cache_dir=cache_dir,
            strides=SmallBackbone.strides,
            channels=channels,
            after=nn.BatchNorm2d,
        )
    if norm is not None or frozen_stages is not None:
        raise UserError(
            "detector.norm and detector.frozen_stages are those of detector.backbone=timm:NAME: give it too"
        )
    body, pretraining = _small_backbone(widths, weights, generated)
    return Pyramid(body, channels, norm=nn.BatchNorm2d), _NORMALIZE, pretraining


def _small_backbone(channels: Sequence[int], weights: str, generated: Generated | None) -> tuple[SmallBackbone, str]:
    """The small backbone with its first weights, and where they come from."""
    width = tuple(int(c) for c in channels)
    if len(width) != 4:
        raise UserError(f"detector.channels={list(channels)} must be four numbers")
    body = SmallBackbone((width[0], width[1], width[2], width[3]))
    if weights == "generated":
        assert generated is not None, "whoever builds the detector makes these weights"
        body.load_state_dict(generated.state)
        pretraining = generated.origin
    elif weights == "later":
        pretraining = LATER
    elif weights == "scratch":
        pretraining = "small backbone from scratch, nothing pre-trained"
    else:
        path = Path(weights)
        if not path.is_file():
            raise UserError(f"detector.weights={weights} is no file: give generated, scratch, or the path of a file")
        load_backbone(body, torch.load(path, map_location="cpu", weights_only=True), weights)
        pretraining = f"small backbone from the file {path.name}"
    return body, pretraining
