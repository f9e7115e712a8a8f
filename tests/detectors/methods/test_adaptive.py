"""Thresholds from class statistics against plain Python."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from detectors.methods.adaptive import AdaptiveKeys, AdaptiveThresholds
from detectors.methods.mean_teacher import MeanTeacher
from detectors.methods.unbiased_teacher import UnbiasedTeacher
from detectors.padded import PaddedTargets, pad
from harness.core.types import Target, UserError

Image = list[tuple[int, float]]  # (class, score) of the boxes that were found in it
EASY = {"momentum": 0.5, "ramp": False, "update": "after", "buffers": True}


def images(generator: random.Random, count: int, classes: int = 3) -> list[Image]:
    return [
        [
            (generator.choices(range(1, classes + 1), [6, 3, 1])[0], generator.random())
            for _ in range(generator.randrange(7))
        ]
        for _ in range(count)
    ]


def padded(found: list[Image]) -> PaddedTargets:
    targets = []
    for image in found:
        falling = sorted(image, key=lambda box: -box[1])
        targets.append(
            Target(
                torch.zeros(len(image), 4),
                torch.tensor([label for label, _ in falling], dtype=torch.int64),
                torch.tensor([score for _, score in falling]),
            )
        )
    return pad(targets)


def by_hand(seen: list[Image], labeled: int, boxes: list[int], keys: AdaptiveKeys, initial: float) -> list[float]:
    """LabelMatch's rule, score by score."""
    if len(seen) < keys.images:
        return [initial] * len(boxes)
    counts = [max(1, count) for count in boxes]
    thresholds = []
    for label, count in enumerate(counts, 1):
        scores = []
        for image in seen[-keys.images :]:
            own = sorted((score for found, score in image if found == label), reverse=True)[: keys.per_image]
            scores += own + [0.0] * (keys.per_image - len(own))
        expected = keys.images * (sum(boxes) / labeled) * count / sum(counts)
        scores.sort(reverse=True)
        rank = min(int(keys.share * expected), len(scores) - 1)
        thresholds.append(max(keys.floor, scores[rank]))
    return thresholds


@pytest.mark.parametrize(
    ("keys", "labeled", "boxes"),
    [
        (AdaptiveKeys(images=20, per_image=3), 10, [12, 6, 2]),
        (AdaptiveKeys(share=1.0, images=7, per_image=2), 4, [9, 1, 0]),
        (AdaptiveKeys(share=0.5, images=12, per_image=20, floor=0.3), 3, [40, 30, 20]),  # more than can be found
    ],
)
def test_against_the_rule_by_hand(keys: AdaptiveKeys, labeled: int, boxes: list[int]) -> None:
    generator = random.Random(0)
    adaptive = AdaptiveThresholds(3, 0.9, keys)
    adaptive.expect(labeled, boxes)
    seen: list[Image] = []
    full = 0
    for _ in range(12):
        found = images(generator, generator.randrange(1, 6))
        rows = adaptive.best_scores(padded(found))
        nothing = torch.full((2, *rows.shape[1:]), 9.0)  # rows of no image mean nothing
        there = torch.tensor([True] * len(found) + [False] * 2)
        adaptive.absorb(torch.cat([rows, nothing]), there)
        seen += found
        expected = by_hand(seen, labeled, boxes, keys, 0.9)
        assert adaptive.thresholds.tolist() == pytest.approx(expected, abs=1e-6)
        full += len(seen) >= keys.images
    assert full >= 3


def test_more_images_in_a_step_than_are_kept() -> None:
    keys = AdaptiveKeys(images=4, per_image=2)
    adaptive = AdaptiveThresholds(3, 0.9, keys)
    adaptive.expect(5, [5, 5, 5])
    seen = images(random.Random(1), 11)
    adaptive.absorb(adaptive.best_scores(padded(seen)), torch.ones(11, dtype=torch.bool))
    assert adaptive.thresholds.tolist() == pytest.approx(by_hand(seen, 5, [5, 5, 5], keys, 0.9), abs=1e-6)


def test_a_box_at_its_threshold_passes() -> None:
    adaptive = AdaptiveThresholds(3, 0.9, AdaptiveKeys())
    adaptive.thresholds.copy_(torch.tensor([0.2, 0.5, 0.8]))
    found = padded([[(1, 0.2), (2, 0.49), (3, 0.8), (1, 0.1)]])
    passed = {(int(label), round(float(s), 2)) for label, s, p in zip(
        found.labels[0], found.scores[0], adaptive.passes(found)[0], strict=True) if p}  # fmt: skip
    assert passed == {(1, 0.2), (3, 0.8)}


METHODS = {
    "mean_teacher": lambda d, **more: MeanTeacher(d, 10, ema=EASY, score=0.3, **more),
    "unbiased_teacher": lambda d, **more: UnbiasedTeacher(
        d, 10, ema=EASY, score=0.3, burn_in=2, teacher_training_proposals=False, **more
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_up_what_their_teacher_finds(make_small, make_batch, name: str) -> None:
    """Once the images are there, the labels are the boxes above the thresholds of their classes."""
    method = METHODS[name](make_small(), adaptive={"images": 4, "per_image": 5, "share": 0.5}).train()
    method.expect(10, [20, 10, 0])
    seen: list[Image] = []
    keys = set()
    for step in range(5):
        batches = [make_batch(10 * step + lane) for lane in range(2)]
        method.before_step(step)
        observed = []
        before = method.adaptive.thresholds.clone()
        for batch in batches:
            if step < method.unlabeled_from:
                batch.unlabeled, batch.unlabeled_ids = {}, batch.unlabeled_ids[:0]
            _, metrics = method(batch, step)
            observed.append(method.observe())
            keys.add(tuple(metrics))
            if step < method.unlabeled_from:
                assert observed[-1] == {}
                continue
            found = method.teacher.detect(batch.unlabeled["weak"], 0.05)
            seen += [list(zip(t.labels.tolist(), t.scores.tolist(), strict=True)) for t in found]
            expected = sum(
                float(s) >= float(before[label - 1]) for t in found for label, s in zip(t.labels, t.scores, strict=True)
            )
            labels = sum(map(len, method.pseudo_labels["classification"]))
            assert 0 <= expected - labels <= 2  # some leave the strong view
            assert float(metrics["highest_threshold"]) == float(before.max())
        if observed[0]:
            method.absorb(step, {key: torch.stack([part[key] for part in observed]) for key in observed[0]})
        by = by_hand(seen, 10, [20, 10, 0], method.adaptive.keys, 0.3)
        assert method.adaptive.thresholds.tolist() == pytest.approx(by, abs=1e-5)
    assert len(keys) == 1
    assert method.class_measures()["pseudo_threshold"].tolist() == pytest.approx([100 * t for t in by], abs=1e-3)
    other = METHODS[name](make_small(), adaptive={"images": 4, "per_image": 5, "share": 0.5})
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert torch.equal(other.adaptive.thresholds, method.adaptive.thresholds)
    assert torch.equal(other.adaptive.best, method.adaptive.best)


def test_without_the_option_there_is_no_state(make_small) -> None:
    method = METHODS["mean_teacher"](make_small())
    assert not [key for key in method.state_dict() if "adaptive" in key]
    assert method.observe() == {}
    assert method.class_measures() == {}


def test_scores_below_the_candidates_cannot_be_thresholds(make_small) -> None:
    with pytest.raises(UserError, match=r"method\.candidate_score=0\.2 .*method\.adaptive\.floor=0\.1"):
        METHODS["mean_teacher"](make_small(), adaptive={"floor": 0.1}, candidate_score=0.2)
    with pytest.raises(UserError, match=r"method\.adaptive\.images=0 must be"):
        METHODS["mean_teacher"](make_small(), adaptive={"images": 0})
