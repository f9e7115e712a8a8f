from __future__ import annotations

import torch

from detectors.padded import concatenate, gather_rows, pad, scatter_by_image
from harness.core.types import Target, View


def target(*rows: tuple[float, float, float, float], label: int = 1) -> Target:
    return Target(torch.tensor(rows).reshape(-1, 4), torch.full((len(rows),), label), torch.ones(len(rows)))


def test_pad_and_unpad():
    targets = [target((0, 0, 1, 1), (2, 2, 3, 3)), target(), target((4, 4, 9, 9), label=3)]
    padded = pad(targets)
    assert padded.boxes.shape == (3, 2, 4)
    assert padded.valid.tolist() == [[True, True], [False, False], [True, False]]
    for before, after in zip(targets, padded.unpad(), strict=True):
        assert torch.equal(before.boxes, after.boxes)
        assert torch.equal(before.labels, after.labels)


def test_pad_of_images_without_boxes_still_has_room():
    assert pad([target(), target()]).boxes.shape == (2, 1, 4)


def test_keep_and_trim():
    padded = pad([target((0, 0, 1, 1), (2, 2, 3, 3)), target((4, 4, 9, 9))])
    kept = padded.keep(torch.tensor([[True, False], [True, True]]))
    assert kept.valid.tolist() == [[True, False], [True, False]]
    assert kept.trim().boxes.shape == (2, 1, 4)
    assert padded.keep(torch.zeros(2, 2, dtype=torch.bool)).trim().boxes.shape == (2, 1, 4)


def test_to_view_maps_clips_and_drops():
    source = View(torch.zeros(1, 3, 32, 32), torch.tensor([[20, 20]]), torch.eye(3)[None])
    half = View(torch.zeros(1, 3, 32, 32), torch.tensor([[10, 8]]), torch.diag(torch.tensor([0.5, 0.5, 1.0]))[None])
    mapped = pad([target((2, 4, 6, 8), (10, 10, 19, 19), (17, 2, 19, 4))]).to_view(source, half)
    assert mapped.valid.tolist() == [[True, True, False]]  # the third lies right of the 8 px wide destination
    assert mapped.unpad()[0].boxes.tolist() == [[1, 2, 3, 4], [5, 5, 8, 9.5]]


def test_concatenate_takes_the_larger_room():
    joined = concatenate([pad([target((0, 0, 1, 1))]), pad([target((0, 0, 2, 2), (1, 1, 2, 2))])])
    assert joined.valid.tolist() == [[True, False], [True, True]]


def test_gather_by_image():
    values = torch.arange(6).view(2, 3)
    index = torch.tensor([[2, 0], [1, 1]])
    assert gather_rows(values, index).tolist() == [[2, 0], [4, 4]]
    assert gather_rows(values[..., None].repeat(1, 1, 2), index).tolist() == [[[2, 2], [0, 0]], [[4, 4], [4, 4]]]


def test_scatter_by_image_keeps_the_first_rows():
    values = torch.arange(1.0, 7.0)
    images = torch.tensor([0, 0, 0, 2, 2, 3])
    found = scatter_by_image(values, images, batch=4, room=2, fill=-1)
    assert found.tolist() == [[1, 2], [-1, -1], [4, 5], [6, -1]]
    assert scatter_by_image(values[:0], images[:0], batch=2, room=2).tolist() == [[0, 0], [0, 0]]
