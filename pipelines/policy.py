"""Augmentation policies as data: which views there are, which operations each has, in which ranges and order.

A policy is plain data (conf/augment/*.yaml); nothing here draws numbers or touches pixels. `pipelines.plan` turns a
view and random keys into numbers, and the backends turn those numbers into pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.types import UserError

# What a colour operation's value means; PIL's enhancers, ImageOps and ImageFilter define the results.
COLOR_OPS = (
    "identity",  # no value
    "brightness",  # factor
    "contrast",  # factor
    "saturation",  # factor; PIL's Color
    "sharpness",  # factor
    "solarize",  # threshold: pixels at or above it are inverted
    "posterize",  # bits kept, 0..8
    "autocontrast",  # no value
    "equalize",  # no value
    "hue",  # shift in turns, -0.5..0.5
    "grayscale",  # no value
    "blur",  # standard deviation of the Gaussian, pixels
)
AFFINE_OPS = (
    "translate_x",  # share of the width
    "translate_y",  # share of the height
    "rotate",  # degrees clockwise, about the centre
    "shear_x",  # degrees
    "shear_y",
    "shear_xy",  # degrees, both axes, each drawn on its own
    "shear_both",  # degrees, one angle for both axes
)


def _error(where: str, problem: str) -> UserError:
    return UserError(f"augment.{where}: {problem}")


def _check_keys(where: str, config: Any, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise _error(where, f"expected keys out of {', '.join(allowed)}, got {config!r}")
    for key in config:
        if key not in allowed:
            raise _error(where, f"unknown key {key!r}; known are {', '.join(allowed)}")
    return dict(config)


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
        if isinstance(config, Mapping):
            keys = _check_keys(where, config, ("range", "values", "integer", "log", "decimals", "ceil"))
            bounds, values = keys.pop("range", None), tuple(float(v) for v in keys.pop("values", ()))
            if (bounds is None) == (not values):
                raise _error(where, "give either range: [low, high] or values: [...]")
            low, high = bounds or (0.0, 0.0)
            if keys.get("log") and low <= 0:
                raise _error(where, f"a range on the logarithm must begin above 0, got {low}")
            return Range(float(low), float(high), values, **keys)
        if len(config) != 2 or config[0] > config[1]:
            raise _error(where, f"expected [low, high], got {list(config)}")
        return Range(float(config[0]), float(config[1]))

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


_VIEW_KEYS = (
    *("resize", "flip", "zoom", "color", "affine", "shuffle", "erase", "geometry_of", "fill", "erase_fill"),
    *("keep_a_box", "min_side", "min_visible"),
)


def _ops(where: str, config: Any, known: tuple[str, ...]) -> dict[str, Range]:
    keys = _check_keys(where, config, known)
    if not keys:
        raise _error(where, "needs at least one operation")
    return {name: Range.parse(f"{where}.{name}", value) for name, value in keys.items()}


def _fill(where: str, config: Any) -> tuple[float, float, float] | None:
    if config is None or config == "mean":
        return None
    levels = (config,) * 3 if isinstance(config, int | float) else tuple(config)
    if len(levels) != 3 or not all(isinstance(level, int | float) and level in range(256) for level in levels):
        raise _error(where, f"expected mean, or one or three (R, G, B) whole numbers from 0 to 255, got {config!r}")
    red, green, blue = levels
    return float(red), float(green), float(blue)


def _positive(where: str, config: Any) -> Range:
    numbers = Range.parse(where, config)
    if numbers.smallest <= 0:
        raise _error(where, f"must be above 0, got {numbers.smallest:g}")
    return numbers


def _color_step(where: str, config: Any) -> ColorStep:
    keys = _check_keys(where, config, ("one_of", "all_of", "probability"))
    if ("one_of" in keys) == ("all_of" in keys):
        raise _error(where, "give either one_of or all_of")
    every = "all_of" in keys
    name = "all_of" if every else "one_of"
    return ColorStep(_ops(f"{where}.{name}", keys[name], COLOR_OPS), float(keys.get("probability", 1.0)), every)


def _affine(where: str, config: Any) -> Affine:
    keys = _check_keys(where, config, ("one_of", "slope", "shear_center", "nearest", "in_box", "in_box_probability"))
    in_box = keys.get("in_box")
    affine = Affine(
        _ops(f"{where}.one_of", keys.get("one_of"), AFFINE_OPS),
        keys.get("slope", "tanh"),
        bool(keys.get("shear_center", False)),
        float(keys.get("nearest", 0.0)),
        _ops(f"{where}.in_box", in_box, AFFINE_OPS) if in_box else {},
        float(keys.get("in_box_probability", 0.0)),
    )
    if affine.slope not in ("tanh", "tan", "scikit_image"):
        raise _error(f"{where}.slope", "must be tanh, tan or scikit_image")
    if (affine.in_box_probability > 0) != bool(affine.in_box_ops):
        raise _error(where, "in_box and in_box_probability go together")
    return affine


def _erase(where: str, config: Any) -> Erase:
    names = tuple(f.name for f in dataclasses.fields(Erase))
    keys = _check_keys(where, config, names)
    for name, parse in (("count", Range.parse), ("ratio", Range.parse), ("area", _positive), ("aspect", _positive)):
        if name in keys:
            keys[name] = parse(f"{where}.{name}", keys[name])
    keys.setdefault("count", Range(values=(1.0,)))
    if isinstance(keys["count"], Range) and not keys["count"].values:
        keys["count"] = dataclasses.replace(keys["count"], integer=True)
    if keys["count"].smallest < 0 or keys["count"].largest < 1:
        raise _error(f"{where}.count", "must allow at least one patch")
    if ("ratio" in keys) == ("area" in keys) or ("area" in keys) != ("aspect" in keys):
        raise _error(where, "give either ratio, or area and aspect")
    return Erase(**keys)


def _view(name: str, config: Any) -> ViewPolicy:
    where = f"views.{name}"
    keys = _check_keys(where, config or {}, _VIEW_KEYS)
    resize = None
    if keys.get("resize") is not None:
        size = _check_keys(f"{where}.resize", keys["resize"], ("short", "max"))
        if "short" not in size:
            raise _error(f"{where}.resize", "needs short")
        resize = Resize(_positive(f"{where}.resize.short", size["short"]), float(size.get("max") or np.inf))
    zoom = keys.get("zoom")
    return ViewPolicy(
        name=name,
        resize=resize,
        flip=float(keys.get("flip", 0.0)),
        zoom=None if zoom is None else _positive(f"{where}.zoom", zoom),
        color=tuple(_color_step(f"{where}.color", step) for step in keys.get("color") or ()),
        affine=None if keys.get("affine") is None else _affine(f"{where}.affine", keys["affine"]),
        keep_a_box=bool(keys.get("keep_a_box", False)),
        shuffle=bool(keys.get("shuffle", False)),
        erase=tuple(_erase(f"{where}.erase", step) for step in keys.get("erase") or ()),
        geometry_of=str(keys.get("geometry_of") or name),
        fill=_fill(f"{where}.fill", keys.get("fill")),
        erase_fill=_fill(f"{where}.erase_fill", keys.get("erase_fill", keys.get("fill"))),
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
            config: the keys of a conf/augment file: `name`, `views`, and optionally `antialias`, `interpolation`,
                `color_at`, `color_channels`, `deviations`, and `paper`: the values of these keys in the paper,
                against which deviations are named.

        Raises:
            UserError: names the key that is wrong.
        """
        names = ("name", "views", "antialias", "interpolation", "color_at", "color_channels", "deviations", "paper")
        keys = _check_keys("", config, names)
        if not keys.get("views"):
            raise _error("views", "a policy needs at least one view")
        views = {name: _view(name, view) for name, view in keys["views"].items()}
        for view in views.values():
            if view.geometry_of not in views:
                raise _error(f"views.{view.name}.geometry_of", f"there is no view {view.geometry_of!r}")
        policy = Policy(
            name=str(keys.get("name", "custom")),
            views=views,
            antialias=bool(keys.get("antialias", False)),
            interpolation=keys.get("interpolation", "linear"),
            color_at=keys.get("color_at", "view"),
            color_channels=keys.get("color_channels", "rgb"),
            deviations=tuple(keys.get("deviations") or ()),
        )
        for name, allowed in (
            ("interpolation", ("linear", "nearest")),
            ("color_at", ("view", "source")),
            ("color_channels", ("rgb", "bgr")),
        ):
            if getattr(policy, name) not in allowed:
                raise _error(name, f"must be {' or '.join(allowed)}")
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

    def view(self, name: str) -> ViewPolicy:
        """The view of that name.

        Raises:
            UserError: if there is none.
        """
        if name not in self.views:
            raise UserError(f"augment={self.name} has no view {name!r}; it has {', '.join(self.views)}")
        return self.views[name]
