"""FAM-3D, the feature alignment of Consistent-Teacher: boxes are taken from where, and from the level on which, the
network says they are regressed best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FIRST_DEVIATION = 0.001  # of the first weights: at the start boxes are hardly moved


class Fam3d(nn.Module):
    """Two steps on maps of boxes: a share of the next finer or coarser level, then each coordinate from another place.

    Wang et al., "Consistent-Teacher: Towards reducing inconsistent pseudo-targets in semi-supervised object
    detection", CVPR 2023; the official code's `FAM3DHead`.

    Args:
        channels: of the maps it looks at.
        hidden: channels that it reduces them to.
        strides: of the levels, finest first.
    """

    def __init__(self, channels: int, hidden: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.levels = nn.Conv2d(3 * hidden, 4, 3, padding=1)
        self.places = nn.Conv2d(3 * hidden, 8, 3, padding=1)
        for layer in (self.reduce, self.levels, self.places):
            nn.init.normal_(layer.weight, std=_FIRST_DEVIATION)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
        """Moved boxes.

        Args:
            maps: what each level looks at, (B, channels, h, w), finest first.
            boxes: of each cell of each level, (B, 4, h, w) xyxy from the corner of the image, in strides of the level.
        """
        reduced = [self.reduce(level).relu() for level in maps]
        moved = []
        for level, box in enumerate(boxes):
            seen = torch.cat([_resized(reduced[other], box) for other in _around(level, len(boxes))], 1)
            mixed = self._from_levels(self.levels(seen).float(), boxes, level)
            moved.append(sampled_at(mixed, self.places(seen).float()))
        return moved

    def _from_levels(self, weights: Tensor, boxes: list[Tensor], level: int) -> Tensor:
        """Boxes of a level mixed with those of its neighbours, as these were: 1 is the coarser one's, -1 the finer
        one's."""
        finest, coarsest = level == 0, level == len(boxes) - 1
        weights = weights.clamp(0.0 if finest else -1.0, 0.0 if coarsest else 1.0)
        mixed = (1 - weights.abs()) * boxes[level]
        for other, share in ((level + 1, weights.clamp(min=0)), (level - 1, (-weights).clamp(min=0))):
            if 0 <= other < len(boxes):
                ratio = self.strides[other] / self.strides[level]
                mixed = mixed + share * _resized(boxes[other], boxes[level]) * ratio
        return mixed


def _around(level: int, count: int) -> tuple[int, int, int]:
    """The next finer level, the level, the next coarser one; itself where there is none."""
    return max(level - 1, 0), level, min(level + 1, count - 1)


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps at the size of others."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


def sampled_at(maps: Tensor, offsets: Tensor) -> Tensor:
    """Each of K maps, bilinearly, at its own offset from every cell; 0 outside, as in a deformable convolution.

    Args:
        maps: (B, K, h, w).
        offsets: (B, 2 K, h, w) in cells: dy and dx of the first map, then those of the second, ...
    """
    batch, count, height, width = maps.shape
    y = torch.arange(height, device=maps.device)[:, None] + offsets[:, 0::2]
    x = torch.arange(width, device=maps.device) + offsets[:, 1::2]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    found = F.grid_sample(
        maps.reshape(batch * count, 1, height, width),
        grid.reshape(batch * count, height, width, 2),
        align_corners=False,
    )
    return found.view(batch, count, height, width)
