"""The same contract with OpenCV and lookup tables in a DataLoader, as mmdetection's pipelines are made: another peer.

Shrinking with antialiasing uses OpenCV's area filter, the only one it has; the other backends use a triangle filter.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from pipelines.loader import LoaderPipeline, Renderer
from pipelines.plan import hue_matrix

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13.0
_LEVELS = np.arange(256, dtype=np.float64)
_TO_CENTERS = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
_FROM_CENTERS = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])


def _table(values: np.ndarray) -> np.ndarray:
    """(256, 1, C) lookup table, truncated as PIL does."""
    return np.clip(values, 0, 255).astype(np.uint8).reshape(256, 1, -1)


def _equalize_table(channel: np.ndarray) -> np.ndarray:
    """PIL's: each level goes to the number of darker pixels plus half a step, over the step."""
    histogram = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    used = histogram[histogram > 0]
    step = (int(used.sum()) - int(used[-1])) // 255
    if len(used) <= 1 or step == 0:
        return _LEVELS
    darker = np.concatenate([[0], np.cumsum(histogram)[:-1]])
    return (step // 2 + darker) // step


def _autocontrast_table(channel: np.ndarray) -> np.ndarray:
    low, high, _, _ = cv2.minMaxLoc(channel)
    return _LEVELS if high <= low else (_LEVELS - low) * (255.0 / (high - low)) + 1e-9


class OpencvRenderer(Renderer):
    """Images are (H, W, 3) uint8 arrays."""

    def decode(self, data: np.ndarray) -> np.ndarray:
        if data[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in data[-4096:].tobytes():
            raise ValueError("truncated")  # OpenCV would fill the rest with grey
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError("no image")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def size(self, image: np.ndarray) -> tuple[int, int]:
        return image.shape[0], image.shape[1]

    def resize(self, image: np.ndarray, size: tuple[int, int], antialias: bool) -> np.ndarray:
        nearest = self.policy.interpolation == "nearest"
        mode = cv2.INTER_AREA if antialias else cv2.INTER_NEAREST_EXACT if nearest else cv2.INTER_LINEAR
        return cv2.resize(image, (size[1], size[0]), interpolation=mode)

    def flip(self, image: np.ndarray) -> np.ndarray:
        return cv2.flip(image, 1)

    def warp(
        self, image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], fill: tuple[float, ...], near: bool
    ) -> np.ndarray:
        centers = _TO_CENTERS @ matrix @ _FROM_CENTERS
        flags = cv2.INTER_NEAREST if near else cv2.INTER_LINEAR
        return cv2.warpAffine(image, centers[:2], (size[1], size[0]), flags=flags, borderValue=fill)

    def swap(self, image: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def color(self, image: np.ndarray, name: str, value: float) -> np.ndarray:
        if name == "brightness":
            return cv2.LUT(image, _table(_LEVELS * value))
        if name == "contrast":
            mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
            return cv2.LUT(image, _table(mean + value * (_LEVELS - mean)))
        if name == "saturation":
            return cv2.addWeighted(image, value, self._gray(image), 1.0 - value, 0)
        if name == "sharpness":
            result = cv2.addWeighted(image, value, cv2.filter2D(image, -1, _SMOOTH), 1.0 - value, 0)
            result[[0, -1]], result[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
            return result
        if name == "solarize":
            return cv2.LUT(image, _table(np.where(value > _LEVELS, _LEVELS, 255 - _LEVELS)))
        if name == "posterize":
            return cv2.LUT(image, _table((_LEVELS.astype(np.int64) & (256 - 2 ** (8 - int(value)))).astype(np.float64)))
        if name in ("autocontrast", "equalize"):
            table = _autocontrast_table if name == "autocontrast" else _equalize_table
            return cv2.LUT(image, _table(np.stack([table(c) for c in cv2.split(image)], axis=1)))
        if name == "grayscale":
            return self._gray(image)
        if name == "blur":
            side = 2 * self.policy.blur_radius + 1
            return cv2.GaussianBlur(image, (side, side), value, borderType=cv2.BORDER_REFLECT_101)
        assert name == "hue"
        return cv2.transform(image, hue_matrix(value).astype(np.float32))

    def _gray(self, image: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)

    def cut(self, image: np.ndarray, box: np.ndarray) -> np.ndarray:
        left, top, right, bottom = box
        return image[top:bottom, left:right]

    def paste(self, image: np.ndarray, patch: Any, top: int, left: int) -> np.ndarray:
        image = image.copy()
        image[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
        return image

    def erase(self, image: np.ndarray, boxes: np.ndarray, fill: tuple[float, ...]) -> np.ndarray:
        image = image.copy()
        for top, left, height, width in boxes:
            image[top : top + height, left : left + width] = fill
        return image

    def write(self, image: np.ndarray, out: Tensor) -> None:
        out.copy_(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))


class OpencvPipeline(LoaderPipeline):
    """See `pipelines.loader.LoaderPipeline`."""

    name = "opencv"
    renderer = OpencvRenderer
