"""The pyramid of a vision transformer, which has one map alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detectors.backbones import Body


class SimplePyramid(nn.Module):
    """ViTDet's pyramid: every level is made of a transformer's last map alone (Li et al., 2022, section 3).

    Args:
        body: the transformer.
        channels: of every level.
        strides: of the levels that are made of it.
        extra: block that adds coarser levels, or None.
    """

    def __init__(self, body: Body, channels: int, strides: Sequence[int], extra: ExtraFPNBlock | None) -> None:
        super().__init__()
        self.body, self.extra = body, extra
        self.out_channels, self.strides = channels, tuple(strides)
        (given,), (width,) = body.strides, body.out_channels
        self.scaled = nn.ModuleList(_rescale(width, given, stride) for stride in strides)
        widths = [width * min(stride, given) // given for stride in strides]
        self.outputs = nn.ModuleList(_output(own, channels) for own in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to feature maps, finest first."""
        height, width = images.shape[-2:]
        (last,) = self.body(images)
        levels = []
        for stride, scale, output in zip(self.strides, self.scaled, self.outputs, strict=True):
            level: Tensor = output(scale(last))
            levels.append(level[..., : math.ceil(height / stride), : math.ceil(width / stride)])
        if self.extra is not None:
            levels, _ = self.extra(levels, levels, [str(stride) for stride in self.strides])
        return levels


def _rescale(width: int, given: int, wanted: int) -> nn.Module:
    """A map at stride `given` to stride `wanted`; each doubling of the resolution halves the channels."""
    if wanted > given:
        return nn.MaxPool2d(wanted // given, ceil_mode=True)
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(given // wanted))):
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    return nn.Sequential(*layers)


def _output(width: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, channels, 1, bias=False),
        LayerNorm2d(channels, eps=1e-6),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels, eps=1e-6),
    )
