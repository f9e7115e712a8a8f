"""Drawn boxes: where they are, in which colours, and that captions stay on the picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageOps

from harness.engine import annotate

# Machado, Oliveira and Fernandes 2009, severity 1: what people without one kind of cone see, in linear RGB.
CONES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "all": np.eye(3).tolist(),
}


def lab(color: tuple[int, int, int], cones: str) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as seen with these cones."""
    value = np.array(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(CONES[cones]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("cones", CONES)
def test_colours_of_seven_classes_stay_apart_for_every_colour_vision(cones: str) -> None:
    seen = [lab(annotate.color_of(label), cones) for label in range(1, 8)]
    nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert nearest > 10  # a just noticeable difference is about 2.3


def test_twenty_one_classes_have_colours_of_their_own() -> None:
    assert len({annotate.color_of(label) for label in range(1, 22)}) == 21
    assert annotate.color_of(22) == annotate.color_of(1)


@pytest.mark.parametrize("orientation", range(9))
def test_boxes_follow_the_picture_through_every_exif_orientation(orientation: int) -> None:
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[5:12, 20:50] = 255
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(image))[..., 0] > 0
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    found = annotate.upright(np.array([[20.0, 5.0, 50.0, 12.0]]), (60, 40), orientation)
    assert found.tolist() == [expected]


def test_a_box_is_drawn_on_its_own_pixels() -> None:
    image = Image.new("RGB", (100, 80), (10, 200, 10))
    annotate.draw_detections(image, np.array([[20.0, 30.0, 60.0, 70.0]]), [1], [""])
    drawn = np.asarray(image)
    color = (drawn == annotate.color_of(1)).all(-1)
    rows, columns = np.flatnonzero(color.any(1)), np.flatnonzero(color.any(0))
    assert (columns[0], rows[0], columns[-1], rows[-1]) == (20, 30, 59, 69)
    assert (drawn[34:66, 24:56] == (10, 200, 10)).all()  # nothing inside


@pytest.mark.parametrize("box", [[-5, -5, 3, 2], [90, 70, 130, 95], [0, 0, 100, 80], [50, 40, 50, 40]])
def test_captions_of_any_length_stay_on_the_picture(box: list[float]) -> None:
    image = Image.new("RGB", (100, 80))
    annotate.draw_detections(image, np.array([box], float), [2], ["Ein sehr langer Name 0.99 " * 4])
    assert (np.asarray(image) == annotate.color_of(2)).all(-1).any()


def test_a_sheet_shows_each_picture_once_and_says_how_many_there_are() -> None:
    pictures = [(f"{n}.jpg", Image.new("RGB", (60, 40), (0, 5 * n, 200))) for n in range(20)]
    page = np.asarray(annotate.sheet(pictures, 100))
    for n in range(20):
        assert (page == (0, 5 * n, 200)).all(-1).sum() == 60 * 40
    assert annotate.on_sheet(3) == {0, 1, 2}
    assert len(annotate.on_sheet(1000)) == 48
    assert {0, 999} <= annotate.on_sheet(1000)
