"""The DALI graph of a policy: decode once, one branch per view; the same definition for the GPU and the CPU.

On the GPU the decoder is `mixed` and all pixels stay there; the numbers of the plan are CPU arguments on both.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from harness.core.types import Normalize, UserError
from pipelines.plan import IN_BOX, KINDS, LINEAR, NEAREST, YIQ, hue_matrix
from pipelines.policy import Policy, ViewPolicy

Node = Any  # nvidia.dali.data_node.DataNode
_FLOAT = DALIDataType.FLOAT


def _input(name: str, dtype: Any, ndim: int) -> Node:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


def _kernels() -> Any:
    """What the CPU does with functions of its own; other devices need neither them nor numba."""
    try:
        return import_module("pipelines.dali.operators")
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
            raise
        raise UserError(f"set NUMBA_CACHE_DIR to a folder that can be written, for compiled code: {error}") from error


class Graph:
    """The operations of one policy, for one channel order and device."""

    def __init__(self, policy: Policy, normalize: Normalize, gpu: bool) -> None:
        self.policy, self.gpu = policy, gpu
        self.kernels = None if gpu else _kernels()
        self.decoded = DALIImageType.BGR if normalize.bgr else DALIImageType.RGB
        # What operations that weigh channels take the image for.
        self.weighed = DALIImageType.BGR if normalize.bgr != (policy.color_channels == "bgr") else DALIImageType.RGB
        # Through channels given as red, green and blue, to the order they are decoded in.
        self.step = -1 if normalize.bgr else 1
        self.mean, self.std = list(normalize.mean)[:: self.step], list(normalize.std)[:: self.step]

    def fill(self, fill: tuple[float, float, float] | None) -> list[float]:
        """A fill value in the decoded channel order; None is the mean, rounded to a pixel value."""
        return [float(round(v)) for v in self.mean] if fill is None else list(fill)[:: self.step]

    def decode(self, data: Node) -> Node:
        """Pixels as they are stored: EXIF orientation is ignored, as annotations ignore it."""
        device = "mixed" if self.gpu else "cpu"
        return fn.decoders.image(data, device=device, output_type=self.decoded, adjust_orientation=False)

    def shrink(self, image: Node, size: Node) -> Node:
        """Resizing with antialiasing."""
        if self.kernels is not None:
            return self.kernels.shrink(image, size)
        return fn.resize(image, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)

    def warp(self, image: Node, matrix: Node, size: Node, border: str, fill: list[float], nearest: bool) -> Node:
        """Resampling by a source-to-destination matrix in corner-origin coordinates."""
        if self.kernels is not None and not nearest:
            return self.kernels.warp(image, matrix, size, fill, border == "replicate")
        return fn.experimental.warp_perspective(
            image,
            matrix=matrix,
            size=size,
            inverse_map=False,
            border_mode=border,
            fill_value=fill,
            interp_type=DALIInterpType.INTERP_NN if nearest else DALIInterpType.INTERP_LINEAR,
        )

    def in_order(self, matrix: np.ndarray) -> np.ndarray:
        """(3, 3) a matrix over red, green and blue, for channels in the order they are weighed in."""
        return matrix if self.weighed == DALIImageType.RGB else matrix[::-1, ::-1]

    def on_device(self, small: Node) -> Node:
        """A small CPU array where an operation takes it as an input."""
        return small.gpu() if self.gpu else small

    def gray(self, image: Node) -> Node:
        """Luma in all three channels."""
        gray = fn.color_space_conversion(image, image_type=self.weighed, output_type=DALIImageType.GRAY)
        return fn.color_space_conversion(gray, image_type=DALIImageType.GRAY, output_type=DALIImageType.RGB)

    def normalize(self, image: Node, size: Node) -> Node:
        """Float CHW, padded right and bottom with 0."""
        if self.kernels is not None:
            return self.kernels.normalize(image, size, self.mean, self.std)
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

    def renders_at_once(self, view: ViewPolicy) -> bool:
        """Whether the CPU has one compiled loop for all of a view."""
        affine = view.affine
        linear = self.policy.interpolation == "linear" and (affine is None or not (affine.nearest or affine.in_box_ops))
        elsewhere = any(step.noise for step in view.erase) or any("blur" in step.ops for step in view.color)
        return self.kernels is not None and linear and not elsewhere

    @property
    def weights(self) -> np.ndarray:
        """(10, 3) what saturation and hue are made of, see `kernels.render`."""
        # The matrix of an angle is still + cos * even + sin * odd; three angles give the three parts.
        at_0, at_90, at_180 = (self.in_order(hue_matrix(turns)) for turns in (0.0, 0.25, 0.5))
        still, even = (at_0 + at_180) / 2.0, (at_0 - at_180) / 2.0
        luma = self.in_order(np.tile(YIQ[0], (3, 1)))[:1]
        return np.concatenate([luma, still, even, at_90 - still])

    @property
    def red(self) -> int:
        """Bits before the channel that is weighed as red, in a packed pixel."""
        return 0 if self.weighed == DALIImageType.RGB else 16

    def render(self, image: Node, view: ViewPolicy) -> Node:
        """The whole view in one."""
        assert self.kernels is not None
        where = [self.policy.color_at == "source", self.red, 0]
        fills = [self.fill(view.fill), self.fill(view.erase_fill)]
        colors = np.concatenate([[self.mean, self.std, *fills, where], self.weights])
        extent, plan = _input(f"{view.name} extent", DALIDataType.UINT8, 3), _input(f"{view.name} plan", _FLOAT, 2)
        return self.kernels.render(image, extent, plan, len(view.color_slots), colors)

    # One method per colour operation, for a GPU; a CPU has them compiled, but for the blur.

    def _brightness(self, image: Node, value: Node) -> Node:
        return fn.brightness_contrast(image, brightness=value)

    def _contrast(self, image: Node, value: Node) -> Node:
        gray = fn.color_space_conversion(image, image_type=self.weighed, output_type=DALIImageType.GRAY)
        mean = math.floor(fn.reductions.mean(gray) + 0.5)
        # Named arguments, as a center of the contrast, must be on the CPU.
        return fn.cast(math.clamp(image * value + mean * (1.0 - value), 0.0, 255.0), dtype=DALIDataType.UINT8)

    def _saturation(self, image: Node, value: Node) -> Node:
        a = fn.brightness_contrast(image, brightness=value, dtype=DALIDataType.INT16)
        b = fn.brightness_contrast(self.gray(image), brightness=1.0 - value, dtype=DALIDataType.INT16)
        return fn.cast(a + b, dtype=DALIDataType.UINT8)

    def _sharpness(self, image: Node, value: Node) -> Node:
        smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13.0
        same = np.zeros((3, 3), dtype=np.float32)
        same[1, 1] = 1.0
        kernel = types.Constant(same, device="cpu") * value + types.Constant(smooth, device="cpu") * (1.0 - value)
        inner = fn.filter(image, self.on_device(kernel), mode="valid")
        return self.paste(image, [inner], types.Constant(np.array([[0, 0], [1, 1]], dtype=np.int32), device="cpu"))

    def _solarize(self, image: Node, value: Node) -> Node:
        every_bit = types.Constant(255, dtype=DALIDataType.UINT8)
        return image ^ ((image >= fn.cast(value, dtype=DALIDataType.UINT8)) * every_bit)

    def _posterize(self, image: Node, value: Node) -> Node:
        mask = 256 - fn.cast(2.0 ** (8.0 - value), dtype=DALIDataType.INT32)
        return image & fn.cast(mask, dtype=DALIDataType.UINT8)

    def _autocontrast(self, image: Node, _: Node) -> Node:
        low = fn.cast(fn.reductions.min(image, axes=[0, 1]), dtype=DALIDataType.FLOAT)
        high = fn.cast(fn.reductions.max(image, axes=[0, 1]), dtype=DALIDataType.FLOAT)
        flat = fn.cast(high - low < 0.5, dtype=DALIDataType.FLOAT)  # a channel of one value stays
        scale = 255.0 * (1.0 - flat) / (high - low + flat) + flat
        stretched = (image - low * (1.0 - flat)) * scale
        return fn.cast(math.clamp(math.floor(stretched + 1e-4), 0.0, 255.0), dtype=DALIDataType.UINT8)

    def _equalize(self, image: Node, _: Node) -> Node:
        # DALI counts pixels up to a level, PIL those below it: the same of the inverted image, inverted.
        every_bit = types.Constant(255, dtype=DALIDataType.UINT8)
        return fn.equalize(image ^ every_bit) ^ every_bit

    def _hue(self, image: Node, value: Node) -> Node:
        if self.weighed == DALIImageType.RGB:
            return fn.hue(image, hue=value * 360.0)
        return self.swap(fn.hue(self.swap(image), hue=value * 360.0))

    def swap(self, image: Node) -> Node:
        """Red and blue exchanged."""
        return fn.color_space_conversion(image, image_type=DALIImageType.RGB, output_type=DALIImageType.BGR)

    def _grayscale(self, image: Node, _: Node) -> Node:
        return self.gray(image)

    def _blur(self, image: Node, value: Node) -> Node:
        radius = self.policy.blur_radius
        taps = np.arange(-radius, radius + 1, dtype=np.float32)
        kernel = math.exp(types.Constant(-(taps**2) / 2.0, device="cpu") / (value * value))
        kernel = self.on_device(kernel / fn.reductions.sum(kernel))
        image = fn.filter(image, fn.reshape(kernel, shape=[-1, 1]))
        return fn.filter(image, fn.reshape(kernel, shape=[1, -1]))

    def in_box(self, image: Node, inputs: dict[str, Node], fill: list[float]) -> Node:
        """An operation inside one box: cut out, warped, pasted back."""
        anchor, shape = inputs["anchor"], inputs["shape"]
        cut = fn.slice(image, anchor, shape, axes=[0, 1])
        size = fn.cast(shape, dtype=DALIDataType.FLOAT)
        cut = self.warp(cut, inputs["region affine"], size, "constant", fill, False)
        return self.paste(image, [cut], fn.stack(anchor * 0, anchor))

    def paste(self, image: Node, patches: list[Node], anchors: Node) -> Node:
        """Patches over an image; the first anchor is the image's own."""
        size = fn.cast(image.shape()[:2], dtype=DALIDataType.INT32)
        return fn.multi_paste(image, *patches, out_anchors=anchors, output_size=size)


def _color(graph: Graph, image: Node, kind: Node, value: Node, names: list[str]) -> Node:
    """The one operation out of `names` whose code is `kind`; the image itself if there is none."""
    if not names:
        return image
    if kind == KINDS[names[0]]:
        result = getattr(graph, f"_{names[0]}")(image, value)
    else:
        result = _color(graph, image, kind, value, names[1:])
    return result


def _colors(graph: Graph, image: Node, view: ViewPolicy) -> Node:
    """All colour operations in turn."""
    if graph.kernels is not None:
        return _compiled_colors(graph, image, view)
    kinds, values = _input(f"{view.name} kinds", DALIDataType.INT32, 1), _input(f"{view.name} values", _FLOAT, 1)
    for slot, names in enumerate(view.color_slots):
        image = _color(graph, image, kinds[slot], values[slot], [name for name in names if name != "identity"])
    return image


def _compiled_colors(graph: Graph, image: Node, view: ViewPolicy) -> Node:
    """Slots in one operation up to the next that may be a blur, which is DALI's."""
    assert graph.kernels is not None
    names = view.color_slots
    if {name for slot in names for name in slot} <= {"identity"}:
        return image
    steps = _input(f"{view.name} steps", _FLOAT, 2)
    start = 0
    for end in [*(n for n, slot in enumerate(names) if "blur" in slot), len(names)]:
        if end > start:
            image = graph.kernels.recolor(image, steps[start:end], graph.weights, graph.red)
        if end < len(names):
            image = _blurred(graph, image, steps[end, 0], steps[end, 1])
            start = end + (set(names[end]) <= {"blur", "identity"})
    return image


def _blurred(graph: Graph, image: Node, kind: Node, value: Node) -> Node:
    assert graph.kernels is not None
    if kind == float(graph.kernels.kernels.BLUR):
        result = graph._blur(image, value)
    else:
        result = image
    return result


def _geometry(graph: Graph, image: Node, view: ViewPolicy, kind: Node, inputs: dict[str, Node]) -> Node:
    """The geometric operation of `kind`, if any."""
    fill, affine, size = graph.fill(view.fill), inputs["affine"], inputs["size"]
    assert view.affine is not None
    if kind == LINEAR:
        image = graph.warp(image, affine, size, "constant", fill, False)
    # `and` would make a graph condition of what is known now.
    if view.affine.nearest:  # noqa: SIM102
        if kind == NEAREST:
            image = graph.warp(image, affine, size, "constant", fill, True)
    if view.affine.in_box_ops:  # noqa: SIM102
        if kind == IN_BOX:
            image = graph.in_box(image, inputs, fill)
    return image


def _erase(graph: Graph, image: Node, view: ViewPolicy, inputs: dict[str, Node]) -> Node:
    """Constant patches, then noise patches."""
    if "patches" in inputs:
        patches, fill = inputs["patches"], graph.fill(view.erase_fill)
        image = fn.erase(image, anchor=patches[0], shape=patches[1], axis_names="HW", fill_value=fill)
    noises = sum(step.max_count for step in view.erase if step.noise)
    if noises:
        anchors = _input(f"{view.name} noise anchors", DALIDataType.INT32, 2)
        noise = [
            fn.external_source(name=f"{view.name} noise {i}", dtype=DALIDataType.UINT8, ndim=3, layout="HWC")
            for i in range(noises)
        ]
        image = graph.paste(image, [graph.on_device(patch) for patch in noise], anchors)
    return image


def _first_warp(graph: Graph, image: Node, view: ViewPolicy, inputs: dict[str, Node], border: str) -> Node:
    """The warp by which every view begins."""
    nearest = graph.policy.interpolation == "nearest"
    return graph.warp(image, inputs["first"], inputs["size"], border, graph.fill(view.fill), nearest)


def _define_view(graph: Graph, image: Node, view: ViewPolicy) -> Node:
    """One branch: geometry and colour in the view's order, erasing, normalisation."""
    if graph.renders_at_once(view):
        return graph.render(image, view)
    at_source = graph.policy.color_at == "source"
    inputs = {
        "size": _input(f"{view.name} size", DALIDataType.FLOAT, 1),
        "first": _input(f"{view.name} first", DALIDataType.FLOAT, 2),
        "canvas": _input(f"{view.name} canvas", DALIDataType.FLOAT, 1),
    }
    if any(not step.noise for step in view.erase):
        inputs["patches"] = _input(f"{view.name} patches", DALIDataType.FLOAT, 2)
    if view.color and at_source:
        image = _colors(graph, image, view)
    if view.zoom is not None:
        image = _first_warp(graph, image, view, inputs, "constant")
    elif view.affine is None:
        image = _first_warp(graph, image, view, inputs, "replicate")
    else:
        composite = _input(f"{view.name} composite", DALIDataType.BOOL, 0)
        if composite:
            image = _first_warp(graph, image, view, inputs, "constant")
        else:
            image = _first_warp(graph, image, view, inputs, "replicate")
    if view.affine is not None:
        inputs["affine"] = _input(f"{view.name} affine", DALIDataType.FLOAT, 2)
        if view.affine.in_box_ops:
            inputs["anchor"] = _input(f"{view.name} region anchor", DALIDataType.INT32, 1)
            inputs["shape"] = _input(f"{view.name} region shape", DALIDataType.INT32, 1)
            inputs["region affine"] = _input(f"{view.name} region affine", DALIDataType.FLOAT, 2)
        if view.affine.nearest or view.affine.in_box_ops:
            before = _input(f"{view.name} before", DALIDataType.INT32, 0)
            image = _geometry(graph, image, view, before, inputs)
    if view.color and not at_source:
        image = _colors(graph, image, view)
    if view.affine is not None and not at_source:
        after = _input(f"{view.name} after", DALIDataType.INT32, 0)
        image = _geometry(graph, image, view, after, inputs)
    image = _erase(graph, image, view, inputs)
    return graph.normalize(image, inputs["canvas"])


@pipeline_def(enable_conditionals=True)
def define(graph: Graph, views: list[ViewPolicy]) -> Any:
    """Decodes each file once and renders every view of it.

    Outputs: (2 or 3,) int64 stored shapes, then for each view the normalised, padded batch.
    """
    data = fn.external_source(name="data", dtype=DALIDataType.UINT8, ndim=1, no_copy=True)
    image = graph.decode(data)
    stored = image.shape()
    if graph.policy.antialias:
        shrunk, shrinks = _input("shrunk", DALIDataType.FLOAT, 1), _input("shrinks", DALIDataType.BOOL, 0)
        if shrinks:  # resizing to the same size would cost as much
            image = graph.shrink(image, shrunk)
    return (stored, *[_define_view(graph, image, view) for view in views])


@pipeline_def
def define_decode(gpu: bool) -> Any:
    """Decodes and returns only the shapes."""
    data = fn.external_source(name="data", dtype=DALIDataType.UINT8, ndim=1, no_copy=True)
    device = "mixed" if gpu else "cpu"
    return fn.decoders.image(data, device=device, output_type=DALIImageType.RGB, adjust_orientation=False).shape()
