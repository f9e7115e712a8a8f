"""CPU seconds of a supervised step of `detector=lite0` in several arrangements, 16 images of 128 px on one thread.

`python benchmarks/bench_backbones.py [rounds]`: the arrangements take turns, so that other work on a machine falls on
all of them alike; only their ratios mean anything.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from detectors.detector import targets_of
from harness.config import compose, sections
from harness.core.types import Target, View
from harness.engine import build

_IMAGES, _SIDE = 16, 128


class WholeNetwork(nn.Module):
    """timm's own `features_only`, which runs the stages behind the last map too; BatchNorm trained."""

    strides = (4, 8, 16)

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not name.startswith(("conv_stem", "bn1", "blocks.0")))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps at strides 4, 8 and 16."""
        return self.network(images)


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "timm's features_only": {"whole": True},
    "cut, BatchNorm trained": {"norm": "batch"},
    "cut, BatchNorm trained, channels last": {"norm": "batch", "channels_last": True},
    "cut, frozen and folded": {},
    "cut, statistics frozen, channels last": {"norm": "frozen_statistics", "channels_last": True},
    "cut, frozen and folded, channels last": {"channels_last": True},
    "the same, bf16 behind the backbone": {"channels_last": True, "bf16": True},
    "the same, frozen up to stride 4": {"channels_last": True, "bf16": True, "frozen_stages": 2},
}


def view() -> View:
    """Noise with three boxes in each image."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(_IMAGES):
        sides = torch.rand(3, 2, generator=generator) * 30 + 12
        corner = torch.rand(3, 2, generator=generator) * (_SIDE - sides)
        labels = torch.randint(1, 4, (3,), generator=generator)
        targets.append(Target(torch.cat([corner, corner + sides], 1), labels, torch.ones(3)))
    images = torch.randn(_IMAGES, 3, _SIDE, _SIDE, generator=generator)
    return View(images, torch.full((_IMAGES, 2), _SIDE), torch.eye(3).repeat(_IMAGES, 1, 1), targets)


def step(channels_last: bool = False, bf16: bool = False, whole: bool = False, **options: Any) -> Callable[[], None]:
    """A function that makes one training step."""
    torch.manual_seed(0)
    cfg = compose.load(["detector=lite0"])
    detector = build.detector({**sections.group(cfg, "detector"), **options}, Path(cfg.cache_dir), 3).train()
    if whole:
        detector.backbone.body = WholeNetwork()
    batch, order = view(), torch.channels_last if channels_last else torch.contiguous_format
    detector.to(memory_format=order)
    batch.images = batch.images.to(memory_format=order)
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], 1e-4, foreach=True)

    def once() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = detector.losses(detector.features(batch.images), batch, targets_of(batch), torch.arange(_IMAGES))
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def main(rounds: int = 6) -> None:
    """Prints a line for each arrangement."""
    torch.set_num_threads(1)
    steps = {name: step(**options) for name, options in ARRANGEMENTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, once in steps.items():
            start = time.process_time()
            once()
            if number:
                seconds[name].append(time.process_time() - start)
    first = statistics.median(next(iter(seconds.values())))
    for name, found in seconds.items():
        own = statistics.median(found)
        print(f"{name:42} {own:.3f} s  {_IMAGES / own:5.1f} images/s  x {first / own:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
