"""Plans: sizes and matrices by hand, boxes by brute force, and that a row depends on its key alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.core.draws import image_keys
from pipelines.base import make_job, view_targets
from pipelines.plan import KINDS, ViewPlan, _sides, boxes_through, noise_patch, noise_tile, plan_view
from pipelines.policy import Policy

POLICIES = sorted(p.stem for p in (Path(__file__).parents[2] / "harness" / "conf" / "augment").glob("*.yaml"))
SIZES = np.array([[480, 640], [640, 427], [200, 900], [64, 64]])
Config = Callable[..., dict[str, Any]]


def plans(config: dict[str, Any], count: int = 4000) -> dict[str, ViewPlan]:
    """Plans of every view for many images."""
    policy = Policy.from_config(config)
    sizes = SIZES[np.arange(count) % len(SIZES)]
    boxes = np.concatenate([sizes * 0.25, sizes * 0.5], axis=1)[:, [1, 0, 3, 2]]
    counts = np.ones(count, dtype=np.int64)
    return {
        name: plan_view(view, image_keys(0, 0, np.arange(count)), sizes, boxes, counts)
        for name, view in policy.views.items()
    }


def test_resizing_rounds_as_mmdetection_does(policy_config: Config) -> None:
    plan = plans(policy_config("soft_teacher"), 4)["test"]
    for size, new in zip(SIZES, plan.sizes, strict=True):
        scale = min(800 / min(size), 1333 / max(size))
        assert new.tolist() == [int(side * scale + 0.5) for side in size]
    np.testing.assert_allclose(plan.to_view[0], np.diag([1067 / 640, 800 / 480, 1]))


def test_flip_maps_x_to_width_minus_x(policy_config: Config) -> None:
    plan = plans(policy_config("soft_teacher"))["weak"]
    flipped = plan.to_view[:, 0, 0] < 0
    assert abs(flipped.mean() - 0.5) < 0.03
    row = int(np.flatnonzero(flipped)[0])
    right_edge = plan.to_view[row] @ [SIZES[row % 4][1], 0, 1]
    np.testing.assert_allclose(right_edge, [0, 0, 1], atol=1e-9)


def scikit_image(rotation: float = 0.0, shear: float = 0.0) -> np.ndarray:
    """Its AffineTransform (before version 0.19) without scale and translation."""
    cos, sin = np.cos(rotation), np.sin(rotation)
    return np.array([[cos, -np.sin(rotation + shear), 0], [sin, np.cos(rotation + shear), 0], [0, 0, 1]])


def imgaug_shear(angle: float, height: int, width: int) -> np.ndarray:
    """The matrix of imgaug 0.4's Affine(shear=(low, high)): one angle, y in a turned frame, then x, about centre."""
    to_center = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    turn, turn_back = scikit_image(rotation=-np.pi / 2), scikit_image(rotation=np.pi / 2)
    shear = scikit_image(shear=angle)
    return to_center @ shear @ turn_back @ shear @ turn @ np.linalg.inv(to_center)


def test_stac_shears_as_imgaug_does(policy_config: Config) -> None:
    plan = plans(policy_config("stac"))["strong"]
    linear = plan.affine[:, :2, :2]
    determinant = np.linalg.det(linear)
    sheared = np.flatnonzero(plan.has_affine & ~np.isclose(determinant, 1))
    angles = np.arcsin(-linear[sheared, 0, 1])
    assert len(sheared) > 200
    assert np.radians(29.5) < np.abs(angles).max() <= np.radians(30)
    for row, angle in zip(sheared, angles, strict=True):
        np.testing.assert_allclose(plan.affine[row], imgaug_shear(angle, *plan.sizes[row]), atol=1e-9)
    np.testing.assert_allclose(determinant[sheared], np.cos(angles) ** 2)  # down to 0.75
    inside = np.flatnonzero(plan.has_region & ~np.isclose(np.linalg.det(plan.region_affine[:, :2, :2]), 1))
    assert len(inside) > 200
    for row in inside:
        angle = np.arcsin(-plan.region_affine[row, 0, 1])
        left, top, right, bottom = plan.regions[row]
        expected = imgaug_shear(angle, bottom - top, right - left)
        np.testing.assert_allclose(plan.region_affine[row], expected, atol=1e-9)
        assert abs(angle) <= np.radians(10)


def test_stac_sides(policy_config: Config) -> None:
    policy = Policy.from_config(policy_config("stac"))
    assert [policy.views[name].resize.max for name in ("labeled", "strong", "test")] == [1344] * 3


def test_soft_teacher_chances(policy_config: Config) -> None:
    """How often each operation is drawn, and the ranges of what is drawn."""
    plan = plans(policy_config("soft_teacher"))["strong"]
    assert abs(plan.color_first.mean() - 0.5) < 0.03
    kinds = np.bincount(plan.kinds[:, 0], minlength=len(KINDS)) / len(plan.kinds)
    assert np.abs(kinds[kinds > 0] - 1 / 9).max() < 0.02
    assert (kinds > 0).sum() == 9
    linear, shift = plan.affine[:, :2, :2], plan.affine[:, :2, 2]
    moved_only = (linear == np.eye(2)).all((1, 2))
    assert abs(moved_only.mean() - 0.5) < 0.03
    share = np.abs(shift[moved_only] / plan.sizes[moved_only][:, ::-1])
    assert 0.099 < share.max() <= 0.1
    rotated = ~moved_only & np.isclose(linear[:, 0, 0], linear[:, 1, 1])
    assert abs(rotated.mean() - 0.25) < 0.03
    assert np.degrees(np.arcsin(np.abs(linear[rotated][:, 1, 0]))).max() <= 30
    sheared = ~moved_only & ~rotated
    assert 0.45 < np.abs(linear[sheared][:, 0, 1]).max() <= np.tanh(np.pi / 6)  # tanh, not tan
    patches = plan.erase[0].boxes
    assert set((patches[:, :, 2] > 0).sum(1)) <= set(range(5))
    assert (patches[:, :, 2] <= 0.2 * plan.sizes[:, :1]).all()
    assert (patches[:, :, :2] + patches[:, :, 2:] <= plan.sizes[:, None]).all()


def test_rotation_is_clockwise_about_the_center() -> None:
    config = {"name": "x", "views": {"v": {"affine": {"one_of": {"rotate": {"values": [90]}}}}}}
    plan = plans(config, 1)["v"]
    center = plan.to_view[0] @ [320, 240, 1]
    right = plan.to_view[0] @ [420, 240, 1]
    np.testing.assert_allclose(center[:2], [320, 240])
    np.testing.assert_allclose(right[:2], [320, 340])  # y points down


def test_unbiased_teacher_shares_geometry_and_soft_teacher_does_not(policy_config: Config) -> None:
    shared, own = plans(policy_config("unbiased_teacher")), plans(policy_config("soft_teacher"))
    np.testing.assert_array_equal(shared["weak"].to_view, shared["strong"].to_view)
    np.testing.assert_array_equal(shared["weak"].sizes, shared["strong"].sizes)
    same = np.isclose(own["weak"].to_resized, own["strong"].to_resized).all((1, 2))
    assert same.mean() < 0.25  # of long images the long side decides
    assert set(shared["weak"].sizes[::4, 0]) == {640, 672, 704, 736, 768, 800}


@pytest.mark.parametrize("name", POLICIES)
def test_aligned_views_draw_the_same_matrices(name: str, policy_config: Config) -> None:
    config = policy_config(name)
    if not {"weak", "strong"} <= set(config["views"]):
        return
    drawn = plans(config, 50)
    weak, strong = drawn["weak"], drawn["strong"]
    same = np.array_equal(weak.to_view, strong.to_view) and np.array_equal(weak.sizes, strong.sizes)
    assert (
        Policy.from_config(config).aligned(("weak", "strong")) == same == (name in ("unbiased_teacher", "small_shared"))
    )


def test_unbiased_teacher_colors(policy_config: Config) -> None:
    plan = plans(policy_config("unbiased_teacher"))["strong"]
    jitter = plan.kinds[:, :4]
    drawn = (jitter > 0).all(1)
    assert ((jitter > 0).any(1) == drawn).all()
    assert abs(drawn.mean() - 0.8) < 0.02
    assert (
        np.sort(jitter[drawn], axis=1) == np.sort([KINDS[k] for k in ("brightness", "contrast", "saturation", "hue")])
    ).all()
    assert len({tuple(row) for row in jitter[drawn]}) == 24
    assert abs((plan.kinds[:, 4] == KINDS["grayscale"]).mean() - 0.2) < 0.02
    assert abs((plan.kinds[:, 5] == KINDS["blur"]).mean() - 0.5) < 0.03
    for step, chance in zip(plan.erase, (0.7, 0.5, 0.3), strict=True):
        share = step.boxes[:, 0, 2:].prod(1) / plan.sizes.prod(1)
        assert abs((share > 0).mean() - chance) < 0.03  # a patch that does not fit is drawn again
        assert share.max() < 0.21


@given(st.integers(0, 2**31), st.sampled_from([0.3, 0.9, 3.0]))
@settings(max_examples=50, deadline=None)
def test_first_patch_that_fits_against_a_loop(seed: int, share: float) -> None:
    """torchvision's RandomErasing: up to ten draws, the first patch that is smaller than the view on both sides."""
    rng = np.random.default_rng(seed)
    limit = rng.integers(1, 40, (4, 2))
    area = rng.uniform(0, share, (4, 10, 3)) * limit.prod(1)[:, None, None]
    aspect = np.exp(rng.uniform(-3, 3, (4, 10, 3)))
    tall, wide = _sides(area, aspect, limit)
    for image, (height, width) in enumerate(limit.tolist()):
        for patch in range(3):
            expected = (0, 0)
            for number in range(10):
                a, r = area[image, number, patch], aspect[image, number, patch]
                h, w = round(math.sqrt(a * r)), round(math.sqrt(a / r))
                if h < height and w < width:
                    expected = (h, w)
                    break
            assert (tall[image, patch], wide[image, patch]) == expected


def test_patches_of_a_narrow_view_are_drawn_again() -> None:
    """A third of the draws fits here: one draw would erase a third of the images, ten nearly all of them."""
    erase = {"area": [0.3, 0.5], "aspect": {"range": [0.1, 10.0], "log": True}}
    plan = plans({"name": "x", "views": {"v": {"erase": [erase]}}})["v"]
    narrow = plan.sizes[:, 1] > 4 * plan.sizes[:, 0]
    patches = plan.erase[0].boxes[narrow, 0]
    assert (patches[:, 2] > 0).mean() > 0.95
    assert (patches[:, :2] + patches[:, 2:] <= plan.sizes[narrow]).all()
    assert (patches[:, 2:] < plan.sizes[narrow]).all()
    never = {"area": [0.99, 1.0], "aspect": {"values": [9.0]}}
    none = plans({"name": "x", "views": {"v": {"erase": [never]}}})["v"]
    assert not none.erase[0].boxes.any()


def test_stac_moves_half_of_the_images_inside_one_box(policy_config: Config) -> None:
    plan = plans(policy_config("stac"))["strong"]
    assert abs(plan.has_region.mean() - 0.5) < 0.05
    row = int(np.flatnonzero(plan.has_region)[0])
    box = boxes_through(
        plan.to_resized[[row]], np.concatenate([SIZES[row % 4] * 0.25, SIZES[row % 4] * 0.5])[[1, 0, 3, 2]][None]
    )
    np.testing.assert_allclose(plan.regions[row], np.round(box[0]))
    assert (plan.affine[plan.has_region] == np.eye(3)).all()
    assert (plan.to_view[:, 0, 0] > 0).all()  # no flip
    halves = (plan.erase[0].boxes[:, :, 2] > 0).sum() / (plan.erase[0].boxes.shape[0] * 3)
    assert abs(halves - 0.5) < 0.05  # half of 1..5 patches have size 0


def test_stac_keeps_a_box() -> None:
    far = {"translate_x": {"values": [1.0]}}
    config = {"name": "x", "views": {"v": {"affine": {"one_of": far}, "keep_a_box": True}}}
    assert (plans(config)["v"].to_view == np.eye(3)).all()


@given(st.integers(0, 2**31), st.data())
@settings(max_examples=20, deadline=None)
def test_hulls_against_brute_force(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    matrix = np.eye(3)
    matrix[:2] = rng.normal(size=(2, 3)) * data.draw(st.sampled_from([1.0, 50.0]))
    x1, y1, x2, y2 = box = np.concatenate([low := rng.uniform(-50, 50, 2), low + rng.uniform(0, 60, 2)])
    corners = np.array([[x, y, 1] for x in (x1, x2) for y in (y1, y2)]) @ matrix.T
    expected = [*corners[:, :2].min(0), *corners[:, :2].max(0)]
    np.testing.assert_allclose(boxes_through(matrix[None], box[None])[0], expected, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_depends_on_its_key_alone(name: str, policy_config: Config) -> None:
    whole = plans(policy_config(name), 40)
    policy = Policy.from_config(policy_config(name))
    rows = np.array([33, 2, 17])
    sizes = SIZES[rows % 4]
    boxes = np.concatenate([sizes * 0.25, sizes * 0.5], axis=1)[:, [1, 0, 3, 2]]
    for view, plan in whole.items():
        part = plan_view(policy.views[view], image_keys(0, 0, rows), sizes, boxes, np.ones(3, dtype=np.int64))
        for field in ("sizes", "to_resized", "affine", "kinds", "values", "regions", "color_first"):
            np.testing.assert_array_equal(getattr(part, field), getattr(plan, field)[rows])
        for a, b in zip(part.erase, plan.erase, strict=True):
            np.testing.assert_array_equal(a.boxes, b.boxes[rows])


def test_targets_are_clipped_and_filtered(make_source: Callable[..., Any]) -> None:
    boxes = np.array([[0, 0, 10, 10], [90, 90, 110, 110], [99.5, 0, 130, 100], [40, 40, 60, 41]])
    source = make_source([Path("a"), Path("b")], [(100, 100), (50, 100)], [boxes, np.zeros((0, 4))])
    policy = Policy.from_config({"name": "x", "views": {"v": {"min_side": 2, "min_visible": 0.2}}})
    job = make_job(policy, ["v"], source, np.array([1, 0]), np.array([3, 4]))
    none, some = view_targets(job, job.plans[0])
    assert none.boxes.shape == (0, 4)
    assert some.boxes.tolist() == [[0, 0, 10, 10], [90, 90, 100, 100]]
    assert some.labels.tolist() == [1, 2]


def test_noise_is_uniform_and_wraps_around() -> None:
    tile = noise_tile()
    counts = np.bincount(tile.ravel(), minlength=256)
    assert counts.std() / counts.mean() < 0.02
    patch = noise_patch(np.array([0, 0, 3, 4]), np.array([1023, 1022]))
    assert patch.shape == (3, 4, 3)
    np.testing.assert_array_equal(patch[1, 2], tile[0, 0])
