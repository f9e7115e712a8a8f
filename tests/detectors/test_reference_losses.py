"""Every loss term of Faster R-CNN against the formulas in plain loops: matching, keyed sampling, and the sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from detectors.detector import targets_of
from harness.sampling import uniform


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def encode(box, anchor, weights):
    aw, ah, bw, bh = anchor[2] - anchor[0], anchor[3] - anchor[1], box[2] - box[0], box[3] - box[1]
    return [
        weights[0] * ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / aw,
        weights[1] * ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / ah,
        weights[2] * math.log(bw / aw),
        weights[3] * math.log(bh / ah),
    ]


def smooth_l1(found, wanted, beta):
    total = 0.0
    for x, y in zip(found, wanted, strict=True):
        d = abs(x - y)
        total += d - beta / 2 if d >= beta else d * d / (2 * beta)
    return total


def assign(candidates, boxes, positive_iou, negative_iou, low_quality):
    """Index of the box for each candidate, -1 for background, -2 to ignore."""
    overlaps = [[iou(c, b) for b in boxes] for c in candidates]
    result = []
    for row in overlaps:
        best = max(row, default=0.0)
        result.append(row.index(best) if row and best >= positive_iou else -1 if best < negative_iou else -2)
    if low_quality:
        for j in range(len(boxes)):
            most = max(row[j] for row in overlaps)
            for i, row in enumerate(overlaps):
                if row[j] == most and most > 0:
                    result[i] = row.index(max(row))
    return result


def choose(assigned, batch, fraction, noise):
    positive = sorted((i for i, a in enumerate(assigned) if a >= 0), key=lambda i: -noise[i])[: int(batch * fraction)]
    negative = sorted((i for i, a in enumerate(assigned) if a == -1), key=lambda i: -noise[i])
    return positive, negative[: batch - len(positive)]


def rpn_reference(output, targets, keys, s):
    noise = np.float32(uniform(keys.numpy(), output.objectness.shape[1], "rpn"))
    anchors = output.anchors.double().tolist()
    classification = regression = 0.0
    count = 0
    for image, target in enumerate(targets):
        boxes = target.boxes.double().tolist()
        assigned = assign(anchors, boxes, s.positive_iou, s.negative_iou, low_quality=True)
        positive, negative = choose(assigned, min(s.batch, len(anchors)), s.positive_fraction, noise[image])
        count += len(positive) + len(negative)
        logits, deltas = output.objectness[image].tolist(), output.deltas[image].tolist()
        for i in positive:
            classification += math.log1p(math.exp(-logits[i]))
            wanted = encode(boxes[assigned[i]], anchors[i], (1, 1, 1, 1))
            regression += smooth_l1(deltas[i], wanted, s.beta)
        for i in negative:
            classification += math.log1p(math.exp(logits[i]))
    normalizer = s.batch * len(targets) if s.fixed_normalizer else count
    return classification / normalizer, regression / normalizer


def roi_reference(detector, features, proposals, targets, keys, gamma):
    s = detector.roi.settings
    rows, images, labels, wanted = [], [], [], []
    room = proposals.boxes.shape[1] + max(1, *(len(t) for t in targets))
    noise = np.float32(uniform(keys.numpy(), room, "roi"))
    for image, target in enumerate(targets):
        boxes = target.boxes.tolist()
        candidates = {i: box for i, box in enumerate(proposals.boxes[image].tolist()) if proposals.valid[image, i]}
        candidates.update({proposals.boxes.shape[1] + j: box for j, box in enumerate(boxes)})
        assigned = [-2] * room
        for i, value in zip(candidates, assign(candidates.values(), boxes, s.iou, s.iou, False), strict=True):
            assigned[i] = value
        positive, negative = choose(assigned, min(s.batch, room), s.positive_fraction, noise[image])
        for i in positive + negative:
            rows.append(candidates[i])
            images.append(image)
            labels.append(int(target.labels[assigned[i]]) if assigned[i] >= 0 else 0)
            wanted.append(boxes[assigned[i]] if assigned[i] >= 0 else None)
    logits, deltas = detector.roi(features, torch.tensor(rows), torch.tensor(images))
    classification = regression = 0.0
    for i, label in enumerate(labels):
        row = logits[i].double().tolist()
        p = math.exp(row[label]) / sum(math.exp(x) for x in row)
        classification += (1 - p) ** gamma * -math.log(p)
        if label:
            regression += smooth_l1(deltas[i, label].tolist(), encode(wanted[i], rows[i], s.coder), s.beta)
    return classification / len(rows), regression / len(rows)


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("style", ["torchvision", "detectron", "mmdetection", "tensorpack"])
@pytest.mark.parametrize("boxes", [(3, 1), (0, 4), (0, 0)])
def test_all_terms(make_batch, make_small, style, gamma, boxes):
    detector = make_small(style=style, rpn={"positive_fraction": None}, roi={"batch_norm": False, "batch": 16})
    for parameter in detector.roi.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = make_batch(labeled_boxes=boxes)
    view, keys = batch.labeled["labeled"], batch.labeled_keys
    features = [level.detach() for level in detector.features(view.images)]
    found = detector.losses(features, view, targets_of(view), keys, focal_gamma=gamma)
    with torch.no_grad():
        output = detector.rpn(features, (64, 64))
        proposals = detector.rpn.proposals(output, view.sizes, training=True)
        expected = {}
        expected["rpn_class"], expected["rpn_box"] = rpn_reference(output, view.targets, keys, detector.rpn.settings)
        expected["roi_class"], expected["roi_box"] = roi_reference(
            detector, features, proposals, view.targets, keys, gamma
        )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=1e-5, rel=1e-5), name


def test_table_of_styles(make_small):
    """The differences between codebases that a style stands for."""
    rows = {}
    for style in ("torchvision", "detectron", "mmdetection", "tensorpack"):
        blank = {"batch": None, "sampling_ratio": None, "positive_fraction": None}
        detector = make_small(
            style=style, rpn={"train_proposals": None, "test_proposals": None, "batch": None}, roi=blank
        )
        rpn, roi = detector.rpn.settings, detector.roi.settings
        rows[style] = (
            rpn.beta, rpn.fixed_normalizer, rpn.positive_fraction, rpn.train_proposals, rpn.test_proposals,
            roi.batch, roi.beta, roi.aligned, roi.sampling_ratio,
        )  # fmt: skip
    ninth = 1 / 9
    test = (1000, 1000)
    assert rows == {
        "torchvision": (ninth, False, 0.5, (2000, 2000), test, 512, ninth, False, 2),
        "detectron": (0.0, True, 0.25, (2000, 1000), test, 512, 0.0, True, 0),
        "mmdetection": (0.0, False, 0.5, (2000, 1000), test, 512, 0.0, True, 0),
        "tensorpack": (ninth, True, 0.5, (2000, 2000), test, 64, 0.0, True, 0),
    }
