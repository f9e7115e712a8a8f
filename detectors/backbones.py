"""Feature extractors: NCHW images to a list of feature maps, finest first."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


def _downsampling_block(channels_in: int, channels_out: int) -> BasicBlock:
    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm2d(channels_out)
    )
    return BasicBlock(channels_in, channels_out, stride=2, downsample=shortcut)


class SmallBackbone(nn.Module):
    """A backbone for pictures of 64 to 128 px: a stem and three residual blocks, each of them halving the resolution.

    Args:
        channels: of the stem and the three blocks.
    """

    def __init__(self, channels: tuple[int, int, int, int] = (24, 32, 64, 96)) -> None:
        super().__init__()
        stem, first, second, third = channels
        self.out_channels = (first, second, third)
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
