"""Pre-training of the small backbone: reproducible to the bit, cached, without side effects, and it learns."""

import json
from dataclasses import replace

import pytest
import torch

from detectors.backbones import SmallBackbone
from harness.engine import pretrain
from harness.engine.pretrain import Recipe, augment, backbone_weights, make_patches, train_classifier

TINY = Recipe(patches=70, epochs=1, batch=32, channels=(8, 8, 8, 8))

pytestmark = pytest.mark.timeout(120)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_are_the_same_bits_whatever_the_state_of_torch(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    first = backbone_weights(tmp_path / "a", TINY)
    try:
        torch.set_num_threads(2)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        second = backbone_weights(tmp_path / "b", TINY)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert same(first, second)
    assert not same(first, backbone_weights(tmp_path / "a", replace(TINY, seed=78)))


def test_weights_fit_the_backbone_and_were_trained(tmp_path):
    weights = backbone_weights(tmp_path, TINY)
    backbone = SmallBackbone(TINY.channels)
    backbone.load_state_dict(weights)
    assert weights["stem.1.num_batches_tracked"] == 2  # 70 patches are two whole batches of 32
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_the_cache_is_used_and_mended(tmp_path, monkeypatch):
    weights = backbone_weights(tmp_path, TINY)
    (file,) = tmp_path.rglob("weights.pt")
    assert 0 <= json.loads((file.parent / "info.json").read_text())["accuracy"] <= 1
    file.write_bytes(file.read_bytes()[:-100])
    assert same(backbone_weights(tmp_path, TINY), weights)
    monkeypatch.setattr(pretrain, "train_classifier", None)  # not called again
    assert same(backbone_weights(tmp_path, TINY), weights)


def test_it_learns():
    recipe = replace(TINY, patches=32, epochs=80, lr=1e-2, channels=(16, 16, 24, 32))
    steps = []
    _, accuracy = train_classifier(*make_patches(recipe), recipe, lambda: steps.append(1))
    assert accuracy > 0.5  # 10 classes
    assert len(steps) == 80


def test_patches_hold_their_box():
    images, boxes, labels = make_patches(TINY)
    assert images.shape == (70, 3, 40, 40)
    assert images.dtype == torch.uint8
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert (boxes[:, 2:] - boxes[:, :2]).min() > 0.1
    assert set(labels.tolist()) <= set(range(10))


def test_boxes_are_mirrored_with_their_images():
    images = torch.zeros(40, 3, 20, 20, dtype=torch.uint8)
    images[:, :, 4:10, 2:7] = 255
    boxes = torch.tensor([2, 4, 7, 10]).div(20).repeat(40, 1)
    views, mirrored = augment(images, boxes, torch.Generator().manual_seed(0))
    assert 0 < (mirrored[:, 0] != boxes[:, 0]).sum() < 40
    for view, box in zip(views, mirrored, strict=True):
        rows, columns = torch.nonzero(view[0] > view[0].mean(), as_tuple=True)
        extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        torch.testing.assert_close(extent / 20, box)


def test_the_description_is_one_sentence():
    text = pretrain.description(TINY)
    assert "70 generated patches" in text
    assert "ImageNet" in text
