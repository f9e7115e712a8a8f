"""Mixing against plain loops over images, boxes and pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detectors.methods import mixing
from detectors.methods.mixing import BoxedImages
from detectors.padded import PaddedTargets, pad
from harness.core.types import Target

KEYS = torch.tensor([11, -5, 7_000_000_001, 42, 43, 44, 45, 46])


def batch(sizes: list[tuple[int, int]], seed: int = 0, boxes: int = 4) -> BoxedImages:
    """Noise of the given sizes, padded with 0, and boxes inside; the last image has one box fewer than the others."""
    generator = torch.Generator().manual_seed(seed)
    canvas = [-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True)]
    images, targets = torch.zeros(len(sizes), 3, *canvas), []
    for row, (height, width) in enumerate(sizes):
        images[row, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        count = boxes - (row == len(sizes) - 1)
        corners = torch.rand(count, 2, 2, generator=generator).sort(1).values * torch.tensor([width, height])
        labels = torch.randint(1, 4, (count,), generator=generator)
        targets.append(Target(corners.flatten(1), labels, torch.rand(count, generator=generator)))
    return BoxedImages(images, torch.tensor(sizes), pad(targets))


def pixels(images: BoxedImages, row: int) -> torch.Tensor:
    height, width = images.sizes[row].tolist()
    return images.images[row, :, :height, :width]


def is_zero_outside(images: BoxedImages) -> bool:
    left = images.images.clone()
    for row in range(len(images)):
        height, width = images.sizes[row].tolist()
        left[row, :, :height, :width] = 0
    return not left.any()


def boxes_of(images: BoxedImages, row: int) -> list[tuple[list[float], int, float]]:
    target = images.targets.unpad()[row]
    return list(zip(target.boxes.tolist(), target.labels.tolist(), target.scores.tolist(), strict=True))


SIZES = [(40, 60), (64, 50), (33, 96), (50, 50)]


@pytest.mark.parametrize("resize", ["nearest", "linear"])
@pytest.mark.parametrize("room", [(64, 64), (45, 120), (37, 41), (128, 96)])
def test_fit_is_interpolate_image_by_image(resize: mixing.Interpolation, room: tuple[int, int]) -> None:
    images = batch(SIZES)
    fitted = mixing.fit(images, *room, resize)
    assert fitted.images.shape[-2:] == room
    assert is_zero_outside(fitted)
    for row, (height, width) in enumerate(SIZES):
        scale = min(room[0] / height, room[1] / width)
        mode = {"linear": "bilinear"}.get(resize, resize)
        expected = F.interpolate(pixels(images, row)[None], scale_factor=scale, mode=mode)[0]
        assert fitted.sizes[row].tolist() == list(expected.shape[1:])
        torch.testing.assert_close(pixels(fitted, row), expected, atol=1e-4, rtol=1e-4)
        limit = [expected.shape[2], expected.shape[1]] * 2
        for (box, label, score), (was, *same) in zip(boxes_of(fitted, row), boxes_of(images, row), strict=True):
            assert box == pytest.approx([min(x * scale, most) for x, most in zip(was, limit, strict=True)], abs=1e-3)
            assert [label, score] == same


def test_flip_mirrors_pixels_and_boxes_within_the_size() -> None:
    images = batch(SIZES)
    flipped = mixing.flip(images)
    assert is_zero_outside(flipped)
    for row, (_, width) in enumerate(SIZES):
        assert torch.equal(pixels(flipped, row), pixels(images, row).flip(-1))
        for (box, *same), (was, *others) in zip(boxes_of(flipped, row), boxes_of(images, row), strict=True):
            assert box == pytest.approx([width - was[2], was[1], width - was[0], was[3]], abs=1e-4)
            assert same == others
    again = mixing.flip(flipped)
    assert torch.equal(again.images, images.images)
    torch.testing.assert_close(again.targets.boxes, images.targets.boxes)


def test_patches_have_the_shares_and_places_of_the_code() -> None:
    sizes = torch.tensor([[480, 640]]).expand(2000, 2)
    keys = torch.arange(2000)
    patches, exists = mixing.draw_patches(sizes, keys, "x", 19, 0.1)
    counts = exists.sum(1)
    assert (int(counts.min()), int(counts.max())) == (1, 19)
    assert float(counts.float().mean()) == pytest.approx(10, abs=0.4)
    sides = patches[..., 2:] - patches[..., :2]
    assert torch.equal(patches, patches.round())
    ratio = sides[..., 1] / 480
    assert float(ratio.max()) <= 0.1
    assert float(ratio.mean()) == pytest.approx(0.05, abs=0.002)
    assert ((sides[..., 0] / 640 - ratio).abs() <= 1 / 480).all()  # one ratio for both sides, rounded down
    assert (patches[..., :2] >= 0).all()
    assert (patches[..., 2] < 640).all()  # the last column stays
    assert (patches[..., 3] < 480).all()
    assert float(patches[..., 0].max()) > 600
    other, _ = mixing.draw_patches(sizes, keys, "y", 19, 0.1)
    assert not torch.equal(patches, other)


def test_erase_against_loops_and_overlapping_patches_count_twice() -> None:
    images = batch(SIZES, boxes=6)
    patches, exists = mixing.draw_patches(images.sizes, KEYS[:4], "x", 19, 0.6)
    erased = mixing.erase(images, patches, exists, hidden=0.7)
    gone = 0
    for row in range(4):
        expected = images.images[row].clone()
        there = [patch for patch, real in zip(patches[row].tolist(), exists[row].tolist(), strict=True) if real]
        for left, top, right, bottom in there:
            expected[:, int(top) : int(bottom), int(left) : int(right)] = 0
        assert torch.equal(erased.images[row], expected)
        kept = []
        for box, label, score in boxes_of(images, row):
            shared = sum(
                max(0, min(box[2], p[2]) - max(box[0], p[0])) * max(0, min(box[3], p[3]) - max(box[1], p[1]))
                for p in there
            )
            if shared / ((box[2] - box[0]) * (box[3] - box[1]) + 1e-7) < 0.7:
                kept.append((box, label, score))
            gone += shared / ((box[2] - box[0]) * (box[3] - box[1]) + 1e-7) >= 0.7
        assert boxes_of(erased, row) == kept
    assert gone
    # Two patches over the same 40 % of a box cover 80 % by the code's count.
    one = BoxedImages(torch.ones(1, 3, 32, 32), torch.tensor([[32, 32]]), target([[0.0, 0.0, 10.0, 10.0]]))
    twice = torch.tensor([[[0.0, 0.0, 10.0, 4.0], [0.0, 0.0, 10.0, 4.0]]])
    assert not mixing.erase(one, twice, torch.tensor([[True, True]])).targets.valid.any()
    assert mixing.erase(one, twice, torch.tensor([[True, False]])).targets.valid.all()


def target(boxes: list[list[float]]) -> PaddedTargets:
    return pad([Target(torch.tensor(boxes), torch.ones(len(boxes), dtype=torch.int64), torch.ones(len(boxes)))])


def test_mixup_is_half_of_both_wherever_they_lie() -> None:
    a, b = batch(SIZES, 1), batch([(50, 40), (30, 90), (33, 96), (60, 20)], 2)
    mixed = mixing.mixup(a, b, KEYS[:4])
    assert is_zero_outside(mixed)
    moved = 0
    for row in range(4):
        height, width = (max(x, y) for x, y in zip(a.sizes[row].tolist(), b.sizes[row].tolist(), strict=True))
        assert mixed.sizes[row].tolist() == [height, width]
        found = boxes_of(mixed, row)
        expected, count = torch.zeros(3, height, width), 0
        for part in (a, b):
            own = boxes_of(part, row)
            (left, top, *_), (was_left, was_top, *_) = found[count][0], own[0][0]
            x, y = round(left - was_left), round(top - was_top)
            h, w = part.sizes[row].tolist()
            assert 0 <= x <= width - w
            assert 0 <= y <= height - h
            moved += x + y
            expected[:, y : y + h, x : x + w] += 0.5 * pixels(part, row)
            for (box, *same), (was, *others) in zip(found[count : count + len(own)], own, strict=True):
                assert box == pytest.approx([was[0] + x, was[1] + y, was[2] + x, was[3] + y], abs=1e-4)
                assert same == others
            count += len(own)
        assert count == len(found)
        torch.testing.assert_close(pixels(mixed, row), expected)
    assert moved


def test_an_image_of_zeros_halves_the_pixels() -> None:
    images = batch(SIZES)
    nothing = BoxedImages(torch.zeros_like(images.images), images.sizes, images.targets.keep(torch.tensor(False)))
    mixed = mixing.mixup(images, nothing, KEYS[:4])
    assert torch.equal(mixed.images, images.images / 2)
    for row in range(4):
        assert boxes_of(mixed, row) == boxes_of(images, row)


def test_places_of_a_mixup_reach_every_corner() -> None:
    small, large = batch([(30, 30)], 1), batch([(32, 33)], 2)
    places = set()
    for key in range(200):
        mixed = mixing.mixup(small, large, torch.tensor([key]))
        x1, y1, *_ = mixed.targets.boxes[0, 0].tolist()
        was = small.targets.boxes[0, 0].tolist()
        places.add((round(x1 - was[0]), round(y1 - was[1])))
    assert places == {(x, y) for x in range(4) for y in range(3)}


def test_mosaic_puts_four_tiles_around_the_centre() -> None:
    tiles = batch([(20, 30), (31, 17), (9, 40), (25, 25), (40, 40), (40, 39), (1, 40), (33, 33)])
    made = mixing.mosaic(tiles, 40, 40)
    assert made.images.shape == (2, 3, 96, 96)
    assert is_zero_outside(made)
    for number in range(2):
        own = range(4 * number, 4 * number + 4)
        high, wide = (-(-max(tiles.sizes[row, axis].item() for row in own) // 16) * 16 for axis in (0, 1))
        assert made.sizes[number].tolist() == [2 * high, 2 * wide]
        expected, boxes = torch.zeros(3, 2 * high, 2 * wide), []
        for place, row in enumerate(own):
            h, w = tiles.sizes[row].tolist()
            y, x = high - h if place < 2 else high, wide - w if place % 2 == 0 else wide
            expected[:, y : y + h, x : x + w] = pixels(tiles, row)
            for box, label, score in boxes_of(tiles, row):
                boxes.append(([box[0] + x, box[1] + y, box[2] + x, box[3] + y], label, score))
        assert torch.equal(pixels(made, number), expected)
        found = boxes_of(made, number)
        assert len(found) == len(boxes)  # none is lost
        for (box, *same), (was, *others) in zip(found, boxes, strict=True):
            assert box == pytest.approx(was, abs=1e-4)
            assert same == others
    assert mixing.mosaic(tiles[:4], 40, 70).images.shape == (1, 3, 96, 160)


def test_boxes_that_a_smaller_image_has_no_room_for_go() -> None:
    images = BoxedImages(
        torch.ones(1, 3, 64, 64), torch.tensor([[10, 63]]), target([[62.9, 0.0, 63.0, 10.0], [0.0, 0.0, 20.0, 9.0]])
    )
    fitted = mixing.fit(images, 31, 31)  # 63 s = 31, but 10 s = 4.92 becomes 4 rows
    assert fitted.sizes.tolist() == [[4, 31]]
    low = mixing.fit(
        BoxedImages(torch.ones(1, 3, 64, 64), torch.tensor([[10, 63]]), target([[0.0, 9.0, 9.0, 10.0]])), 31, 31
    )
    assert not low.targets.valid.any()  # it lay in the part of a row that is cut off
    assert fitted.targets.valid.all()


def test_join_pads_to_the_largest() -> None:
    parts = [batch([(20, 30)], 1), batch([(40, 70), (33, 20)], 2, boxes=7)]
    joined = mixing.join_images(parts)
    assert len(joined) == 3
    assert is_zero_outside(joined)
    flat = [(part, row) for part in parts for row in range(len(part))]
    for number, (part, row) in enumerate(flat):
        assert torch.equal(pixels(joined, number), pixels(part, row))
        assert boxes_of(joined, number) == boxes_of(part, row)
    order = torch.tensor([2, 0])
    assert boxes_of(joined[order], 0) == boxes_of(joined, 2)


def test_draws_do_not_depend_on_the_other_images() -> None:
    a, b = batch(SIZES, 1), batch(SIZES[::-1], 2)
    together = mixing.mixup(a, b, KEYS[:4])
    for row in range(4):
        one = slice(row, row + 1)
        alone = mixing.mixup(a[one], b[one], KEYS[one])
        assert torch.equal(pixels(together, row), pixels(alone, 0))
        assert boxes_of(together, row) == boxes_of(alone, 0)
