from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from detectors.rpn import Anchors, Rpn, RpnSettings, base_anchors

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
