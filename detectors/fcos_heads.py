"""The two heads of FCOS (Tian et al., 2019): towers that can be looked at, and what predicts from them.

Names and first weights of the parts are torchvision's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PRIOR = 0.01  # probability of every class at the start


def _tower(width: int, convolutions: int, groups: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(convolutions):
        parts += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.ReLU()]
    return nn.Sequential(*parts)


def _start_small(part: nn.Module) -> None:
    for layer in part.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def _by_cell(maps: Tensor) -> Tensor:
    """(B, K, h, w) to (B, h * w, K)."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


class ClassHead(nn.Module):
    """A tower, and the class logits.

    Args:
        width: channels of the features and of the tower.
        classes: C.
        convolutions: of the tower.
        groups: of its normalisation.
    """

    def __init__(self, width: int, classes: int, convolutions: int, groups: int) -> None:
        super().__init__()
        self.conv = _tower(width, convolutions, groups)
        _start_small(self.conv)
        self.cls_logits = nn.Conv2d(width, classes, 3, padding=1)
        _start_small(self.cls_logits)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]

    def towers(self, features: list[Tensor]) -> list[Tensor]:
        """What the tower makes of every level: (B, width, h, w) each."""
        return [self.conv(level) for level in features]

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, A, C)."""
        return torch.cat([_by_cell(self.cls_logits(level)) for level in self.towers(features)], 1)


class DistanceHead(nn.Module):
    """A tower, and from it the four distances and the quality of every cell.

    Args:
        width, convolutions, groups: see `ClassHead`.
        levels: of the pyramid.
        scales: the distances of each level are multiplied with a factor that is learnt.
    """

    def __init__(self, width: int, convolutions: int, groups: int, levels: int, scales: bool) -> None:
        super().__init__()
        self.conv = _tower(width, convolutions, groups)
        self.bbox_reg = nn.Conv2d(width, 4, 3, padding=1)
        self.bbox_ctrness = nn.Conv2d(width, 1, 3, padding=1)  # whichever quality it is trained to tell
        self.scales = nn.Parameter(torch.ones(levels)) if scales else None
        for part in (self.bbox_reg, self.bbox_ctrness, self.conv):
            _start_small(part)

    def towers(self, features: list[Tensor]) -> list[Tensor]:
        """What the tower makes of every level: (B, width, h, w) each."""
        return [self.conv(level) for level in features]

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Distances (B, A, 4) in strides, none of them negative, and quality logits (B, A)."""
        towers = self.towers(features)
        distances = [_by_cell(F.relu(self._scaled(self.bbox_reg(level), i))) for i, level in enumerate(towers)]
        quality = [_by_cell(self.bbox_ctrness(level)) for level in towers]
        return torch.cat(distances, 1), torch.cat(quality, 1)[..., 0]

    def _scaled(self, distances: Tensor, level: int) -> Tensor:
        return distances if self.scales is None else distances * self.scales[level]
