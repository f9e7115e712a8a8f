from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

from detectors import losses
from detectors.padded import pad
from detectors.rpn import Proposals
from harness.core import boxes as box_ops
from harness.core.types import Target


def head_inputs(seed: int = 0, batch: int = 2, count: int = 25, classes: int = 3):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=generator) * 45
    boxes = torch.cat([corner, corner + 4 + torch.rand(batch, count, 2, generator=generator) * 14], -1)
    logits = torch.randn(batch * count, classes + 1, generator=generator) * 2
    deltas = torch.randn(batch * count, classes + 1, 4, generator=generator)
    return Proposals(boxes, torch.ones(batch, count, dtype=torch.bool)), logits, deltas


@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_detections_are_torchvisions(make_small, threshold):
    roi = make_small().roi
    proposals, logits, deltas = head_inputs()
    sizes = torch.tensor([[64, 64], [50, 40]])
    found = roi.detections(logits, deltas, proposals, sizes, threshold).unpad()
    theirs = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, threshold, 0.5, 20)
    boxes, scores, labels = theirs.postprocess_detections(
        logits, deltas.flatten(1), list(proposals.boxes), [tuple(size) for size in sizes.tolist()]
    )
    for image in range(2):
        torch.testing.assert_close(found[image].boxes, boxes[image], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found[image].scores, scores[image])
        assert torch.equal(found[image].labels, labels[image])


def test_threshold_is_strict(make_small):
    roi = make_small().roi
    proposals, logits, deltas = head_inputs(count=1)
    score = float(logits.softmax(-1)[0, 1:].max())
    sizes = torch.tensor([[64, 64]] * 2)
    assert len(roi.detections(logits, deltas, proposals, sizes, score).unpad()[0]) == 0


def test_padding_is_never_detected(make_small):
    roi = make_small().roi
    proposals, logits, deltas = head_inputs()
    proposals.valid[:] = False
    found = roi.detections(logits, deltas, proposals, torch.tensor([[64, 64]] * 2), 0.05)
    assert not found.valid.any()


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (100, 3)])
def test_samples(make_small, counts):
    roi = make_small().roi
    proposals, _, _ = head_inputs()
    generator = torch.Generator().manual_seed(7)
    targets = []
    for n in counts:
        corner = torch.rand(n, 2, generator=generator) * 45
        targets.append(Target(torch.cat([corner, corner + 12], 1), torch.ones(n, dtype=torch.int64), torch.ones(n)))
    keys = torch.tensor([5, 6])
    rois, count = roi.sample(proposals, pad(targets), keys)
    assert float(count) == len(rois)
    assert (rois.weights == 1).all()
    for image, target in enumerate(targets):
        own = rois.images == image
        assert int(own.sum()) == 16
        positive = own & (rois.labels > 0)
        assert int(positive.sum()) <= 8
        assert bool(len(target)) == bool(positive.any())  # the boxes themselves are proposals
    assert torch.equal(rois.wanted[rois.labels == 0], rois.boxes[rois.labels == 0])

    positives, same = roi.sample(proposals, pad(targets), keys, positives_only=True)
    assert float(same) == float(count)
    assert torch.equal(positives.boxes, rois.boxes[rois.labels > 0])
    assert torch.equal(positives.wanted, rois.wanted[rois.labels > 0])


@pytest.mark.parametrize("positives_only", [False, True])
def test_positives_of_few_candidates(make_small, positives_only):
    """45 candidates for 512 places: 128 may be positive, and so all 20 boxes and what overlaps them are."""
    roi = make_small(roi={"batch": 512, "positive_fraction": 0.25}).roi
    proposals, _, _ = head_inputs(batch=1)
    corner = torch.rand(20, 2, generator=torch.Generator().manual_seed(7)) * 45
    boxes = torch.cat([corner, corner + 12], 1)
    target = Target(boxes, torch.ones(20, dtype=torch.int64), torch.ones(20))
    rois, _ = roi.sample(proposals, pad([target]), torch.tensor([5]), positives_only=positives_only)
    candidates = torch.cat([proposals.boxes[0], boxes])
    positive = int((box_iou(candidates, boxes).amax(1) >= 0.5).sum())
    assert positive > 20
    assert int((rois.labels > 0).sum()) == positive
    assert len(rois) == (positive if positives_only else 45)


def test_padding_has_no_weight_where_it_is_kept(make_small, monkeypatch):
    """On a GPU rows of padding stay, to spare a wait: losses must not change."""
    detector = make_small(roi={"batch_norm": False})
    roi = detector.roi
    proposals, _, _ = head_inputs()
    proposals.valid[:, 5:] = False  # fewer than 16 to offer
    proposals.boxes[:, 5:] = 0  # what the RPN leaves there
    targets = pad([Target(torch.tensor([[5.0, 5, 20, 20]]), torch.tensor([2]), torch.ones(1))] * 2)
    keys = torch.tensor([1, 2])
    features = detector.features(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))

    def losses_of():
        rois, count = roi.sample(proposals, targets, keys)
        box_rois, _ = roi.sample(proposals, targets, keys, positives_only=True)
        logits, deltas = roi(features, rois.boxes, rois.images)
        _, box_deltas = roi(features, box_rois.boxes, box_rois.images)
        return len(rois), [
            roi.class_loss(logits, rois), roi.box_loss(deltas, rois, count), roi.box_loss(box_deltas, box_rois, count)
        ]  # fmt: skip

    fewer, without = losses_of()
    monkeypatch.setattr(roi, "_without_padding", lambda rois: rois)
    more, with_padding = losses_of()
    assert more > fewer
    assert all(torch.isfinite(value) for value in with_padding)
    torch.testing.assert_close(without, with_padding)
    torch.testing.assert_close(without[1], without[2])
    gradients = [
        torch.autograd.grad(sum(part), roi.head.parameters(), retain_graph=True) for part in (without, with_padding)
    ]
    for one, two in zip(*gradients, strict=True):
        assert torch.isfinite(two).all()
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_background_has_no_box_loss(make_small):
    """Bit for bit: the stand-in for its box changes neither the sum nor the gradient."""
    roi = make_small().roi
    proposals, _, deltas = head_inputs()
    rois, count = roi.sample(
        proposals,
        pad([Target(torch.tensor([[5.0, 5, 20, 20]]), torch.tensor([2]), torch.ones(1))] * 2),
        torch.tensor([1, 2]),
    )
    deltas = deltas[: len(rois)].requires_grad_()
    own = deltas[torch.arange(len(rois)), rois.labels]
    plain = losses.box_regression(own, box_ops.encode(rois.wanted, rois.boxes, (10, 10, 5, 5)), rois.positive, 1 / 9)
    found = roi.box_loss(deltas, rois, count)
    assert torch.equal(found, plain / count)
    (expected,) = torch.autograd.grad(plain / count, deltas)
    (gradient,) = torch.autograd.grad(found, deltas)
    assert torch.equal(gradient, expected)
    assert gradient[rois.labels > 0].any()
    assert not gradient[rois.labels == 0].any()
