from __future__ import annotations

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from detectors.roi_align import PyramidRoiAlign


def make(levels: int = 3, seed: int = 0) -> tuple[list[torch.Tensor], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    strides = [4 * 2**level for level in range(levels)]
    return [torch.randn(2, 5, 64 // s, 96 // s, generator=generator) for s in strides], strides


def regions(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([90.0, 60.0]) - 4
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 60 + 0.5], 1)
    return boxes, torch.randint(0, 2, (count,), generator=generator)


@pytest.mark.parametrize("ratio", [1, 2, 0])
def test_agrees_with_torchvision(ratio):
    features, strides = make()
    boxes, images = regions(40)
    pool = PyramidRoiAlign(5, ratio, aligned=False, scale=32, level=3)
    theirs = MultiScaleRoIAlign(["0", "1", "2"], 5, ratio, canonical_scale=32, canonical_level=3)
    found = pool(features, strides, boxes, images)
    per_image = [boxes[images == i] for i in range(2)]
    expected = theirs({str(i): f for i, f in enumerate(features)}, per_image, [(64, 96)] * 2)
    order = torch.cat([(images == i).nonzero()[:, 0] for i in range(2)])
    torch.testing.assert_close(found[order], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
def test_look_up_agrees_with_the_operator_also_in_gradients(aligned):
    boxes, images = regions(60, seed=5)
    level = torch.arange(60) % 3
    pool = PyramidRoiAlign(4, 1, aligned)
    results = []
    for way in (pool.by_look_up, pool.by_operator):
        features, strides = make(seed=3)
        leaves = [feature.requires_grad_() for feature in features]
        pooled = way(leaves, strides, boxes, images, level)
        pooled.square().sum().backward()
        results.append([pooled.detach(), *[leaf.grad for leaf in leaves]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", [1, 2])
def test_no_region(ratio):
    features, strides = make()
    pool = PyramidRoiAlign(5, ratio, aligned=False)
    assert pool(features, strides, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 5, 5, 5)


def test_level_of_a_region():
    # floor(4 + log2(sqrt(area) / 224)): 224 px belongs on level 4, 223 px on level 3, 112 on 3, 111 on 2.
    features = [torch.full((1, 1, 128 // 2**i, 128 // 2**i), float(i + 2)) for i in range(4)]
    boxes = torch.tensor([[0.0, 0, side, side] for side in (224, 223, 112, 111, 10, 500)])
    pool = PyramidRoiAlign(1, 2, aligned=False)
    found = pool(features, [4, 8, 16, 32], boxes, torch.zeros(6, dtype=torch.int64))
    assert found.flatten().tolist() == [4, 3, 3, 2, 2, 5]
