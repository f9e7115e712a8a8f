"""The compiled shrink against a triangle filter written down plainly, and against DALI's own, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIInterpType
from PIL import Image

from harness.core.types import ImageSource
from pipelines.dali import graph as dali_graph
from pipelines.dali import operators
from pipelines.dali.shrink import shrink

SIDE = st.integers(1, 60)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    out = np.full((*size, 3), 77, dtype=np.uint8)
    shrink(out, image)
    return out


def filtered(image: np.ndarray, size: int) -> np.ndarray:
    """(size, ...) float64: the first axis resized; every weight from the distance between centres."""
    step = len(image) / size
    radius = max(step, 1.0)
    rows = []
    for row in range(size):
        centre = (row + 0.5) * step - 0.5
        around = np.arange(int(np.floor(centre - radius)), int(np.ceil(centre + radius)) + 1)
        weights = np.maximum(0.0, 1.0 - np.abs(around - centre) / radius)
        rows.append(np.tensordot(weights / weights.sum(), image[np.clip(around, 0, len(image) - 1)], 1))
    return np.stack(rows)


@settings(max_examples=100, deadline=None)
@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE), seed=st.integers(0, 99))
def test_shrink_is_a_triangle_filter(old: tuple[int, int], new: tuple[int, int], seed: int) -> None:
    """Both axes may shrink, stay or grow."""
    image = picture(*old, seed)
    columns = filtered(image.astype(np.float64), new[0]).swapaxes(0, 1)
    exact = filtered(columns, new[1]).swapaxes(0, 1)
    # Half a level for rounding, and single precision.
    assert np.abs(shrunk(image, new) - exact).max() <= 0.5 + 0.001


def test_by_hand() -> None:
    """Two to one: the four nearest weigh 1, 3, 3 and 1 eighths, pixels at the border once more for those outside."""
    row = np.array([0, 80, 160, 240, 8, 88], dtype=np.uint8)
    image = np.repeat(row[None, :, None], 3, axis=2)
    assert shrunk(image, (1, 3))[0, :, 0].tolist() == [50, 161, 77]
    assert (shrunk(image, (1, 6)) == image).all()


@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_a_plain_picture_stays_plain(level: int) -> None:
    image = np.full((101, 67, 3), level, dtype=np.uint8)
    for size in ((101, 66), (33, 67), (17, 13), (1, 1)):
        assert (shrunk(image, size) == level).all()


@pipeline_def
def _both() -> Any:
    image = fn.external_source(name="image", dtype=DALIDataType.UINT8, ndim=3, layout="HWC")
    size = fn.external_source(name="size", dtype=DALIDataType.FLOAT, ndim=1)
    theirs = fn.resize(image, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
    return operators.shrink(image, size), theirs


def assert_same_bytes(pictures: list[np.ndarray], sizes: np.ndarray) -> None:
    """On several threads."""
    pipeline = _both(batch_size=len(pictures), num_threads=2, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    pipeline.feed_input("image", pictures)
    pipeline.feed_input("size", sizes.astype(np.float32))
    for ours, theirs in zip(*pipeline.run(), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.timeout(60)
def test_bytes_are_those_of_dali() -> None:
    """Any shrink; equal proportions, where either axis may come first; halves, which are rounded in two ways."""
    rng = np.random.default_rng(8)
    old, new = rng.integers(1, 200, (2, 150, 2))
    new = np.minimum(old, new)
    new[50:100] = np.maximum(1, np.round(old[50:100] * rng.uniform(0.1, 1.0, (50, 1))))
    old[100:130] = 2 * new[100:130]
    new[130:140, 0], new[140:, 1] = old[130:140, 0], old[140:, 1]
    assert_same_bytes([picture(*size, seed) for seed, size in enumerate(old)], new)


@pytest.mark.timeout(60)
def test_one_axis_may_grow() -> None:
    rng = np.random.default_rng(9)
    old, new = rng.integers(20, 90, (2, 40, 2))
    new[:, 0] = np.minimum(new[:, 0], old[:, 0])
    assert_same_bytes([picture(*size, seed) for seed, size in enumerate(old)], new)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("short", [24, 64])
def test_bytes_of_pictures_are_those_of_dali(photos: ImageSource, short: int) -> None:
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in photos.paths]
    sizes = np.array([image.shape[:2] for image in pictures])
    assert_same_bytes(pictures, np.maximum(1, np.round(sizes * short / sizes.min(1, keepdims=True))))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("short", [40, 115, 160])
def test_views_are_those_of_dalis_shrink(
    short: int, photos: ImageSource, build: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all, some and none of the pictures shrink."""
    config = {"name": "x", "antialias": True, "views": {"test": {"resize": {"short": short}}}}
    ours, _ = whole(build("dali", config), photos)

    def theirs(_: Any, image: Any, size: Any) -> Any:
        return fn.resize(image, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)

    with monkeypatch.context() as patch:
        patch.setattr(dali_graph.Graph, "shrink", theirs)
        expected, _ = whole(build("dali", config), photos)
    assert (ours.images == expected.images).all()
