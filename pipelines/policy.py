"""Augmentation policies as data: which views there are, which operations each has, in which ranges and order.

A policy is plain data (conf/augment/*.yaml); nothing here draws numbers or touches pixels. `pipelines.plan` turns a
view and random keys into numbers, and the backends turn those numbers into pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from harness.core import validate
from harness.core.types import UserError
from harness.core.validate import Limits, Name, Pixels, Share

# What an operation's value means, and the smallest and largest that it may be.
# Of colour operations PIL's enhancers, ImageOps and ImageFilter define the results.
_COLOR_LIMITS = {
    "identity": (0, 0),  # no value
    "brightness": (0, 100),  # factor
    "contrast": (0, 100),  # factor
    "saturation": (0, 100),  # factor; PIL's Color
    "sharpness": (0, 100),  # factor
    "solarize": (0, 256),  # threshold: pixels at or above it are inverted
    "posterize": (0, 8),  # bits kept
    "autocontrast": (0, 0),  # no value
    "equalize": (0, 0),  # no value
    "hue": (-0.5, 0.5),  # shift in turns
    "grayscale": (0, 0),  # no value
    "blur": (0, 100),  # standard deviation of the Gaussian, pixels
}
_AFFINE_LIMITS = {
    "translate_x": (-1, 1),  # share of the width
    "translate_y": (-1, 1),  # share of the height
    "rotate": (-360, 360),  # degrees clockwise, about the centre
    "shear_x": (-89, 89),  # degrees
    "shear_y": (-89, 89),
    "shear_xy": (-89, 89),  # degrees, both axes, each drawn on its own
    "shear_both": (-89, 89),  # degrees, one angle for both axes
}
COLOR_OPS, AFFINE_OPS = tuple(_COLOR_LIMITS), tuple(_AFFINE_LIMITS)

Number = Annotated[float, Limits(ge=-1e6, le=1e6, words="a number")]
Pair = Annotated[list[Number], Limits(least=2, most=2, words="[low, high]")]


# The keys that a policy's YAML may have, each with what it may be.


@dataclass(frozen=True, kw_only=True)
class RangeKeys:
    """A random number: uniform over `range` or `values`, then rounded."""

    range: Pair | None = None
    values: Annotated[list[Number], Limits(least=1)] | None = None
    integer: bool = False
    log: bool = False
    decimals: Annotated[int, Limits(ge=0, le=12)] | None = None
    ceil: bool = False


Drawn = Number | Pair | RangeKeys  # a number, [low, high], or the keys of a range
Ops = dict[str, Drawn | None]
Level = Annotated[int, Limits(ge=0, le=255, words="a whole number from 0 to 255")]
Fill = (
    Annotated[str, Limits(pattern=r"\Amean\Z", words="mean")]
    | Level
    | Annotated[list[Level], Limits(least=3, most=3, words="one or three (R, G, B) of them")]
    | None
)


@dataclass(frozen=True, kw_only=True)
class ResizeKeys:
    """Keep the aspect ratio: short side to `short`, less if the long side would exceed `max`."""

    short: Drawn
    max: Pixels | None = None


@dataclass(frozen=True, kw_only=True)
class ColorKeys:
    """With `probability`, one operation, or all of them in a drawn order."""

    one_of: Ops | None = None
    all_of: Ops | None = None
    probability: Share = 1.0


@dataclass(frozen=True, kw_only=True)
class AffineKeys:
    """See `Affine`."""

    one_of: Ops
    slope: Literal["tanh", "tan", "scikit_image"] = "tanh"
    shear_center: bool = False
    nearest: Share = 0.0
    in_box: Ops | None = None
    in_box_probability: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class EraseKeys:
    """See `Erase`."""

    count: Drawn = 1
    probability: Share = 1.0
    ratio: Drawn | None = None
    square: bool = False
    centered: bool = False
    area: Drawn | None = None
    aspect: Drawn | None = None
    noise: bool = False


@dataclass(frozen=True, kw_only=True)
class ViewKeys:
    """See `ViewPolicy`."""

    resize: ResizeKeys | None = None
    flip: Share = 0.0
    zoom: Drawn | None = None
    color: list[ColorKeys] | None = None
    affine: AffineKeys | None = None
    shuffle: bool = False
    erase: list[EraseKeys] | None = None
    geometry_of: Name | None = None
    fill: Fill = None
    erase_fill: Fill = None
    keep_a_box: bool = False
    min_side: Annotated[float, Limits(ge=0, le=100_000)] = 0.0
    min_visible: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class PolicyKeys:
    """See `Policy`; `paper`: the values of these keys in the paper, against which deviations are named."""

    name: Name
    views: dict[Name, ViewKeys | None]
    antialias: bool = False
    interpolation: Literal["linear", "nearest"] = "linear"
    color_at: Literal["view", "source"] = "view"
    color_channels: Literal["rgb", "bgr"] = "rgb"
    deviations: list[str] | None = None
    paper: dict[Literal["antialias", "interpolation", "color_at", "color_channels"], Any] | None = None


def _error(where: str, problem: str) -> UserError:
    return UserError(f"augment.{validate.shown(where)}: {problem}")


@dataclass(frozen=True)
class Range:
    """One random number: uniform over `values` if given, else over [low, high], then rounded as asked."""

    low: float = 0.0
    high: float = 0.0
    values: tuple[float, ...] = ()
    integer: bool = False  # uniform over the integers low..high, both included
    log: bool = False  # uniform in the logarithm
    decimals: int | None = None  # rounded to so many decimals
    ceil: bool = False  # then rounded up

    @staticmethod
    def parse(where: str, config: Any) -> Range:
        """From a number, [low, high], or a mapping with `range` or `values` and the roundings."""
        if config is None or isinstance(config, int | float):
            return Range(values=(float(config or 0.0),))
        keys = dict(config) if isinstance(config, Mapping) else {"range": config}
        bounds, values = keys.pop("range", None), tuple(float(v) for v in keys.pop("values", None) or ())
        if (bounds is None) == (not values):
            raise _error(where, "give either range: [low, high] or values: [...]")
        low, high = bounds or (0.0, 0.0)
        if low > high:
            raise _error(where, f"expected [low, high], got {[low, high]}")
        if keys.get("log") and low <= 0:
            raise _error(where, f"a range on the logarithm must begin above 0, got {low}")
        return Range(float(low), float(high), values, **keys)

    @property
    def largest(self) -> float:
        """The largest number it can give, before rounding."""
        return max(self.values, default=self.high)

    @property
    def smallest(self) -> float:
        """The smallest number it can give, before rounding."""
        return min(self.values, default=self.low)

    def sample(self, u: np.ndarray) -> np.ndarray:
        """Maps uniform numbers in [0, 1) to values of the same shape."""
        if self.values:
            return np.asarray(self.values)[(u * len(self.values)).astype(np.int64)]
        if self.integer:
            return self.low + np.floor(u * (self.high - self.low + 1))
        if self.log:
            return np.exp(np.log(self.low) + u * (np.log(self.high) - np.log(self.low)))
        value = self.low + u * (self.high - self.low)
        if self.decimals is not None:
            value = np.round(value, self.decimals)
        return np.ceil(value) if self.ceil else value


@dataclass(frozen=True)
class Resize:
    """Keep the aspect ratio: short side to `short`, less if the long side would exceed `max`."""

    short: Range
    max: float


@dataclass(frozen=True)
class ColorStep:
    """With `probability`, one operation out of `ops`, or all of them in a drawn order if `all`."""

    ops: dict[str, Range]
    probability: float = 1.0
    all: bool = False

    @property
    def slots(self) -> int:
        """How many operations one image gets at most."""
        return len(self.ops) if self.all else 1


@dataclass(frozen=True)
class Affine:
    """One geometric operation out of `ops`, size unchanged; or, with probability `in_box_probability`, one out of
    `in_box_ops` inside one box drawn uniformly, which moves pixels and not boxes (STAC)."""

    ops: dict[str, Range]
    slope: str = "tanh"  # shear factor from the angle: tanh or tan; scikit_image: that library's form, which shrinks
    shear_center: bool = False  # shear about the centre instead of the origin
    nearest: float = 0.0  # probability of nearest-neighbour interpolation
    in_box_ops: dict[str, Range] = dataclasses.field(default_factory=dict)
    in_box_probability: float = 0.0


@dataclass(frozen=True)
class Erase:
    """With `probability`, `count` patches; fill is a pixel value or noise."""

    count: Range
    probability: float = 1.0
    ratio: Range | None = None  # patch sides as shares of the view's sides
    square: bool = False  # both sides are the ratio times the view's height
    centered: bool = False  # the patch's centre is uniform over the view, and the patch may stick out
    area: Range | None = None  # or: share of the view's area,
    aspect: Range | None = None  # and height / width
    noise: bool = False  # uniform random bytes instead of the view's fill

    @property
    def max_count(self) -> int:
        """Most patches an image can get."""
        return int(self.count.largest)


@dataclass(frozen=True)
class ViewPolicy:
    """One view of an image."""

    name: str
    resize: Resize | None
    flip: float
    zoom: Range | None  # scale about a random place, size unchanged
    color: tuple[ColorStep, ...]
    affine: Affine | None
    keep_a_box: bool  # an image whose boxes would all be lost stays as it was resized
    shuffle: bool  # whether the order of colour and affine is drawn; otherwise colour comes first
    erase: tuple[Erase, ...]
    geometry_of: str  # name of the view whose resize, flip and zoom draws it shares; its own name if none
    fill: tuple[float, float, float] | None  # where an operation leaves nothing; None is the mean of Normalize
    erase_fill: tuple[float, float, float] | None
    min_side: float  # px; boxes with a side below are dropped
    min_visible: float  # share of a box's area inside the view, below which it is dropped

    @property
    def color_slots(self) -> list[tuple[str, ...]]:
        """The operations that each slot of the colour chain may hold."""
        return [tuple(step.ops) for step in self.color for _ in range(step.slots)]


def _ops(where: str, keys: Mapping[str, Any], limits: Mapping[str, tuple[float, float]]) -> dict[str, Range]:
    if not keys:
        raise _error(where, "needs at least one operation")
    for name in keys:
        if name not in limits:
            hint = validate.near(name, limits) or f"; known are {', '.join(limits)}"
            raise _error(where, f"there is no operation {name!r}{hint}")
    return {name: _limited(f"{where}.{name}", value, *limits[name]) for name, value in keys.items()}


def _limited(where: str, config: Any, low: float, high: float) -> Range:
    numbers = Range.parse(where, config)
    if not low <= numbers.smallest <= numbers.largest <= high:
        wanted = f"must lie from {low:g} to {high:g}" if low < high else "takes no value"
        raise _error(where, f"{wanted}, got {validate.shown(config)}")
    return numbers


def _fill(config: Any) -> tuple[float, float, float] | None:
    if config is None or config == "mean":
        return None
    red, green, blue = (config,) * 3 if isinstance(config, int) else config
    return float(red), float(green), float(blue)


def _check_positive(where: str, numbers: Range) -> None:
    if numbers.smallest <= 0:
        raise _error(where, f"must be above 0, got {numbers.smallest:g}")


def _color_step(where: str, keys: Mapping[str, Any]) -> ColorStep:
    if (keys.get("one_of") is None) == (keys.get("all_of") is None):
        raise _error(where, "give either one_of or all_of")
    name = "one_of" if keys.get("one_of") is not None else "all_of"
    return ColorStep(
        _ops(f"{where}.{name}", keys[name], _COLOR_LIMITS), float(keys.get("probability", 1.0)), name == "all_of"
    )


def _affine(where: str, keys: Mapping[str, Any]) -> Affine:
    in_box = keys.get("in_box")
    affine = Affine(
        _ops(f"{where}.one_of", keys["one_of"], _AFFINE_LIMITS),
        keys.get("slope", "tanh"),
        keys.get("shear_center", False),
        float(keys.get("nearest", 0.0)),
        _ops(f"{where}.in_box", in_box, _AFFINE_LIMITS) if in_box else {},
        float(keys.get("in_box_probability", 0.0)),
    )
    if (affine.in_box_probability > 0) != bool(affine.in_box_ops):
        raise _error(where, "in_box and in_box_probability go together")
    return affine


def _erase(where: str, config: Mapping[str, Any]) -> Erase:
    keys = {name: value for name, value in config.items() if value is not None}
    for name, low, high in (("ratio", 0, 10), ("area", 0, 10), ("aspect", 0, 1000), ("count", 0, 1000)):
        if name in keys:
            keys[name] = _limited(f"{where}.{name}", keys[name], low, high)
    for name in ("area", "aspect"):
        if name in keys:
            _check_positive(f"{where}.{name}", keys[name])
    keys.setdefault("count", Range(values=(1.0,)))
    if not keys["count"].values:
        keys["count"] = dataclasses.replace(keys["count"], integer=True)
    if keys["count"].largest < 1:
        raise _error(f"{where}.count", "must allow at least one patch")
    if ("ratio" in keys) == ("area" in keys) or ("area" in keys) != ("aspect" in keys):
        raise _error(where, "give either ratio, or area and aspect")
    return Erase(**keys)


def _resize(where: str, keys: Mapping[str, Any] | None) -> Resize | None:
    if keys is None:
        return None
    short = _limited(f"{where}.short", keys["short"], 0, 100_000)
    _check_positive(f"{where}.short", short)
    return Resize(short, float(keys.get("max") or np.inf))


def _zoom(where: str, config: Any) -> Range | None:
    if config is None:
        return None
    zoom = _limited(where, config, 0, 100)
    _check_positive(where, zoom)
    return zoom


def _view(name: str, config: Mapping[str, Any] | None) -> ViewPolicy:
    where = f"views.{name}"
    keys = config or {}
    return ViewPolicy(
        name=name,
        resize=_resize(f"{where}.resize", keys.get("resize")),
        flip=float(keys.get("flip", 0.0)),
        zoom=_zoom(f"{where}.zoom", keys.get("zoom")),
        color=tuple(_color_step(f"{where}.color[{i}]", step) for i, step in enumerate(keys.get("color") or ())),
        affine=None if keys.get("affine") is None else _affine(f"{where}.affine", keys["affine"]),
        keep_a_box=keys.get("keep_a_box", False),
        shuffle=keys.get("shuffle", False),
        erase=tuple(_erase(f"{where}.erase[{i}]", step) for i, step in enumerate(keys.get("erase") or ())),
        geometry_of=keys.get("geometry_of") or name,
        fill=_fill(keys.get("fill")),
        erase_fill=_fill(keys.get("erase_fill", keys.get("fill"))),
        min_side=float(keys.get("min_side", 0.0)),
        min_visible=float(keys.get("min_visible", 0.0)),
    )


@dataclass(frozen=True)
class Policy:
    """A named set of views and the choices that hold for all of them."""

    name: str
    views: dict[str, ViewPolicy]
    antialias: bool = False  # shrink the image once, with a triangle filter, to the largest size any view needs
    interpolation: str = "linear"  # or nearest
    color_at: str = "view"  # or source: before resizing, cheaper where views are larger than photographs
    color_channels: str = "rgb"  # or bgr: operations that weigh channels take them in the wrong order, as some codes do
    deviations: tuple[str, ...] = ()  # from the paper or code the policy is named after, for the record

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Policy:
        """Builds a policy from plain data.

        Args:
            config: the keys of a conf/augment file, as `PolicyKeys` has them.

        Raises:
            UserError: names the key that is wrong.
        """
        keys = dict(config)
        validate.check(PolicyKeys, keys, "augment")
        if not keys["views"]:
            raise _error("views", "a policy needs at least one view")
        views = {name: _view(name, view) for name, view in keys["views"].items()}
        for view in views.values():
            if view.geometry_of not in views:
                raise _error(f"views.{view.name}.geometry_of", f"there is no view {view.geometry_of!r}")
        policy = Policy(
            name=keys["name"],
            views=views,
            antialias=keys.get("antialias", False),
            interpolation=keys.get("interpolation", "linear"),
            color_at=keys.get("color_at", "view"),
            color_channels=keys.get("color_channels", "rgb"),
            deviations=tuple(keys.get("deviations") or ()),
        )
        changed = tuple(
            f"{name}={getattr(policy, name)} (paper: {value})"
            for name, value in (keys.get("paper") or {}).items()
            if getattr(policy, name) != value
        )
        return dataclasses.replace(policy, deviations=policy.deviations + changed)

    @property
    def blur_radius(self) -> int:
        """Three standard deviations of the widest blur of any view, pixels."""
        steps = [step for view in self.views.values() for step in view.color]
        widest = [step.ops["blur"].largest for step in steps if "blur" in step.ops]
        return int(np.ceil(3.0 * max(widest, default=0.0)))

    def aligned(self, names: Sequence[str]) -> bool:
        """Whether these views show the same pixels of an image in the same places, whatever is drawn."""
        views = [self.view(name) for name in names]
        shared = {(view.geometry_of, view.resize, view.flip, view.zoom) for view in views}
        return len(shared) == 1 and not any(view.affine for view in views)

    def view(self, name: str) -> ViewPolicy:
        """The view of that name.

        Raises:
            UserError: if there is none.
        """
        if name not in self.views:
            known = validate.shown(", ".join(map(str, self.views)))
            raise UserError(f"augment={validate.shown(self.name)} has no view {name!r}; it has {known}")
        return self.views[name]
