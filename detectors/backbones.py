"""Feature extractors: NCHW images to a list of feature maps, finest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import torchvision.models.resnet as resnet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detectors.weights import CAFFE, RGB, first_weights, load_backbone
from harness.core.types import Normalize, UserError
from harness.core.validate import Limits

_GROUPS = 32  # of GroupNorm


def _downsampling_block(channels_in: int, channels_out: int) -> BasicBlock:
    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm2d(channels_out)
    )
    return BasicBlock(channels_in, channels_out, stride=2, downsample=shortcut)


class Body(nn.Module):
    """What a pyramid stands on: images (B, 3, H, W) to feature maps, finest first."""

    strides: Sequence[int]  # of the maps, px
    out_channels: list[int]  # of the maps


class SmallBackbone(Body):
    """A backbone for pictures of 64 to 128 px: a stem and three residual blocks, each of them halving the resolution.

    Args:
        channels: of the stem and the three blocks.
    """

    strides = (4, 8, 16)

    def __init__(self, channels: tuple[int, int, int, int] = (24, 32, 64, 96)) -> None:
        super().__init__()
        stem, first, second, third = channels
        self.out_channels = [first, second, third]
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
        self.l1 = _downsampling_block(stem, first)
        self.l2 = _downsampling_block(first, second)
        self.l3 = _downsampling_block(second, third)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to [c1, c2, c3] at strides 4, 8 and 16."""
        c1 = self.l1(self.stem(images))
        c2 = self.l2(c1)
        return [c1, c2, self.l3(c2)]


class FrozenStatistics(nn.Module):
    """BatchNorm whose statistics are constants, and whose scale and shift are trained without weight decay.

    That is how STAC's backbone is trained (tensorpack's `FreezeBN`). Parameters and buffers have BatchNorm's names.

    Args:
        channels: of the maps (B, channels, h, w).
    """

    no_weight_decay = True  # see `harness.engine.optim`

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation that trains from scratch with few images at a time."""
    return nn.GroupNorm(_GROUPS, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "frozen_statistics": FrozenStatistics,
    "batch": nn.BatchNorm2d,
    "group": group_norm,
}
# What a configuration may say.
Depth = Literal[18, 50, 101]
Norm = Annotated[str, Limits(one_of=tuple(NORMS))]
Stages = Annotated[int, Limits(ge=0, le=5)]  # frozen ones, the stem counted


class ResNetBackbone(Body):
    """torchvision's ResNet without its classifier; parameter names are torchvision's.

    Args:
        depth: 18, 50 or 101.
        norm: key of `NORMS`.
        frozen_stages: 0 trains everything; 1 freezes the stem, 2 the stem and layer1 (all papers), ...
        stride_in_1x1: where a bottleneck halves the resolution: in its first convolution as in the original (caffe)
            network, or in its 3x3 convolution as in torchvision.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, depth: int, norm: str, frozen_stages: int, stride_in_1x1: bool = False) -> None:
        super().__init__()
        network = getattr(resnet, f"resnet{depth}")(weights=None, norm_layer=NORMS[norm])
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (getattr(network, f"layer{i}") for i in range(1, 5))
        expansion = 1 if depth < 50 else 4
        self.out_channels = [width * expansion for width in (64, 128, 256, 512)]
        if stride_in_1x1:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        self.frozen_stages = frozen_stages
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    def _frozen(self) -> list[nn.Module]:
        parts = [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]
        return [module for part in parts[: self.frozen_stages] for module in part]

    def train(self, mode: bool = True) -> ResNetBackbone:
        """Sets the mode of what is trained; BatchNorm of frozen stages keeps its statistics in either."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to [c2, c3, c4, c5] at strides 4, 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        levels = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            levels.append(x)
        return levels


class Pyramid(nn.Module):
    """A backbone with torchvision's feature pyramid on top.

    Args:
        body: the backbone.
        channels: of every level.
        first: index of the first backbone level to use.
        norm: normalisation after the pyramid's convolutions, or None.
        extra: block that adds coarser levels, or None.
    """

    def __init__(
        self,
        body: Body,
        channels: int,
        first: int = 0,
        norm: Callable[[int], nn.Module] | None = None,
        extra: ExtraFPNBlock | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.first = first
        self.out_channels = channels
        self.strides: Sequence[int] = body.strides[first:]
        self.fpn = FeaturePyramidNetwork(body.out_channels[first:], channels, extra, norm)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to feature maps, finest first."""
        levels = self.body(images)[self.first :]
        return list(self.fpn(OrderedDict((str(i), level) for i, level in enumerate(levels))).values())


def pyramid_norm(weights: str, norm: str | None, channels: int) -> Callable[[int], nn.Module] | None:
    """Normalisation of a ResNet's pyramid: GroupNorm where everything is trained from scratch, else none.

    Raises:
        UserError: the channels do not fall into groups.
    """
    if weights != "scratch" or norm not in (None, "group"):
        return None
    if channels % _GROUPS:
        raise UserError(
            f"detector.pyramid_channels={channels} must be a multiple of {_GROUPS} with detector.weights=scratch, "
            "whose GroupNorm has so many groups"
        )
    return group_norm


def build_resnet(
    depth: int, weights: str, norm: str | None, frozen_stages: int | None, caffe: bool | None, cache_dir: str | Path
) -> tuple[ResNetBackbone, Normalize, str]:
    """A ResNet with its first weights, what it wants of pixels, and where the weights come from.

    Args:
        depth: 18, 50 or 101.
        weights: `torchvision`, `scratch`, `later`, or the path of a file; see `first_weights`.
        norm: `frozen`, `frozen_statistics`, `batch` or `group`; None: group from scratch, frozen otherwise.
        frozen_stages: None: 2 (stem and layer1), but 0 from scratch.
        caffe: see `first_weights`.
        cache_dir: for downloads.

    Raises:
        UserError: an impossible combination, or weights that cannot be had.
    """
    if depth not in (18, 50, 101):
        raise UserError(f"detector.depth={depth} is unknown: choose 18, 50 or 101")
    if norm is not None and norm not in NORMS:
        raise UserError(f"detector.norm={norm} is unknown: choose one of {', '.join(NORMS)}")
    scratch = weights == "scratch"
    if scratch and norm in ("frozen", "frozen_statistics"):
        raise UserError(
            f"detector.norm={norm} needs pre-trained weights: take detector.norm=group with weights=scratch"
        )
    if not scratch and norm == "group":
        raise UserError(f"detector.norm=group does not fit detector.weights={weights}: those weights have BatchNorm")
    if scratch and frozen_stages:
        raise UserError("detector.frozen_stages must be 0 with detector.weights=scratch: nothing is learnt there yet")
    first = first_weights(depth, weights, caffe, Path(cache_dir))
    norm = norm or ("group" if scratch else "frozen")
    frozen = (0 if scratch else 2) if frozen_stages is None else frozen_stages
    body = ResNetBackbone(depth, norm, frozen, stride_in_1x1=first.caffe)
    if first.state is not None:
        load_backbone(body, first.state, weights)
    return body, CAFFE if first.caffe else RGB, first.words
