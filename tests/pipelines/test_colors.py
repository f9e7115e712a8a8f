"""Every colour operation of every backend against PIL, and hue and blur against their formulas.

The bounds are the largest differences in grey levels. PIL truncates where DALI rounds, hence 1; operations that blend
two rounded images may differ by 2.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from harness.core.types import ImageSource, Normalize

BACKENDS = ("dali", "torchvision", "opencv")


def hue(image: Image.Image, turns: float) -> np.ndarray:
    """Each pixel's angle in the I, Q plane turned, by the standard library's YIQ."""
    pixels = np.asarray(image) / 255.0
    result = np.zeros_like(pixels)
    for row, column in np.ndindex(pixels.shape[:2]):
        y, i, q = colorsys.rgb_to_yiq(*pixels[row, column])
        turned = complex(i, q) * np.exp(-2j * np.pi * turns)
        yiq = np.array([y, turned.real, turned.imag])
        inverse = np.linalg.inv([colorsys.rgb_to_yiq(*unit) for unit in np.eye(3)]).T
        result[row, column] = inverse @ yiq
    return np.clip(result, 0, 1) * 255


def blur(image: Image.Image, sigma: float) -> np.ndarray:
    """Direct convolution with a Gaussian, edges mirrored."""
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    pixels = np.pad(np.asarray(image, dtype=np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    for axis in (0, 1):
        pixels = np.apply_along_axis(np.convolve, axis, pixels, kernel, mode="valid")
    return pixels


def posterize(image: Image.Image, bits: float) -> Image.Image:
    return ImageOps.posterize(image, int(bits)) if bits else Image.new("RGB", image.size)


REFERENCES: dict[str, tuple[Callable[[Image.Image, float], Any], tuple[float, ...], float]] = {
    "brightness": (lambda i, v: ImageEnhance.Brightness(i).enhance(v), (0.28, 1.72), 1),
    "contrast": (lambda i, v: ImageEnhance.Contrast(i).enhance(v), (0.28, 1.72), 1),
    "saturation": (lambda i, v: ImageEnhance.Color(i).enhance(v), (0.28, 1.72), 2),
    "sharpness": (lambda i, v: ImageEnhance.Sharpness(i).enhance(v), (0.28, 1.72), 1),
    "solarize": (lambda i, v: ImageOps.solarize(i, int(v)), (25, 128, 230), 0),
    "posterize": (posterize, (0, 1, 4), 0),
    "autocontrast": (lambda i, _: ImageOps.autocontrast(i), (0,), 1),
    "equalize": (lambda i, _: ImageOps.equalize(i), (0,), 1),
    "grayscale": (lambda i, _: i.convert("L").convert("RGB"), (0,), 1),
    "hue": (hue, (-0.1, 0.07), 3),  # DALI's YIQ coefficients have three digits
    "blur": (blur, (0.5, 2.0), 2),  # each of two passes rounds
}


def low_contrast(source: ImageSource, folder: Any, height: int = 40, width: int = 60) -> ImageSource:
    """Small PNG images that do not use all levels, so that stretching has something to do."""
    paths, sizes = [], []
    for number, path in enumerate(source.paths[:3]):
        image = Image.open(path).convert("RGB").resize((width, height))
        pixels = np.asarray(image) * (0.5 + 0.2 * number) + 20
        name = folder / f"{number}.png"
        Image.fromarray(np.clip(pixels, 0, 250).astype(np.uint8)).save(name)
        paths.append(str(name))
        sizes.append((height, width))
    return replace(
        source,
        paths=paths,
        ids=source.ids[:3],
        sizes=np.array(sizes),
        offsets=np.zeros(4, dtype=np.int64),
        boxes=source.boxes[:0],
        labels=source.labels[:0],
        scores=source.scores[:0],
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFERENCES)
def test_against_reference(name: str, backend: str, photos: ImageSource, tmp_path: Any, build: Any) -> None:
    reference, values, bound = REFERENCES[name]
    # PIL equalises in whole steps of pixels / 255, which is coarse on small images.
    height, width = (200, 306) if name == "equalize" else (40, 60)
    images = low_contrast(photos, tmp_path, height, width)
    views = {f"v{i}": {"color": [{"one_of": {name: value}}]} for i, value in enumerate(values)}
    for bgr in (False, True):
        normalize = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), bgr)
        pipeline = build(backend, {"name": "x", "views": views}, normalize)
        for view, value in zip(views, values, strict=True):
            ((batch, _),) = pipeline.images(images, view)
            for path, pixels in zip(images.paths, batch.images[:, :, :height, :width], strict=True):
                got = (pixels.flip(0) if bgr else pixels).permute(1, 2, 0).numpy()
                expected = np.asarray(reference(Image.open(path).convert("RGB"), value), dtype=np.float64)
                assert np.abs(got - expected).max() <= bound


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", BACKENDS)
def test_swapped_channels(backend: str, photos: ImageSource, tmp_path: Any, build: Any) -> None:
    """color_channels=bgr weighs red as blue, as codes do that hand BGR images to PIL."""
    images = low_contrast(photos, tmp_path)
    ops = {"saturation": 0.3, "grayscale": None, "hue": 0.1, "contrast": 1.5}
    views = {name: {"color": [{"one_of": {name: value}}]} for name, value in ops.items()}
    swapped = build(backend, {"name": "x", "color_channels": "bgr", "views": views})
    straight = build(backend, {"name": "x", "views": views})
    mirrored_paths = []
    for path in images.paths:
        red, green, blue = Image.open(path).split()
        mirrored_paths.append(path.replace(".png", "-swapped.png"))
        Image.merge("RGB", (blue, green, red)).save(mirrored_paths[-1])
    for view in views:
        ((a, _),) = swapped.images(images, view)
        ((b, _),) = straight.images(replace(images, paths=mirrored_paths), view)
        assert (a.images - b.images.flip(1)).abs().max() <= 1
