from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from detectors.detector import Detector
from detectors.faster_rcnn import STYLES, faster_rcnn, small_faster_rcnn
from detectors.fcos import fcos
from detectors.retinanet import retinanet
from detectors.rpn import CANDIDATES, Anchors, Rpn, RpnSettings, base_anchors
from harness.core.types import UserError

SIZES = [[16.0], [32.0], [64.0]]
RATIOS = (0.5, 1.0, 2.0)


def features_of(seed: int = 0, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 8, 64 // s, 96 // s, generator=generator) for s in (4, 8, 16)]


def make_rpn(**settings: object) -> Rpn:
    torch.manual_seed(0)
    rpn = Rpn(8, Anchors(SIZES, RATIOS, rounded=True), RpnSettings(**settings))  # type: ignore[arg-type]
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return rpn


def test_anchors_are_torchvisions():
    features = features_of()
    ours, level_sizes = Anchors(SIZES, RATIOS, rounded=True)(features, (64, 96))
    generator = AnchorGenerator(tuple(tuple(level) for level in SIZES), (RATIOS,) * 3)
    theirs = generator(ImageList(torch.zeros(2, 3, 64, 96), [(64, 96)] * 2), features)[0]
    assert torch.equal(ours, theirs)
    assert level_sizes == [16 * 24 * 3, 8 * 12 * 3, 4 * 6 * 3]


def detector_of(kind: str, style: str) -> Detector:
    own = {"num_classes": 3, "name": kind, "cache_dir": ".", "weights": "scratch", "style": style}
    if kind == "small":
        return small_faster_rcnn(**own, channels=(8, 8, 16, 16), pyramid_channels=8, anchor_ratios=(0.5, 1.0))
    make = {"faster_rcnn": faster_rcnn, "retinanet": retinanet, "fcos": fcos}[kind]
    return make(**own, depth=18, pyramid_channels=32)


FIXED = [
    *((kind, style) for kind in ("small", "faster_rcnn") for style in STYLES if style != "torchvision"),
    ("retinanet", "detectron"),
    ("fcos", "detectron"),
]
DETECTORS: dict[tuple[str, str], Detector] = {}


@pytest.mark.parametrize(("kind", "style"), FIXED)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), more=st.tuples(st.integers(0, 9), st.integers(0, 9)))
@settings(max_examples=15, deadline=None)
def test_anchors_of_a_cell_do_not_depend_on_the_canvas(kind, style, rows, columns, more):
    """Every level of every style but torchvision's: what the cells of a canvas of multiples of 32 px have, they have on
    every larger one, and it is the anchor shape about (column, row) times the level's stride."""
    detector = DETECTORS.setdefault((kind, style), detector_of(kind, style))
    anchors = detector.anchors if kind in ("retinanet", "fcos") else detector.rpn.anchors
    strides = {"small": (4, 8, 16), "faster_rcnn": (4, 8, 16, 32, 64)}.get(kind, (8, 16, 32, 64, 128))

    def on_canvas(height: int, width: int) -> list[torch.Tensor]:
        maps = [torch.zeros(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in strides]
        boxes, level_sizes = anchors(maps, (height, width))
        parts = boxes.split(level_sizes)
        return [part.view(*m.shape[-2:], -1, 4) for part, m in zip(parts, maps, strict=True)]

    one = on_canvas(32 * rows, 32 * columns)
    other = on_canvas(32 * (rows + more[0]), 32 * (columns + more[1]))
    for level, larger, stride, base in zip(one, other, strides, anchors.bases, strict=True):
        assert torch.equal(level, larger[: level.shape[0], : level.shape[1]])
        y, x = level.shape[0] - 1, level.shape[1] - 1
        for cell in ((0, 0), (y, 0), (0, x), (y, x)):
            place = torch.tensor([cell[1], cell[0], cell[1], cell[0]]) * stride
            assert torch.equal(level[cell], base + place)


def test_torchvisions_anchors_do_depend_on_it():
    anchors = detector_of("faster_rcnn", "torchvision").rpn.anchors
    steps = []
    for side in (96, 128):
        maps = [torch.zeros(1, 1, math.ceil(side / s), math.ceil(side / s)) for s in (4, 8, 16, 32, 64)]
        coarsest = anchors(maps, (side, side))[0][-3 * maps[-1].shape[-1] ** 2 :]
        steps.append(float(coarsest[3, 0] - coarsest[0, 0]))
    assert steps == [48, 64]


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_candidates(sizes):
    """Cell by cell, over the five levels of a canvas that fits all images."""
    strides = (4, 8, 16, 32, 64)
    height, width = (math.ceil(max(side) / 32) * 32 for side in zip(*sizes, strict=True))
    maps = [torch.zeros(len(sizes), 1, math.ceil(height / s), math.ceil(width / s)) for s in strides]
    anchors, _ = Anchors([[32.0], [64.0], [128.0], [256.0], [512.0]], RATIOS, False, strides)(maps, (height, width))
    padded, inside = (CANDIDATES[rule](anchors, torch.tensor(sizes)) for rule in ("padded", "inside"))
    for image, (h, w) in enumerate(sizes):
        expected = []
        for stride in strides:
            rows, columns = (math.ceil(math.ceil(side / 32) * 32 / stride) for side in (h, w))
            for y in range(math.ceil(height / stride)):
                expected += [y < rows and x < columns for x in range(math.ceil(width / stride)) for _ in RATIOS]
        assert padded[image].tolist() == expected
        boxes = anchors.tolist()
        assert inside[image].tolist() == [x1 >= 0 and y1 >= 0 and x2 <= w and y2 <= h for x1, y1, x2, y2 in boxes]
    assert CANDIDATES["all"] is None


@pytest.mark.parametrize("setting", [{"candidates": "some"}, {"low_quality_of": "both"}])
def test_unknown_rules(setting):
    with pytest.raises(UserError, match=rf"detector.rpn.{next(iter(setting))}"):
        RpnSettings(**setting)


def test_unrounded_anchors_keep_their_area():
    for box, ratio in zip(base_anchors([30.0], RATIOS, rounded=False).tolist(), RATIOS, strict=True):
        width, height = box[2] - box[0], box[3] - box[1]
        assert width * height == pytest.approx(900, rel=1e-5)
        assert height / width == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(50, 20), (2000, 300)])
def test_proposals_are_torchvisions(before, after):
    rpn = make_rpn(train_proposals=(before, after), test_proposals=(10, 5))
    features = features_of()
    sizes = torch.tensor([[64, 96], [50, 71]])
    output = rpn(features, (64, 96))
    found = rpn.proposals(output, sizes, training=True)

    counts = {"training": before, "testing": before}
    theirs = RegionProposalNetwork(
        AnchorGenerator(tuple(tuple(level) for level in SIZES), (RATIOS,) * 3),
        rpn.head, 0.7, 0.3, 256, 0.5, counts, {"training": after, "testing": after}, 0.7,
    )  # fmt: skip
    images = ImageList(torch.zeros(2, 3, 64, 96), [tuple(size) for size in sizes.tolist()])
    with torch.no_grad():
        expected, _ = theirs.eval()(images, {str(i): f for i, f in enumerate(features)})
    for image in range(2):
        own = found.boxes[image][found.valid[image]]
        torch.testing.assert_close(own, expected[image], atol=1e-4, rtol=1e-5)


def test_training_and_test_counts():
    rpn = make_rpn(train_proposals=(50, 20), test_proposals=(10, 5))
    output = rpn(features_of(), (64, 96))
    sizes = torch.tensor([[64, 96]] * 2)
    assert rpn.proposals(output, sizes, training=True).boxes.shape == (2, 20, 4)
    assert rpn.proposals(output, sizes, training=False).boxes.shape == (2, 5, 4)


def test_head_output_lies_in_the_order_of_the_anchors():
    rpn = make_rpn()
    features = features_of()
    output = rpn(features, (64, 96))
    objectness, deltas = concat_box_prediction_layers(*rpn.head(features))
    assert torch.equal(output.objectness.flatten(), objectness.flatten())
    assert torch.equal(output.deltas.reshape(-1, 4), deltas)
