from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from detectors.methods.pseudo_labels import (
    confident,
    count_by_class,
    label_offline,
    offline_quality,
    quality,
    shares_by_class,
)
from harness.core.types import ImageSource, Target, View


def target(*rows: tuple[float, float, float, float, int, float]) -> Target:
    data = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Target(data[:, :4], data[:, 4].long(), data[:, 5])


BOX = (0.0, 0.0, 10.0, 10.0)


def test_stac_threshold_by_hand():
    """tau = min(0.9, best score), and scores equal to it stay."""
    nine = torch.tensor(0.9).item()
    sure = target((*BOX, 1, 0.95), (*BOX, 1, nine), (*BOX, 2, 0.89))
    unsure = target((*BOX, 1, 0.3), (*BOX, 2, 0.6))
    assert confident(sure, nine, keep_top1=True).scores.tolist() == pytest.approx([0.95, 0.9])
    assert confident(unsure, 0.9, keep_top1=True).labels.tolist() == [2]
    assert len(confident(unsure, 0.9, keep_top1=False)) == 0
    assert len(confident(target(), 0.9, keep_top1=True)) == 0


def test_quality_by_hand():
    truth = [target((0, 0, 10, 10, 1, 1), (20, 20, 40, 40, 2, 1)), target((5, 5, 15, 15, 1, 1)), target()]
    found = [
        # right with IoU 0.8; a duplicate of it with less score; right place but wrong class
        target((0, 0, 10, 8, 1, 0.9), (0, 0, 10, 10, 1, 0.7), (20, 20, 40, 40, 1, 0.8)),
        target(),
        target((1, 1, 5, 5, 3, 0.6)),
    ]
    measured = quality(found, truth)
    assert measured == pytest.approx({"precision": 1 / 4, "recall": 1 / 3, "iou": 0.8, "labels": 4, "boxes": 3})


def test_quality_of_nothing():
    assert quality([target()], [target()]) == {"precision": 0, "recall": 0, "iou": 0, "labels": 0, "boxes": 0}


def make_source(count: int = 3) -> ImageSource:
    return ImageSource(
        paths=[f"{i}.jpg" for i in range(count)],
        ids=np.arange(count) + 10,
        sizes=np.full((count, 2), 32),
        boxes=np.tile(np.array([[1, 1, 9, 9]], np.float32), (count, 1)),
        labels=np.ones(count, np.int64),
        scores=np.ones(count, np.float32),
        offsets=np.arange(count + 1),
    )


class Fixed(torch.nn.Module):
    """Finds in every image the boxes it was given."""

    def __init__(self, found: dict[int, Target]) -> None:
        super().__init__()
        self.found = found

    def detect(self, view: View, score_threshold: float) -> list[Target]:
        assert not self.training
        marks = [int(image[0, 0, 0]) for image in view.images]
        return [t[t.scores > score_threshold] for t in (self.found[mark] for mark in marks)]


def batches(order: list[int]):
    for row in order:  # views at twice the size
        images = torch.full((1, 3, 64, 64), float(row))
        yield (
            View(images, torch.tensor([[64, 64]]), torch.diag(torch.tensor([2.0, 2.0, 1.0]))[None]),
            torch.tensor([row + 10]),
        )


def test_labels_made_offline():
    found = {
        0: target((2, 2, 20, 20, 1, 0.95), (4, 4, 10, 10, 2, 0.5)),
        1: target(),
        2: target((10, 10, 80, 30, 2, 0.4), (10, 10, 20.2, 20, 1, 0.2)),
    }
    detector = Fixed(found).train()
    labels = label_offline(detector, batches([2, 0, 1]), make_source(), threshold=0.9)
    assert detector.training
    assert labels.ids.tolist() == [10, 12]  # in the source's order, without the image in which nothing was found
    assert labels.paths == ["0.jpg", "2.jpg"]
    assert labels.boxes.tolist() == [[1, 1, 10, 10], [5, 5, 32, 15]]  # original pixels, clipped
    assert labels.labels.tolist() == [1, 2]
    assert labels.scores.tolist() == pytest.approx([0.95, 0.4], abs=1e-3)
    assert labels.offsets.tolist() == [0, 1, 2]
    everything = label_offline(detector, batches([0, 1, 2]), make_source(), drop_empty=False)
    assert everything.offsets.tolist() == [0, 1, 1, 2]


def test_float16_is_an_option():
    found = {row: target((2.002, 2, 20, 20, 1, 0.9501)) for row in range(3)}
    coarse = label_offline(Fixed(found), batches([0]), make_source())
    fine = label_offline(Fixed(found), batches([0]), make_source(), float16=False)
    assert coarse.boxes[0, 0] == np.float32(np.float16(1.001))
    assert fine.boxes[0, 0] == np.float32(1.001)
    assert fine.boxes.dtype == coarse.boxes.dtype == np.float32


@pytest.mark.parametrize(
    ("scores", "float16", "kept"),
    [
        # float16 knows 0.8994, 0.8999 (what 0.9 becomes) and 0.9004: 0.8997 meets the threshold only when rounded
        ((0.8997, 0.9502), True, [0.8999, 0.9502]),
        ((0.8997, 0.9502), False, [0.9502]),
        ((0.8995, 0.9502), True, [0.9502]),
        # two scores that float16 holds as one are both the best of an uncertain image
        ((0.60001, 0.60002), True, [0.6001, 0.6001]),
        ((0.60001, 0.60002), False, [0.60002]),
    ],
)
def test_threshold_meets_scores_as_they_are_stored(scores, float16, kept):
    found = {0: target(*((2.0, 2.0, 20.0, 20.0, 1.0, score) for score in scores))}
    labels = label_offline(Fixed(found), batches([0]), make_source(), threshold=0.9, float16=float16)
    assert labels.scores.tolist() == pytest.approx(kept, abs=5e-5)


def test_images_whose_boxes_are_all_below_the_threshold_stay():
    """What leaves an image out is that nothing at all was found there."""
    found = {0: target((2, 2, 20, 20, 1, 0.95)), 1: target((2, 2, 20, 20, 1, 0.5)), 2: target((2, 2, 20, 20, 1, 0.04))}
    labels = label_offline(Fixed(found), batches([0, 1, 2]), make_source(), threshold=0.9, keep_top1=False)
    assert labels.ids.tolist() == [10, 11]
    assert labels.offsets.tolist() == [0, 1, 1]


def test_boxes_of_the_source_do_not_reach_the_labels():
    found = {row: target((2, 2, 20, 20, 1, 0.95)) for row in range(3)}
    source = make_source()
    noise = replace(source, boxes=source.boxes + 7, labels=source.labels + 1)
    first = label_offline(Fixed(found), batches([0, 1, 2]), source)
    second = label_offline(Fixed(found), batches([0, 1, 2]), noise)
    for name in ("ids", "boxes", "labels", "scores", "offsets"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_offline_quality_counts_images_that_were_left_out():
    found = {0: target((2, 2, 18, 18, 1, 0.95)), 1: target(), 2: target((30, 30, 40, 40, 1, 0.99))}
    truth = make_source()
    labels = label_offline(Fixed(found), batches([0, 1, 2]), truth)
    measured, by_class = offline_quality(labels, truth, 2)
    assert by_class.sum(0).tolist() == [2, 1, 3]
    assert measured["precision"] == pytest.approx(1 / 2)
    assert measured["recall"] == pytest.approx(1 / 3)
    assert measured["iou"] == pytest.approx(1.0, abs=1e-3)


def test_labels_are_counted_class_by_class():
    """Each class against `quality` of its boxes alone; random boxes, some shifted a little, some of another class."""
    random = np.random.default_rng(0)
    truth, labels = [], []
    for _ in range(20):
        corner = random.uniform(0, 80, (6, 2))
        boxes = np.concatenate([corner, corner + random.uniform(5, 20, (6, 2))], 1)
        classes = random.integers(1, 4, 6)
        truth.append(target(*((*box, label, 1.0) for box, label in zip(boxes, classes, strict=True))))
        moved, others = boxes + random.uniform(-3, 3, boxes.shape), np.where(random.random(6) < 0.7, classes, 1)
        scores = random.random(6)
        labels.append(target(*((*b, c, s) for b, c, s in zip(moved, others, scores, strict=True))))
    counts = count_by_class(labels, truth, 3)
    shares = shares_by_class(counts, ["a", "b", "c"])
    for number, name in enumerate("abc"):
        own = [found[found.labels == number + 1] for found in labels]
        there = [true[true.labels == number + 1] for true in truth]
        alone = quality(own, there)
        assert counts[number, 0] == alone["labels"]
        assert counts[number, 2] == alone["boxes"]
        assert shares[name]["pseudo_precision"] == pytest.approx(100 * alone["precision"])
        assert shares[name]["pseudo_recall"] == pytest.approx(100 * alone["recall"])
    assert counts[:, 1].min() > 0
    assert shares_by_class(np.zeros((1, 3), np.int64), ["a"]) == {
        "a": {"pseudo_precision": None, "pseudo_recall": None}
    }
