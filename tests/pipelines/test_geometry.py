"""The matrix is the truth: a drawn mark at p lands within 1 px of M p, for every operation and on every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.core.types import ImageSource, View

BACKENDS = ("dali", "torchvision", "opencv")
GRAY = 60
SHORT = {"short": {"range": [50, 260], "integer": True}, "max": 300}
AFFINES: dict[str, Any] = {
    "translate_x": [-0.2, 0.2],
    "translate_y": [-0.2, 0.2],
    "rotate": [-30, 30],
    "shear_x": [-30, 30],
    "shear_y": [-30, 30],
    "shear_xy": [-30, 30],
    "shear_both": [-30, 30],
}
ZOOM = {"range": [0.6, 1.6], "log": True}
# name -> (view, policy keys)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "identity": ({}, {}),
    "flip": ({"flip": 1.0}, {}),
    "resize": ({"resize": SHORT}, {}),
    "resize, nearest": ({"resize": SHORT}, {"interpolation": "nearest"}),
    "resize and flip, antialiased": ({"resize": SHORT, "flip": 0.5}, {"antialias": True}),
    "zoom": ({"resize": SHORT, "zoom": ZOOM, "flip": 0.5}, {}),
    "zoom, antialiased": ({"resize": SHORT, "zoom": ZOOM, "flip": 0.5}, {"antialias": True}),
    "zoom and turn": ({"zoom": ZOOM, "affine": {"one_of": AFFINES}}, {}),
    "zoom and turn, one warp": ({"zoom": ZOOM, "affine": {"one_of": AFFINES}}, {"color_at": "source"}),
    "all, one warp": ({"resize": SHORT, "flip": 0.5, "affine": {"one_of": AFFINES}}, {"color_at": "source"}),
    "all, two warps": ({"resize": SHORT, "flip": 0.5, "affine": {"one_of": AFFINES, "nearest": 0.5}}, {}),
    **{name: ({"affine": {"one_of": {name: draw}, "slope": "tan"}}, {}) for name, draw in AFFINES.items()},
    "shear as scikit-image": ({"affine": {"one_of": {"shear_both": [-20, 20]}, "slope": "scikit_image"}}, {}),
    "shear about the center": ({"affine": {"one_of": {"shear_xy": [-20, 20]}, "shear_center": True}}, {}),
}


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, make_source: Callable[..., ImageSource]) -> Any:
    """PNG files with one bright blob each, and where it is."""
    folder = tmp_path_factory.mktemp("marks")
    rng = np.random.default_rng(1)
    paths, sizes, points = [], [], []
    for number in range(12):
        height, width = int(rng.integers(100, 180)), int(rng.integers(100, 180))
        point = rng.uniform(0.3, 0.7, 2) * [width, height]
        y, x = np.mgrid[:height, :width] + 0.5
        blob = np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 4.0**2))
        pixels = np.repeat((GRAY + 190 * blob)[:, :, None], 3, axis=2).astype(np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
        sizes.append((height, width))
        points.append(point)
    return make_source(paths, sizes), np.array(points)


def centroids(view: View) -> np.ndarray:
    """(B, 2) where the mark is, x and y in continuous coordinates."""
    result = []
    for image, (height, width) in zip(view.images, view.sizes.tolist(), strict=True):
        weight = np.clip(image[0, :height, :width].numpy() - GRAY - 20, 0, None)
        y, x = np.mgrid[:height, :width] + 0.5
        result.append([(x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()])
    return np.array(result)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", BACKENDS)
def test_marks_follow_the_matrix(backend: str, marked: Any, build: Any) -> None:
    source, points = marked
    for name, (view, keys) in CASES.items():
        pipeline = build(backend, {"name": "x", "views": {"v": {"fill": GRAY, **view}}, **keys}, eval_batch=5)
        checked = 0
        for batch, ids in pipeline.images(source, "v"):
            rows = ids.numpy() - 100
            homogeneous = np.concatenate([points[rows], np.ones((len(rows), 1))], axis=1)
            expected = np.einsum("bij,bj->bi", batch.to_view.numpy(), homogeneous)[:, :2]
            # A mark that is cut off by the view's edge has its centre elsewhere.
            margin = 12 * np.abs(batch.to_view.numpy()[:, :2, :2]).sum(2).max(1, keepdims=True)
            inside = ((expected > margin) & (expected < batch.sizes.numpy()[:, ::-1] - margin)).all(1)
            with np.errstate(invalid="ignore"):
                distance = np.abs(centroids(batch) - expected).max(1)
            assert (distance[inside] < 1.0).all(), f"{name}: {distance[inside]}"
            checked += int(inside.sum())
        assert checked >= 6, name
        pipeline.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_box_operation_moves_pixels_and_not_boxes(
    backend: str, make_source: Any, tmp_path: Path, build: Any
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = np.array([[20.0, 30.0, 60.0, 70.0]])
    source = make_source([tmp_path / "a.png"], [(96, 96)], [box])
    half = {"translate_x": {"values": [0.5]}}
    affine = {"one_of": {"rotate": [0, 1]}, "in_box": half, "in_box_probability": 1.0}
    pipeline = build(backend, {"name": "x", "views": {"v": {"fill": 125, "affine": affine}}})
    ((view, _),) = pipeline.images(source, "v")
    got = view.images[0].permute(1, 2, 0).numpy()
    expected = pixels.copy()
    expected[30:70, 40:60] = pixels[30:70, 20:40]
    expected[30:70, 20:40] = 125
    # The half source pixel at the moved edge blends with the fill.
    different = np.abs(got - expected).max(2) > 1
    assert not np.delete(different, [39, 40, 59], axis=1).any()
    assert view.targets is not None
    np.testing.assert_allclose(view.targets[0].boxes.numpy(), box)
    np.testing.assert_array_equal(view.to_view[0].numpy(), np.eye(3))
