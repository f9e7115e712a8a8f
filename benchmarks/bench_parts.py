"""Parts of a training step on their own: NMS, matching, the teacher's average, a step of each detector.

python -m pytest benchmarks/bench_parts.py --benchmark-only
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from detectors.detector import Detector, targets_of
from detectors.matching import match_anchors
from detectors.methods import ema
from detectors.padded import pad
from harness.config import compose, sections
from harness.core import boxes as box_ops
from harness.core.draws import image_keys
from harness.core.types import Target, View
from harness.engine import build

CLASSES = 80
DETECTORS = {"small": 128, "faster_rcnn": 224, "retinanet": 224, "fcos": 224}  # image side in pixels

pytestmark = pytest.mark.benchmark(timer=time.process_time)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def some_boxes(count: int, side: float, generator: torch.Generator) -> torch.Tensor:
    """(count, 4) boxes within a square."""
    corner = torch.rand(count, 2, generator=generator) * side * 0.8
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * side * 0.2], 1)


def detector(name: str, tmp_path: Any) -> Detector:
    """A detector of the configuration from scratch."""
    cfg = compose.load([f"detector={name}", "detector.weights=scratch", f"cache_dir={tmp_path}"])
    return build.detector(sections.group(cfg, "detector"), tmp_path, CLASSES)


def test_nms(benchmark: Any) -> None:
    """8 images of 2,000 boxes on five levels, as an RPN has them."""
    generator = torch.Generator().manual_seed(0)
    count = 8 * 2000
    boxes, scores = some_boxes(count, 800, generator), torch.rand(count, generator=generator)
    images = torch.arange(8).repeat_interleave(2000)
    levels = torch.randint(0, 5, (count,), generator=generator)
    benchmark.pedantic(box_ops.nms, (boxes, scores, images, levels, 0.7), rounds=5, warmup_rounds=1)


def test_matching(benchmark: Any) -> None:
    """20,000 anchors against up to 30 boxes in 8 images."""
    generator = torch.Generator().manual_seed(0)
    anchors = some_boxes(20_000, 800, generator)
    targets = []
    for count in (1, 3, 5, 8, 12, 18, 24, 30):
        labels = torch.randint(1, CLASSES, (count,), generator=generator)
        targets.append(Target(some_boxes(count, 800, generator), labels, torch.ones(count)))
    arguments = (anchors, pad(targets), 0.7, 0.3)
    benchmark.pedantic(match_anchors, arguments, rounds=5, warmup_rounds=1)


def test_ema(benchmark: Any, tmp_path: Any) -> None:
    """The teacher of a ResNet-50."""
    student, teacher = detector("faster_rcnn", tmp_path), detector("faster_rcnn", tmp_path)
    benchmark.pedantic(ema.update, (teacher, student, 0.999), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_step(benchmark: Any, tmp_path: Any, name: str) -> None:
    """Forward and backward on two images with three boxes each."""
    torch.manual_seed(0)
    network, side = detector(name, tmp_path).train(), DETECTORS[name]
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 2, 3])
    targets = [Target(some_boxes(3, side, generator), labels, torch.ones(3)) for _ in range(2)]
    images = torch.randn(2, 3, side, side, generator=generator)
    view = View(images, torch.full((2, 2), side), torch.eye(3).repeat(2, 1, 1), targets)
    keys = torch.from_numpy(image_keys(0, 0, [0, 1]))

    def step() -> None:
        losses = network.losses(network.features(view.images), view, targets_of(view), keys)
        torch.stack(list(losses.values())).sum().backward()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
