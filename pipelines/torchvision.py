"""The same contract with torchvision v2 on uint8 tensors and a DataLoader: reference to agree with, and peer to beat.

It resizes with torchvision's fast uint8 kernels, warps only where a geometric operation was drawn, and normalises whole
batches in the training process, so that workers send bytes and not floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.loader import LoaderPipeline, Renderer
from pipelines.plan import hue_matrix


class TorchvisionRenderer(Renderer):
    """Images are (3, H, W) uint8 tensors."""

    def decode(self, data: np.ndarray) -> Tensor:
        return decode_image(torch.from_numpy(data), mode=ImageReadMode.RGB, apply_exif_orientation=False)

    def size(self, image: Tensor) -> tuple[int, int]:
        return image.shape[1], image.shape[2]

    def resize(self, image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
        nearest = self.policy.interpolation == "nearest" and not antialias
        mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
        return F.resize(image, list(size), interpolation=mode, antialias=antialias)

    def flip(self, image: Tensor) -> Tensor:
        return F.horizontal_flip(image)

    def warp(
        self, image: Tensor, matrix: np.ndarray, size: tuple[int, int], fill: tuple[float, ...], near: bool
    ) -> Tensor:
        height, width = self.size(image)
        to_unit = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]])
        from_unit = np.array([[size[1] / 2, 0, size[1] / 2], [0, size[0] / 2, size[0] / 2], [0, 0, 1]])
        theta = torch.from_numpy((to_unit @ np.linalg.inv(matrix) @ from_unit)[None, :2].astype(np.float32))
        grid = functional.affine_grid(theta, [1, 3, *size], align_corners=False)
        base = torch.tensor(fill)[:, None, None]  # what lies outside is 0 after subtracting the fill
        mode = "nearest" if near else "bilinear"
        pixels = functional.grid_sample((image - base)[None], grid, mode=mode, align_corners=False)[0]
        return pixels.add_(base).round_().clamp_(0, 255).to(torch.uint8)

    def swap(self, image: Tensor) -> Tensor:
        return image.flip(0)

    def color(self, image: Tensor, name: str, value: float) -> Tensor:
        if name == "brightness":
            return F.adjust_brightness(image, value)
        if name == "contrast":
            return F.adjust_contrast(image, value)
        if name == "saturation":
            return F.adjust_saturation(image, value)
        if name == "sharpness":
            return F.adjust_sharpness(image, value)
        if name == "solarize":
            return F.solarize(image, min(value, 255.0))
        if name == "posterize":
            return F.posterize(image, int(value))
        if name == "autocontrast":
            return F.autocontrast(image)
        if name == "equalize":
            return F.equalize(image)
        if name == "grayscale":
            return F.rgb_to_grayscale(image, num_output_channels=3)
        if name == "blur":
            return F.gaussian_blur(image, kernel_size=[2 * self.policy.blur_radius + 1] * 2, sigma=[value, value])
        assert name == "hue"
        matrix = torch.from_numpy(hue_matrix(value).astype(np.float32))
        turned = torch.einsum("ij,jhw->ihw", matrix, image.float())
        return turned.round_().clamp_(0, 255).to(torch.uint8)

    def cut(self, image: Tensor, box: np.ndarray) -> Tensor:
        left, top, right, bottom = box
        return image[:, top:bottom, left:right]

    def paste(self, image: Tensor, patch: Any, top: int, left: int) -> Tensor:
        if isinstance(patch, np.ndarray):
            patch = torch.from_numpy(patch).permute(2, 0, 1)
        image = image.clone()
        image[:, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
        return image

    def erase(self, image: Tensor, boxes: np.ndarray, fill: tuple[float, ...]) -> Tensor:
        image = image.clone()
        color = torch.tensor([int(v) for v in fill], dtype=torch.uint8)[:, None, None]
        for top, left, height, width in boxes:
            image[:, top : top + height, left : left + width] = color
        return image

    def write(self, image: Tensor, out: Tensor) -> None:
        out.copy_(image)


class TorchvisionPipeline(LoaderPipeline):
    """See `pipelines.loader.LoaderPipeline`."""

    name = "torchvision"
    renderer = TorchvisionRenderer
