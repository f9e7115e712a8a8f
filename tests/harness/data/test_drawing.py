"""Drawings against their own pixels: boxes, limits, colours, reproducibility."""

import numpy as np
import pytest
from PIL import Image

from harness.data import drawing
from harness.data.drawing import CLASSES, OTHER_CLASSES, OUTLINES, render

GREY = 128


def drawn(count, **options):
    return [render(np.random.default_rng([9, index]), **options) for index in range(count)]


@pytest.fixture
def plain(monkeypatch):
    """Objects alone, on grey."""
    monkeypatch.setattr(drawing, "_background", lambda _, size, __: Image.new("RGB", (size, size), (GREY,) * 3))
    monkeypatch.setattr(drawing, "_paint_distractor", lambda *_: None)


def painted_box(image):
    """Extent of all pixels that are not the background, xyxy."""
    rows, columns = np.nonzero(np.abs(image.astype(int) - GREY).mean(axis=2) > 3)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("size", "scale"), [(64, 1.0), (48, 1.0), (160, 2.5)])
@pytest.mark.parametrize("name", OUTLINES)
def test_boxes_are_tight_around_the_painted_pixels(name, size, scale):
    for image, boxes, labels in drawn(12, size=size, classes=(name,), scale=scale, max_objects=1):
        assert labels.tolist() == [1]
        inwards = (painted_box(image) - boxes[0]) * [1, 1, -1, -1]
        # A pixel is painted from a 16th of its area on, so that a sharp tip may fall short of the outline.
        assert inwards.min() > -1.2, "painted outside of the box"
        assert inwards.max() < 1.5, "the box is wider than what is painted"


@pytest.mark.usefixtures("plain")
def test_every_object_is_inside_its_box_and_stands_out():
    for image, boxes, _ in drawn(40):
        covered = np.zeros(image.shape[:2], dtype=bool)
        for x1, y1, x2, y2 in boxes:
            covered[max(int(y1) - 1, 0) : int(y2) + 2, max(int(x1) - 1, 0) : int(x2) + 2] = True
        difference = np.abs(image.astype(int) - GREY).mean(axis=2)
        assert difference[~covered].max(initial=0) == 0
        # The last object is covered by nothing; its middle shows the colour that was chosen against the background.
        x, y = (boxes[-1, :2] + boxes[-1, 2:]) / 2
        assert difference[int(y), int(x)] > 20


def test_boxes_lie_in_the_image_and_hardly_overlap():
    counts = []
    for image, boxes, labels in drawn(150):
        assert (image.shape, image.dtype, boxes.dtype, labels.dtype) == ((64, 64, 3), np.uint8, np.float32, np.int64)
        assert boxes.min() >= 0
        assert boxes.max() <= 64
        sides = boxes[:, 2:] - boxes[:, :2]
        assert sides.min() > 6
        assert sides.max() < 36
        assert set(labels) <= {1, 2, 3, 4}
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        common = (high - low).clip(0).prod(axis=2) - np.diag(sides.prod(axis=1))
        smaller = np.minimum.outer(sides.prod(axis=1), sides.prod(axis=1))
        assert (common <= 0.25 * smaller * 1.15).all()  # the rule holds before a box is clipped at the image's edge
        counts.append(len(boxes))
    assert min(counts) == 1
    assert max(counts) == 5
    assert 2.5 < np.mean(counts) < 3.2


def test_colour_does_not_tell_the_class():
    centres, classes = [], []
    for image, boxes, labels in drawn(500, max_objects=1):
        x, y = (boxes[0, :2] + boxes[0, 2:]) / 2
        centres.append(image[int(y), int(x)])
        classes.append(labels[0])
    colours, classes = np.array(centres, dtype=float), np.array(classes)
    for label in range(1, 5):
        own = colours[classes == label]
        assert len(own) > 80
        standard_error = colours.std(axis=0) / np.sqrt(len(own))
        assert (np.abs(own.mean(axis=0) - colours.mean(axis=0)) < 4 * standard_error).all()


def test_a_generator_decides_every_pixel():
    first, second, other = (render(np.random.default_rng(seed)) for seed in ([1, 2], [1, 2], [1, 3]))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


def test_layout_does_not_depend_on_pixels(monkeypatch):
    before = drawn(10)
    monkeypatch.setattr(drawing, "_background", lambda _, size, __: Image.new("RGB", (size, size)))
    for (_, boxes, labels), (_, other_boxes, other_labels) in zip(before, drawn(10), strict=True):
        np.testing.assert_array_equal(boxes, other_boxes)
        np.testing.assert_array_equal(labels, other_labels)


def test_what_is_drawn_grows_with_scale():
    for (_, small, _), (image, large, _) in zip(drawn(10), drawn(10, size=256, scale=4.0), strict=True):
        assert image.shape == (256, 256, 3)
        np.testing.assert_allclose(large, 4 * small, atol=0.05)


def test_pre_training_classes_are_not_in_the_dataset():
    assert not set(CLASSES) & set(OTHER_CLASSES)
    assert len(OTHER_CLASSES) == 10
