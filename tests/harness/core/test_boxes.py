from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.core import boxes as box_ops
from harness.core.types import ImageSource, View


def random_boxes(generator: torch.Generator, *shape: int, span: float = 100.0) -> torch.Tensor:
    corner = torch.rand(*shape, 2, generator=generator) * span
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * span / 2 + 1], -1)


def plain_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def test_iou_against_loops():
    generator = torch.Generator().manual_seed(0)
    a, b = random_boxes(generator, 2, 5), random_boxes(generator, 2, 7)
    found = box_ops.iou(a, b)
    for image in range(2):
        for i, first in enumerate(a[image].tolist()):
            for j, second in enumerate(b[image].tolist()):
                assert found[image, i, j].item() == pytest.approx(plain_iou(first, second), abs=1e-6)


def test_paired_iou_is_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    corner, sides = torch.rand(2, 3, 40, 2, generator=generator) * 10, torch.rand(2, 3, 40, 2, generator=generator) * 9
    a, b = torch.cat([corner, corner + sides], -1)
    torch.testing.assert_close(box_ops.paired_iou(a, b), torch.diagonal(box_ops.iou(a, b), dim1=-2, dim2=-1))
    assert box_ops.paired_iou(torch.zeros(4), torch.zeros(4)).item() == 0


def test_iou_of_empty_boxes_is_zero():
    empty = torch.zeros(1, 4)
    assert box_ops.iou(empty, empty).item() == 0
    assert box_ops.iou(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0, 3)


def test_clip_keeps_each_image_to_its_size():
    boxes = torch.tensor([[[-5.0, -5.0, 50.0, 50.0]], [[10.0, 10.0, 90.0, 90.0]]])
    clipped = box_ops.clip_boxes(boxes, torch.tensor([[20, 30], [40, 25]]))
    assert clipped.tolist() == [[[0, 0, 30, 20]], [[10, 10, 25, 40]]]
    flat = box_ops.clip_boxes(boxes[:, 0], torch.tensor([[20, 30], [40, 25]]))
    assert torch.equal(flat, clipped[:, 0])


@settings(max_examples=50, deadline=None)
@given(st.floats(-40, 40), st.floats(0.5, 2.0), st.floats(-20, 20), st.floats(-20, 20), st.floats(-0.0005, 0.0005))
def test_transform_is_the_hull_of_the_mapped_corners(angle, scale, shift_x, shift_y, tilt):
    turn = math.radians(angle)
    rows = [
        [scale * math.cos(turn), -scale * math.sin(turn), shift_x],
        [scale * math.sin(turn), scale * math.cos(turn), shift_y],
        [tilt, 0.0, 1.0],
    ]
    x1, y1, x2, y2 = 10.0, 20.0, 40.0, 35.0
    mapped = []
    for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)):
        u, v, w = (row[0] * x + row[1] * y + row[2] for row in rows)
        mapped.append((u / w, v / w))
    expected = [
        min(p[0] for p in mapped),
        min(p[1] for p in mapped),
        max(p[0] for p in mapped),
        max(p[1] for p in mapped),
    ]
    found = box_ops.transform_boxes(torch.tensor([[x1, y1, x2, y2]]), torch.tensor(rows))
    assert found[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_transform_takes_one_matrix_per_image():
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 4.0]], [[0.0, 0.0, 2.0, 4.0]]])
    matrices = torch.stack([torch.eye(3), torch.diag(torch.tensor([3.0, 0.5, 1.0]))])
    assert box_ops.transform_boxes(boxes, matrices).tolist() == [[[0, 0, 2, 4]], [[0, 0, 6, 2]]]


def test_between_views_of_a_flip_and_a_scale():
    # A point at x = 3 of a 10 px wide image lies at 7 in its mirror image, and at 6 in one twice as large: 7 -> 6.
    mirror = torch.tensor([[[-1.0, 0, 10], [0, 1, 0], [0, 0, 1]]])
    double = torch.diag(torch.tensor([2.0, 2.0, 1.0]))[None]
    matrix = box_ops.between_views(mirror, double)
    point = matrix[0] @ torch.tensor([7.0, 5.0, 1.0])
    assert point.tolist() == pytest.approx([6.0, 10.0, 1.0], abs=1e-6)


def test_encode_by_hand():
    # Anchor (0, 0, 10, 20), box (2, 1, 10, 11): centres (5, 10) and (6, 6), sizes (10, 20) and (8, 10).
    expected = [10 * 0.1, 10 * -0.2, 5 * math.log(0.8), 5 * math.log(0.5)]
    anchor, box = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[2.0, 1.0, 10.0, 11.0]])
    assert box_ops.encode(box, anchor, (10, 10, 5, 5))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_decode_undoes_encode_and_bounds_the_scale():
    generator = torch.Generator().manual_seed(1)
    anchors, boxes = random_boxes(generator, 50), random_boxes(generator, 50)
    deltas = box_ops.encode(boxes, anchors, (10, 10, 5, 5))
    torch.testing.assert_close(box_ops.decode(deltas, anchors, (10, 10, 5, 5)), boxes, atol=1e-4, rtol=1e-5)
    huge = box_ops.decode(torch.tensor([[0.0, 0, 1e6, 1e6]]), torch.tensor([[0.0, 0, 16, 16]]), (1, 1, 1, 1))
    assert (huge[0, 2] - huge[0, 0]).item() == pytest.approx(1000, rel=1e-4)


def plain_nms(boxes, scores, images, groups, threshold) -> list[int]:
    order = sorted(range(len(boxes)), key=lambda i: (images[i], -scores[i], i))
    kept: list[int] = []
    for i in order:
        rivals = [j for j in kept if images[j] == images[i] and groups[j] == groups[i]]
        if all(plain_iou(boxes[i], boxes[j]) <= threshold for j in rivals):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_nms_against_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, 80, span=40.0)
    scores = torch.rand(80, generator=generator)
    images = torch.randint(0, 4, (80,), generator=generator).sort()[0]
    groups = torch.randint(0, 3, (80,), generator=generator)
    found = box_ops.nms(boxes, scores, images, groups, 0.4)
    expected = plain_nms(boxes.tolist(), scores.tolist(), images.tolist(), groups.tolist(), 0.4)
    assert found.tolist() == expected


def test_nms_keeps_far_groups_exactly_apart():
    # At coordinates of 100,000 float32 has steps of 1/128 px; a shifted copy must still be suppressed by 0.5 exactly.
    boxes = torch.tensor([[0.0, 0, 1.0, 3.0], [0.0, 0.999, 1.0, 4.0]]).repeat(2, 1)
    groups = torch.tensor([0, 0, 80_000, 80_000])
    kept = box_ops.nms(boxes, torch.tensor([0.9, 0.8, 0.9, 0.8]), torch.zeros(4, dtype=torch.int64), groups, 0.5)
    assert sorted(kept.tolist()) == [0, 2]


def test_nms_of_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    assert len(box_ops.nms(torch.zeros(0, 4), torch.zeros(0), empty, empty, 0.5)) == 0


def test_source_boxes_in_a_view():
    source = ImageSource(
        paths=["a", "b"],
        ids=np.array([7, 3]),
        sizes=np.array([[10, 20], [10, 20]]),
        boxes=np.array([[1, 2, 5, 6], [15, 1, 19, 4]], np.float32),
        labels=np.array([1, 2]),
        scores=np.ones(2, np.float32),
        offsets=np.array([0, 2, 2]),
    )
    mirror = torch.tensor([[-1.0, 0, 20], [0, 1, 0], [0, 0, 1]])
    shifted = mirror.clone()
    shifted[0, 2] = 3  # only the first 4 px of the second box's mirror image stay inside
    view = View(torch.zeros(2, 3, 32, 32), torch.tensor([[10, 20], [10, 20]]), torch.stack([torch.eye(3), mirror]))
    targets = [source.target(1), source.target(0)]
    none, both = box_ops.targets_in_view(targets, view)
    assert len(none) == 0
    assert both.boxes.tolist() == [[15, 2, 19, 6], [1, 1, 5, 4]]
    assert both.labels.tolist() == [1, 2]
    view.to_view[1] = shifted
    part = box_ops.targets_in_view(targets, view)[1]
    assert part.boxes.tolist() == [[0, 2, 2, 6]]
    assert part.labels.tolist() == [1]
