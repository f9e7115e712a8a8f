"""The compiled loops against the same thing written down plainly in NumPy, and DALI's use of them."""

from __future__ import annotations

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


@pytest.mark.parametrize("matrix", [STRAIGHT, TURNED, FLIPPED])
@pytest.mark.parametrize("replicate", [False, True])
def test_warp_normalized_is_warp_erase_normalize(matrix: Any, replicate: bool) -> None:
    mean, std, gray = (120.0, 110.0, 99.5), (58.0, 57.0, 2.0), (1.0, 2.0, 3.0)
    out = np.full((3, 50, 60), np.nan, dtype=np.float32)
    # Two patches, one at a corner, and an empty one.
    patches = np.array([[3, 4, 40, 0, 0, 0], [10, 20, 4, 7, 0, 0]], dtype=np.float32)
    kernels.warp_normalized(
        out,
        picture(),
        np.array(matrix, dtype=np.float32),
        np.array([44, 52], dtype=np.float32),
        patches,
        np.array([mean, std, FILL, gray], dtype=np.float32),
        replicate,
    )
    view = warped(picture(), matrix, (44, 52), replicate)
    view[3:13, 4:24] = view[40:44, 0:7] = gray
    expected = np.zeros((3, 50, 60))
    expected[:, :44, :52] = ((view - np.array(mean)) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


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
        "color": {"color": [{"one_of": {"brightness": 0.5}}], "affine": {"one_of": {"shear_y": [-30, 30]}}},
        "erase": {"erase": [{"count": [1, 4], "ratio": [0, 0.4]}, {"ratio": 0.2}], "erase_fill": [9, 99, 199]},
    }
    noise = {"ratio": 0.1, "probability": 0.0, "noise": True}
    for bgr in (False, True):
        normalize = Normalize((120.0, 110.0, 99.5), (58.0, 57.0, 2.0), bgr)
        for name, view in views.items():
            images = []
            for extra in ([], [noise]):
                erase = [*view.get("erase", []), *extra]
                policy = {"name": "x", "color_at": "source", "views": {name: {**view, "erase": erase}}}
                graph = dali_graph.Graph(Policy.from_config(policy), normalize, gpu=False)
                assert graph.renders_at_once(graph.policy.views[name]) == (not extra)
                rendered, _ = whole(build("dali", policy, normalize), photos, name)
                images.append(rendered.images)
            np.testing.assert_allclose(images[0], images[1], rtol=1e-6, atol=1e-6, err_msg=name)


@pipeline_def(enable_conditionals=True)
def _both_ways() -> Any:
    """Warped bytes; warped, erased and normalised at once; the former, normalised."""
    image = external_source(name="image", dtype=DALIDataType.UINT8, ndim=3)
    matrix = external_source(name="matrix", dtype=DALIDataType.FLOAT, ndim=2)
    size = external_source(name="size", dtype=DALIDataType.FLOAT, ndim=1)
    canvas = external_source(name="canvas", dtype=DALIDataType.FLOAT, ndim=1)
    replicate = external_source(name="replicate", dtype=DALIDataType.BOOL, ndim=0)
    fill = list(FILL)
    mean, std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    if replicate:
        view = operators.warp(image, matrix, size, fill, True)
        whole = operators.warp_normalized(image, matrix, size, canvas, None, [mean, std, fill, fill], True)
    else:
        view = operators.warp(image, matrix, size, fill, False)
        whole = operators.warp_normalized(image, matrix, size, canvas, None, [mean, std, fill, fill], False)
    return view, whole, operators.normalize(view, canvas, mean, std)


@pytest.mark.timeout(60)
def test_in_a_dali_graph() -> None:
    """Images, sizes and borders that differ within a batch, on several threads, for several batches."""
    pipeline = _both_ways(batch_size=8, num_threads=3, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    rng = np.random.default_rng(3)
    for _ in range(5):
        images = [picture(*rng.integers(5, 60, 2), seed) for seed in range(8)]
        matrices = np.array([STRAIGHT, TURNED] * 4, dtype=np.float32)
        sizes, replicate = rng.integers(3, 50, (8, 2)), rng.random(8) < 0.5
        inputs = {
            "image": images,
            "matrix": matrices,
            "size": sizes.astype(np.float32),
            "canvas": np.full((8, 2), 50, dtype=np.float32),
            "replicate": replicate,
        }
        for name, value in inputs.items():
            pipeline.feed_input(name, value)
        views, whole, parts = pipeline.run()
        for row in range(8):
            height, width = sizes[row]
            expected = warped(images[row], matrices[row], (height, width), bool(replicate[row]))
            assert (np.asarray(views[row]) == expected).all()
            assert np.asarray(whole[row]).shape == (3, 50, 50)
            assert (np.asarray(whole[row]) == np.asarray(parts[row])).all()
            np.testing.assert_allclose(
                np.asarray(whole[row])[:, :height, :width],
                ((expected - [1.0, 2.0, 3.0]) / [4.0, 5.0, 6.0]).transpose(2, 0, 1),
                rtol=1e-5,
                atol=1e-5,
            )


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
