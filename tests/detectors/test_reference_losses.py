"""Every loss term of Faster R-CNN against the formulas in plain loops: matching, keyed sampling, and the sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from detectors.detector import targets_of
from detectors.faster_rcnn import STYLES, faster_rcnn
from detectors.padded import pad
from harness.core.draws import image_keys, uniform
from harness.core.types import Target


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


def candidate(style, anchor, cell, stride, size):
    """Whether an image of (height, width) `size` learns from an anchor of the cell (row, column)."""
    height, width = size
    if style == "mmdetection":  # valid_flags: the feature map of the image alone, padded to a multiple of 32
        rows, columns = (math.ceil(math.ceil(side / 32) * 32 / stride) for side in size)
        return cell[0] < rows and cell[1] < columns
    if style == "tensorpack":
        return anchor[0] >= 0 and anchor[1] >= 0 and anchor[2] <= width and anchor[3] <= height
    return True


def cells_of(maps, strides, per_cell):
    """(row, column) and stride of each anchor, levels one after the other."""
    return [
        ((y, x), stride)
        for level, stride in zip(maps, strides, strict=True)
        for y in range(level.shape[-2])
        for x in range(level.shape[-1])
        for _ in range(per_cell)
    ]


def forced_anchor(style, most, row):
    """Whether a box's best anchor, of overlap `most` with it and overlaps `row` with all boxes, is positive by that."""
    if style == "mmdetection":  # min_pos_iou
        return most >= 0.3
    if style == "tensorpack":  # negatives are set last
        return most > 0 and max(row) >= 0.3
    return most > 0


def assign(candidates, boxes, positive_iou, negative_iou, style=None):
    """Index of the box for each candidate, -1 for background, -2 to ignore; boxes claim their best one by `style`."""
    # In float32, as ties between anchors around a small box are rounded in one way or another.
    sides = [torch.tensor(list(part)).view(-1, 4) for part in (candidates, boxes)]
    overlaps = box_iou(*sides).tolist()
    result = []
    for row in overlaps:
        best = max(row, default=0.0)
        result.append(row.index(best) if row and best >= positive_iou else -1 if best < negative_iou else -2)
    if style and overlaps:
        for j in range(len(boxes)):
            most = max(row[j] for row in overlaps)
            for i, row in enumerate(overlaps):
                if row[j] == most and forced_anchor(style, most, row):
                    result[i] = row.index(max(row))
    return result


def choose(assigned, batch, fraction, noise):
    positive = sorted((i for i, a in enumerate(assigned) if a >= 0), key=lambda i: -noise[i])[: int(batch * fraction)]
    negative = sorted((i for i, a in enumerate(assigned) if a == -1), key=lambda i: -noise[i])
    return positive, negative[: batch - len(positive)]


def rpn_reference(output, targets, sizes, keys, s, style, cells):
    """The two losses, and the samples of each image: positive and negative anchors."""
    noise = np.float32(uniform(keys.numpy(), output.objectness.shape[1], "rpn"))
    anchors = output.anchors.double().tolist()
    classification = regression = 0.0
    count = 0
    chosen = []
    for image, target in enumerate(targets):
        boxes = target.boxes.double().tolist()
        size = sizes[image].tolist()
        own = [i for i, (cell, stride) in enumerate(cells) if candidate(style, anchors[i], cell, stride, size)]
        found = assign([anchors[i] for i in own], boxes, s.positive_iou, s.negative_iou, style)
        assigned = [-2] * len(anchors)
        for i, value in zip(own, found, strict=True):
            assigned[i] = value
        positive, negative = choose(assigned, s.batch, s.positive_fraction, noise[image])
        chosen.append((positive, negative))
        count += len(positive) + len(negative)
        logits, deltas = output.objectness[image].tolist(), output.deltas[image].tolist()
        for i in positive:
            classification += math.log1p(math.exp(-logits[i]))
            wanted = encode(boxes[assigned[i]], anchors[i], (1, 1, 1, 1))
            regression += smooth_l1(deltas[i], wanted, s.beta)
        for i in negative:
            classification += math.log1p(math.exp(logits[i]))
    normalizer = s.batch * len(targets) if s.fixed_normalizer else count
    return classification / normalizer, regression / normalizer, chosen


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
        for i, value in zip(candidates, assign(candidates.values(), boxes, s.iou, s.iou), strict=True):
            assigned[i] = value
        positive, negative = choose(assigned, s.batch, s.positive_fraction, noise[image])
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
    view.sizes = torch.tensor([[64, 64], [30, 61]])
    features = [level.detach() for level in detector.features(view.images)]
    found = detector.losses(features, view, targets_of(view), keys, focal_gamma=gamma)
    with torch.no_grad():
        output = detector.rpn(features, (64, 64))
        proposals = detector.rpn.proposals(output, view.sizes, training=True)
        expected = {}
        cells = cells_of(features, (4, 8, 16), 1)
        expected["rpn_class"], expected["rpn_box"], _ = rpn_reference(
            output, view.targets, view.sizes, keys, detector.rpn.settings, style, cells
        )
        expected["roi_class"], expected["roi_box"] = roi_reference(
            detector, features, proposals, view.targets, keys, gamma
        )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=1e-5, rel=1e-5), name


STRIDES = (4, 8, 16, 32, 64)


def five_levels(style, sizes, seed=0):
    """The RPN of a ResNet's pyramid, its output on a canvas for images of `sizes`, and which cell each anchor is of."""
    torch.manual_seed(seed)
    rpn = faster_rcnn(
        num_classes=3, name="x", cache_dir=".", depth=18, weights="scratch", pyramid_channels=32, style=style
    ).rpn
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    height, width = (math.ceil(max(side) / 32) * 32 for side in zip(*sizes, strict=True))
    maps = [torch.randn(len(sizes), 32, math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
    return rpn, rpn(maps, (height, width)), cells_of(maps, STRIDES, 3)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(3))
def test_rpn_of_five_levels(style, seed):
    """Matching, candidates and both losses with images of several shapes, of which one leaves much padding."""
    sizes = torch.tensor([[96, 160], [40, 150], [93, 33]])
    rpn, output, cells = five_levels(style, sizes.tolist(), seed)
    assert len(output.level_sizes) == 5
    assert output.level_sizes[-1] == 2 * 3 * 3  # P6: 1.5 and 2.5 cells, rounded up
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count, (height, width) in zip((9, 6, 4), sizes.tolist(), strict=True):
        side = 6 + torch.rand(count, 2, generator=generator) * 40
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 8.0, height - 8.0])
        boxes = torch.cat([corner, torch.minimum(corner + side, torch.tensor([float(width), float(height)]))], 1)
        targets.append(Target(boxes, torch.ones(count, dtype=torch.int64), torch.ones(count)))
    keys = torch.from_numpy(image_keys(0, seed, [0, 1, 2]))
    found = rpn.losses(output, pad(targets), sizes, keys)
    with torch.no_grad():
        classes, boxes, chosen = rpn_reference(output, targets, sizes, keys, rpn.settings, style, cells)
    assert found["rpn_class"].item() == pytest.approx(classes, rel=1e-5)
    assert found["rpn_box"].item() == pytest.approx(boxes, rel=1e-4, abs=1e-6)
    outside = [
        sum(cells[i][0][0] * cells[i][1] >= 64 for i in positive + negative) for positive, negative in chosen
    ]  # below the second image, which is 40 px high and 64 as padded on its own
    assert (outside[1] > 0) == (style in ("torchvision", "detectron"))


@pytest.mark.parametrize("style", STYLES)
def test_twenty_small_boxes(style):
    """No anchor overlaps a box of 16 px by 0.3: forced matches or none."""
    rpn, output, cells = five_levels(style, [(320, 320)])
    corners = torch.tensor([[40.0 + 60 * (i % 5), 40.0 + 70 * (i // 5)] for i in range(20)])
    boxes = torch.cat([corners, corners + 16], 1)
    target = Target(boxes, torch.ones(20, dtype=torch.int64), torch.ones(20))
    sizes, keys = torch.tensor([[320, 320]]), torch.tensor([7])
    box = rpn.losses(output, pad([target]), sizes, keys)["rpn_box"].item()
    with torch.no_grad():
        expected = rpn_reference(output, [target], sizes, keys, rpn.settings, style, cells)
    positive, negative = expected[2][0]
    if style in ("mmdetection", "tensorpack"):
        assert positive == []
        assert box == 0
    else:
        assert len(positive) == 256 * rpn.settings.positive_fraction  # of hundreds
        assert box > 0
    assert len(positive) + len(negative) == 256
    assert box == pytest.approx(expected[1], rel=1e-4)


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
            rpn.low_quality_iou, rpn.low_quality_of, rpn.candidates, STYLES[style]["norm"],
        )  # fmt: skip
    ninth = 1 / 9
    test = (1000, 1000)
    assert rows == {
        "torchvision": (ninth, False, 0.5, (2000, 2000), test, 512, ninth, False, 2, 0.0, "box", "all", "frozen"),
        "detectron": (0.0, True, 0.25, (2000, 1000), test, 512, 0.0, True, 0, 0.0, "box", "all", "frozen"),
        "mmdetection": (0.0, False, 0.5, (2000, 1000), test, 512, 0.0, True, 0, 0.3, "box", "padded", "frozen"),
        "tensorpack": (
            ninth,
            True,
            0.5,
            (2000, 2000),
            test,
            64,
            0.0,
            True,
            2,
            0.3,
            "anchor",
            "inside",
            "frozen_statistics",
        ),
    }
