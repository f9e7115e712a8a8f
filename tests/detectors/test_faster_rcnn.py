from __future__ import annotations

import copy

import pytest
import torch

from detectors.backbones import ResNetBackbone
from detectors.detector import join_views, targets_of
from detectors.faster_rcnn import STYLES
from detectors.method import student_features
from harness.types import View


def losses_of(detector, batch):
    view = batch.labeled["labeled"]
    return detector.losses(detector.features(view.images), view, targets_of(view), batch.labeled_keys)


def test_channels_last_gives_the_same_numbers(make_small, make_batch):
    detector, batch = make_small(), make_batch()
    other = copy.deepcopy(detector).to(memory_format=torch.channels_last)
    expected, found = losses_of(detector, batch), losses_of(other, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_backbone_gives_the_same_numbers_and_names(make_small, make_batch):
    detector, batch = make_small(), make_batch()
    expected = losses_of(copy.deepcopy(detector), batch)
    names = list(detector.state_dict())
    detector.backbone.compile()
    found = losses_of(detector, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
    assert list(detector.state_dict()) == names
    sum(found.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


def test_detect_gives_boxes_inside_the_valid_size(make_small, make_batch):
    detector = make_small().eval()
    torch.nn.init.normal_(detector.roi.head.classes.weight, std=2.0)
    view = make_batch().labeled["labeled"]
    view.sizes = torch.tensor([[40, 64], [64, 30]])
    found = detector.detect(view, 0.05)
    assert len(found) == 2
    for target, (height, width) in zip(found, view.sizes.tolist(), strict=True):
        assert 0 < len(target) <= 20
        assert (target.scores > 0.05).all()
        assert target.scores.tolist() == sorted(target.scores.tolist(), reverse=True)
        assert (target.boxes >= 0).all()
        assert (target.boxes[:, [0, 2]] <= width).all()
        assert (target.boxes[:, [1, 3]] <= height).all()
        assert set(target.labels.tolist()) <= {1, 2, 3}
        assert not target.boxes.requires_grad


def test_detections_of_an_image_do_not_depend_on_its_neighbours(make_small, make_batch):
    detector = make_small().eval()
    torch.nn.init.normal_(detector.roi.head.classes.weight, std=2.0)
    view = make_batch().labeled["labeled"]
    both = detector.detect(view, 0.05)
    for image in range(2):
        rows = slice(image, image + 1)
        (alone,) = detector.detect(View(view.images[rows], view.sizes[rows], view.to_view[rows]), 0.05)
        torch.testing.assert_close(alone.boxes, both[image].boxes, atol=1e-3, rtol=1e-4)
        assert torch.equal(alone.labels, both[image].labels)


def test_no_global_random_numbers(make_small, make_batch):
    detector, batch = make_small(), make_batch()
    state = torch.random.get_rng_state()
    losses_of(detector, batch)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_joined_views_are_padded_with_zeros():
    small = View(torch.ones(1, 3, 32, 64), torch.tensor([[30, 60]]), torch.eye(3)[None])
    tall = View(torch.ones(2, 3, 64, 32), torch.tensor([[60, 30]] * 2), 2 * torch.eye(3).repeat(2, 1, 1))
    joined = join_views([small, tall])
    assert joined.images.shape == (3, 3, 64, 64)
    assert joined.images[0, :, 32:].abs().sum() == 0
    assert joined.images[1:, :, :, 32:].abs().sum() == 0
    assert joined.sizes.tolist() == [[30, 60], [60, 30], [60, 30]]


def test_joint_features_belong_to_their_views(make_small, make_batch):
    detector, batch = make_small().eval(), make_batch(labeled_boxes=(1, 1, 1))
    views = (batch.labeled["labeled"], batch.strong)
    seen, features = student_features(detector, views, joint=True)
    assert [len(view) for view in seen] == [3, 2]
    for view, own in zip(views, features, strict=True):
        for level, expected in zip(own, detector.features(view.images), strict=True):
            torch.testing.assert_close(level, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_anchors_of_the_small_detector_follow_the_style(make_small, style):
    """torchvision's are whole pixels (4.5 and 10.5 round to the even neighbour), the others' exact."""
    bases = make_small(style=style, anchor_sizes=[9, 21, 36]).rpn.anchors.bases
    sides = [float(base[0, 2] - base[0, 0]) for base in bases]
    assert sides == ([8, 20, 36] if style == "torchvision" else [9, 21, 36])


@pytest.mark.parametrize("stages", [0, 2, 5])
def test_frozen_stages_keep_their_statistics(stages):
    body = ResNetBackbone(18, "batch", stages)
    parent = torch.nn.Sequential(body)
    for train in (lambda: None, lambda: parent.train(), lambda: parent.eval().train()):
        train()
        before = {name: buffer.clone() for name, buffer in body.named_buffers()}
        body(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        parts = ("bn1", "layer1", "layer2", "layer3", "layer4")
        for number, part in enumerate(parts):
            own = {name for name in before if name.startswith(part) and name.endswith("running_mean")}
            assert own
            for name in own:
                assert torch.equal(body.state_dict()[name], before[name]) == (number < stages)
    parent.eval()
    assert not any(module.training for module in body.modules())
