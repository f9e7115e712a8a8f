"""Boxes of a batch as tensors of one shape, so that matching and sampling need no loop over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harness.core import boxes as box_ops
from harness.core.types import Target, View


@dataclass
class PaddedTargets:
    """Boxes of B images, each with room for N >= 1; what `valid` does not mark is padding and means nothing."""

    boxes: Tensor  # (B, N, 4) float32
    labels: Tensor  # (B, N) int64 in 1..C
    scores: Tensor  # (B, N) float32
    valid: Tensor  # (B, N) bool

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, images: slice | Tensor) -> PaddedTargets:
        """Some of the images: a slice, or (K,) int64 on their device."""
        return PaddedTargets(self.boxes[images], self.labels[images], self.scores[images], self.valid[images])

    def keep(self, mask: Tensor) -> PaddedTargets:
        """The same boxes, valid only where `mask` (B, N) is too."""
        return replace(self, valid=self.valid & mask)

    def to_view(self, source: View, destination: View) -> PaddedTargets:
        """Boxes of one view in the pixels of another view of the same images.

        They are clipped to the valid area of the destination; those that leave it become invalid.
        """
        matrices = box_ops.between_views(source.to_view, destination.to_view)
        mapped = box_ops.clip_boxes(box_ops.transform_boxes(self.boxes, matrices), destination.sizes)
        return replace(self, boxes=mapped, valid=self.valid & box_ops.is_large_enough(mapped))

    def trim(self) -> PaddedTargets:
        """The same boxes with no more room than needed, at least 1. Waits for the device."""
        slots = torch.arange(1, self.valid.shape[1] + 1, device=self.valid.device)
        room = max(1, int((self.valid * slots).max())) if self.valid.numel() else 1
        return PaddedTargets(self.boxes[:, :room], self.labels[:, :room], self.scores[:, :room], self.valid[:, :room])

    def pack(self) -> PaddedTargets:
        """The valid boxes in their order, without gaps, with no more room than needed. Waits for the device."""
        order = (~self.valid).to(torch.uint8).argsort(dim=1, stable=True)
        parts = (gather_rows(part, order) for part in (self.boxes, self.labels, self.scores, self.valid))
        return PaddedTargets(*parts).trim()

    def unpad(self) -> list[Target]:
        """One Target per image, detached. Waits for the device."""
        parts = zip(self.boxes.detach(), self.labels, self.scores.detach(), self.valid, strict=True)
        return [Target(boxes[valid], labels[valid], scores[valid]) for boxes, labels, scores, valid in parts]


def pad(targets: Sequence[Target]) -> PaddedTargets:
    """Puts the boxes of B >= 1 images side by side."""
    device = targets[0].boxes.device
    counts = torch.tensor([len(target) for target in targets])
    room = max(1, int(counts.max()))
    empty = torch.zeros(room, 4, device=device)  # an extra row: pad_sequence pads to the longest
    rows = [empty, *(target.boxes for target in targets)]
    boxes = pad_sequence(rows, batch_first=True)[1:]
    labels = pad_sequence([empty[:, 0].long(), *(target.labels for target in targets)], batch_first=True)[1:]
    scores = pad_sequence([empty[:, 0], *(target.scores for target in targets)], batch_first=True)[1:]
    valid = torch.arange(room)[None] < counts[:, None]
    return PaddedTargets(boxes, labels, scores, valid.to(device, non_blocking=True))


def concatenate(parts: Sequence[PaddedTargets]) -> PaddedTargets:
    """Several batches as one, with the room of the largest."""
    room = max(part.valid.shape[1] for part in parts)

    def widened(values: Tensor) -> Tensor:
        missing = room - values.shape[1]
        return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], 1)

    return PaddedTargets(
        torch.cat([widened(part.boxes) for part in parts]),
        torch.cat([widened(part.labels) for part in parts]),
        torch.cat([widened(part.scores) for part in parts]),
        torch.cat([widened(part.valid) for part in parts]),
    )


def side_by_side(parts: Sequence[PaddedTargets]) -> PaddedTargets:
    """The boxes that several batches have of the same B images, one batch's after the other's."""
    return PaddedTargets(
        torch.cat([part.boxes for part in parts], 1),
        torch.cat([part.labels for part in parts], 1),
        torch.cat([part.scores for part in parts], 1),
        torch.cat([part.valid for part in parts], 1),
    )


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, S) of `values` (B, N) or (B, N, D), image by image."""
    if values.dim() == 2:
        return values.gather(1, index)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def scatter_by_image(values: Tensor, images: Tensor, batch: int, room: int, fill: float = 0.0) -> Tensor:
    """Rows (K, ...) sorted by image to (B, room, ...): each image's first `room` rows, padded with `fill`."""
    index = torch.arange(batch, device=images.device)
    first = (images[None] < index[:, None]).sum(1)
    slots = torch.arange(images.shape[0], device=images.device) - first[images]
    overflow = batch * room  # one row to throw away, since a mask would wait for the device
    place = torch.where(slots < room, images * room + slots, overflow)
    out = torch.full((batch * room + 1, *values.shape[1:]), fill, dtype=values.dtype, device=values.device)
    out[place] = values
    return out[:overflow].view(batch, room, *values.shape[1:])
