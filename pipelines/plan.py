"""From a view's policy and random keys to the numbers that every backend turns into pixels.

Everything is vectorised over the batch and pure: the same keys give the same plan whatever the backend. Matrices are
3x3 in corner-origin coordinates (pixel i covers [i, i + 1]), source to destination. B images.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from harness.core.draws import uniform
from pipelines.policy import COLOR_OPS, Affine, Erase, Policy, Range, Resize, ViewPolicy

KINDS = {name: number for number, name in enumerate(COLOR_OPS)}
NOISE_SIDE = 1024
# YIQ, of the same coefficients as in DALI: hue is an angle in its I, Q plane. The first row is luma.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_ERASE_TRIES = 10  # as torchvision's RandomErasing, which draws a patch anew until it fits

# What geometry an image gets before or after its colour operations, beside the first warp.
NOTHING, LINEAR, NEAREST, IN_BOX = range(4)


@functools.cache
def noise_tile() -> np.ndarray:
    """(NOISE_SIDE, NOISE_SIDE, 3) uint8 uniform random bytes, the same in every process.

    Gaussian noise of standard deviation 1 on [0, 1] images that wraps around when it is cast to bytes, as Unbiased
    Teacher's code does, is uniform to within 1e-8.
    """
    draws = uniform(np.arange(NOISE_SIDE), NOISE_SIDE * 3, "noise tile")
    return (draws * 256).astype(np.uint8).reshape(NOISE_SIDE, NOISE_SIDE, 3)


def _stretches(start: int, length: int) -> list[slice]:
    """The parts of a side of the noise tile, which repeats, that make up a length."""
    end = start + length
    bases = range(start // NOISE_SIDE * NOISE_SIDE, end + 1, NOISE_SIDE)
    return [slice(max(start - base, 0), min(end - base, NOISE_SIDE)) for base in bases]


def noise_patch(box: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 noise of one patch; the tile repeats."""
    rows, columns = (_stretches(int(offset[i]), int(box[2 + i])) for i in (0, 1))
    tile = noise_tile()
    return np.concatenate([np.concatenate([tile[row, column] for column in columns], axis=1) for row in rows])


def hue_matrix(turns: float) -> np.ndarray:
    """(3, 3) RGB -> RGB matrix that turns the hue in YIQ space."""
    angle = 2 * np.pi * turns
    turn = np.array(
        [[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]],
    )
    return np.linalg.inv(YIQ) @ turn @ YIQ


@dataclass
class ErasePlan:
    """Patches of one erasing step."""

    boxes: np.ndarray  # (B, N, 4) int64 top, left, height, width, inside the view; unused rows are 0
    noise: np.ndarray | None  # (B, N, 2) int64 top, left of the patch's noise in `noise_tile`; None: constant fill


@dataclass
class ViewPlan:
    """What happens to B images in one view.

    The image is resized (`to_resized`), gets its colour operations and its geometric one (`affine`, or `region_affine`
    inside `regions`) in the order that `color_first` says, and is erased. With `color_at: source` the colour operations
    come before everything. Where the geometric operation directly follows the resizing and both interpolate linearly,
    they are one warp, which saves a resampling.
    """

    policy: ViewPolicy
    sizes: np.ndarray  # (B, 2) int64 height, width of the view
    to_resized: np.ndarray  # (B, 3, 3) float64: resize, flip and zoom
    affine: np.ndarray  # (B, 3, 3) float64: the geometric operation; the identity where there is none
    color_first: np.ndarray  # (B,) bool
    kinds: np.ndarray  # (B, K) int64, index into COLOR_OPS
    values: np.ndarray  # (B, K) float64
    nearest: np.ndarray  # (B,) bool: interpolate `affine` by the nearest neighbour
    regions: np.ndarray  # (B, 4) int64 left, top, right, bottom of the in-box operation; empty where there is none
    region_affine: np.ndarray  # (B, 3, 3) float64, in the region's own coordinates
    erase: list[ErasePlan]

    @property
    def to_view(self) -> np.ndarray:
        """(B, 3, 3) float64 original pixels -> view pixels; in-box operations move pixels and not boxes."""
        return self.affine @ self.to_resized

    @property
    def has_affine(self) -> np.ndarray:
        """(B,) bool: there is a geometric operation on the whole image."""
        return (self.affine != np.eye(3)).any((1, 2))

    @property
    def has_region(self) -> np.ndarray:
        """(B,) bool: there is one inside a box."""
        return (self.regions[:, 2] > self.regions[:, 0]) & (self.regions[:, 3] > self.regions[:, 1])

    def geometry(self, color_at: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a backend does beside the colour operations.

        Returns:
            (B, 3, 3) the first warp, (B,) geometry before and (B,) geometry after the colour operations, each
            NOTHING, LINEAR or NEAREST (a warp by `affine`), or IN_BOX.
        """
        apart = self.has_affine & (self.nearest | (self.color_first & (color_at == "view")))
        first = np.where((self.has_affine & ~apart)[:, None, None], self.to_view, self.to_resized)
        kind = np.where(self.has_region, IN_BOX, np.where(~apart, NOTHING, np.where(self.nearest, NEAREST, LINEAR)))
        return first, np.where(self.color_first, NOTHING, kind), np.where(self.color_first, kind, NOTHING)


def _identity(count: int) -> np.ndarray:
    return np.tile(np.eye(3), (count, 1, 1))


def _resized(resize: Resize | None, sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(B, 2) int64 sizes after keep-ratio resizing, as mmdetection rounds them: int(side * scale + 0.5)."""
    if resize is None:
        return sizes.copy()
    scale = np.minimum(resize.short.sample(u) / sizes.min(1), resize.max / sizes.max(1))
    return np.maximum((sizes * scale[:, None] + 0.5).astype(np.int64), 1)


def _geometry(view: ViewPolicy, keys: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and matrices of resize, flip and zoom."""
    u = uniform(keys, 5, f"{view.geometry_of} geometry")
    new = _resized(view.resize, sizes, u[:, 0])
    height, width = new[:, 0].astype(np.float64), new[:, 1].astype(np.float64)
    flip = u[:, 1] < view.flip
    matrix = np.zeros((len(keys), 3, 3))
    matrix[:, 0, 0] = np.where(flip, -1.0, 1.0) * width / sizes[:, 1]
    matrix[:, 1, 1] = height / sizes[:, 0]
    matrix[:, 0, 2] = np.where(flip, width, 0.0)
    matrix[:, 2, 2] = 1.0
    if view.zoom is not None:
        scale = view.zoom.sample(u[:, 2])
        matrix[:, :2] *= scale[:, None, None]
        matrix[:, 0, 2] += u[:, 3] * width * (1.0 - scale)
        matrix[:, 1, 2] += u[:, 4] * height * (1.0 - scale)
    return new, matrix


def _choose(ops: dict[str, Range], pick: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index into `ops` and value for each image."""
    index = (pick * len(ops)).astype(np.int64)
    values = np.stack([draw.sample(u) for draw in ops.values()])
    return index, values[index, np.arange(len(index))]


def _colors(view: ViewPolicy, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, K) operations and values."""
    kinds, values = [], []
    for number, step in enumerate(view.color):
        codes = np.array([KINDS[name] for name in step.ops])
        u = uniform(keys, 1 + 2 * len(codes), f"{view.name} color {number}")
        active = (u[:, 0] < step.probability)[:, None]
        if step.all:
            order = np.argsort(u[:, 1 : 1 + len(codes)], axis=1)
            drawn = np.stack(
                [draw.sample(u[:, 1 + len(codes) + i]) for i, draw in enumerate(step.ops.values())], axis=1
            )
            kind, value = codes[order], np.take_along_axis(drawn, order, axis=1)
        else:
            index, value = _choose(step.ops, u[:, 1], u[:, 2])
            kind, value = codes[index][:, None], value[:, None]
        kinds.append(np.where(active, kind, 0))
        values.append(value)
    if not kinds:
        return np.zeros((len(keys), 0), dtype=np.int64), np.zeros((len(keys), 0))
    all_kinds, all_values = np.concatenate(kinds, axis=1), np.concatenate(values, axis=1)
    # Pixels are whole numbers: a threshold between two of them is the upper one, and nothing reaches 256.
    solarize = all_kinds == KINDS["solarize"]
    all_values = np.where(solarize, np.ceil(all_values), all_values)
    return np.where(solarize & (all_values > 255), 0, all_kinds), all_values


def _about(matrix: np.ndarray, center: np.ndarray) -> np.ndarray:
    """The matrix applied about (B, 2) centres x, y."""
    matrix = matrix.copy()
    matrix[:, :2, 2] += center - np.einsum("bij,bj->bi", matrix[:, :2, :2], center)
    return matrix


def _shear(slope: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(B, 3, 3) shears about the origin by (B,) angles in radians along both axes.

    With `tanh` and `tan`, x' = x - slope(angle of x) y, then y' = y + slope(angle of y) x', as Soft Teacher's code.
    With `scikit_image` first y and then x, each shrinking the other axis by the cosine, as imgaug 0.4 builds it of
    scikit-image's AffineTransform (STAC): an image sheared along both axes by 30 degrees keeps 0.75 of its area.
    """
    matrix = _identity(len(x))
    if slope == "scikit_image":
        matrix[:, 0, 0] = np.cos(y) - np.sin(x) * np.sin(y)
        matrix[:, 0, 1] = -np.sin(x)
        matrix[:, 1, 0] = np.cos(x) * np.sin(y)
        matrix[:, 1, 1] = np.cos(x)
        return matrix
    factor = np.tanh if slope == "tanh" else np.tan
    along_x, along_y = factor(-x), factor(y)
    matrix[:, 0, 1], matrix[:, 1, 0] = along_x, along_y
    matrix[:, 1, 1] = 1.0 + along_x * along_y  # y' = y + k' x' of the already sheared x'
    return matrix


def _affine_matrix(affine: Affine, ops: dict[str, Range], u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(B, 3, 3) one drawn operation on images of (B, 2) sizes h, w. Columns of u: pick, value, second value."""
    index, value = _choose(ops, u[:, 0], u[:, 1])
    _, second = _choose(ops, u[:, 0], u[:, 2])
    names = np.array(list(ops))[index]
    size = sizes[:, ::-1].astype(np.float64)  # w, h
    matrix = _identity(len(u))
    for axis, name in enumerate(("translate_x", "translate_y")):
        matrix[:, axis, 2] = np.where(names == name, value * size[:, axis], 0.0)
    rotate = names == "rotate"
    angle = np.deg2rad(np.where(rotate, value, 0.0))
    rotation = _identity(len(u))
    rotation[:, 0, 0] = rotation[:, 1, 1] = np.cos(angle)
    rotation[:, 1, 0], rotation[:, 0, 1] = np.sin(angle), -np.sin(angle)
    along_x = np.where(np.isin(names, ("shear_x", "shear_xy", "shear_both")), value, 0.0)
    along_y = np.where(np.isin(names, ("shear_y", "shear_both")), value, np.where(names == "shear_xy", second, 0.0))
    shear = _shear(affine.slope, np.deg2rad(along_x), np.deg2rad(along_y))
    if affine.shear_center:
        shear = _about(shear, size / 2.0)
    return shear @ _about(rotation, size / 2.0) @ matrix


def _pick_boxes(u: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Row of one uniformly drawn box of each image; images without boxes get row 0."""
    return np.where(counts > 0, offsets + (u * counts).astype(np.int64), 0)


def boxes_through(matrices: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Axis-aligned hulls of mapped boxes.

    Args:
        matrices: (M, 3, 3), one per box.
        boxes: (M, 4) xyxy.

    Returns:
        (M, 4) xyxy, not clipped.
    """
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2)
    mapped = np.einsum("mij,mkj->mki", matrices[:, :2, :2], corners) + matrices[:, None, :2, 2]
    return np.concatenate([mapped.min(1), mapped.max(1)], axis=1)


def _sides(area: np.ndarray, aspect: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of several patches that is smaller than the view on both sides.

    Args:
        area, aspect: (B, T, N) pixels and height / width of T candidates for each of N patches.
        limit: (B, 2) height, width of the view.

    Returns:
        (B, N) heights and widths in whole pixels, 0 where no candidate fits.
    """
    tall, wide = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (tall < limit[:, 0, None, None]) & (wide < limit[:, 1, None, None])
    first = fits.argmax(1)[:, None]
    tall, wide = (np.take_along_axis(side * fits, first, axis=1)[:, 0] for side in (tall, wide))
    return tall, wide


def _erase(step: Erase, number: int, view: ViewPolicy, keys: np.ndarray, sizes: np.ndarray) -> ErasePlan:
    """Patches of one step, clipped to the view."""
    most = step.max_count
    u = uniform(keys, 2 + 4 * most, f"{view.name} erase {number}")
    count = np.where(u[:, 0] < step.probability, step.count.sample(u[:, 1]), 0)
    a, b, top, left = (u[:, 2 + i * most : 2 + (i + 1) * most] for i in range(4))
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    if step.ratio is not None:
        ratio = step.ratio.sample(a)
        tall, wide = np.floor(ratio * height), np.floor(ratio * (height if step.square else width))
    else:
        assert step.area is not None
        assert step.aspect is not None
        more = uniform(keys, 2 * (_ERASE_TRIES - 1) * most, f"{view.name} erase {number} again")
        again = more.reshape(len(keys), 2, _ERASE_TRIES - 1, most)
        tries = [np.concatenate([one[:, None], again[:, i]], axis=1) for i, one in enumerate((a, b))]
        area = step.area.sample(tries[0]) * height[:, None] * width[:, None]
        tall, wide = _sides(area, step.aspect.sample(tries[1]), sizes)
    if step.centered:
        y, x = np.floor(top * height - tall / 2), np.floor(left * width - wide / 2)
    else:
        y, x = np.floor(top * (height - tall + 1)), np.floor(left * (width - wide + 1))
    bottom, right = np.minimum(y + tall, height), np.minimum(x + wide, width)
    y, x = np.maximum(y, 0), np.maximum(x, 0)
    used = (np.arange(most) < count[:, None]) & (bottom > y) & (right > x)
    boxes = np.stack([y, x, bottom - y, right - x], axis=2) * used[:, :, None]
    offsets = uniform(keys, 2 * most, f"{view.name} noise {number}").reshape(-1, most, 2)
    return ErasePlan(boxes.astype(np.int64), (offsets * NOISE_SIDE).astype(np.int64) if step.noise else None)


def plan_view(
    view: ViewPolicy,
    keys: np.ndarray,
    sizes: np.ndarray,
    boxes: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> ViewPlan:
    """Draws everything about one view.

    Args:
        view: its policy.
        keys: (B,) int64 of `harness.core.draws.image_keys`.
        sizes: (B, 2) int64 height, width of the stored images.
        boxes: (M, 4) boxes of all images in original pixels, for in-box operations.
        counts: (B,) int64 boxes of each image.
    """
    count = len(keys)
    new, matrix = _geometry(view, keys, sizes)
    kinds, values = _colors(view, keys)
    u = uniform(keys, 9, f"{view.name} affine") if view.affine or view.shuffle else np.zeros((count, 9))
    color_first = u[:, 0] < 0.5 if view.shuffle else np.ones(count, dtype=bool)
    affine, region_affine, regions = _identity(count), _identity(count), np.zeros((count, 4), dtype=np.int64)
    nearest = np.zeros(count, dtype=bool)
    if view.affine is not None:
        affine = _affine_matrix(view.affine, view.affine.ops, u[:, 1:4], new)
        nearest = u[:, 4] < view.affine.nearest
    if view.affine is not None and view.affine.in_box_ops and boxes is not None and counts is not None and len(boxes):
        inside = (u[:, 5] < view.affine.in_box_probability) & (counts > 0)
        rows = _pick_boxes(u[:, 6], counts, np.cumsum(counts) - counts)
        limit = np.concatenate([new[:, ::-1], new[:, ::-1]], axis=1)
        regions = np.clip(np.round(boxes_through(matrix, boxes[rows].astype(np.float64))).astype(np.int64), 0, limit)
        regions *= inside[:, None]
        again = uniform(keys, 3, f"{view.name} in box")
        shape = np.stack([regions[:, 3] - regions[:, 1], regions[:, 2] - regions[:, 0]], axis=1)
        region_affine = _affine_matrix(view.affine, view.affine.in_box_ops, again, shape)
        affine[inside] = np.eye(3)
    erase = [_erase(step, number, view, keys, new) for number, step in enumerate(view.erase)]
    plan = ViewPlan(view, new, matrix, affine, color_first, kinds, values, nearest, regions, region_affine, erase)
    if view.keep_a_box and boxes is not None and counts is not None:
        _keep_a_box(plan, boxes, counts)
    return plan


def _keep_a_box(plan: ViewPlan, boxes: np.ndarray, counts: np.ndarray) -> None:
    """Undoes everything but the resizing for images whose boxes would all leave the view."""
    image = np.repeat(np.arange(len(counts)), counts)
    hulls = np.clip(boxes_through(plan.to_view[image], boxes.astype(np.float64)), 0, plan.sizes[image][:, [1, 0, 1, 0]])
    inside = (hulls[:, 2:] > hulls[:, :2]).all(1)
    lost = (counts > 0) & (np.bincount(image[inside], minlength=len(counts)) == 0)
    plan.affine[lost] = np.eye(3)
    plan.kinds[lost] = KINDS["identity"]
    plan.regions[lost] = 0
    for erase in plan.erase:
        erase.boxes[lost] = 0


def shrunk_sizes(policy: Policy, plans: list[ViewPlan], sizes: np.ndarray) -> np.ndarray:
    """Size to which each image is shrunk, with antialiasing, before all views: the largest that any of them needs.

    Returns:
        (B, 2) int64; the stored size where the policy does not antialias or a view enlarges.
    """
    if not policy.antialias:
        return sizes
    scale = np.max([np.linalg.norm(plan.to_resized[:, :2, :2], axis=1)[:, ::-1] for plan in plans], axis=0)
    return np.clip(np.round(sizes * scale).astype(np.int64), 1, sizes)


def from_shrunk(sizes: np.ndarray, shrunk: np.ndarray) -> np.ndarray:
    """(B, 3, 3) shrunk pixels -> original pixels."""
    matrix = _identity(len(sizes))
    matrix[:, 0, 0] = sizes[:, 1] / shrunk[:, 1]
    matrix[:, 1, 1] = sizes[:, 0] / shrunk[:, 0]
    return matrix
