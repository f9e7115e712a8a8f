"""The region proposal network: anchors, its two losses, and proposals, each for all images of a batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from detectors import losses
from detectors.matching import match_anchors, matched_boxes, sample
from detectors.padded import PaddedTargets, gather_rows, scatter_by_image
from harness.core import boxes as box_ops
from harness.core.types import UserError
from harness.core.validate import Limits, NotNegative, Share

_CODER = (1.0, 1.0, 1.0, 1.0)
_SMALLEST_PROPOSAL = 1e-3  # px
_PAD = 32  # px; mmdetection pads each image to a multiple of it, before images are padded to the size of the batch


@dataclass
class RpnOutput:
    """What the head says of A anchors in B images; levels lie one after the other."""

    objectness: Tensor  # (B, A) logits
    deltas: Tensor  # (B, A, 4)
    anchors: Tensor  # (A, 4) pixels of the view
    level_sizes: list[int]  # anchors of each level

    def images(self, start: int, stop: int) -> RpnOutput:
        """The same of images `start` to `stop`."""
        return RpnOutput(self.objectness[start:stop], self.deltas[start:stop], self.anchors, self.level_sizes)


@dataclass
class Proposals:
    """P regions of each of B images, by falling objectness."""

    boxes: Tensor  # (B, P, 4), clipped to the image, detached
    valid: Tensor  # (B, P) bool


def base_anchors(sizes: Sequence[float], ratios: Sequence[float], rounded: bool) -> Tensor:
    """(len(ratios) * len(sizes), 4) anchors about the origin, of area size^2 and height / width = ratio.

    torchvision rounds them to whole pixels, detectron does not.
    """
    height = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None] * torch.tensor(sizes, dtype=torch.float32)
    width = torch.tensor(sizes, dtype=torch.float32) / torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None]
    boxes = torch.stack([-width, -height, width, height], -1).view(-1, 4) / 2
    return boxes.round() if rounded else boxes


class Anchors(nn.Module):
    """Anchors of every cell of every level.

    Args:
        sizes: of each level, in pixels.
        ratios: height / width, of all levels.
        rounded: see `base_anchors`.
        strides: of each level in pixels; None divides the image's size by that of the level's map, as torchvision does,
            whose anchors of the coarsest level therefore depend on the size that a batch is padded to.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        rounded: bool,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        assert strides is None or len(strides) == len(sizes), "one stride per level"
        self.bases = [base_anchors(level, ratios, rounded) for level in sizes]
        self.strides = strides
        self._grids: dict[tuple, Tensor] = {}

    def forward(self, features: list[Tensor], image_shape: tuple[int, int]) -> tuple[Tensor, list[int]]:
        """(A, 4) anchors of images padded to `image_shape`, and how many of them each level has."""
        assert len(features) == len(self.bases), "one list of anchor sizes per level"
        shapes = [tuple(level.shape[-2:]) for level in features]
        key = (*shapes, *image_shape, features[0].device)
        if key not in self._grids:
            if len(self._grids) > 64:  # many image shapes: what was cached is cheap to make again
                self._grids.clear()
            device = features[0].device
            steps = self._steps(shapes, image_shape)
            levels = zip(self.bases, shapes, steps, strict=True)
            self._grids[key] = torch.cat([self._grid(base.to(device), shape, step) for base, shape, step in levels])
        return self._grids[key], [len(b) * h * w for b, (h, w) in zip(self.bases, shapes, strict=True)]

    def _steps(self, shapes: list[tuple[int, ...]], image_shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Distance of neighbouring cells of each level, vertical and horizontal, in pixels."""
        if self.strides is not None:
            return [(stride, stride) for stride in self.strides]
        return [(image_shape[0] // shape[0], image_shape[1] // shape[1]) for shape in shapes]

    @staticmethod
    def _grid(base: Tensor, shape: tuple[int, ...], step: tuple[int, int]) -> Tensor:
        y = torch.arange(shape[0], device=base.device) * step[0]
        x = torch.arange(shape[1], device=base.device) * step[1]
        y, x = torch.meshgrid(y, x, indexing="ij")
        return (torch.stack([x, y, x, y], -1).view(-1, 1, 4) + base).view(-1, 4)


_Kept = Annotated[int, Limits(ge=1, le=100_000)]
Proposed = tuple[_Kept, _Kept]


@dataclass(frozen=True)
class RpnSettings:
    """The numbers of table C.0 that concern the RPN; the defaults are torchvision's."""

    batch: Annotated[int, Limits(ge=1, le=100_000)] = 256  # anchors per image in the losses
    positive_fraction: Share = 0.5
    positive_iou: Share = 0.7
    negative_iou: Share = 0.3
    low_quality_iou: Share = 0.0  # see `match`
    low_quality_of: Annotated[str, Limits(one_of=("box", "anchor"))] = "box"  # see `match`
    candidates: Annotated[str, Limits(one_of=tuple(CANDIDATES))] = "all"
    beta: NotNegative = 1 / 9  # of the box loss, see losses.box_regression
    fixed_normalizer: bool = False  # divide by batch * images, or by the number of anchors that were sampled
    nms_iou: Share = 0.7
    train_proposals: Proposed = (2000, 2000)  # per level before NMS, per image after
    test_proposals: Proposed = (1000, 1000)

    def __post_init__(self) -> None:
        for key, known in (("low_quality_of", ("box", "anchor")), ("candidates", tuple(CANDIDATES))):
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"detector.rpn.{key}={value} is unknown: choose {', '.join(known)}")


def _within_padding(anchors: Tensor, sizes: Tensor) -> Tensor:
    """Anchors of the cells within each image as padded on its own (mmdetection's valid_flags)."""
    cells = ((anchors[:, :2] + anchors[:, 2:]) / 2).round()  # corners of the cells, on which the anchors are centred
    padded = (sizes + _PAD - 1).div(_PAD, rounding_mode="floor") * _PAD
    return (cells < padded.flip(1)[:, None]).all(-1)


def _within_image(anchors: Tensor, sizes: Tensor) -> Tensor:
    """Anchors that lie inside each image entirely (tensorpack's filter_boxes_inside_shape)."""
    return (anchors[:, :2] >= 0).all(-1) & (anchors[:, 2:] <= sizes.flip(1)[:, None]).all(-1)


# Which of the anchors (A, 4) images of the sizes (B, 2) learn from: (B, A) bool. None: all of the batch's area.
CANDIDATES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "all": None,
    "padded": _within_padding,
    "inside": _within_image,
}


class Rpn(nn.Module):
    """Head, losses and proposals.

    Args:
        channels: of the feature maps.
        anchors: of each cell.
        settings: numbers.
    """

    def __init__(self, channels: int, anchors: Anchors, settings: RpnSettings) -> None:
        super().__init__()
        self.anchors = anchors
        self.settings = settings
        self.head = RPNHead(channels, len(anchors.bases[0]))

    def forward(self, features: list[Tensor], image_shape: tuple[int, int]) -> RpnOutput:
        """The head on all levels."""
        anchors, level_sizes = self.anchors(features, image_shape)
        objectness, deltas = self.head(features)
        batch = len(features[0])
        return RpnOutput(
            torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1) for level in objectness], 1),
            torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in deltas], 1),
            anchors,
            level_sizes,
        )

    def losses(
        self,
        output: RpnOutput,
        targets: PaddedTargets,
        sizes: Tensor,
        keys: Tensor,
        boxes: bool = True,
        stream: str = "rpn",
    ) -> dict[str, Tensor]:
        """`rpn_class` and, if `boxes`, `rpn_box`.

        Args:
            output: of the B images.
            targets: what lies in them; an image without boxes has only negatives.
            sizes: (B, 2) valid sizes.
            keys: (B,).
            boxes: False leaves the box loss out.
            stream: name of the random draw.
        """
        s = self.settings
        within = CANDIDATES[s.candidates]
        matches = match_anchors(
            output.anchors,
            targets,
            s.positive_iou,
            s.negative_iou,
            low_quality=True,
            low_quality_iou=s.low_quality_iou,
            low_quality_of=s.low_quality_of,
            usable=None if within is None else within(output.anchors, sizes),
        )
        samples = sample(matches, s.batch, s.positive_fraction, keys, stream)
        if s.fixed_normalizer:
            count = output.objectness.new_tensor(float(s.batch * len(keys)), dtype=torch.float32)
        else:
            count = samples.valid.sum().clamp(min=1).float()
        logits = output.objectness.gather(1, samples.index)
        classification = losses.binary_cross_entropy(logits, samples.positive.float(), samples.valid)
        result = {"rpn_class": classification / count}
        if boxes:
            head = samples.head()
            anchors = output.anchors[head.index]
            wanted = box_ops.encode(matched_boxes(head, matches, targets, anchors), anchors, _CODER)
            deltas = gather_rows(output.deltas, head.index)
            result["rpn_box"] = losses.box_regression(deltas, wanted, head.positive, s.beta) / count
        return result

    @torch.no_grad()
    def proposals(self, output: RpnOutput, sizes: Tensor, training: bool) -> Proposals:
        """The best regions: top of each level, NMS within the level, top of all levels.

        Args:
            output: of the B images.
            sizes: (B, 2) valid sizes.
            training: which of the two counts to take. Not `self.training`: teachers label with the training counts.
        """
        before, after = self.settings.train_proposals if training else self.settings.test_proposals
        scores, picked, levels, start = [], [], [], 0
        for level, size in enumerate(output.level_sizes):
            value, index = output.objectness[:, start : start + size].float().topk(min(before, size), dim=1)
            scores.append(value)
            picked.append(index + start)
            levels.append(index.new_full((index.shape[1],), level))
            start += size
        score, index = torch.cat(scores, 1), torch.cat(picked, 1)
        boxes = box_ops.decode(gather_rows(output.deltas, index), output.anchors[index], _CODER)
        boxes = box_ops.clip_boxes(boxes, sizes)
        score = score.masked_fill(~box_ops.is_large_enough(boxes, _SMALLEST_PROPOSAL), -torch.inf)
        batch, count = score.shape
        images = torch.arange(batch, device=score.device).repeat_interleave(count, output_size=batch * count)
        flat_boxes, flat_score = boxes.view(-1, 4), score.view(-1)
        keep = box_ops.nms(flat_boxes, flat_score, images, torch.cat(levels).repeat(batch), self.settings.nms_iou)
        room = min(after, count)
        kept_boxes = scatter_by_image(flat_boxes[keep], images[keep], batch, room)
        kept_score = scatter_by_image(flat_score[keep], images[keep], batch, room, fill=-torch.inf)
        return Proposals(kept_boxes, kept_score > -torch.inf)
