"""Errors by kind, each placed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.data.ground_truth import GroundTruth, from_coco
from harness.engine.accumulate import scores
from harness.engine.errors import KINDS, LEFT_OUT, classify, error_table
from harness.engine.matches import match
from tests.harness.engine.evaluations import random_predictions, random_truth

A, B = 1, 2  # two classes
OBJECT = [0.0, 0.0, 100.0, 100.0]


def _truth(objects: list[tuple[int, int, list[float]]], crowds: tuple[int, ...] = ()) -> GroundTruth:
    annotations: list[dict[str, Any]] = [
        {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": 1.0, "iscrowd": int(n in crowds)}
        for n, (i, k, box) in enumerate(objects)
    ]
    categories = [{"id": A, "name": "a"}, {"id": B, "name": "b"}]
    return from_coco({"images": [{"id": 1}, {"id": 2}], "categories": categories, "annotations": annotations})


def _kinds(truth: GroundTruth, *rows: list[float]) -> list[str]:
    names = {-1: "right", -2: "ignored", -3: "left out", **dict(enumerate(KINDS))}
    return [names[kind] for kind in classify(np.array(rows), truth).kinds.tolist()]


def _row(box: list[float], score: float = 0.9, category: int = A, image: int = 1) -> list[float]:
    return [image, *box, score, category]


def _shifted(share: float) -> list[float]:
    """A box of OBJECT's size whose IoU with it is `share`: shifted by s, IoU is (100 - s) / (100 + s)."""
    return [100 * (1 - share) / (1 + share), 0.0, 100.0, 100.0]


@pytest.mark.parametrize(
    ("box", "category", "kind"),
    [
        (_shifted(0.6), A, "right"),
        (_shifted(0.45), A, "place"),
        (_shifted(0.15), A, "place"),
        (_shifted(0.05), A, "background"),
        ([500.0, 500.0, 10.0, 10.0], A, "background"),
        (_shifted(0.6), B, "class"),
        (_shifted(0.45), B, "both"),
        (_shifted(0.05), B, "background"),
    ],
)
def test_one_box_and_one_object(box: list[float], category: int, kind: str) -> None:
    assert _kinds(_truth([(1, A, OBJECT)]), _row(box, category=category)) == [kind]


def test_a_second_box_on_an_object_is_a_duplicate_whatever_the_order_of_the_rows() -> None:
    truth = _truth([(1, A, OBJECT)])
    assert _kinds(truth, _row(_shifted(0.9), 0.3), _row(_shifted(0.6), 0.8)) == ["duplicate", "right"]


def test_a_box_near_a_taken_object_and_well_on_one_of_another_class_is_a_class_error() -> None:
    truth = _truth([(1, A, OBJECT), (1, B, OBJECT)])
    assert _kinds(truth, _row(OBJECT, 0.9), _row(OBJECT, 0.8)) == ["right", "class"]


def test_a_wrong_place_comes_before_a_wrong_class() -> None:
    truth = _truth([(1, A, OBJECT), (1, B, _shifted(0.3))])
    assert _kinds(truth, _row(_shifted(0.3))) == ["place"]


def test_objects_of_other_images_do_not_matter_and_an_image_without_objects_is_background() -> None:
    assert _kinds(_truth([(1, A, OBJECT)]), _row(OBJECT, image=2)) == ["background"]


def test_boxes_within_a_crowd_of_their_class_are_ignored() -> None:
    truth = _truth([(1, A, [0.0, 0.0, 400.0, 400.0])], crowds=(0,))
    assert _kinds(truth, _row([10, 10, 20, 20]), _row([10, 10, 20, 20], category=B)) == ["ignored", "background"]
    assert not classify(np.array([_row([10, 10, 20, 20])]), truth).missed.any()


def test_missed_is_what_no_mended_box_would_find() -> None:
    objects = [(1, A, OBJECT), (1, A, [300.0, 0.0, 50.0, 50.0]), (1, B, [0.0, 300.0, 50.0, 50.0]), (2, B, OBJECT)]
    rows = [
        _row(OBJECT),
        _row([320, 0, 50, 50]),  # IoU 3/7: place, would find object 1
        _row([0, 300, 50, 50]),  # class, would find object 2
    ]
    found = classify(np.array(rows), _truth(objects))
    assert found.missed.tolist() == [False, False, False, True]
    assert found.mends.tolist() == [-1, 1, 2]


def test_only_the_best_box_of_an_object_would_be_mended_to_it() -> None:
    rows = [_row(_shifted(0.3), 0.4), _row(_shifted(0.2), 0.7), _row(OBJECT, 0.5, B)]
    found = classify(np.array(rows), _truth([(1, A, OBJECT)]))
    assert [KINDS[kind] for kind in found.kinds] == ["place", "place", "class"]
    assert found.mends.tolist() == [-1, 0, -1]


def test_what_mending_a_kind_would_add_worked_by_hand() -> None:
    # Class a: 2 objects; background at .9, right at .8, place (on the second object) at .7.
    objects = [(1, A, OBJECT), (2, A, OBJECT)]
    rows = [_row([500, 0, 10, 10], 0.9), _row(OBJECT, 0.8), _row(_shifted(0.3), 0.7, image=2)]
    table = error_table(np.array(rows), _truth(objects))
    half = 51 / 101  # recalls 0, .01 ... .50
    assert table.ap50 == pytest.approx(100 * half / 2)  # one of two boxes right at recall 1/2
    assert table.counts == {"class": 0, "place": 1, "both": 0, "duplicate": 0, "background": 1, "missed": 0}
    assert table.right == 1
    # Background gone: precision 1 up to recall 1/2. Place mended: 2 of 3 right at recall 1, the largest everywhere.
    assert table.lost["background"] == pytest.approx(100 * (half - half / 2))
    assert table.lost["place"] == pytest.approx(100 * (2 / 3 - half / 2))
    assert table.lost["class"] == table.lost["duplicate"] == table.lost["both"] == table.lost["missed"] == 0


def test_a_class_error_is_mended_to_the_class_of_its_object_and_missed_ones_are_not_asked_for() -> None:
    objects = [(1, A, OBJECT), (2, B, OBJECT)]
    table = error_table(np.array([_row(OBJECT, 0.9, B)]), _truth(objects))
    assert table.ap50 == 0.0
    assert table.lost["class"] == pytest.approx(50)  # class a has AP 100, class b still nothing
    assert table.lost["missed"] == 0.0  # its only object gone, class b has no box that is right
    assert table.class_counts.tolist() == [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]
    better = error_table(np.array([_row(OBJECT), _row([0, 0, 9, 9], 0.8, B, 2)]), _truth([*objects, (2, A, OBJECT)]))
    assert better.lost["missed"] == pytest.approx((100 - 100 * 51 / 101) / 2)


def test_at_most_100_boxes_of_an_image_take_part() -> None:
    rows = np.array([_row(OBJECT, 0.9 - n / 1000) for n in range(105)])
    kinds = classify(rows, _truth([(1, A, OBJECT)])).kinds
    assert (kinds == LEFT_OUT).tolist() == [False] * 100 + [True] * 5


def test_nothing_predicted_and_nothing_to_find() -> None:
    empty = np.zeros((0, 7))
    table = error_table(empty, _truth([(1, A, OBJECT), (1, B, OBJECT)]))
    assert (table.ap50, table.counts["missed"], table.lost["background"]) == (0.0, 2, 0.0)
    assert np.isnan(error_table(np.array([_row(OBJECT)]), _truth([])).ap50)


@pytest.mark.parametrize("seed", range(5))
def test_every_box_and_object_is_accounted_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    annotations = random_truth(rng)
    for one in annotations["annotations"]:
        one["iscrowd"] = 0
    truth, rows = from_coco(annotations), random_predictions(rng, annotations)
    table, found = error_table(rows, truth), classify(rows, truth)
    assert table.right + sum(table.counts.values()) - table.counts["missed"] == len(rows)
    mended = set(found.mends[found.mends >= 0].tolist())
    assert table.right + len(mended) + table.counts["missed"] == len(truth)
    assert table.ap50 == pytest.approx(scores(match(rows, truth))["ap50"], abs=3)  # the matching differs a little
