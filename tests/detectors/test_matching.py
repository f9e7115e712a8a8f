from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detectors import matching
from detectors.matching import match, matched_boxes, sample
from detectors.padded import pad
from harness.sampling import image_keys, torch_uniform
from harness.types import Target


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
    found = match(anchors, pad(targets), 0.6, 0.3, low_quality)
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
    whole = match(anchors, targets, 0.5, 0.3, low_quality=True)
    own = match(anchors.expand(5, -1, -1), targets, 0.5, 0.3)
    monkeypatch.setattr(matching, "_LARGEST_TABLE", 400)
    for expected, found in (
        (whole, match(anchors, targets, 0.5, 0.3, low_quality=True)),
        (own, match(anchors.expand(5, -1, -1), targets, 0.5, 0.3)),
    ):
        assert torch.equal(expected.target, found.target)
        assert torch.equal(expected.positive, found.positive)
        assert torch.equal(expected.negative, found.negative)


def test_image_without_boxes_has_only_negatives():
    generator = torch.Generator().manual_seed(0)
    found = match(some_boxes(generator, 10), pad(make_targets(generator, (0, 2))), 0.6, 0.3, low_quality=True)
    assert found.negative[0].all()
    assert not found.positive[0].any()


def test_a_box_that_no_anchor_touches_forces_nothing():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])
    far = Target(torch.tensor([[80.0, 80, 90, 90]]), torch.tensor([1]), torch.ones(1))
    found = match(anchors, pad([far]), 0.6, 0.3, low_quality=True)
    assert not found.positive.any()
    assert found.negative.all()


@pytest.mark.parametrize(("count", "fraction"), [(16, 0.5), (64, 0.25), (500, 0.5)])
def test_sample_respects_counts(count, fraction):
    generator = torch.Generator().manual_seed(1)
    anchors = some_boxes(generator, 120)
    matches = match(anchors, pad(make_targets(generator, (5, 0, 2))), 0.4, 0.3, low_quality=True)
    samples = sample(matches, count, fraction, keys_of(3), "rpn")
    count = min(count, 120)
    for image in range(3):
        index, valid = samples.index[image], samples.valid[image]
        positive = samples.positive[image]
        assert len(set(index[valid].tolist())) == int(valid.sum())
        assert matches.positive[image][index[positive]].all()
        assert matches.negative[image][index[valid & ~positive]].all()
        expected = min(int(matches.positive[image].sum()), int(count * fraction))
        assert int(positive.sum()) == expected
        negatives = min(int(matches.negative[image].sum()), count - expected)
        assert int(valid.sum()) == expected + negatives
        assert positive.tolist() == sorted(positive.tolist(), reverse=True)


def test_sample_takes_the_candidates_with_the_largest_draws():
    generator = torch.Generator().manual_seed(2)
    anchors = some_boxes(generator, 120)
    keys = keys_of(2)
    matches = match(anchors, pad(make_targets(generator, (5, 3))), 0.3, 0.3)
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
    together = sample(match(anchors, pad(targets), 0.4, 0.3), 20, 0.5, keys, "rpn")
    for image in range(3):
        alone = sample(
            match(anchors, pad(targets[image : image + 1]), 0.4, 0.3), 20, 0.5, keys[image : image + 1], "rpn"
        )
        assert torch.equal(alone.index[0], together.index[image])
    other = sample(match(anchors, pad(targets), 0.4, 0.3), 20, 0.5, keys_of(3, step=1), "rpn")
    assert not torch.equal(other.index, together.index)


def test_matched_boxes_are_the_candidates_themselves_where_nothing_is_learnt():
    generator = torch.Generator().manual_seed(4)
    anchors = some_boxes(generator, 60)
    targets = make_targets(generator, (2, 0))
    padded = pad(targets)
    matches = match(anchors, padded, 0.4, 0.3, low_quality=True)
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
