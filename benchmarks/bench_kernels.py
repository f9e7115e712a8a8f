"""The compiled loops of the CPU graph beside OpenCV's, on one photograph-sized image and a full COCO-scale view.

python -m pytest benchmarks/bench_kernels.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from pipelines.dali import kernels
from pipelines.dali.shrink import shrink
from pipelines.plan import hue_matrix

IMAGE = np.random.default_rng(0).integers(0, 256, (426, 640, 3), dtype=np.uint8)
SIZE, CANVAS = (800, 1066), (1300, 1300)
VIEW = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
STRAIGHT = np.array([[1066 / 640, 0, 0], [0, 800 / 426, 0], [0, 0, 1]], dtype=np.float32)
SAME = np.eye(3)
AFTER = np.array([[0.95, -0.2, 40], [0.2, 0.95, -30], [0, 0, 1]], dtype=np.float32)
TURNED = np.array([[1.6, -0.2, 40], [0.2, 1.8, -30], [0, 0, 1]], dtype=np.float32)
HUE = hue_matrix(0.1).astype(np.float32)
WEIGHTS = np.concatenate([[[0.299, 0.587, 0.114]], HUE, np.zeros((6, 3))])
LEVELS = [[120, 115, 100], [58, 57, 57], [125] * 3, [125] * 3, [0] * 3]
COLORS = np.concatenate([LEVELS, WEIGHTS]).astype(np.float32)
PATCH = [[100, 100, 0], [80, 90, 0]]
small_out = np.empty((128, 192, 3), dtype=np.uint8)
bytes_out, planes_out = np.empty((*SIZE, 3), dtype=np.uint8), np.empty((3, *CANVAS), dtype=np.float32)


def _render(matrix: np.ndarray, replicate: bool, kind: int = kernels.IDENTITY, after: np.ndarray = SAME) -> None:
    plan = np.concatenate([matrix, after, [[*SIZE, replicate], [kind, 0.9, 0]], PATCH]).astype(np.float32)
    kernels.render(planes_out, IMAGE, plan, 1, COLORS)


def _recolor(kind: int) -> None:
    steps = np.array([[kind, 0.9]], dtype=np.float32)
    kernels.recolor(bytes_out, VIEW, steps, COLORS[5:], np.int32(0))


def _opencv(matrix: np.ndarray) -> Any:
    return cv2.warpPerspective(IMAGE, matrix, SIZE[::-1], dst=bytes_out)


CASES: dict[str, Callable[[], Any]] = {
    "view to canvas, straight": lambda: _render(STRAIGHT, True),
    "view to canvas, turned": lambda: _render(TURNED, False),
    "view to canvas, equalized": lambda: _render(STRAIGHT, True, kernels.EQUALIZE),
    "view to canvas, sharpened, turned": lambda: _render(STRAIGHT, True, kernels.SHARPNESS, AFTER),
    "warp, straight": lambda: kernels.warp(bytes_out, IMAGE, STRAIGHT, COLORS[2], True),
    "warp, turned": lambda: kernels.warp(bytes_out, IMAGE, TURNED, COLORS[2], False),
    "warp, OpenCV, straight": lambda: _opencv(STRAIGHT),
    "warp, OpenCV, turned": lambda: _opencv(TURNED),
    "shrink": lambda: shrink(small_out, IMAGE),
    "shrink, OpenCV": lambda: cv2.resize(IMAGE, (192, 128), dst=small_out, interpolation=cv2.INTER_AREA),
    "normalize": lambda: kernels.normalize(planes_out, VIEW, COLORS),
    "hue": lambda: _recolor(kernels.HUE),
    "hue, OpenCV": lambda: cv2.transform(VIEW, HUE, dst=bytes_out),
}


@pytest.mark.benchmark(min_time=0.001, min_rounds=50)
@pytest.mark.parametrize("case", CASES)
def test_kernel(case: str, benchmark: Any) -> None:
    cv2.setNumThreads(1)
    benchmark(CASES[case])
