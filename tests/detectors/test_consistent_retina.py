"""Consistent-Teacher's detector: FAM-3D against torchvision's deformable convolution and loops, losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d, generalized_box_iou_loss

from detectors import losses
from detectors.assigners import adaptive
from detectors.consistent_retina import ConsistentRetina, consistent_retina, small_consistent_retina
from detectors.detector import targets_of
from detectors.fam3d import Fam3d, sampled_at
from detectors.matching import match_anchors
from harness.core import boxes as box_ops
from harness.core.types import UserError


def make(seed: int = 0, **options: object) -> ConsistentRetina:
    torch.manual_seed(seed)
    small: dict = {"channels": (8, 8, 16, 16), "pyramid_channels": 16}
    return small_consistent_retina(num_classes=3, name="s", cache_dir=".", weights="scratch", **{**small, **options})


def box_maps(sizes: list[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, *size, generator=generator) * 3 + 5 for size in sizes]


def test_each_coordinate_is_sampled_as_by_a_deformable_convolution():
    (maps,) = box_maps([(6, 7)])
    offsets = torch.randn(2, 8, 6, 7, generator=torch.Generator().manual_seed(1)) * 3  # some lead outside
    weight = torch.ones(4, 1, 1, 1)
    torch.testing.assert_close(sampled_at(maps, offsets), deform_conv2d(maps, offsets, weight), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sampled_at(maps, torch.zeros_like(offsets)), maps, atol=1e-4, rtol=1e-5)


def test_a_map_of_one_cell_can_be_sampled():
    maps = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(sampled_at(maps, torch.zeros(2, 8, 1, 1)), maps)


def test_fam3d_with_zero_offsets_and_weights_is_the_identity():
    sizes = [(9, 12), (5, 6), (3, 3)]
    fam = Fam3d(6, 2, (4, 8, 16))
    for layer in (fam.levels, fam.places):
        torch.nn.init.zeros_(layer.weight)
    maps = [torch.randn(2, 6, *size) for size in sizes]
    for moved, boxes in zip(fam(maps, box_maps(sizes)), box_maps(sizes), strict=True):
        torch.testing.assert_close(moved, boxes, atol=1e-4, rtol=1e-5)


def test_fam3d_hardly_moves_boxes_at_the_start():
    torch.manual_seed(0)
    sizes = [(9, 12), (5, 6)]
    maps = [torch.randn(2, 48, *size) for size in sizes]
    for moved, boxes in zip(Fam3d(48, 12, (4, 8))(maps, box_maps(sizes)), box_maps(sizes), strict=True):
        assert float((moved - boxes).detach().abs().max()) < 0.01
        assert not torch.equal(moved, boxes)


@pytest.mark.parametrize("bias", [0.4, -0.7, 3.0, -3.0])
def test_fam3d_mixes_the_levels_as_written(bias):
    """A constant weight on every level, clamped, at the ends to what there is; neighbours as they were."""
    sizes, strides = [(8, 8), (4, 4), (2, 2)], (4, 8, 16)
    fam = Fam3d(6, 2, strides)
    for layer in (fam.levels, fam.places):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(fam.levels.bias, bias)
    before = box_maps(sizes)
    moved = fam([torch.randn(2, 6, *size) for size in sizes], before)
    for level in range(3):
        low, high = (0 if level == 0 else -1), (0 if level == 2 else 1)
        weight = min(max(bias, low), high)
        expected = (1 - abs(weight)) * before[level]
        if weight:
            other = level + 1 if weight > 0 else level - 1
            resized = F.interpolate(before[other], sizes[level], mode="bilinear", align_corners=False)
            expected = expected + abs(weight) * resized * strides[other] / strides[level]
        torch.testing.assert_close(moved[level], expected, atol=1e-4, rtol=1e-5)


def test_boxes_without_fam3d_are_decoded_anchors():
    """Deltas with deviations 0.1, 0.1, 0.2, 0.2, times the level's scale, on one square anchor per cell."""
    detector = make(fam3d=False)
    head = detector.head
    torch.nn.init.zeros_(head.deltas.weight)
    head.deltas.bias.data = torch.tensor([1.0, -2.0, 0.5, 3.0])
    head.scales.data = torch.tensor([1.0, 2.0, 0.5])
    features = [torch.randn(1, 16, n, n) for n in (16, 8, 4)]
    logits, deltas, _ = detector.heads(features)
    anchors, level_sizes = detector.anchors(features, (64, 64))
    found = detector.decode(deltas, anchors).split(level_sizes, 1)
    for level, (stride, side, scale) in enumerate(((4, 12, 1.0), (8, 18, 2.0), (16, 28, 0.5))):
        width = int(level_sizes[level] ** 0.5)
        for cell in (0, width + 2, width * width - 1):
            x, y = cell % width * stride, cell // width * stride  # on the corner of the cell
            cx, cy = x + side * 0.1 * scale, y - side * 0.2 * scale
            w, h = side * math.exp(0.1 * scale), side * math.exp(0.6 * scale)
            expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
            torch.testing.assert_close(found[level][0, cell], expected, atol=1e-3, rtol=1e-4)
    assert logits.shape == (1, sum(level_sizes), 3)


def test_first_scores_are_the_prior(make_batch):
    detector = make()
    view = make_batch().labeled["labeled"]
    scores = detector.output(detector.features(view.images), view).logits.sigmoid()
    assert abs(float(scores.detach().mean()) - 0.01) < 0.002


@pytest.mark.parametrize("assignment", ["adaptive", "max_iou"])
@pytest.mark.parametrize("boxes", [(3, 1), (0, 2), (0, 0)])
def test_losses_by_hand(make_batch, assignment, boxes):
    detector = make(assignment=assignment).eval()
    for parameter in (detector.head.cls_logits.weight, detector.head.deltas.weight):
        torch.nn.init.normal_(parameter, std=0.2)
    view = make_batch(labeled_boxes=boxes).labeled["labeled"]
    features, targets = detector.features(view.images), targets_of(view)
    found = detector.losses(features, view, targets, torch.zeros(2, dtype=torch.int64))
    output = detector.output(features, view)
    predicted = detector.decode(output.deltas, output.anchors)
    strides = torch.tensor([4.0, 8.0, 16.0]).repeat_interleave(torch.tensor(output.level_sizes))
    if assignment == "adaptive":
        matches, _ = adaptive(output.logits, predicted, output.anchors, strides, targets)
    else:
        matches = match_anchors(output.anchors, targets, 0.5, 0.4, low_quality=True)
    of_class = of_box = count = 0.0
    for image in range(2):
        for a in range(len(output.anchors)):
            positive, negative = bool(matches.positive[image, a]), bool(matches.negative[image, a])
            scores = output.logits[image, a].double().sigmoid().tolist()
            box = int(matches.target[image, a])
            label = int(targets.labels[image, box]) if positive else 0
            if positive or negative:
                for column, p in enumerate(scores, 1):
                    right = column == label
                    of_class += -0.25 * (1 - p) ** 2 * math.log(p) if right else -0.75 * p**2 * math.log(1 - p)
            if positive:
                pair = predicted[image, a][None], targets.boxes[image, box][None]
                weight = float(box_ops.iou(*pair)) if assignment == "adaptive" else 1.0
                of_box += 2 * weight * float(generalized_box_iou_loss(*pair, reduction="sum"))
                count += weight
    assert float(found["class"]) == pytest.approx(of_class / max(1, count), rel=1e-4)
    assert float(found["box"]) == pytest.approx(of_box / max(1, count), rel=1e-4)


def test_anchors_beyond_an_images_own_padding_learn_nothing(make_batch):
    """An image of 20 px in a batch of 64 px is padded to 32 px on its own."""
    detector = make()
    view = make_batch().labeled["labeled"]
    view.sizes = torch.tensor([[20, 40], [64, 64]])
    output = detector.output(detector.features(view.images), view)
    matches, _ = detector.assign(output, detector.decode(output.deltas, output.anchors), view, targets_of(view))
    center = (output.anchors[:, :2] + output.anchors[:, 2:]) / 2
    learns = matches.positive | matches.negative
    assert torch.equal(learns[0], (center[:, 0] < 64) & (center[:, 1] < 32))
    assert learns[1].all()


def test_giou_has_a_gradient_for_boxes_inside_out():
    turned = torch.tensor([[14.0, 10.0, 12.0, 20.0]], requires_grad=True)
    loss = losses.giou_loss(turned, torch.tensor([[10.0, 10.0, 20.0, 20.0]])).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert turned.grad[0, 0] > 0 > turned.grad[0, 2]  # the left side goes left, the right one right


@pytest.mark.parametrize("fam3d", [True, False])
def test_it_finds_what_it_was_trained_on(make_batch, fam3d):
    detector = make(fam3d=fam3d).train()
    view = make_batch(labeled_boxes=(2, 1)).labeled["labeled"]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        terms = detector.losses(detector.features(view.images), view, targets_of(view), torch.zeros(2).long())
        sum(terms.values()).backward()
        optimizer.step()
    for found, true in zip(detector.detect(view, 0.3), view.targets, strict=True):
        overlap = box_ops.iou(true.boxes, found.boxes)
        assert (overlap.amax(1) > 0.6).all()
        assert torch.equal(found.labels[overlap.argmax(1)], true.labels)


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (small_consistent_retina, {"anchor_sizes": [8, 16]}, "must be 3 numbers"),
        (small_consistent_retina, {"pyramid_channels": 20}, "pyramid_channels=20 must be a multiple of 16"),
        (consistent_retina, {"anchor_sizes": [8, 16]}, "must be 5 numbers"),
        (consistent_retina, {"pyramid_channels": 48}, "pyramid_channels=48 must be a multiple of 32"),
    ],
)
def test_what_does_not_fit_is_said(build, options, words):
    with pytest.raises(UserError, match=words):
        build(num_classes=3, name="x", cache_dir=".", weights="scratch", **options)
