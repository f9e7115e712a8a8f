"""Score thresholds that follow from the labelled images: of each class as many boxes are to pass as there should be.

Adaptive label-distribution-aware confidence thresholds (ACT) of Chen et al., "Label matching semi-supervised object
detection", CVPR 2022, in the online form of its official code (hikvision-research/SSOD at 13c43fc).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from detectors.padded import PaddedTargets
from harness.core.validate import Limits, Positive, Share


@dataclass(frozen=True)
class AdaptiveKeys:
    """How thresholds follow from scores; the values of `method.adaptive` in the configuration."""

    share: Positive = 0.2  # of the boxes that are expected: so many pass; LabelMatch's uncertain boxes: 1
    images: Annotated[int, Limits(ge=1, le=10**6)] = 12_800  # unlabelled images whose scores are kept
    per_image: Annotated[int, Limits(ge=1, le=1000)] = 20  # best scores of a class that are kept of each image
    floor: Share = 0.05  # no threshold is lower


class AdaptiveThresholds(nn.Module):
    """A threshold for each class, from the teacher's scores on the last unlabelled images.

    If the labelled images have b boxes each and class c has the share r_c of them, then L unlabelled images should have
    E_c = L b r_c boxes of it. The threshold is the score number int(share E_c), counted from 0, of all scores of the
    class in these images by falling size. A class without any labelled box counts as if it had one.

    Args:
        num_classes: C.
        initial: the threshold of every class until L images have been seen.
        keys: the numbers.
    """

    best: Tensor  # (L + 1, C, K) scores, 0 where there are fewer; the last row is there to be thrown away
    count: Tensor  # () int64 images taken up so far
    thresholds: Tensor  # (C,)

    def __init__(self, num_classes: int, initial: float, keys: AdaptiveKeys) -> None:
        super().__init__()
        self.keys = keys
        self.register_buffer("best", torch.zeros(keys.images + 1, num_classes, keys.per_image))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("thresholds", torch.full((num_classes,), float(initial)))
        self.ranks: list[int] = []  # int(share E_c) of each class

    def expect(self, images: int, boxes: Sequence[int]) -> None:
        """Takes up how many labelled images there are, and how many boxes of each class in them."""
        counts = [max(1, count) for count in boxes]
        per_image = sum(boxes) / max(1, images)
        expected = (self.keys.images * per_image * count / sum(counts) for count in counts)
        last = self.keys.images * self.keys.per_image - 1
        self.ranks = [min(int(self.keys.share * number), last) for number in expected]

    def passes(self, found: PaddedTargets) -> Tensor:
        """(B, N) bool: whose score is at least the threshold of its class."""
        return found.scores >= self.thresholds[(found.labels - 1).clamp(min=0)]

    def best_scores(self, found: PaddedTargets) -> Tensor:
        """(B, C, K): the best scores of every class in each image, by falling size, 0 where there are fewer."""
        classes = torch.arange(1, len(self.thresholds) + 1, device=found.labels.device)
        own = (found.labels[:, None] == classes[:, None]) & found.valid[:, None]
        scores = found.scores[:, None] * own
        most = min(self.keys.per_image, scores.shape[2])
        best = scores.topk(most, dim=2).values
        return nn.functional.pad(best, (0, self.keys.per_image - most))

    @torch.no_grad()
    def absorb(self, best: Tensor, seen: Tensor) -> None:
        """Takes up scores of images, in place of the oldest ones, and makes the thresholds anew.

        Args:
            best: (n, C, K) of `best_scores`.
            seen: (n,) bool: which of them are of images at all.
        """
        assert self.ranks, "expect() comes first"
        total = seen.sum()
        number = seen.cumsum(0) - 1
        kept = seen & (number >= total - self.keys.images)
        # Where there is nothing to keep, it goes to the last row: a mask would wait for the device.
        self.best[torch.where(kept, (self.count + number) % self.keys.images, self.keys.images)] = best
        self.best[-1] = 0
        self.count += total
        falling = self.best[:-1].transpose(0, 1).flatten(1).topk(max(self.ranks) + 1, dim=1).values
        ranked = torch.stack([scores[rank] for scores, rank in zip(falling, self.ranks, strict=True)])
        found = ranked.clamp(min=self.keys.floor)
        self.thresholds.copy_(torch.where(self.count >= self.keys.images, found, self.thresholds))
