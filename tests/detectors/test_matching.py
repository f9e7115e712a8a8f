from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detectors import matching
from detectors.matching import match_anchors, matched_boxes, sample
from detectors.padded import pad
from harness.core.draws import image_keys, torch_uniform
from harness.core.types import Target


def some_boxes(generator: torch.Generator, count: int) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator) * 50
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 20], 1)


def keys_of(count: int, step: int = 0) -> torch.Tensor:
    return torch.from_numpy(image_keys(0, step, list(range(count))))


def make_targets(generator: torch.Generator, counts: tuple[int, ...]) -> list[Target]:
    return [Target(some_boxes(generator, n), torch.arange(n) % 3 + 1, torch.ones(n)) for n in counts]


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_match_agrees_with_torchvision_image_by_image(low_quality, seed):
    generator = torch.Generator().manual_seed(seed)
    anchors = some_boxes(generator, 120)
    targets = make_targets(generator, (3, 1, 6))
    found = match_anchors(anchors, pad(targets), 0.6, 0.3, low_quality)
    matcher = Matcher(0.6, 0.3, allow_low_quality_matches=low_quality)
    for image, target in enumerate(targets):
        expected = matcher(box_iou(target.boxes, anchors))
        assert torch.equal(found.positive[image], expected >= 0)
        assert torch.equal(found.negative[image], expected == Matcher.BELOW_LOW_THRESHOLD)
        chosen = expected >= 0
        assert torch.equal(found.target[image][chosen], expected[chosen])


def test_large_tables_are_split_by_image(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    anchors, targets = some_boxes(generator, 50), pad(make_targets(generator, (3, 0, 6, 2, 1)))
    usable = torch.rand(5, 50, generator=generator) < 0.7
    rules = {"low_quality": True, "low_quality_iou": 0.2, "low_quality_of": "anchor", "usable": usable}
    whole = match_anchors(anchors, targets, 0.5, 0.3, **rules)
    own = match_anchors(anchors.expand(5, -1, -1), targets, 0.5, 0.3)
    monkeypatch.setattr(matching, "_LARGEST_TABLE", 400)
    for expected, found in (
        (whole, match_anchors(anchors, targets, 0.5, 0.3, **rules)),
        (own, match_anchors(anchors.expand(5, -1, -1), targets, 0.5, 0.3)),
    ):
        assert torch.equal(expected.target, found.target)
        assert torch.equal(expected.positive, found.positive)
        assert torch.equal(expected.negative, found.negative)


@pytest.mark.parametrize("of", ["box", "anchor"])
def test_low_quality_matches_need_some_overlap(of):
    """mmdetection's and tensorpack's rules, written as their code has them."""
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        anchors, (target,) = some_boxes(generator, 40), make_targets(generator, (6,))
        found = match_anchors(anchors, pad([target]), 0.7, 0.3, True, 0.3, of)
        overlap = box_iou(target.boxes, anchors)
        label = torch.full((40,), -1)
        forced = [torch.nonzero(row == row.max())[:, 0] for row in overlap]
        if of == "box":  # assign_wrt_overlaps of MaxIoUAssigner
            label[overlap.max(0).values < 0.3] = 0
            label[overlap.max(0).values >= 0.7] = 1
            for row, index in zip(overlap, forced, strict=True):
                if row.max() >= 0.3:
                    label[index] = 1
        else:  # get_anchor_labels
            label[torch.cat(forced)] = 1
            label[overlap.max(0).values >= 0.7] = 1
            label[overlap.max(0).values < 0.3] = 0
        assert torch.equal(found.positive[0], label == 1)
        assert torch.equal(found.negative[0], label == 0)
        any_overlap = match_anchors(anchors, pad([target]), 0.7, 0.3, True)
        seen.add(torch.equal(found.positive, any_overlap.positive))
    assert False in seen


def test_a_box_claims_among_the_usable_candidates():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 6], [50, 50, 60, 60]])
    box = pad([Target(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1]), torch.ones(1))] * 2)
    usable = torch.tensor([[False, True, True, False], [True, False, True, True]])
    found = match_anchors(anchors, box, 0.9, 0.3, low_quality=True, low_quality_iou=0.3, usable=usable)
    assert found.positive.tolist() == [[False, True, False, False], [True, False, False, False]]
    assert found.negative.tolist() == [[False] * 4, [False, False, False, True]]


def test_image_without_boxes_has_only_negatives():
    generator = torch.Generator().manual_seed(0)
    found = match_anchors(some_boxes(generator, 10), pad(make_targets(generator, (0, 2))), 0.6, 0.3, low_quality=True)
    assert found.negative[0].all()
    assert not found.positive[0].any()


def test_a_box_that_no_anchor_touches_forces_nothing():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])
    far = Target(torch.tensor([[80.0, 80, 90, 90]]), torch.tensor([1]), torch.ones(1))
    found = match_anchors(anchors, pad([far]), 0.6, 0.3, low_quality=True)
    assert not found.positive.any()
    assert found.negative.all()


@pytest.mark.parametrize(("count", "fraction"), [(16, 0.5), (64, 0.25), (500, 0.5), (130, 0.1)])
def test_sample_respects_counts(count, fraction):
    generator = torch.Generator().manual_seed(1)
    anchors = some_boxes(generator, 120)
    matches = match_anchors(anchors, pad(make_targets(generator, (5, 0, 2))), 0.4, 0.3, low_quality=True)
    samples = sample(matches, count, fraction, keys_of(3), "rpn")
    room, count = int(count * fraction), min(count, 120)
    assert samples.room == min(room, 120)
    head = samples.head()
    assert torch.equal(head.positive.sum(1), samples.positive.sum(1))
    assert torch.equal(head.index, samples.index[:, : samples.room])
    for image in range(3):
        index, valid = samples.index[image], samples.valid[image]
        positive = samples.positive[image]
        assert len(set(index[valid].tolist())) == int(valid.sum())
        assert matches.positive[image][index[positive]].all()
        assert matches.negative[image][index[valid & ~positive]].all()
        expected = min(int(matches.positive[image].sum()), room)
        assert int(positive.sum()) == expected
        negatives = min(int(matches.negative[image].sum()), count - expected)
        assert int(valid.sum()) == expected + negatives
        assert positive.tolist() == sorted(positive.tolist(), reverse=True)


def test_fewer_candidates_are_no_fewer_positives():
    """20 candidates for 64 places of which 16 may be positive: all 12 positive ones are taken, not a quarter of 20."""
    positive = torch.arange(20)[None] < 12
    matches = matching.AnchorMatches(torch.zeros(1, 20, dtype=torch.int64), positive, ~positive)
    samples = sample(matches, 64, 0.25, keys_of(1), "roi")
    assert int(samples.positive.sum()) == 12
    assert int(samples.valid.sum()) == 20


def test_sample_takes_the_candidates_with_the_largest_draws():
    generator = torch.Generator().manual_seed(2)
    anchors = some_boxes(generator, 120)
    keys = keys_of(2)
    matches = match_anchors(anchors, pad(make_targets(generator, (5, 3))), 0.3, 0.3)
    samples = sample(matches, 10, 0.5, keys, "roi")
    noise = torch_uniform(keys, 120, "roi")
    for image in range(2):
        for kind, room in ((matches.positive[image], 5), (matches.negative[image], None)):
            own = samples.valid[image] & (samples.positive[image] if room else ~samples.positive[image])
            chosen = set(samples.index[image][own].tolist())
            candidates = kind.nonzero()[:, 0].tolist()
            ranked = sorted(candidates, key=lambda i, row=noise[image]: -float(row[i]))
            assert chosen == set(ranked[: len(chosen)])


def test_draws_of_an_image_do_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(3)
    anchors = some_boxes(generator, 120)
    targets = make_targets(generator, (4, 2, 3))
    keys = keys_of(3)
    together = sample(match_anchors(anchors, pad(targets), 0.4, 0.3), 20, 0.5, keys, "rpn")
    for image in range(3):
        alone = sample(
            match_anchors(anchors, pad(targets[image : image + 1]), 0.4, 0.3), 20, 0.5, keys[image : image + 1], "rpn"
        )
        assert torch.equal(alone.index[0], together.index[image])
    other = sample(match_anchors(anchors, pad(targets), 0.4, 0.3), 20, 0.5, keys_of(3, step=1), "rpn")
    assert not torch.equal(other.index, together.index)


def test_matched_boxes_are_the_candidates_themselves_where_nothing_is_learnt():
    generator = torch.Generator().manual_seed(4)
    anchors = some_boxes(generator, 60)
    targets = make_targets(generator, (2, 0))
    padded = pad(targets)
    matches = match_anchors(anchors, padded, 0.4, 0.3, low_quality=True)
    samples = sample(matches, 20, 0.5, keys_of(2), "rpn")
    chosen = anchors[samples.index]
    boxes = matched_boxes(samples, matches, padded, chosen)
    for image in range(2):
        for slot in range(20):
            if samples.positive[image, slot]:
                overlap = box_iou(targets[image].boxes, chosen[image, slot][None])[:, 0]
                assert torch.equal(boxes[image, slot], targets[image].boxes[overlap.argmax()])
            else:
                assert torch.equal(boxes[image, slot], chosen[image, slot])
