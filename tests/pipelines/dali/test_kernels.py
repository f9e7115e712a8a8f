"""The compiled loops against the same thing written down plainly in NumPy, and DALI's use of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import pipeline_def
from nvidia.dali.fn import external_source
from nvidia.dali.types import DALIDataType

from harness.core.types import Normalize, UserError
from pipelines.dali import graph as dali_graph
from pipelines.dali import kernels, operators
from pipelines.policy import Policy

FILL = (10.0, 200.0, 90.0)
STRAIGHT = [[1.7, 0.0, -3.3], [0.0, 0.6, 4.2], [0.0, 0.0, 1.0]]
TURNED = [[1.1, -0.4, 8.0], [0.3, 0.9, -2.5], [0.0, 0.0, 1.0]]
FLIPPED = [[-1.0, 0.0, 40.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def bilinear(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], fill: Any, replicate: bool) -> np.ndarray:
    """(h, w, 3) float64: every pixel from its four neighbours, found one by one."""
    height, width = image.shape[:2]
    out = np.zeros((*size, 3))
    inverse = np.linalg.inv(matrix)

    def pixel(y: int, x: int) -> np.ndarray:
        if replicate:
            return image[min(max(y, 0), height - 1), min(max(x, 0), width - 1)].astype(np.float64)
        inside = 0 <= y < height and 0 <= x < width
        return image[y, x].astype(np.float64) if inside else np.array(fill)

    for row, column in np.ndindex(size):
        x, y, _ = inverse @ [column + 0.5, row + 0.5, 1.0] - 0.5
        left, top = int(np.floor(x)), int(np.floor(y))
        u, v = x - left, y - top
        above = (1 - u) * pixel(top, left) + u * pixel(top, left + 1)
        below = (1 - u) * pixel(top + 1, left) + u * pixel(top + 1, left + 1)
        out[row, column] = (1 - v) * above + v * below
    return out


def picture(height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def warped(image: np.ndarray, matrix: Any, size: tuple[int, int], replicate: bool) -> np.ndarray:
    out = np.full((*size, 3), 77, dtype=np.uint8)
    kernels.warp(out, image, np.array(matrix, dtype=np.float32), np.array(FILL, dtype=np.float32), replicate)
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    source=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    scale=st.tuples(*[st.floats(0.2, 4.0)] * 2),
    slant=st.tuples(*[st.sampled_from([0.0, 0.0, 0.3, -0.7])] * 2),
    shift=st.tuples(*[st.floats(-60, 60)] * 2),
    mirrored=st.booleans(),
    replicate=st.booleans(),
)
def test_warp_is_bilinear_interpolation(
    seed: int, source: Any, size: Any, scale: Any, slant: Any, shift: Any, mirrored: bool, replicate: bool
) -> None:
    matrix = np.array([[scale[0], slant[0], shift[0]], [slant[1], scale[1], shift[1]], [0, 0, 1]], dtype=np.float32)
    matrix[0, 0] *= -1 if mirrored else 1
    if abs(np.linalg.det(matrix)) < 0.02:
        return
    image = picture(*source, seed)
    exact = bilinear(image, matrix.astype(np.float64), size, FILL, replicate)
    # Half a level for rounding; single precision places a pixel to a few ten-thousandths, of up to 255 levels.
    assert np.abs(warped(image, matrix, size, replicate) - exact).max() <= 0.5 + 0.1


@pytest.mark.parametrize("replicate", [False, True])
def test_identity_and_mirror_are_exact(replicate: bool) -> None:
    image = picture()
    assert (warped(image, np.eye(3), (30, 40), replicate) == image).all()
    assert (warped(image, FLIPPED, (30, 40), replicate) == image[:, ::-1]).all()


@pytest.mark.parametrize("size", [(1, 1), (30, 40)])
@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf, 1e-30, 1e30])
def test_no_matrix_reads_outside(size: tuple[int, int], entry: float) -> None:
    """Matrices without an inverse, and shifts beyond any integer, give some pixels of the image or the fill."""
    image = np.full((*size, 3), FILL, dtype=np.uint8)
    for place in np.ndindex(2, 3):
        matrix = np.array([[1.0, 0.5, 2.0], [0.25, 1.0, 3.0], [0.0, 0.0, 1.0]])
        matrix[place] = entry
        assert (warped(image, matrix, (20, 30), False) == np.array(FILL)).all()


def test_by_hand() -> None:
    """Two pixels to four: each new one lies a quarter off the old ones; the outer ones blend with what is outside."""
    image = np.array([[[0, 0, 0], [100, 100, 100]]], dtype=np.uint8)
    twice = [[2.0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert warped(image, twice, (1, 4), True)[0, :, 0].tolist() == [0, 25, 75, 100]
    assert warped(image, twice, (1, 4), False)[0].tolist() == [[3, 50, 23], [25] * 3, [75] * 3, [78, 125, 98]]


MEAN, STD, GRAY = (120.0, 110.0, 99.5), (58.0, 57.0, 2.0), (1.0, 2.0, 3.0)
LUMA = np.array([[0.299, 0.587, 0.114]])
WEIGHTS = np.concatenate([LUMA, np.eye(3), np.zeros((6, 3))]).astype(np.float32)
SAME = np.eye(3).tolist()


def recolored(image: np.ndarray, *steps: tuple[int, float], red: int = 0) -> np.ndarray:
    out = np.full_like(image, 77)
    kernels.recolor(out, image, np.array(steps, dtype=np.float32).reshape(-1, 2), WEIGHTS, np.int32(red))
    return out


def rendered(
    matrix: Any, after: Any, replicate: bool, steps: list[tuple[int, float]], at_source: bool = False
) -> np.ndarray:
    """A view of 44 x 52 pixels on a canvas of 50 x 60, with two patches, one at a corner, and an empty one."""
    patches = [[3, 4], [10, 20], [40, 0], [4, 7], [0, 0], [0, 0]]
    plan = np.zeros((7 + len(steps) + len(patches), 3), dtype=np.float32)
    plan[0:3], plan[3:6], plan[6] = matrix, after, (44, 52, replicate)
    plan[7:, :2] = [*steps, *patches]
    colors = np.concatenate([[MEAN, STD, FILL, GRAY, (at_source, 0, 0)], WEIGHTS]).astype(np.float32)
    out = np.full((3, 50, 60), np.nan, dtype=np.float32)
    kernels.render(out, picture(), plan, len(steps), colors)
    return out


@pytest.mark.parametrize("matrix", [STRAIGHT, TURNED, FLIPPED])
@pytest.mark.parametrize("after", [SAME, TURNED])
@pytest.mark.parametrize("steps", [[], [(kernels.IDENTITY, 0.0)], [(kernels.SATURATION, 0.4), (kernels.SOLARIZE, 90)]])
@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("at_source", [False, True])
def test_render_is_its_parts(matrix: Any, after: Any, steps: Any, replicate: bool, at_source: bool) -> None:
    """Warp, colour, second warp, erase, normalise; or colour first."""
    view = recolored(picture(), *steps) if at_source else picture()
    view = warped(view, matrix, (44, 52), replicate)
    view = view if at_source else recolored(view, *steps)
    if after != SAME:
        view = warped(view, after, (44, 52), False)
    view[3:13, 4:24] = view[40:44, 0:7] = GRAY
    expected = np.zeros((3, 50, 60))
    expected[:, :44, :52] = ((view - np.array(MEAN)) / STD).transpose(2, 0, 1)
    found = rendered(matrix, after, replicate, steps, at_source)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def half_up(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255)


def by_formula(image: np.ndarray, kind: int, value: float) -> np.ndarray:
    """The operations in double precision, pixel by pixel."""
    x = image.astype(np.float64)
    gray = half_up(x @ LUMA[0])
    if kind == kernels.BRIGHTNESS:
        return half_up(x * value)
    if kind == kernels.CONTRAST:
        mean = np.floor(gray.mean() + 0.5)
        return half_up(mean + value * (x - mean))
    if kind == kernels.SATURATION:
        return half_up(value * x + (1 - value) * (x @ LUMA[0])[..., None])
    if kind == kernels.GRAYSCALE:
        return np.repeat(gray[..., None], 3, axis=2)
    if kind == kernels.SOLARIZE:
        return np.where(x >= value, 255 - x, x)
    if kind == kernels.POSTERIZE:
        return np.floor(x / 2 ** (8 - value)) * 2 ** (8 - value)
    if kind == kernels.AUTOCONTRAST:
        low, high = x.min((0, 1)), x.max((0, 1))
        return np.where(high > low, np.floor((x - low) * 255 / np.maximum(high - low, 1) + 1e-4), x)
    if kind == kernels.EQUALIZE:
        most = np.array([(x[..., c] == x[..., c].max()).sum() for c in range(3)])
        above = [[max(0, (x[..., c] >= level).sum() - most[c]) for level in range(256)] for c in range(3)]
        scaled = 255 - np.rint(np.array(above) * (255 / np.maximum(x[..., 0].size - most, 1))[:, None])
        changed = np.stack([scaled[c][image[..., c]] for c in range(3)], axis=-1)
        return np.where(most == x[..., 0].size, x, changed)
    assert kind == kernels.SHARPNESS
    out = x.copy()
    for row, column in np.ndindex(max(x.shape[0] - 2, 0), max(x.shape[1] - 2, 0)):
        around = x[row : row + 3, column : column + 3]
        smooth = (around.sum((0, 1)) + 4 * around[1, 1]) / 13
        out[row + 1, column + 1] = np.clip(np.rint(smooth + value * (around[1, 1] - smooth)), 0, 255)
    return out


VALUES = {
    "BRIGHTNESS": [0.28, 1.0, 1.72],
    "CONTRAST": [0.28, 1.0, 1.72],
    "SATURATION": [0.28, 1.0, 1.72],
    "SHARPNESS": [0.28, 1.0, 1.72],
    "SOLARIZE": [1, 128, 255],
    "POSTERIZE": [0, 1, 4, 8],
    "AUTOCONTRAST": [0],
    "EQUALIZE": [0],
    "GRAYSCALE": [0],
}


@pytest.mark.parametrize("name", VALUES)
def test_colors_by_formula(name: str) -> None:
    """Single precision, and luma of 15 bits, move few pixels that lie between two levels, and by one."""
    kind = getattr(kernels, name)
    dark = (picture(21, 33) // 2 + 20).astype(np.uint8)
    flat = picture(9, 12)
    flat[..., 1] = 7
    for image in (picture(), dark, flat, picture(1, 1), picture(2, 9)):
        for value in VALUES[name]:
            apart = np.abs(recolored(image, (kind, value)) - by_formula(image, kind, value))
            assert apart.max() <= 1
            assert (apart > 0).mean() <= (0 if name in ("SOLARIZE", "POSTERIZE", "EQUALIZE") else 0.002)


def test_colors_of_swapped_channels() -> None:
    """With blue first, luma is that of the image turned round."""
    for kind in (kernels.GRAYSCALE, kernels.CONTRAST):
        swapped = recolored(picture()[..., ::-1].copy(), (kind, 0.5), red=16)
        assert (swapped[..., ::-1] == recolored(picture(), (kind, 0.5))).all()


def test_successive_colors_are_one_after_the_other() -> None:
    """Tables that are merged give what they give apart."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        names = rng.choice(list(VALUES), 4)
        steps = [(getattr(kernels, name), float(rng.choice(VALUES[name]))) for name in names]
        image = picture(12, 15)
        for step in steps:
            image = recolored(image, step)
        assert (recolored(picture(12, 15), *steps) == image).all(), names


def test_normalize() -> None:
    mean, std = (120.0, 110.0, 99.5), (58.0, 57.0, 2.0)
    out = np.full((3, 33, 40), np.nan, dtype=np.float32)
    kernels.normalize(out, picture(), np.array([mean, std], dtype=np.float32))
    expected = np.zeros((3, 33, 40))
    expected[:, :30] = ((picture() - np.array(mean)) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(60)
def test_rendering_at_once_changes_nothing(build: Any, photos: Any, whole: Any) -> None:
    """Noise patches of probability 0 keep the steps apart; all the rest is the same."""
    views: dict[str, dict[str, Any]] = {
        "plain": {"resize": {"short": {"range": [50, 200], "integer": True}, "max": 300}, "flip": 0.5},
        "zoom": {"zoom": {"range": [0.5, 2.0]}, "fill": [1, 100, 255], "flip": 0.5},
        "turn": {"affine": {"one_of": {"rotate": [-30, 30], "translate_x": [-0.3, 0.3]}}, "fill": 125},
        "color": {
            "color": [{"one_of": {"brightness": 0.5, "equalize": None, "sharpness": 0.3}}, {"one_of": {"hue": 0.1}}],
            "affine": {"one_of": {"shear_y": [-30, 30]}},
            "shuffle": True,
        },
        "erase": {"erase": [{"count": [1, 4], "ratio": [0, 0.4]}, {"ratio": 0.2}], "erase_fill": [9, 99, 199]},
    }
    noise = {"ratio": 0.1, "probability": 0.0, "noise": True}
    for bgr in (False, True):
        normalize = Normalize((120.0, 110.0, 99.5), (58.0, 57.0, 2.0), bgr)
        for (name, view), color_at in itertools.product(views.items(), ("view", "source")):
            images = []
            for extra in ([], [noise]):
                erase = [*view.get("erase", []), *extra]
                policy = {"name": "x", "color_at": color_at, "views": {name: {**view, "erase": erase}}}
                graph = dali_graph.Graph(Policy.from_config(policy), normalize, gpu=False)
                assert graph.renders_at_once(graph.policy.views[name]) == (not extra)
                rendered, _ = whole(build("dali", policy, normalize), photos, name)
                images.append(rendered.images)
            np.testing.assert_allclose(images[0], images[1], rtol=1e-6, atol=1e-6, err_msg=name)


@pipeline_def(enable_conditionals=True)
def _both_ways() -> Any:
    """Warped and recoloured bytes; the whole at once, and in parts, normalised."""
    image = external_source(name="image", dtype=DALIDataType.UINT8, ndim=3)
    extent = external_source(name="extent", dtype=DALIDataType.UINT8, ndim=3)
    canvas = external_source(name="canvas", dtype=DALIDataType.FLOAT, ndim=1)
    plan = external_source(name="plan", dtype=DALIDataType.FLOAT, ndim=2)
    size = external_source(name="size", dtype=DALIDataType.FLOAT, ndim=1)
    view = operators.warp(image, plan[0:3], size, list(FILL), False)
    view = operators.recolor(view, plan[7:8, 0:2], WEIGHTS, 0)
    colors = np.concatenate([[MEAN, STD, FILL, GRAY, (0, 0, 0)], WEIGHTS])
    whole = operators.render(image, extent, plan, 1, colors)
    return view, whole, operators.normalize(view, canvas, list(MEAN), list(STD))


@pytest.mark.timeout(60)
def test_in_a_dali_graph() -> None:
    """Images, sizes and operations that differ within a batch, on several threads, for several batches."""
    pipeline = _both_ways(batch_size=8, num_threads=3, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    rng = np.random.default_rng(3)
    for _ in range(5):
        images = [picture(*rng.integers(5, 60, 2), seed) for seed in range(8)]
        sizes, kinds = rng.integers(3, 50, (8, 2)), rng.integers(0, 9, 8)
        plans = np.zeros((8, 8, 3), dtype=np.float32)
        plans[:, :3], plans[:, 3:6] = np.array([STRAIGHT, TURNED] * 4), np.eye(3)
        plans[:, 6, :2], plans[:, 7, 0], plans[:, 7, 1] = sizes, kinds, 0.5
        inputs = {
            "image": images,
            "extent": np.zeros((8, 50, 50, 0), dtype=np.uint8),
            "canvas": np.full((8, 2), 50, dtype=np.float32),
            "plan": plans,
            "size": sizes.astype(np.float32),
        }
        for name, value in inputs.items():
            pipeline.feed_input(name, value)
        views, whole, parts = pipeline.run()
        for row in range(8):
            expected = warped(images[row], plans[row, :3], tuple(sizes[row]), False)
            assert (np.asarray(views[row]) == recolored(expected, (kinds[row], 0.5))).all()
            assert np.asarray(whole[row]).shape == (3, 50, 50)
            assert (np.asarray(whole[row]) == np.asarray(parts[row])).all()


def test_nowhere_to_keep_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's error on a read-only machine becomes a sentence; any other stays what it is."""
    for message, error in (("cannot cache function 'warp': no locator", UserError), ("another", RuntimeError)):

        def fail(_: str, message: str = message) -> Any:
            raise RuntimeError(message)

        monkeypatch.setattr(dali_graph, "import_module", fail)
        with pytest.raises(error, match="NUMBA_CACHE_DIR" if error is UserError else message):
            dali_graph.Graph(
                Policy.from_config({"name": "x", "views": {"v": {}}}), Normalize((0,) * 3, (1,) * 3), False
            )
