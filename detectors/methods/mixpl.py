"""MixPL: mean-teacher pseudo-labelling on mixed images, with any detector.

Chen et al., "Mixed pseudo labels for semi-supervised object detection", 2023 (arXiv 2312.07006). The numbers and the
order of things are those of the official code (Czm369/MixPL at 9f2176a); where this differs, an option or
`docs/methods.md` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from detectors.consistent_retina import ConsistentRetina
from detectors.detector import Detector
from detectors.faster_rcnn import FasterRcnn
from detectors.fcos import Fcos
from detectors.methods import mixing
from detectors.methods.adaptive import AdaptiveKeys
from detectors.methods.mean_teacher import MeanTeacher
from detectors.methods.method import EmaKeys, Losses, mean_count
from detectors.methods.mixing import BoxedImages
from detectors.padded import PaddedTargets
from detectors.retinanet import RetinaNet
from harness.core import boxes as box_ops
from harness.core.draws import image_keys, stream_key, torch_uniform, uniform
from harness.core.stages import stage
from harness.core.steps import StepsOrPart
from harness.core.types import Batch, UserError, View
from harness.core.validate import Limits, NotNegative, Positive, Share, Weight, keys_of

# The official configurations' thresholds, by detector; Consistent-Teacher's, whose scores are a RetinaNet's, has its.
SCORES = {FasterRcnn: 0.7, RetinaNet: 0.4, ConsistentRetina: 0.4, Fcos: 0.3}
ROOM = 100  # boxes of an image that are kept with it, the best ones
PATCHES, PATCH = 19, 0.1  # most patches that are erased of an image, and their largest side in units of the image's
TILES = 4  # images of a mosaic

Drawn = tuple[int, BoxedImages]  # the step that images are of


class MixPl(MeanTeacher):
    """L = L_s + lambda_u (g L(mixed images) + mosaic_weight g L(mosaics)), each the detector's own losses.

    The strong views of unlabelled images are mixed with older ones, and mosaics are made of others, out of a cache that
    every lane (micro-batch of a step) has for itself. A cached image keeps the boxes that the teacher gave it in its
    own step, whatever their score: they meet the threshold when they are learnt from. g is 1 or 0, see `gate`.

    The cache takes up a step's images after that step. Its pixels are no part of the state: of the boxes every process
    has those of all lanes, and the pipeline renders the images once more where a run is taken up (see
    `Method.missing`).

    Args:
        detector, steps, reported, ema, lambda_u, burn_in, rise, candidate_score, adaptive, smallest_side,
            joint_forward: see `MeanTeacher`; mosaics are a forward of their own in any case.
        score: above it the teacher's boxes are pseudo labels; None: 0.7 for Faster R-CNN, 0.4 for RetinaNet and
            Consistent-Teacher's detector, 0.3 for FCOS.
        cache: `lane`: images of earlier steps are mixed in; `batch`: those of the micro-batch itself.
        cache_size: images in a lane's cache. The older half is mixed in; mosaics, as many as there are fours, are made
            of the newer half. Nothing is mixed until it is full.
        resize: how cached images are fitted: `nearest` (the code) or `linear`.
        gate: g is 0 for a forward in which some image (`all`, the code), or every image (`any`), is without a box.
        erase: erase patches of the images that are learnt from, and boxes that are mostly covered.
        mosaic_weight: of the mosaics' losses.
        mosaic_side: lowest and highest side of the area that a mosaic's tile is fitted into, in pixels; up to 1: in
            units of the padded strong views' height and width.
    """

    measures = ("pseudo_boxes", "mixed_gate", "mosaic_gate")
    deviations = (
        "a cached image keeps its 100 best boxes; their sides must still be longer than smallest_side when it is mixed",
        "the cache may be of any size and a micro-batch may have any number of images; the code needs 8 and 4",
    )
    cached_boxes: Tensor  # (K lanes, N cached images, ROOM, 7): x1, y1, x2, y2, label, score, valid
    cached_from: Tensor  # (K, N, 2) int64 step and row in the micro-batch that a cached image comes from; -1: none

    def __init__(
        self,
        detector: Detector,
        steps: int,
        *,
        ema: EmaKeys,
        reported: Literal["student", "teacher"] = "teacher",
        lambda_u: Weight = 2.0,
        burn_in: StepsOrPart = 0,
        rise: StepsOrPart | None = None,
        score: Share | None = None,
        candidate_score: Share = 0.05,
        adaptive: Annotated[Mapping[str, Any], keys_of(AdaptiveKeys)] | None = None,
        smallest_side: NotNegative = 0.01,
        joint_forward: bool = False,
        cache: Literal["lane", "batch"] = "lane",
        cache_size: Annotated[int, Limits(ge=2 * TILES, le=1024)] = 8,
        resize: mixing.Interpolation = "nearest",
        gate: Literal["all", "any"] = "all",
        erase: bool = True,
        mosaic_weight: Weight = 0.5,
        mosaic_side: tuple[Positive, Positive] = (400, 800),
    ) -> None:
        super().__init__(
            detector,
            steps,
            ema=ema,
            reported=reported,
            lambda_u=lambda_u,
            burn_in=burn_in,
            rise=rise,
            score=_score_of(detector) if score is None else score,
            candidate_score=candidate_score,
            adaptive=adaptive,
            smallest_side=smallest_side,
            joint_forward=joint_forward,
        )
        low, high = mosaic_side
        if not (low <= high <= 1 or 32 <= low <= high):
            raise UserError(
                f"method.mosaic_side=[{low},{high}] must be two sides, the smaller one first: of at least 32 px both, "
                "or both shares up to 1 of the strong view's sides"
            )
        self.cache, self.cache_size, self.resize = cache, cache_size, resize
        self.gate, self.erase = gate, erase
        self.mosaic_weight, self.mosaic_side = mosaic_weight, (float(low), float(high))
        self.register_buffer("cached_boxes", torch.zeros(0, cache_size, ROOM, 7))
        self.register_buffer("cached_from", torch.zeros(0, cache_size, 2, dtype=torch.int64))
        self._cached: dict[int, list[Drawn]] = {}  # of this process's lanes, old first
        self._fresh: dict[int, Drawn] = {}  # of the step under way, by lane
        self._seen: tuple[int, BoxedImages | None] | None = None  # step and strong views of the last forward
        self._mixed: tuple[BoxedImages, BoxedImages | None] | None = None  # of the last forward: mixed images, mosaics

    # What the student sees

    def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:
        self._seen = (step, None) if step >= self.unlabeled_from else None
        return super().forward(batch, step)

    @torch.no_grad()
    def taught_view(self, batch: Batch, step: int) -> View:
        strong, keys = batch.unlabeled["strong"], batch.unlabeled_keys
        with stage("teacher"):
            whole = BoxedImages(strong.images, strong.sizes, self.label_all(batch.unlabeled["weak"], strong))
            self.labels = {"classification": whole.targets.keep(self.certain(whole.targets)).pack()}
        self._seen = self._fresh[batch.lane] = (step, whole)
        with stage("mixing"):
            height, width = strong.images.shape[-2:]
            older, newer = self._sources(whole, batch.lane, keys)
            mixed = self._erased(whole, keys, "mixpl erase")
            mosaics = None
            if older is not None and newer is not None:
                fitted = mixing.flip(mixing.fit(older, height, width, self.resize))
                mixed = mixing.mixup(mixed, self._erased(fitted, keys, "mixpl erase older"), keys, "mixpl place")
                if self.mosaic_weight:
                    mosaics = self._taught(self._mosaics(newer, keys, *self._tile(batch, step)))
            mixed = self._taught(mixed)
        self._mixed = (mixed, mosaics)
        return View(mixed.images, mixed.sizes, strong.to_view)

    def label_all(self, weak: View, strong: View) -> PaddedTargets:
        """All boxes of the teacher in the strong views, whatever their score."""
        found = self.teacher.find(self.teacher.features(weak.images), weak, self.candidate_score)
        self.watch(found)
        labels = found.to_view(weak, strong)
        labels = labels.keep(box_ops.is_large_enough(labels.boxes, self.smallest_side)).pack()
        return PaddedTargets(*(part[:, :ROOM] for part in (labels.boxes, labels.labels, labels.scores, labels.valid)))

    def _sources(self, whole: BoxedImages, lane: int, keys: Tensor) -> tuple[BoxedImages | None, BoxedImages | None]:
        """What is mixed into the B images of a micro-batch, B others, and the tiles of mosaics; None: nothing yet."""
        if self.cache == "batch":
            tiles = TILES * max(1, len(whole) // TILES)
            return whole[_others(keys, len(whole))], whole[_shuffled(keys, len(whole), tiles, "tiles")]
        parts = [images for _, images in self._cached.get(lane, [])]
        if sum(map(len, parts)) < self.cache_size:
            return None, None
        cached = mixing.join_images(parts)[-self.cache_size :]
        half = self.cache_size // 2
        older, newer = cached[:half], cached[half:]
        tiles = len(newer) // TILES * TILES
        return older[_shuffled(keys, half, len(whole))], newer[_shuffled(keys, len(newer), tiles, "tiles")]

    def _erased(self, images: BoxedImages, keys: Tensor, stream: str) -> BoxedImages:
        if not self.erase:
            return images
        return mixing.erase(images, *mixing.draw_patches(images.sizes, keys, stream, PATCHES, PATCH))

    def _mosaics(self, tiles: BoxedImages, keys: Tensor, height: int, width: int) -> BoxedImages:
        """Of 4 M images M mosaics, each tile in at most height x width."""
        fitted = mixing.flip(mixing.fit(tiles, height, width, self.resize))
        return mixing.mosaic(self._erased(fitted, _numbered(keys, len(tiles)), "mixpl erase tile"), height, width)

    def _tile(self, batch: Batch, step: int) -> tuple[int, int]:
        """Height and width that tiles are fitted into, drawn anew for every micro-batch.

        The seed is in the draws through the images that the step has drawn: their keys are on the device, where reading
        them would have to wait.
        """
        own = image_keys(int(batch.unlabeled_ids[0]), step, [batch.lane])
        low, high = self.mosaic_side
        drawn = low + uniform(own, 2, "mixpl tile")[0] * (high - low)
        height, width = batch.unlabeled["strong"].images.shape[-2:] if high <= 1 else (1, 1)
        return max(1, int(drawn[0] * height)), max(1, int(drawn[1] * width))

    def _taught(self, images: BoxedImages) -> BoxedImages:
        """The images with those of their boxes alone that are above the threshold and not too small."""
        known = images.targets.keep(self.certain(images.targets))
        large = box_ops.is_large_enough(known.boxes, self.smallest_side)
        return replace(images, targets=known.keep(large).pack())

    # Losses

    def unlabeled_losses(
        self,
        features: list[Tensor],
        strong: View,
        weak: View,  # noqa: ARG002 - it is labelled by now
        keys: Tensor,
    ) -> tuple[Losses, Losses]:
        assert self._mixed is not None
        mixed, mosaics = self._mixed
        mixed_gate = self._gate_of(mixed.targets)
        mosaic_gate = torch.zeros_like(mixed_gate)
        terms = self.student.losses(features, strong, mixed.targets, keys)
        terms = {name: mixed_gate * value for name, value in terms.items()}
        if mosaics is not None:
            mosaic_gate = self._gate_of(mosaics.targets)
            for name, value in self._mosaic_losses(mosaics, keys).items():
                terms[name] = terms[name] + self.mosaic_weight * mosaic_gate * value
        return terms, {
            "pseudo_boxes": mean_count(self.labels["classification"].valid),
            "mixed_gate": mixed_gate,
            "mosaic_gate": mosaic_gate,
            **self.thresholds(),
        }

    def _mosaic_losses(self, mosaics: BoxedImages, keys: Tensor) -> Losses:
        nowhere = torch.zeros(len(mosaics), 3, 3, device=keys.device)  # a mosaic is of several images
        view = View(mosaics.images, mosaics.sizes, nowhere)
        with stage("student"):
            features = self.student.features(mosaics.images)
        return self.student.losses(
            features, view, mosaics.targets, _numbered(keys ^ stream_key("mosaic"), len(mosaics))
        )

    def _gate_of(self, targets: PaddedTargets) -> Tensor:
        """g, 0-d: whether the images of a forward are learnt from."""
        labeled = targets.valid.any(1)
        return (labeled.all() if self.gate == "all" else labeled.any()).float()

    # The cache

    def before_step(self, step: int) -> None:
        self._fresh.clear()  # of a step that was not finished
        super().before_step(step)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self.cache == "lane":
            for lane, (drawn_at, images) in self._fresh.items():
                self._keep(lane, drawn_at, images)
        self._fresh.clear()

    def _keep(self, lane: int, step: int, images: BoxedImages) -> None:
        parts = self._cached.setdefault(lane, [])
        parts.append((step, images))
        while sum(len(part) for _, part in parts[1:]) >= self.cache_size:
            parts.pop(0)

    def observe(self) -> dict[str, Tensor]:
        """Boxes and origin of the images that the cache takes up, in as many rows as it has."""
        observed = super().observe()
        if self.cache == "batch" or self._seen is None:
            return observed
        step, images = self._seen
        boxes = self.cached_boxes.new_zeros(self.cache_size, ROOM, 7)
        origin = self.cached_from.new_full((self.cache_size, 2), -1)
        if images is not None:
            kept = min(len(images), self.cache_size)
            boxes[-kept:, : images.targets.valid.shape[1]] = _packed(images.targets[-kept:])
            origin[-kept:, 0] = step
            origin[-kept:, 1] = torch.arange(len(images) - kept, len(images), device=origin.device)
        return {**observed, "cached_boxes": boxes, "cached_from": origin}

    def absorb(self, step: int, observed: dict[str, Tensor]) -> None:
        super().absorb(step, observed)
        if "cached_from" not in observed:
            return
        origin, boxes = observed["cached_from"], observed["cached_boxes"]
        if not len(self.cached_from):
            self.cached_from, self.cached_boxes = torch.full_like(origin, -1), torch.zeros_like(boxes)
        origin = torch.cat([self.cached_from, origin], 1)
        boxes = torch.cat([self.cached_boxes, boxes], 1)
        newest = (origin[..., 0] >= 0).to(torch.uint8).argsort(dim=1, stable=True)[:, -self.cache_size :]
        lanes = torch.arange(len(origin), device=origin.device)[:, None]
        self.cached_from, self.cached_boxes = origin[lanes, newest], boxes[lanes, newest]

    def missing(self) -> list[tuple[int, int]]:
        needed = {(step, lane) for lane, rows in enumerate(self.cached_from[..., 0].tolist()) for step in rows}
        held = {(step, lane) for lane, parts in self._cached.items() for step, _ in parts}
        return sorted((step, lane) for step, lane in needed - held if step >= 0)

    def remember(self, batch: Batch, step: int) -> None:
        strong, origin = batch.unlabeled["strong"], self.cached_from[batch.lane]
        own = origin[:, 0] == step
        rows = origin[own, 1]
        targets = _unpacked(self.cached_boxes[batch.lane][own]).pack()
        self._keep(batch.lane, step, BoxedImages(strong.images[rows], strong.sizes[rows], targets))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The state of any number of lanes; images that are not of that state are forgotten."""
        for name in ("cached_boxes", "cached_from"):
            own, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is not None and saved.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_zeros(saved.shape))
        self._cached.clear()
        self._fresh.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _score_of(detector: Detector) -> float:
    """The published threshold for a detector.

    Raises:
        UserError: there is none.
    """
    for kind, score in SCORES.items():
        if isinstance(detector, kind):
            return score
    raise UserError(f"method.score=null has no meaning for detector={detector.name}: give a threshold, such as 0.4")


def _shuffled(keys: Tensor, count: int, wanted: int, stream: str = "images") -> Tensor:
    """(wanted,) int64: 0 to count - 1 in a drawn order, again and again."""
    order = torch_uniform(keys[:1], count, f"mixpl {stream}")[0].argsort(stable=True)
    return order[torch.arange(wanted, device=keys.device) % count]


def _others(keys: Tensor, count: int) -> Tensor:
    """(count,) int64: each of 0 to count - 1 once, none in its own place where there are others."""
    away = 1 + (torch_uniform(keys[:1], 1, "mixpl images")[0] * (count - 1)).long()
    return (torch.arange(count, device=keys.device) + away) % count


def _numbered(keys: Tensor, count: int) -> Tensor:
    """(count,) keys of things that belong to a whole micro-batch."""
    return keys[:1] + torch.arange(count, device=keys.device)


def _packed(targets: PaddedTargets) -> Tensor:
    """(B, N, 7) float32."""
    rest = (targets.labels, targets.scores, targets.valid)
    return torch.cat([targets.boxes, *(part[..., None].to(targets.boxes.dtype) for part in rest)], -1)


def _unpacked(values: Tensor) -> PaddedTargets:
    return PaddedTargets(values[..., :4], values[..., 4].long(), values[..., 5], values[..., 6] > 0)
