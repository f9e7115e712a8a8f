"""Pseudo labels from somebody else's file, against hand-worked examples."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core.types import ImageSource, UserError
from harness.engine.foreign_labels import read_labels

NAMES = ["/data/a/x.jpg", "/data/b/x.jpg", "/data/b/grüne Äpfel.jpg", "/data/b/z.jpg"]
IDS = np.array([5, 9, 7, 11])
CATEGORIES = np.array([3, 90])


def source() -> ImageSource:
    none = np.zeros(0, np.float32)
    sizes = np.full((4, 2), (50, 100), np.int64)  # height 50, width 100
    return ImageSource(NAMES, IDS, sizes, none.reshape(0, 4), none.astype(np.int64), none, np.zeros(5, np.int64))


def box(category: int, bbox: list[float], score: float, **image: Any) -> dict[str, Any]:
    return {**image, "category_id": category, "bbox": bbox, "score": score}


def read(tmp_path: Path, entries: Any, **options: Any) -> ImageSource:
    file = tmp_path / "labels.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return read_labels(file, source(), CATEGORIES, **{"threshold": 0.5, **options})


GOOD = [
    box(3, [10, 20, 30, 10], 0.6, image_id=5),
    box(90, [90, 40, 30, 30], 0.9, image_id=5),  # beyond the borders
    box(3, [0, 0, 5, 5], 0.3, file_name="grüne Äpfel.jpg", image_id=1),  # the labeller's own numbering
    box(3, [1, 1, 5, 5], 0.2, file_name="b/x.jpg"),
    box(90, [2, 2, 5, 5], 0.4, image_id="b/x.jpg"),
]


def test_by_name_and_by_id(tmp_path: Path) -> None:
    """By descending score, cut at the borders; the surest box stays where none is sure; others are left out."""
    found = read(tmp_path, GOOD)
    assert found.ids.tolist() == [5, 9, 7]
    assert found.boxes.tolist() == [[90, 40, 100, 50], [10, 20, 40, 30], [2, 2, 7, 7], [0, 0, 5, 5]]
    assert found.labels.tolist() == [2, 1, 2, 1]
    assert np.allclose(found.scores, [0.9, 0.6, 0.4, 0.3])
    assert found.offsets.tolist() == [0, 2, 3, 4]


def test_what_is_kept(tmp_path: Path) -> None:
    without_top = read(tmp_path, GOOD, keep_top1=False)
    assert (without_top.ids.tolist(), without_top.offsets.tolist()) == ([5, 9, 7], [0, 2, 2, 2])
    assert read(tmp_path, GOOD, drop_empty=False).ids.tolist() == IDS.tolist()
    assert read(tmp_path, GOOD, score_threshold=0.35).ids.tolist() == [5, 9]


def test_boxes_of_other_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = read(
            tmp_path, [*GOOD, box(3, [0, 0, 5, 5], 0.9, image_id=99), box(3, [0, 0, 5, 5], 0.9, file_name="q")]
        )
    assert len(found) == 3
    assert "2 of its 7 boxes are of images that are not unlabelled ones" in caplog.text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[1, 2", "is no list of boxes"),
        ({"annotations": []}, "is no list of boxes"),
        ([], r"no box with a score above 0\.05 for any of the 4 unlabelled images, .* x\.jpg \(image_id 5\)"),
        ([box(3, [0, 0, 5, 5], 0.9, image_id=99)], "give their file names or image ids"),
        ([box(1, [0, 0, 5, 5], 0.9, image_id=5)], r"\[0\]\.category_id of .* is 1, .* give its ids, 3, 90"),
        ([box(3, [0, 0, 5], 0.9, image_id=5)], r"bbox"),
        ([box(3, [0, 0, 5, 5], 90, image_id=5)], r"score"),
        ([box(3, [0, 0, 5, 5], 0.9)], r"\[0\] of .* names no picture"),
        ([box(3, [0, 0, 5, 5], 0.9, file_name="x.jpg")], r"x\.jpg, which names 2 pictures, .* their folders too"),
    ],
)
def test_refused(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, entries)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.offline\.labels=.* cannot be read \(No such file"):
        read_labels(tmp_path / "none.json", source(), CATEGORIES, threshold=0.5)
