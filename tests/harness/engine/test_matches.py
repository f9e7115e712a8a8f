"""Matches and what is accumulated from them, against pycocotools on the same and on resampled images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from harness.core.types import UserError
from harness.data.ground_truth import from_coco, from_index
from harness.data.shapes import shapes_dataset
from harness.engine import accumulate as accumulation
from harness.engine.accumulate import METRICS, accumulate, class_scores, scores
from harness.engine.matches import THRESHOLDS, match, read_matches, write_matches
from tests.harness.engine.evaluations import pycocotools, random_predictions, random_truth, replicated

_STATS = dict(zip(METRICS, (0, 1, 2, 3, 4, 5, 8, 9, 10, 11), strict=True))  # places in COCOeval.stats


def _case(seed: int, images: int = 25) -> tuple[np.ndarray, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images)
    return random_predictions(rng, truth), truth


def _per_class(evaluation: COCOeval) -> tuple[np.ndarray, np.ndarray]:
    """(4, 10, K) AP and recall, NaN where pycocotools has -1."""
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]
    ap = np.where((precision > -1).all(1), precision.mean(1), np.nan)
    return ap.transpose(2, 0, 1), np.where(recall > -1, recall, np.nan).transpose(2, 0, 1)


def _check(found: accumulation.Accumulated, row: int, expected: COCOeval) -> None:
    ap, recall = _per_class(expected)
    np.testing.assert_allclose(found.ap[row], ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.recall[row], recall, rtol=0, atol=1e-12)
    metrics = found.metrics()
    for name, place in _STATS.items():
        value = expected.stats[place]
        np.testing.assert_allclose(metrics[name][row], np.nan if value < 0 else 100 * value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_one_give_pycocotools_numbers(seed: int) -> None:
    rows, truth = _case(seed)
    _check(accumulate(match(rows, from_coco(truth))), 0, pycocotools(rows, truth))


@pytest.mark.parametrize("seed", range(4))
def test_weights_give_pycocotools_numbers_on_replicated_images(seed: int) -> None:
    rows, truth = _case(seed, 12)
    rng = np.random.default_rng(seed)
    weights = np.stack([rng.multinomial(12, np.full(12, 1 / 12)) for _ in range(5)] + [rng.integers(0, 2, 12)])
    found = accumulate(match(rows, from_coco(truth)), weights)
    for row, weight in enumerate(weights):
        _check(found, row, pycocotools(*replicated(rows, truth, weight)))


def test_flags_are_those_of_pycocotools_image_by_image() -> None:
    rows, truth = _case(3)
    found = match(rows, from_coco(truth))
    evaluation = pycocotools(rows, truth)
    bits = (1 << np.arange(10, dtype=np.uint16))[:, None]
    compared = 0
    for number, one in enumerate(evaluation.evalImgs):
        if one is None:
            continue
        size = number // len(found.image_ids) % 4
        k = int(np.searchsorted(found.category_ids, one["category_id"]))
        own = np.arange(found.offsets[k], found.offsets[k + 1])
        own = own[found.image_ids[found.images[own]] == one["image_id"]]
        np.testing.assert_array_equal(found.scores[own], one["dtScores"])
        np.testing.assert_array_equal((found.matched[size, own] & bits) > 0, one["dtMatches"] > 0)
        np.testing.assert_array_equal((found.ignored[size, own] & bits) > 0, one["dtIgnore"])
        here = (found.truth_classes == k) & (found.image_ids[found.truth_images] == one["image_id"])
        assert found.counted[size, here].sum() == (np.asarray(one["gtIgnore"]) == 0).sum()
        compared += len(own)
    assert compared == 4 * len(rows)


def test_no_more_than_100_boxes_of_an_image_and_class_take_part() -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng, 3)
    rows = random_predictions(rng, truth, 60)
    assert max(np.unique(rows[:, [0, 6]], axis=0, return_counts=True)[1]) > 100
    found = match(rows, from_coco(truth))
    assert len(found.scores) < len(rows)
    _check(accumulate(found), 0, pycocotools(rows, truth))


def test_equal_scores_and_equal_boxes_keep_the_order_of_the_rows() -> None:
    rows, truth = _case(5)
    rows = np.concatenate([rows, rows[::2]])
    rows[:, 5] = np.round(rows[:, 5], 1)
    _check(accumulate(match(rows, from_coco(truth))), 0, pycocotools(rows, truth))


def test_images_and_categories_in_any_order() -> None:
    rows, truth = _case(6)
    shuffled = copy.deepcopy(truth)
    shuffled["images"].reverse()
    shuffled["categories"].reverse()
    a, b = match(rows, from_coco(truth)), match(rows, from_coco(shuffled))
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_no_prediction_and_no_object() -> None:
    rows, truth = _case(1)
    assert scores(match(np.zeros((0, 7)), from_coco(truth)))["ap"] == 0.0
    nothing = scores(match(rows, from_coco({**truth, "annotations": []})))
    assert set(nothing.values()) == {None}


def test_class_scores_name_every_class_and_average_to_the_metrics() -> None:
    rows, truth = _case(2)
    truth["categories"].append({"id": 91, "name": "never seen"})
    found = match(rows, from_coco(truth))
    table, overall = class_scores(found), scores(found)
    assert [one.name for one in table] == ["class 2", "class 5", "class 90", "never seen"]
    assert table[-1].objects == 0
    assert set(table[-1].scores.values()) == {None}
    boxes = [a for a in truth["annotations"] if not a["iscrowd"]]
    for one in table:
        assert one.objects == sum(a["category_id"] == one.category_id for a in boxes)
    for name in METRICS:
        values = [one.scores[name] for one in table if one.scores[name] is not None]
        assert overall[name] == pytest.approx(np.mean(values))  # type: ignore[arg-type]


def test_thresholds_are_pycocotools_floats() -> None:
    rows, truth = _case(0)
    params = pycocotools(rows, truth).params
    assert THRESHOLDS.tolist() == params.iouThrs.tolist()
    assert accumulation._RECALLS.tolist() == params.recThrs.tolist()


def test_a_ground_truth_is_the_same_from_an_index_and_from_its_dictionary(tmp_path: Path) -> None:
    index = shapes_dataset("shapes", tmp_path, train_images=6, val_images=4).val
    a, b = from_index(index), from_coco(index.coco_ground_truth())
    assert len(a) > 0
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    rows, truth = _case(4)
    found = match(rows, from_coco(truth))
    for number, dtype in enumerate((np.float64, np.float32)):
        rows[:, 5] = rows[:, 5].astype(dtype)
        found = match(rows, from_coco(truth))
        path = tmp_path / f"{number}.npz"
        write_matches(path, found)
        back = read_matches(path)
        for name, value in vars(found).items():
            np.testing.assert_array_equal(value, getattr(back, name), err_msg=name)
        with np.load(path) as file:
            assert file["scores"].dtype == dtype


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", None])
def test_damaged_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "matches.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"matches\.npz .*evaluate the run again"):
        read_matches(path)


def test_a_cut_file_and_one_of_another_format_are_named(tmp_path: Path) -> None:
    rows, truth = _case(4)
    path = tmp_path / "matches.npz"
    write_matches(path, match(rows, from_coco(truth)))
    whole = path.read_bytes()
    for at in (len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:at])
        with pytest.raises(UserError, match="damaged"):
            read_matches(path)
    path.write_bytes(whole[:200] + bytes(100) + whole[300:])
    with pytest.raises(UserError, match="damaged"):
        read_matches(path)
    np.savez(path, format=99)
    with pytest.raises(UserError, match="another version"):
        read_matches(path)


def test_predictions_of_other_images_or_classes_are_refused() -> None:
    rows, truth = _case(4)
    rows[3, 0] = 4
    with pytest.raises(UserError, match="image 4,"):
        match(rows, from_coco(truth))
    rows[3, 0], rows[3, 6] = 3, 6
    with pytest.raises(UserError, match="category 6,"):
        match(rows, from_coco(truth))
