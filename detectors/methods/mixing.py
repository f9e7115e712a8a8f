"""Images mixed with each other on the device, boxes and all: fitted, mirrored, erased, laid over or beside one another.

Nothing loops over images or waits for the device: sizes of canvases are known beforehand, and an image is moved on its
canvas by taking every pixel from another row and column. Random numbers are keyed (`harness.core.draws`). The
operations are those of MixPL's official code (Czm369/MixPL at 9f2176a).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detectors.padded import PaddedTargets, concatenate, side_by_side
from harness.core import boxes as box_ops
from harness.core.draws import torch_uniform

Interpolation = Literal["nearest", "linear"]


@dataclass
class BoxedImages:
    """B images with their boxes, padded right and bottom with 0 to a common size."""

    images: Tensor  # (B, 3, H, W)
    sizes: Tensor  # (B, 2) int64 valid (height, width)
    targets: PaddedTargets  # in pixels of the images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Tensor) -> BoxedImages:
        """Some of the images: a slice, or (K,) int64 on their device."""
        return BoxedImages(self.images[rows], self.sizes[rows], self.targets[rows])


def join_images(parts: Sequence[BoxedImages]) -> BoxedImages:
    """Several batches as one, padded to a common size."""
    height = max(part.images.shape[2] for part in parts)
    width = max(part.images.shape[3] for part in parts)
    images = [F.pad(p.images, (0, width - p.images.shape[3], 0, height - p.images.shape[2])) for p in parts]
    targets = concatenate([part.targets for part in parts])
    return BoxedImages(torch.cat(images), torch.cat([part.sizes for part in parts]), targets)


def fit(batch: BoxedImages, height: int, width: int, resize: Interpolation = "nearest") -> BoxedImages:
    """Images resized, all of them in their own proportions, so that they just fit into a canvas.

    A side of n pixels becomes floor(n s), s = min(height / h, width / w). Pixels are those of
    `torch.nn.functional.interpolate(image, scale_factor=s, mode=resize)`.

    Args:
        batch: the images.
        height, width: of the canvas.
        resize: `nearest`, or `linear`, which blends the four pixels around a place.
    """
    high, wide = batch.sizes.double().unbind(1)
    scale = torch.minimum(height / high, width / wide)
    sizes = (batch.sizes * scale[:, None]).long()
    rows, columns = _grid(batch, height, width)
    if resize == "nearest":
        images = _take(_take(batch.images, (rows / scale[:, None]).long(), 2), (columns / scale[:, None]).long(), 3)
    else:
        images = _blend(batch.images, (rows + 0.5) / scale[:, None] - 0.5, batch.sizes[:, 0], 2)
        images = _blend(images, (columns + 0.5) / scale[:, None] - 0.5, batch.sizes[:, 1], 3)
    boxes = box_ops.clip_boxes(batch.targets.boxes * scale[:, None, None].float(), sizes)
    targets = replace(batch.targets, boxes=boxes).keep(box_ops.is_large_enough(boxes))
    return BoxedImages(_masked(images, sizes), sizes, targets)


def flip(batch: BoxedImages) -> BoxedImages:
    """Images mirrored left to right within their sizes."""
    width = batch.sizes[:, 1:]
    _, columns = _grid(batch, *batch.images.shape[-2:])
    images = _masked(_take(batch.images, (width - 1 - columns).long(), 3), batch.sizes)
    left, top, right, bottom = batch.targets.boxes.unbind(-1)
    boxes = torch.stack([width - right, top, width - left, bottom], -1)
    return replace(batch, images=images, targets=replace(batch.targets, boxes=boxes))


def draw_patches(sizes: Tensor, keys: Tensor, stream: str, most: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Patches to erase: of each image 1 to `most`, each of sides floor(r h) and floor(r w) for r uniform in [0, ratio).

    Args:
        sizes: (B, 2) of the images.
        keys: (B,) random keys.
        stream: name of the draws.
        most: of an image; they may overlap.
        ratio: below 1.

    Returns:
        (B, most, 4) float32 boxes in whole pixels, and (B, most) which of them there are.
    """
    drawn = torch_uniform(keys, 1 + 3 * most, stream)
    exists = torch.arange(most, device=keys.device) < 1 + (drawn[:, :1] * most).long()
    shares, places = drawn[:, 1 : 1 + most] * ratio, drawn[:, 1 + most :].view(-1, most, 2)
    sides = (shares[..., None] * sizes[:, None]).long()
    corners = (places * (sizes[:, None] - sides)).long()  # the last row and column stay free, as in the official code
    return torch.cat([corners.flip(-1), (corners + sides).flip(-1)], -1).float(), exists


def erase(batch: BoxedImages, patches: Tensor, exists: Tensor, hidden: float = 0.7) -> BoxedImages:
    """Images with patches of 0, which is the mean colour; boxes that are mostly covered go.

    Args:
        batch: the images.
        patches: (B, P, 4) boxes in whole pixels.
        exists: (B, P) which of them there are.
        hidden: a box goes where its intersections with the patches add up to at least this share of its area. What
            several patches cover counts several times, as in the official code.
    """
    rows, columns = _grid(batch, *batch.images.shape[-2:])
    left, top, right, bottom = (side[..., None] for side in patches.unbind(-1))
    within_rows = (rows[:, None] >= top) & (rows[:, None] < bottom) & exists[..., None]  # (B, P, H)
    within_columns = (columns[:, None] >= left) & (columns[:, None] < right)
    with torch.autocast(batch.images.device.type, enabled=False):
        covered = torch.bmm(within_rows.float().transpose(1, 2), within_columns.float()) > 0
    boxes = batch.targets.boxes
    shared_from = torch.maximum(boxes[:, :, None, :2], patches[:, None, :, :2])
    shared_to = torch.minimum(boxes[:, :, None, 2:], patches[:, None, :, 2:])
    shared = ((shared_to - shared_from).clamp(min=0).prod(-1) * exists[:, None]).sum(-1)
    seen = shared / (box_ops.area(boxes) + 1e-7) < hidden
    return replace(batch, images=batch.images.masked_fill(covered[:, None], 0.0), targets=batch.targets.keep(seen))


def mixup(a: BoxedImages, b: BoxedImages, keys: Tensor, stream: str = "mixup") -> BoxedImages:
    """The mean of two images pair by pair, 0 where one of them is not; boxes of both.

    Either lies at a random place of a canvas as high and as wide as the larger of the two.

    Args:
        a, b: B images each.
        keys: (B,) random keys.
        stream: name of the draws.
    """
    sizes = torch.maximum(a.sizes, b.sizes)
    height = max(a.images.shape[2], b.images.shape[2])
    width = max(a.images.shape[3], b.images.shape[3])
    drawn = torch_uniform(keys, 4, stream)
    parts = [
        shift(part, (draws * (sizes - part.sizes + 1)).long(), height, width)
        for part, draws in ((a, drawn[:, :2]), (b, drawn[:, 2:]))
    ]
    targets = side_by_side([part.targets for part in parts])
    return BoxedImages(0.5 * parts[0].images + 0.5 * parts[1].images, sizes, targets)


def mosaic(tiles: BoxedImages, height: int, width: int, multiple: int = 16) -> BoxedImages:
    """Four images around the centre of one: upper left, upper right, lower left, lower right; boxes of all.

    A quarter is as high and as wide as the largest of the four tiles, rounded up. Where it is smaller than the canvas
    is large, the rest of the canvas is padding.

    Args:
        tiles: 4 M images no larger than `height` and `width`; four successive ones make a mosaic.
        height, width: of the largest tile that there may be.
        multiple: what a quarter's sides are multiples of.

    Returns:
        M images on a canvas of twice height and width, rounded up.
    """
    quarter = -(-tiles.sizes.view(-1, 4, 2).amax(1) // multiple) * multiple  # (M, 2)
    own = quarter.repeat_interleave(4, 0, output_size=len(tiles))
    place = torch.arange(len(tiles), device=own.device) % 4
    upper, left = place < 2, place % 2 == 0
    offsets = torch.stack(
        [
            torch.where(upper, own[:, 0] - tiles.sizes[:, 0], own[:, 0]),
            torch.where(left, own[:, 1] - tiles.sizes[:, 1], own[:, 1]),
        ],
        1,
    )
    canvas = [2 * multiple * -(-side // multiple) for side in (height, width)]
    moved = shift(tiles, offsets, *canvas)
    images = moved.images.unflatten(0, (-1, 4)).sum(1)  # no two of them overlap
    parts = [moved.targets[slice(number, None, 4)] for number in range(4)]
    return BoxedImages(images, 2 * quarter, side_by_side(parts))


def shift(batch: BoxedImages, offsets: Tensor, height: int, width: int) -> BoxedImages:
    """Images moved right and down by (B, 2) whole pixels (down, right), on a canvas that holds them."""
    rows, columns = _grid(batch, height, width)
    rows, columns = rows - offsets[:, :1], columns - offsets[:, 1:]
    images = _take(_take(batch.images, rows.long(), 2), columns.long(), 3)
    inside = _inside(rows, batch.sizes[:, :1])[:, None, :, None] & _inside(columns, batch.sizes[:, 1:])[:, None, None]
    boxes = batch.targets.boxes + offsets.flip(1).repeat(1, 2)[:, None]
    return BoxedImages(images * inside, batch.sizes + offsets, replace(batch.targets, boxes=boxes))


def _grid(batch: BoxedImages, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(1, height) and (1, width): numbers of a canvas's rows and columns."""
    device = batch.images.device
    return torch.arange(height, device=device)[None], torch.arange(width, device=device)[None]


def _take(images: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows (`dim` 2) or columns (3) `index` (B, n) of (B, C, H, W); the nearest there is where they lie outside."""
    index = index.clamp(0, images.shape[dim] - 1)
    shape = list(images.shape)
    shape[dim] = index.shape[1]
    index = index[:, None, :, None] if dim == 2 else index[:, None, None]
    return images.gather(dim, index.expand(shape))


def _blend(images: Tensor, places: Tensor, limit: Tensor, dim: int) -> Tensor:
    """Linear interpolation of rows (`dim` 2) or columns (3) at `places` (B, n), among the first `limit` (B,)."""
    places = torch.minimum(places.clamp(min=0), limit[:, None] - 1)
    first = places.long()
    second = torch.minimum(first + 1, limit[:, None] - 1)
    share = (places - first).to(images.dtype)
    share = share[:, None, :, None] if dim == 2 else share[:, None, None]
    return torch.lerp(_take(images, first, dim), _take(images, second, dim), share)


def _inside(places: Tensor, limit: Tensor) -> Tensor:
    return (places >= 0) & (places < limit)


def _masked(images: Tensor, sizes: Tensor) -> Tensor:
    """The images with 0 outside their sizes."""
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return images * (rows[:, None, :, None] & columns[:, None, None])
