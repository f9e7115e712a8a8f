"""VOC's AP against examples worked by hand and a plain statement of the rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.data.ground_truth import from_coco
from harness.engine.voc_ap import all_points, eleven_points, voc_ap
from tests.harness.engine.evaluations import random_predictions, random_truth


def _truth(objects: list[tuple[int, int, list[float], bool]], images: int = 3, classes: int = 2) -> dict[str, Any]:
    """A COCO dictionary of (image, class, box, difficult)."""
    return {
        "images": [{"id": i} for i in range(1, images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": int(hard)}
            for n, (i, k, box, hard) in enumerate(objects, 1)
        ],
    }


def test_both_ways_worked_by_hand() -> None:
    # Right, wrong, right, wrong, wrong, right of 4 objects. Recall 1/4 at precision 1, 2/4 at 2/3, 3/4 at 3/6.
    right = np.array([True, False, True, False, False, True])
    # 11 points: 0, .1, .2 -> 1; .3, .4, .5 -> 2/3; .6, .7 -> 1/2; .8, .9, 1 -> 0. Sum 3 + 2 + 1 = 6.
    assert eleven_points(right, 4) == pytest.approx(100 * 6 / 11)
    # Area: a quarter each of 1, 2/3 and 1/2.
    assert all_points(right, 4) == pytest.approx(100 * (1 + 2 / 3 + 1 / 2) / 4)


def test_a_recall_that_is_reached_exactly_counts() -> None:
    # 3 of 10 found, all right: recalls 0, .1, .2 and .3 have precision 1, the other seven 0.
    right = np.array([True, True, True])
    assert eleven_points(right, 10) == pytest.approx(100 * 4 / 11)
    assert all_points(right, 10) == pytest.approx(30)


def test_the_precision_of_a_recall_is_the_largest_beyond_it() -> None:
    # Wrong, right, right of 2: precision 1/2 at recall 1/2, but 2/3 at recall 1, which counts for every recall.
    right = np.array([False, True, True])
    assert eleven_points(right, 2) == pytest.approx(100 * 2 / 3)
    assert all_points(right, 2) == pytest.approx(100 * 2 / 3)


def test_no_box_and_no_object() -> None:
    nothing = np.zeros(0, bool)
    assert eleven_points(nothing, 3) == all_points(nothing, 3) == 0.0
    assert eleven_points(nothing, 0) is all_points(nothing, 0) is None


def test_difficult_objects_are_neither_found_nor_missed_and_duplicates_are_wrong() -> None:
    box = [10.0, 10.0, 20.0, 20.0]
    truth = _truth([(1, 1, box, False), (2, 1, box, True), (3, 1, [50.0, 50.0, 10.0, 10.0], False)])
    rows = np.array(
        [
            [2, *box, 0.9, 1],  # on the difficult object: ignored
            [1, *box, 0.8, 1],  # right
            [2, *box, 0.7, 1],  # on it again: ignored again
            [1, *box, 0.6, 1],  # a duplicate: wrong
            [3, 50, 50, 10, 10, 0.5, 1],  # right: 2 of 2 found with 3 boxes that count
            [3, 50, 50, 10, 10, 0.4, 2],  # a class without an object
        ]
    )
    found = voc_ap(rows, from_coco(truth))
    assert found.objects == (2, 0)
    assert found.class_all_points == (pytest.approx(100 * (1 + 2 / 3) / 2), None)
    assert found.class_11_points == (pytest.approx(100 * (6 + 5 * 2 / 3) / 11), None)
    assert found.ap_all_points == found.class_all_points[0]


def test_a_box_whose_best_object_is_taken_does_not_turn_to_another() -> None:
    # Two objects that overlap; the second box overlaps the first object more (taken), the second one by more than half.
    truth = _truth([(1, 1, [0.0, 0.0, 100.0, 100.0], False), (1, 1, [20.0, 0.0, 100.0, 100.0], False)])
    rows = np.array([[1, 0, 0, 100, 100, 0.9, 1], [1, 8, 0, 100, 100, 0.8, 1]])
    assert voc_ap(rows, from_coco(truth)).class_all_points[0] == pytest.approx(50)


def _plainly(rows: np.ndarray, truth: dict[str, Any], category: int) -> tuple[float, float]:
    """Both APs of a class, by the paper's words, one box at a time."""
    objects = [a for a in truth["annotations"] if a["category_id"] == category]
    count = sum(not a["iscrowd"] for a in objects)
    taken: set[int] = set()
    right, seen, points = 0, 0, []
    for row in sorted((r for r in rows.tolist() if r[6] == category), key=lambda r: -r[5]):
        best, chosen = 0.0, None
        for a in objects:
            if a["image_id"] == row[0]:
                x, y, w, h = a["bbox"]
                across = max(0.0, min(row[1] + row[3], x + w) - max(row[1], x))
                down = max(0.0, min(row[2] + row[4], y + h) - max(row[2], y))
                overlap = across * down / (row[3] * row[4] + w * h - across * down)
                if overlap > best:
                    best, chosen = overlap, a
        if chosen is not None and best >= 0.5:
            if chosen["iscrowd"]:
                continue
            if chosen["id"] not in taken:
                right += 1
                taken.add(chosen["id"])
        seen += 1
        points.append((right, right / seen))
    eleven = sum(max((p for r, p in points if r * 10 >= t * count), default=0.0) for t in range(11)) / 11
    every = sum(max((p for r, p in points if r >= n), default=0.0) for n in range(1, count + 1)) / count
    return 100 * eleven, 100 * every


@pytest.mark.parametrize("seed", range(6))
def test_random_evaluations_agree_with_the_rules_said_plainly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    rows = random_predictions(rng, truth)
    found = voc_ap(rows, from_coco(truth))
    expected = [_plainly(rows, truth, category["id"]) for category in truth["categories"]]
    np.testing.assert_allclose(found.class_11_points, [e for e, _ in expected], rtol=1e-12)
    np.testing.assert_allclose(found.class_all_points, [e for _, e in expected], rtol=1e-12)
    assert found.ap_11_points == pytest.approx(np.mean([e for e, _ in expected]))
