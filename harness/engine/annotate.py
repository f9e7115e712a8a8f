"""Boxes drawn on pictures: colours that stay apart, names and scores that can be read, and a sheet of many pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from harness.core.escape import plain

# Okabe and Ito's colours, which people of any colour vision tell apart (jfly.uni-koeln.de/color); theirs but for black,
# in an order in which the first ones are the farthest apart.
_OKABE_ITO = (
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (0, 114, 178),
    (230, 159, 0),
)
_SHADES = (0.0, 0.5, -0.45)  # of further classes: towards white, towards black
_SMALLEST_FONT = 11  # px
_CELL, _GAP, _COLUMNS, _MOST = 280, 10, 6, 48  # of the contact sheet, px and pictures
_CAPTION = 22  # px

Color = tuple[int, int, int]


def color_of(label: int) -> Color:
    """The colour of a class, 1..C. After seven classes come lighter shades, then darker ones; 21 have their own."""
    base = _OKABE_ITO[(label - 1) % len(_OKABE_ITO)]
    shade = _SHADES[(label - 1) // len(_OKABE_ITO) % len(_SHADES)]
    target = 255 if shade > 0 else 0
    red, green, blue = (round(value + (target - value) * abs(shade)) for value in base)
    return red, green, blue


@lru_cache
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has most of Europe's letters."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def upright(boxes: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Boxes of stored pixels in the pixels of the picture as EXIF says it is to be looked at.

    Args:
        boxes: (N, 4) xyxy in stored pixels.
        size: (width, height) of the stored picture.
        orientation: EXIF's, 1 to 8 (CIPA DC-008, table 6); anything else stands for 1.
    """
    width, height = size
    x1, y1, x2, y2 = boxes.T
    left, right, top, bottom = width - x2, width - x1, height - y2, height - y1
    corners = {
        2: (left, y1, right, y2),
        3: (left, top, right, bottom),
        4: (x1, top, x2, bottom),
        5: (y1, x1, y2, x2),
        6: (top, x1, bottom, x2),
        7: (top, left, bottom, right),
        8: (y1, left, y2, right),
    }.get(orientation, (x1, y1, x2, y2))
    return np.stack(corners, 1)


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str],
    colors: Sequence[Color] | None = None,
) -> None:
    """Draws boxes and their captions onto an RGB picture; the later ones lie above.

    Args:
        image: changed in place.
        boxes: (N, 4) xyxy in its pixels.
        labels: N classes, which give the colours.
        captions: N texts; an empty one is not drawn.
        colors: N colours instead of those of the classes.
    """
    shown = colors or [color_of(label) for label in labels]
    pen = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 240))
    for box, color in zip(boxes, shown, strict=True):
        x1, y1, x2, y2 = _pixels(box)
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0))  # seen on what has the box's own colour
        pen.rectangle((x1, y1, x2, y2), outline=color, width=line)
    font = typeface(max(_SMALLEST_FONT, round(min(image.size) / 34)))
    for box, color, caption in zip(boxes, shown, captions, strict=True):
        if caption:
            _write(pen, image.size, box, color, caption, font, line)


def _pixels(box: np.ndarray) -> tuple[int, int, int, int]:
    """First and last pixels of a box, of which every one has at least one."""
    x1, y1 = math.floor(box[0]), math.floor(box[1])
    return x1, y1, max(x1, math.ceil(box[2]) - 1), max(y1, math.ceil(box[3]) - 1)


def _write(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: np.ndarray,
    color: Color,
    caption: str,
    font: ImageFont.FreeTypeFont,
    line: int,
) -> None:
    """A caption on its box's upper edge: above it where there is room, else inside; never outside of the picture."""
    width, height = math.ceil(font.getlength(caption)) + 2 * line, round(font.size * 1.25)
    x, y, _, _ = _pixels(box)
    x = max(0, min(x, size[0] - width))
    y = y - height if y >= height else min(max(0, y), max(0, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=color)
    luminance = (0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]) / 255
    ink = (0, 0, 0) if luminance > 0.4 else (255, 255, 255)
    pen.text((x + line, y + height / 2), caption, fill=ink, font=font, anchor="lm")


def sheet(pictures: Sequence[tuple[str, Image.Image]], total: int) -> Image.Image:
    """Many pictures, made small, on one.

    Args:
        pictures: (name, thumbnail of at most `_CELL` px) of at least one.
        total: how many pictures there are in all, which the last line says where it is more.
    """
    columns = min(_COLUMNS, len(pictures))
    widest = max(image.width for _, image in pictures)
    highest = max(image.height for _, image in pictures)
    rows = -(-len(pictures) // columns)
    footer = 0 if total == len(pictures) else 2 * _CAPTION
    step_x, step_y = widest + _GAP, highest + _CAPTION + _GAP
    page = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP + footer), (255, 255, 255))
    pen, font = ImageDraw.Draw(page), typeface(12)
    for number, (name, image) in enumerate(pictures):
        x, y = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        page.paste(image, (x + (widest - image.width) // 2, y + (highest - image.height) // 2))
        pen.text((x + widest / 2, y + highest + 3), _shortened(name, font, widest), (60, 60, 60), font, anchor="ma")
    if footer:
        note = f"{len(pictures)} of {total:,} pictures, evenly spread"
        pen.text((_GAP, page.height - footer + 4), note, (60, 60, 60), typeface(13))
    return page


def _shortened(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The end of a name, which is what tells files apart."""
    name = plain(name)
    if font.getlength(name) <= width:
        return name
    while len(name) > 1 and font.getlength("…" + name) > width:
        name = name[1:]
    return "…" + name


def thumbnail(image: Image.Image) -> Image.Image:
    """A small copy for `sheet`."""
    small = image.copy()
    small.thumbnail((_CELL, _CELL), reducing_gap=2.0)
    return small


def on_sheet(total: int) -> set[int]:
    """Numbers of the pictures that a sheet shows, evenly spread where there are too many."""
    return set(np.linspace(0, total - 1, min(total, _MOST)).round().astype(int).tolist())
