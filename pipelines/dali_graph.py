"""The DALI graph of a policy: decode once, one branch per view; the same definition for the GPU and the CPU.

On the GPU the decoder is `mixed` and all pixels stay there; the numbers of the plan are CPU arguments on both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from harness.types import Normalize
from pipelines.plan import KINDS
from pipelines.policy import Policy, ViewPolicy

Node = Any  # nvidia.dali.data_node.DataNode


def _input(name: str, dtype: Any, ndim: int) -> Node:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


class Graph:
    """The operations of one policy, for one channel order and device."""

    def __init__(self, policy: Policy, normalize: Normalize, gpu: bool) -> None:
        self.policy, self.gpu = policy, gpu
        self.decoded = DALIImageType.BGR if normalize.bgr else DALIImageType.RGB
        # What operations that weigh channels take the image for.
        self.weighed = DALIImageType.BGR if normalize.bgr != (policy.color_channels == "bgr") else DALIImageType.RGB
        self._step = -1 if normalize.bgr else 1
        self.mean, self.std = list(normalize.mean)[:: self._step], list(normalize.std)[:: self._step]

    def fill(self, fill: tuple[float, float, float] | None) -> list[float]:
        """A fill value in the decoded channel order; None is the mean, rounded to a pixel value."""
        return [float(round(v)) for v in self.mean] if fill is None else list(fill)[:: self._step]

    def decode(self, data: Node) -> Node:
        """Pixels as they are stored: EXIF orientation is ignored, as annotations ignore it."""
        device = "mixed" if self.gpu else "cpu"
        return fn.decoders.image(data, device=device, output_type=self.decoded, adjust_orientation=False)

    def warp(self, image: Node, matrix: Node, size: Node, border: str, fill: list[float], nearest: bool) -> Node:
        """Resampling by a source-to-destination matrix in corner-origin coordinates."""
        return fn.experimental.warp_perspective(
            image,
            matrix=matrix,
            size=size,
            inverse_map=False,
            border_mode=border,
            fill_value=fill,
            interp_type=DALIInterpType.INTERP_NN if nearest else DALIInterpType.INTERP_LINEAR,
        )

    def gray(self, image: Node) -> Node:
        """Luma in all three channels."""
        gray = fn.color_space_conversion(image, image_type=self.weighed, output_type=DALIImageType.GRAY)
        return fn.color_space_conversion(gray, image_type=DALIImageType.GRAY, output_type=DALIImageType.RGB)

    def blend(self, image: Node, base: Node, factor: Node) -> Node:
        """base + factor * (image - base), rounded and clipped."""
        a = fn.brightness_contrast(image, brightness=factor, dtype=DALIDataType.INT16)
        b = fn.brightness_contrast(base, brightness=1.0 - factor, dtype=DALIDataType.INT16)
        return fn.cast(a + b, dtype=DALIDataType.UINT8)

    def normalize(self, image: Node, size: Node) -> Node:
        """Float CHW, padded right and bottom with 0."""
        return fn.crop_mirror_normalize(
            image,
            crop=size,
            crop_pos_x=0.0,
            crop_pos_y=0.0,
            out_of_bounds_policy="pad",
            fill_values=[0.0] * 3,
            mean=self.mean,
            std=self.std,
            dtype=DALIDataType.FLOAT,
            output_layout="CHW",
        )

    def _brightness(self, image: Node, value: Node) -> Node:
        return fn.brightness_contrast(image, brightness=value)

    def _contrast(self, image: Node, value: Node) -> Node:
        gray = fn.color_space_conversion(image, image_type=self.weighed, output_type=DALIImageType.GRAY)
        mean = fn.reductions.mean(gray)
        if self.gpu:  # named arguments must be on the CPU
            return fn.cast(math.clamp(image * value + mean * (1.0 - value) + 0.5, 0.0, 255.0), dtype=DALIDataType.UINT8)
        center = fn.cast(fn.cast(mean + 0.5, dtype=DALIDataType.INT32), dtype=DALIDataType.FLOAT)
        return fn.brightness_contrast(image, contrast=value, contrast_center=center)

    def _saturation(self, image: Node, value: Node) -> Node:
        return self.blend(image, self.gray(image), value)

    def _sharpness(self, image: Node, value: Node) -> Node:
        kernel = types.Constant(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13.0, device="cpu")
        return self.blend(image, fn.filter(image, kernel), value)

    def _solarize(self, image: Node, value: Node) -> Node:
        above = fn.cast(image >= fn.cast(value, dtype=DALIDataType.INT32), dtype=DALIDataType.UINT8)
        return image ^ (above * types.Constant(np.uint8(255)))

    def _posterize(self, image: Node, value: Node) -> Node:
        return image & fn.cast(256 - fn.cast(2.0 ** (8.0 - value), dtype=DALIDataType.INT32), dtype=DALIDataType.UINT8)

    def _autocontrast(self, image: Node, _: Node) -> Node:
        low = fn.reductions.min(image, axes=[0, 1], keep_dims=True)
        high = fn.reductions.max(image, axes=[0, 1], keep_dims=True)
        span = fn.cast(high, dtype=DALIDataType.FLOAT) - fn.cast(low, dtype=DALIDataType.FLOAT)
        flat = fn.cast(span < 0.5, dtype=DALIDataType.FLOAT)
        scale = 255.0 * (1.0 - flat) / (span + flat) + flat
        return fn.cast(
            fn.cast(image, dtype=DALIDataType.FLOAT) * scale
            - fn.cast(low, dtype=DALIDataType.FLOAT) * scale * (1.0 - flat),
            dtype=DALIDataType.UINT8,
        )

    def _equalize(self, image: Node, _: Node) -> Node:
        return fn.equalize(image)

    def _hue(self, image: Node, value: Node) -> Node:
        return fn.hue(image, hue=value * 360.0)

    def _grayscale(self, image: Node, _: Node) -> Node:
        return self.gray(image)

    def _blur(self, image: Node, value: Node) -> Node:
        return fn.gaussian_blur(image, sigma=value)


def _color(graph: Graph, image: Node, kind: Node, value: Node, names: list[str]) -> Node:
    """The one operation out of `names` whose code is `kind`; the image itself if there is none."""
    if not names:
        return image
    if kind == KINDS[names[0]]:
        result = getattr(graph, f"_{names[0]}")(image, value)
    else:
        result = _color(graph, image, kind, value, names[1:])
    return result


def _colors(graph: Graph, image: Node, view: ViewPolicy, kinds: Node, values: Node) -> Node:
    for slot, names in enumerate(view.color_slots):
        image = _color(graph, image, kinds[slot], values[slot], [name for name in names if name != "identity"])
    return image


def _define_view(graph: Graph, image: Node, view: ViewPolicy) -> Node:
    """One branch: geometry, colour, erasing, normalisation."""
    fill, nearest = graph.fill(view.fill), graph.policy.interpolation == "nearest"
    size = _input(f"{view.name} size", DALIDataType.FLOAT, 1)
    padded = _input(f"{view.name} canvas", DALIDataType.FLOAT, 1)
    resize = _input(f"{view.name} resize", DALIDataType.FLOAT, 2)
    border = "replicate" if view.zoom is None else "constant"
    source = graph.policy.color_at == "source"
    if view.color:
        kinds = _input(f"{view.name} kinds", DALIDataType.INT32, 1)
        values = _input(f"{view.name} values", DALIDataType.FLOAT, 1)
    if view.color and source:
        image = _colors(graph, image, view, kinds, values)
    if view.affine is None or source:
        image = graph.warp(image, resize, size, "constant" if view.affine else border, fill, nearest)
        if view.color and not source:
            image = _colors(graph, image, view, kinds, values)
    else:
        affine = _input(f"{view.name} affine", DALIDataType.FLOAT, 2)
        color_first = _input(f"{view.name} color first", DALIDataType.BOOL, 0)
        if color_first:
            image = graph.warp(image, resize, size, border, fill, nearest)
            image = _colors(graph, image, view, kinds, values)
            image = graph.warp(image, affine, size, "constant", fill, nearest)
        else:
            image = graph.warp(image, resize, size, "constant", fill, nearest)
            image = _colors(graph, image, view, kinds, values)
    for number, _ in enumerate(view.erase):
        patches = _input(f"{view.name} erase {number}", DALIDataType.FLOAT, 2)
        image = fn.erase(
            image, anchor=patches[0], shape=patches[1], axis_names="HW", fill_value=graph.fill(view.erase_fill)
        )
    return graph.normalize(image, padded)


@pipeline_def(enable_conditionals=True)
def define(graph: Graph, views: list[ViewPolicy]) -> Any:
    data = fn.external_source(name="data", dtype=DALIDataType.UINT8, ndim=1, no_copy=True)
    image = graph.decode(data)
    stored = image.shape()
    if graph.policy.antialias:
        shrunk = _input("shrunk", DALIDataType.FLOAT, 1)
        image = fn.resize(image, size=shrunk, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
    return (stored, *[_define_view(graph, image, view) for view in views])
