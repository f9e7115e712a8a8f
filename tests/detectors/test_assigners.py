"""Assignment by cost, against loops over images, boxes and candidates as one would write them down."""

from __future__ import annotations

import math

import pytest
import torch

from detectors.assigners import adaptive, dynamic_k
from detectors.padded import PaddedTargets
from harness.core import boxes as box_ops


def looped(
    cost: list[list[float]], overlap: list[list[float]], allowed: list[list[bool]], top: int
) -> list[int | None]:
    """The box of each candidate of one image, or None; rows are boxes."""
    boxes, candidates = len(cost), len(cost[0])
    picks: list[list[int]] = [[] for _ in range(candidates)]
    for n in range(boxes):
        offered = [a for a in range(candidates) if allowed[n][a]]
        best = sorted((overlap[n][a] for a in offered), reverse=True)[:top]
        k = min(max(1, int(sum(best))), len(offered))
        for a in sorted(offered, key=lambda a: cost[n][a])[:k]:
            picks[a].append(n)
    result: list[int | None] = []
    for a in range(candidates):
        if len(picks[a]) > 1:  # of all boxes, not of those that picked it
            result.append(min((n for n in range(boxes) if allowed[n][a]), key=lambda n: cost[n][a]))
        else:
            result.append(picks[a][0] if picks[a] else None)
    return result


@pytest.mark.parametrize("seed", range(30))
def test_dynamic_k_is_what_loops_give(seed):
    generator = torch.Generator().manual_seed(seed)
    images, boxes, candidates = 3, 1 + seed % 5, 6 + 7 * (seed % 4)
    cost = torch.rand(images, boxes, candidates, generator=generator)
    overlap = torch.rand(images, boxes, candidates, generator=generator) ** (1 + seed % 3)
    valid = torch.rand(images, boxes, generator=generator) < 0.8
    allowed = (torch.rand(images, 1, candidates, generator=generator) < 0.7) & valid[..., None]
    target, positive = dynamic_k(cost, overlap, allowed, top=5)
    for image in range(images):
        expected = looped(cost[image].tolist(), overlap[image].tolist(), allowed[image].tolist(), 5)
        found = [
            n if is_positive else None
            for n, is_positive in zip(target[image].tolist(), positive[image].tolist(), strict=True)
        ]
        assert found == expected


def test_a_candidate_that_several_boxes_chose_goes_to_the_cheapest_of_all():
    """Boxes 0 and 1 choose candidate 0, but it is cheapest for box 2, which has chosen candidate 1."""
    cost = torch.tensor([[[0.5, 2.0, 3.0], [0.4, 2.0, 3.0], [0.3, 0.1, 3.0]]])
    none = torch.zeros_like(cost)
    target, positive = dynamic_k(cost, none, none == 0, top=13)
    assert positive.tolist() == [[True, True, False]]
    assert target[0, :2].tolist() == [2, 2]


def test_costs_that_no_number_holds_do_not_admit_what_is_forbidden():
    """A box whose allowed candidates are all infinitely dear still gets one of those."""
    cost = torch.full((1, 1, 4), torch.inf)
    allowed = torch.tensor([[[False, False, True, False]]])
    target, positive = dynamic_k(cost, torch.zeros_like(cost), allowed, top=13)
    assert positive.tolist() == [[False, False, True, False]]
    assert target[0, 2] == 0


def focal(score: float, right: bool) -> float:
    """Alpha 0.25, gamma 2."""
    return 0.25 * (1 - score) ** 2 * -math.log(score) if right else 0.75 * score**2 * -math.log(1 - score)


def scene(seed: int, classes: int = 4) -> dict:
    """Two levels of cells on images of 64 px, random predictions around random boxes; the last box may be padding."""
    generator = torch.Generator().manual_seed(seed)
    centers, strides = [], []
    for stride in (8, 16):
        places = torch.arange(0, 64, stride)
        y, x = torch.meshgrid(places, places, indexing="ij")
        centers.append(torch.stack([x, y], -1).view(-1, 2))
        strides.append(torch.full((len(places) ** 2,), float(stride)))
    center, stride = torch.cat(centers).float(), torch.cat(strides)
    half = stride[:, None] * 2
    corner = torch.rand(2, 3, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 4 + torch.rand(2, 3, 2, generator=generator) * 30], -1)
    noise = torch.randn(2, len(center), 4, generator=generator) * 5
    valid = torch.tensor([[True, True, True], [True, bool(seed % 2), False]])
    labels = torch.randint(1, classes + 1, (2, 3), generator=generator)
    return {
        "logits": torch.randn(2, len(center), classes, generator=generator) * 2,
        "boxes": torch.cat([center - half, center + half], -1) + noise,
        "anchors": torch.cat([center - half, center + half], -1),
        "strides": stride,
        "targets": PaddedTargets(boxes, labels * valid, torch.ones(2, 3), valid),
        "usable": torch.rand(2, len(center), generator=generator) < 0.9,
    }


@pytest.mark.parametrize("seed", range(12))
def test_adaptive_assignment_is_what_loops_give(seed):
    given = scene(seed)
    matches, quality = adaptive(**given, top=13, overlap_weight=2.0)
    targets, count = given["targets"], len(given["anchors"])
    for image in range(2):
        real = [n for n in range(3) if targets.valid[image, n]]
        candidates = []
        for a in range(count):
            x, y = ((given["anchors"][a, :2] + given["anchors"][a, 2:]) / 2).tolist()
            within = [targets.boxes[image, n].tolist() for n in real]
            is_inside = any(x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in within)
            candidates.append(is_inside and bool(given["usable"][image, a]))
        overlap = box_ops.iou(targets.boxes[image], given["boxes"][image])
        cost = [[0.0] * count for _ in range(3)]
        for n in real:
            x1, y1, x2, y2 = targets.boxes[image, n].tolist()
            for a in range(count):
                scores = given["logits"][image, a].double().sigmoid().tolist()
                label = int(targets.labels[image, n])
                of_class = sum(focal(score, column + 1 == label) for column, score in enumerate(scores))
                x, y = ((given["anchors"][a, :2] + given["anchors"][a, 2:]) / 2).tolist()
                distance = math.dist((x, y), ((x1 + x2) / 2, (y1 + y2) / 2)) / float(given["strides"][a])
                cost[n][a] = of_class - 2 * math.log(float(overlap[n, a]) + 1e-7) + 0.001 * 10**distance
        allowed = [[n in real and candidates[a] for a in range(count)] for n in range(3)]
        expected = looped(cost, overlap.tolist(), allowed, 13)
        for a in range(count):
            assert bool(matches.positive[image, a]) == (expected[a] is not None)
            assert bool(matches.negative[image, a]) == (expected[a] is None and bool(given["usable"][image, a]))
            if expected[a] is not None:
                assert int(matches.target[image, a]) == expected[a]
                assert float(quality[image, a]) == pytest.approx(float(overlap[expected[a], a]))
            else:
                assert float(quality[image, a]) == 0
    assert matches.positive.any()


def test_a_candidate_may_learn_a_box_that_it_is_not_inside_of():
    """Only the cost forbids it: the anchor at (8, 8) lies in box 0 alone, but its prediction is box 1."""
    boxes = torch.tensor([[[4.0, 4.0, 12.0, 12.0], [16.0, 4.0, 24.0, 12.0]]])
    targets = PaddedTargets(boxes, torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2), torch.ones(1, 2).bool())
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 16.0, 16.0]])
    matches, quality = adaptive(
        torch.zeros(1, 2, 1), torch.stack([boxes[0, 0], boxes[0, 1]])[None], anchors, torch.tensor([8.0, 8.0]), targets
    )
    assert matches.target.tolist() == [[0, 1]]
    assert quality.tolist() == [[1, 1]]


def test_images_without_boxes_are_background():
    given = scene(0)
    given["targets"] = given["targets"].keep(torch.zeros(2, 3, dtype=torch.bool))
    matches, quality = adaptive(**given)
    assert not matches.positive.any()
    assert torch.equal(matches.negative, given["usable"])
    assert not quality.any()
