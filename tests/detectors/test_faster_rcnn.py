from __future__ import annotations

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from detectors.backbones import FrozenStatistics, ResNetBackbone
from detectors.detector import join_views, targets_of
from detectors.faster_rcnn import STYLES, faster_rcnn
from detectors.methods.method import student_features
from harness.core.types import View
from harness.engine.optim import build_optimizer


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
    views = (batch.labeled["labeled"], batch.unlabeled["strong"])
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


def test_frozen_statistics_with_a_trained_scale_and_shift():
    """STAC's backbone: stem and first stage frozen, scale and shift of the others trained, statistics constants."""
    body = ResNetBackbone(18, "frozen_statistics", 2)
    norms = {name: m for name, m in body.named_modules() if isinstance(m, FrozenStatistics)}
    assert len(norms) == 20
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in body.modules())
    generator = torch.Generator().manual_seed(0)
    for norm in norms.values():
        norm.running_mean.copy_(torch.randn(len(norm.bias), generator=generator) * 0.1)
        norm.running_var.copy_(torch.rand(len(norm.bias), generator=generator) + 0.5)
    frozen = ResNetBackbone(18, "frozen", 2)
    frozen.load_state_dict(body.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=generator)
    before = {name: buffer.clone() for name, buffer in body.named_buffers()}
    features = body.train()(images)
    for own, other in zip(features, frozen(images), strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)
    sum(level.square().mean() for level in features).backward()
    for name, norm in norms.items():
        trained = name.startswith(("layer2", "layer3", "layer4"))
        assert (norm.weight.grad is not None and bool(norm.weight.grad.any())) == trained, name
        assert (norm.bias.grad is not None) == trained, name
    assert all(torch.equal(buffer, before[name]) for name, buffer in body.named_buffers())


@pytest.mark.parametrize(
    ("style", "given", "kind"),
    [
        ("tensorpack", None, FrozenStatistics),
        ("tensorpack", "frozen", FrozenBatchNorm2d),
        ("tensorpack", "batch", torch.nn.BatchNorm2d),
        ("mmdetection", None, FrozenBatchNorm2d),
        ("mmdetection", "frozen_statistics", FrozenStatistics),
    ],
)
def test_norm_of_the_style(style, given, kind, tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "weights.pth")
    detector = faster_rcnn(
        num_classes=3, name="x", cache_dir=tmp_path, depth=18, weights=str(tmp_path / "weights.pth"), norm=given,
        pyramid_channels=32, style=style,
    )  # fmt: skip
    assert type(detector.backbone.body.layer3[0].bn1) is kind
    options = {"_target_": "harness.engine.optim.sgd", "lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": True}
    groups = build_optimizer(detector, OmegaConf.create(options)).param_groups
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    own = {id(p) for m in detector.modules() if isinstance(m, FrozenStatistics) for p in m.parameters()}
    trained = {id(p) for p in detector.parameters() if p.requires_grad}
    assert spared == own & trained
    assert bool(spared) == (kind is FrozenStatistics)


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
