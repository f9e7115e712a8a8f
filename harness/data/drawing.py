"""Draws coloured shapes on textured backgrounds.

A class shows in an object's outline alone: colour and texture are drawn independently of it. The layout of an image
(classes, outlines, boxes) is drawn before any pixel is, so that the boxes do not depend on how a library rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

GENERATOR_VERSION = 1  # raise it whenever other pixels or boxes come out, so that cached copies are made anew

_OVERSAMPLING = 4  # outlines are filled at this multiple of the resolution and averaged down
_NOISE_OCTAVES = ((20.0, 45.0), (10.0, 25.0), (5.0, 14.0))  # (distance of the knots in px, amplitude)
_TEXTURE = 0.35  # amplitude of an object's own noise, relative to the background's
_CONTRAST = 55.0  # least mean absolute RGB difference between an object and what lies beneath it
_MOST_OVERLAP = 0.25  # of the smaller of two boxes
_PLACEMENT_TRIES = 20
_COLOUR_TRIES = 16
_OUTSIDE = 1.0  # px by which an outline may leave the image


def _polygon(*corners: tuple[float, float]) -> np.ndarray:
    return np.array(corners, dtype=np.float64)


def _arc(start: float, end: float, count: int, radius: float = 1.0) -> np.ndarray:
    """Points of a circle from one angle to another, in degrees, clockwise on the screen."""
    angles = np.deg2rad(np.linspace(start, end, count))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    outline = _arc(-90, 270, 2 * points + 1)[:-1]
    outline[1::2] *= inner
    return outline


# Outlines in a box of about [-1, 1] x [-1, 1], y down.
OUTLINES: dict[str, np.ndarray] = {
    "ellipse": _arc(0, 360, 41)[:-1],
    "square": _polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": _polygon((0, -0.95), (0.95, 0.75), (-0.95, 0.75)),
    "cross": _polygon(
        *((-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)),
        *((0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)),
    ),
    "pentagon": _arc(-90, 270, 6)[:-1],
    "star": _star(5, 0.42),
    "l": _polygon((-0.8, -1), (-0.2, -1), (-0.2, 0.4), (0.8, 0.4), (0.8, 1), (-0.8, 1)),
    "t": _polygon((-0.9, -1), (0.9, -1), (0.9, -0.4), (0.3, -0.4), (0.3, 1), (-0.3, 1), (-0.3, -0.4), (-0.9, -0.4)),
    "arrow": _polygon((-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3)),
    "half_disc": _arc(180, 360, 21) * (1, 1.2) + (0, 0.6),
    "kite": _polygon((0, -1), (0.75, -0.3), (0, 1), (-0.75, -0.3)),
    "bar": _polygon((-1, -0.35), (1, -0.35), (1, 0.35), (-1, 0.35)),
    "chevron": _polygon((-0.9, -0.9), (0.1, -0.9), (0.9, 0), (0.1, 0.9), (-0.9, 0.9), (-0.1, 0)),
    "crescent": np.concatenate([_arc(80, 280, 25), _arc(280, 80, 25) * (0.5, 1) + (0.1, 0)]),
}
CLASSES = ("ellipse", "square", "triangle", "cross")
OTHER_CLASSES = tuple(name for name in OUTLINES if name not in CLASSES)  # never in the dataset; for pre-training


@dataclass(frozen=True)
class _Shape:
    label: int  # 1..C
    outline: np.ndarray  # (V, 2) float64 x, y in pixels
    box: tuple[float, float, float, float]  # xyxy, not clipped


def render(
    generator: np.random.Generator,
    size: int = 64,
    classes: tuple[str, ...] = CLASSES,
    *,
    scale: float = 1.0,
    max_objects: int = 5,
    distractors: tuple[int, int] = (1, 3),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one image.

    Args:
        generator: source of every random number.
        size: height and width of the image, pixels.
        classes: names in `OUTLINES`; an object's label is 1 + its place here.
        scale: multiplies the size of everything that is drawn; at 1 the boxes are about 10 to 32 px long.
        max_objects: 1 to this many objects are tried; one that finds no free place is left out.
        distractors: least and most unlabelled lines, arcs, dots and angles behind the objects; 0 or 1 lies in front.

    Returns:
        (size, size, 3) uint8 RGB, (N, 4) float32 boxes xyxy clipped to the image and rounded to 0.01 px, and (N,)
        int64 labels. Later objects cover earlier ones, of which the box stays whole.
    """
    shapes = _place(generator, size, classes, scale, max_objects)
    image = _background(generator, size, scale)
    for _ in range(generator.integers(distractors[0], distractors[1] + 1)):
        _paint_distractor(image, generator, scale)
    for shape in shapes:
        _paint_shape(image, generator, shape, scale)
    if generator.random() < 0.5:
        _paint_distractor(image, generator, scale)
    boxes = np.array([shape.box for shape in shapes]).clip(0, size).round(2)
    return np.asarray(image), boxes.astype(np.float32), np.array([shape.label for shape in shapes], dtype=np.int64)


def _place(
    generator: np.random.Generator, size: int, classes: tuple[str, ...], scale: float, max_objects: int
) -> list[_Shape]:
    """Objects of which no two overlap by more than a quarter of the smaller box."""
    shapes: list[_Shape] = []
    margin = _OUTSIDE * scale
    for label in generator.integers(1, len(classes) + 1, size=generator.integers(1, max_objects + 1)).tolist():
        outline, (width, height) = _random_outline(generator, OUTLINES[classes[label - 1]], scale)
        free_x, free_y = size + 2 * margin - width, size + 2 * margin - height
        for u_x, u_y in generator.random((_PLACEMENT_TRIES, 2)).tolist():
            x, y = u_x * free_x - margin, u_y * free_y - margin
            box = (x, y, x + width, y + height)
            if all(_overlap(box, other.box) <= _MOST_OVERLAP for other in shapes):
                shapes.append(_Shape(label, outline + np.array([x, y]), box))
                break
    return shapes


def _random_outline(
    generator: np.random.Generator, outline: np.ndarray, scale: float
) -> tuple[np.ndarray, tuple[float, float]]:
    """Radius log-uniform in 6 to 16 px, second axis 0.75 to 1 of it, turned by up to 15 degrees.

    Returns:
        (V, 2) pixels with the least x and y at 0, and their width and height.
    """
    u_radius, u_aspect, u_angle = generator.random(3).tolist()
    radius = scale * 6.0 * (16.0 / 6.0) ** u_radius
    second = radius * (0.75 + 0.25 * u_aspect)
    angle = math.radians(30.0 * u_angle - 15.0)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = outline[:, 0] * radius, outline[:, 1] * second
    points = np.stack([x * cos - y * sin, x * sin + y * cos], axis=1)
    points -= points.min(axis=0)
    width, height = points.max(axis=0).tolist()
    return points, (width, height)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection of two boxes over the area of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


@lru_cache(maxsize=4096)
def _interpolation(length: int, distance: float) -> np.ndarray:
    """(length, K) weights that blend K knots, `distance` pixels apart, smoothly into `length` pixels."""
    position = (np.arange(length) + 0.5) / distance
    left = position.astype(np.int64)
    fraction = position - left
    blend = fraction * fraction * (3.0 - 2.0 * fraction)
    weights = np.zeros((length, int(left[-1]) + 2))
    weights[np.arange(length), left] = 1.0 - blend
    weights[np.arange(length), left + 1] = blend
    return weights


def _noise(
    generator: np.random.Generator,
    height: int,
    width: int,
    scale: float,
    octaves: tuple[tuple[float, float], ...] = _NOISE_OCTAVES,
) -> np.ndarray:
    """(3, height, width) smooth noise around 0, independent per channel."""
    total = np.zeros((3, height, width))
    for distance, amplitude in octaves:
        rows, columns = _interpolation(height, distance * scale), _interpolation(width, distance * scale)
        knots = generator.uniform(-amplitude, amplitude, (3, rows.shape[1], columns.shape[1]))
        total += rows @ knots @ columns.T
    return total


def _to_image(planes: np.ndarray) -> Image.Image:
    """(3, H, W) floats to an RGB image."""
    pixels = planes.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _background(generator: np.random.Generator, size: int, scale: float) -> Image.Image:
    """A base colour with smooth colour noise and, in every other image, a sine grating."""
    base = generator.uniform(60, 195, (3, 1, 1))
    planes = base + generator.uniform(0.3, 1.0) * _noise(generator, size, size, scale)
    if generator.random() < 0.5:
        angle, phase, pitch, amplitude = generator.uniform((0, 0, 5, 6), (math.pi, 2 * math.pi, 16, 20)).tolist()
        step = np.arange(size) * (2 * math.pi / (pitch * scale))
        x, y = step * math.cos(angle), step * math.sin(angle) + phase
        planes += amplitude * (np.outer(np.sin(y), np.cos(x)) + np.outer(np.cos(y), np.sin(x)))
    return _to_image(planes)


def _paint_shape(image: Image.Image, generator: np.random.Generator, shape: _Shape, scale: float) -> None:
    """Fills the outline with a colour that stands out from what lies beneath it, and with noise of its own."""
    x1, y1, x2, y2 = shape.box
    left, top = max(math.floor(x1), 0), max(math.floor(y1), 0)
    window = (left, top, min(math.ceil(x2), image.width), min(math.ceil(y2), image.height))
    width, height = window[2] - left, window[3] - top
    colours = generator.uniform(0, 255, (_COLOUR_TRIES, 3))
    beneath = image.resize((1, 1), Image.Resampling.BOX, box=window).getpixel((0, 0))
    distances = np.abs(colours - np.array(beneath)).mean(axis=1)
    clear = distances > _CONTRAST
    colour = colours[clear.argmax() if clear.any() else distances.argmax()]
    # The coarsest octave would hardly change within an object.
    texture = _TEXTURE * _noise(generator, height, width, scale, _NOISE_OCTAVES[1:])
    mask = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    # Pillow puts the centre of pixel i at i, we at i + 0.5.
    points = (shape.outline - np.array([left, top])) * _OVERSAMPLING - 0.5
    ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=255)
    image.paste(_to_image(colour[:, None, None] + texture), window, mask.reduce(_OVERSAMPLING))


def _paint_distractor(image: Image.Image, generator: np.random.Generator, scale: float) -> None:
    """A thick line, a thin arc, six dots or an open angle, in any colour."""
    kind = int(generator.integers(4))
    numbers = generator.random(16)
    colour = tuple(generator.integers(0, 256, 3).tolist())
    factor = 2  # enough for lines
    mask = Image.new("L", (image.width * factor, image.height * factor))
    draw = ImageDraw.Draw(mask)
    unit = factor * scale
    points = numbers[:12].reshape(6, 2) * mask.width
    thickness = float(numbers[12])
    if kind == 0:
        draw.line(points[:2].ravel().tolist(), fill=255, width=round((2.0 + 2.0 * thickness) * unit))
    elif kind == 1:
        (x, y), radius, start = points[0], (6.0 + 14.0 * numbers[13]) * unit, 360.0 * numbers[14]
        end = start + 60.0 + 140.0 * numbers[15]
        draw.arc((x - radius, y - radius, x + radius, y + radius), start, end, fill=255, width=round(1.5 * unit))
    elif kind == 2:
        radius = (0.8 + 0.7 * thickness) * unit
        for x, y in points.tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        corner = points[0]
        arms = (points[1:3] / mask.width - 0.5) * 40.0 * unit
        polyline = np.stack([corner + arms[0], corner, corner + arms[1]])
        draw.line(polyline.ravel().tolist(), fill=255, width=round((1.0 + thickness) * unit), joint="curve")
    image.paste(colour, (0, 0, image.width, image.height), mask.reduce(factor))
