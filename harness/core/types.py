"""The core types that the packages share: dataclasses and Protocols.

Conventions, used everywhere without being repeated: boxes are xyxy in pixels of the image or view they belong to,
origin top left, continuous coordinates (pixel i covers [i, i + 1]). Matrices are 3x3 and act on column vectors
(x, y, 1). Labels are 1..C, 0 is background. N boxes, B images, C classes, H and W in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from harness.core.errors import RunError as RunError
from harness.core.errors import UnusableImages as UnusableImages
from harness.core.errors import UserError as UserError
from harness.core.files import read_picture

if TYPE_CHECKING:  # only annotations name it, and the data side opens COCO in less memory than importing it takes
    import torch
    from torch import Tensor


@dataclass
class Target:
    """Boxes of one image."""

    boxes: Tensor  # (N, 4) float32, pixels of the view
    labels: Tensor  # (N,) int64 in 1..C
    scores: Tensor  # (N,) float32, 1 for human labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keep: Tensor) -> Target:
        return Target(self.boxes[keep], self.labels[keep], self.scores[keep])

    def to(self, device: torch.device | str) -> Target:
        """The same target on another device; on the CPU it is whole when this returns."""
        # A copy from a GPU that does not block goes to pinned memory, which may be read before it is filled.
        waits = str(device) == "cpu"
        return Target(*(t.to(device, non_blocking=not waits) for t in (self.boxes, self.labels, self.scores)))


@dataclass
class View:
    """One augmented view of B images, normalised, padded right and bottom with 0 to a common size."""

    images: Tensor  # (B, 3, H, W) float32, H and W multiples of 32
    sizes: Tensor  # (B, 2) int64 valid (height, width)
    to_view: Tensor  # (B, 3, 3) float32, original pixels -> view pixels
    targets: list[Target] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> View:
        """Some of the images (K,), without targets."""
        images, sizes, to_view = (part[index.to(part.device)] for part in (self.images, self.sizes, self.to_view))
        return View(images, sizes, to_view)


@dataclass(frozen=True)
class Normalize:
    """How uint8 RGB pixels become a network's input: (x - mean) / std per channel, then BGR order if `bgr`."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # of R, G, B, in 0..255
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    bgr: bool = False


@dataclass(frozen=True)
class Views:
    """The views a method needs, by the names that the augmentation policy gives them."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...] = ()


@dataclass
class Batch:
    """One micro-batch: what one forward of the method sees.

    `labeled` and `unlabeled` hold one View for each name in `Method.views`; row i of every view of a part is the same
    image. Either dict is empty where the step draws no such image. Ground truth of unlabelled images is never here:
    `targets` of unlabelled views are None, or the pseudo labels that were made offline.
    """

    labeled: dict[str, View]
    unlabeled: dict[str, View]
    labeled_ids: Tensor  # (Bl,) int64 image ids, on the CPU
    unlabeled_ids: Tensor  # (Bu,) int64, on the CPU
    labeled_keys: (
        Tensor  # (Bl,) int64, random key of (seed, step, slot), on the training device; see harness.data.sampling
    )
    unlabeled_keys: Tensor  # (Bu,) int64
    lane: int = 0  # which micro-batch of the step it is, over all devices

    @property
    def images_seen(self) -> int:
        """Distinct source images, labelled and unlabelled."""
        return len(self.labeled_ids) + len(self.unlabeled_ids)


@dataclass(frozen=True)
class Split:
    """Which images are labelled."""

    labeled_ids: np.ndarray  # (L,) int64
    unlabeled_ids: np.ndarray  # (U,) int64
    percent: float
    fold: int
    protocol: str
    sha256: str
    shots: int | None = None  # of each class, where the protocol draws by it


@dataclass(frozen=True)
class ImageSource:
    """Images that a pipeline reads, with the boxes it may show: arrays, not dicts, so that it scales to COCO.

    Boxes of image i are rows `offsets[i]:offsets[i + 1]` of `boxes`, `labels` and `scores`.
    """

    paths: Sequence[str]
    ids: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N, 2) int64 (height, width) of the stored pixels
    boxes: np.ndarray  # (M, 4) float32 xyxy, original pixels
    labels: np.ndarray  # (M,) int64 in 1..C
    scores: np.ndarray  # (M,) float32
    offsets: np.ndarray  # (N + 1,) int64
    annotated: bool = True  # whether an image without boxes is one without objects, not one that nobody labelled

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: int) -> slice:
        """Rows of image number `index` in the box arrays."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def select(self, rows: np.ndarray | Sequence[int]) -> ImageSource:
        """The images number `rows` (K,), in that order, with their boxes."""
        rows = np.asarray(rows, np.int64)
        starts = self.offsets[rows]
        counts = self.offsets[rows + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        boxes = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return replace(
            self,
            paths=[self.paths[row] for row in rows.tolist()],
            ids=self.ids[rows],
            sizes=self.sizes[rows],
            boxes=self.boxes[boxes],
            labels=self.labels[boxes],
            scores=self.scores[boxes],
            offsets=offsets,
        )

    def with_boxes(self, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> ImageSource:
        """The same images, annotated with other boxes: arrays as the class describes them."""
        return replace(self, boxes=boxes, labels=labels, scores=scores, offsets=offsets, annotated=True)

    def with_targets(self, targets: Sequence[Target]) -> ImageSource:
        """The same images, annotated with the boxes of one target each, in original pixels."""
        return self.with_boxes(
            np.concatenate([np.zeros((0, 4), np.float32), *(target.boxes.numpy() for target in targets)]),
            np.concatenate([np.zeros(0, np.int64), *(target.labels.numpy() for target in targets)]),
            np.concatenate([np.zeros(0, np.float32), *(target.scores.numpy() for target in targets)]),
            np.cumsum([0, *map(len, targets)]).astype(np.int64),
        )

    def target(self, row: int) -> Target:
        """Boxes of image number `row`, in original pixels; its tensors share memory with the arrays."""
        import torch

        part = self.rows(row)
        return Target(*(torch.from_numpy(array[part]) for array in (self.boxes, self.labels, self.scores)))

    def read(self, row: int) -> np.ndarray:
        """(K,) uint8, the stored file of image number `row`; raises as `harness.core.files.read_picture`."""
        return read_picture(self.paths[row])


class Sampler(Protocol):
    """Which images every step of a training draws."""

    seed: int
    micro: int  # images of a micro-batch

    def stream(self, start_step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
        """Endless micro-batches of one rank, from the first one of `start_step` on."""


class Pipeline(Protocol):
    """JPEG files to batches on the training device."""

    bad_images: dict[str, str]  # file -> why it could not be used

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless micro-batches of this rank, from the first one of `start_step` on."""

    def batch_of(self, micro: MicroBatch) -> Batch:
        """One micro-batch at once, of images that the sampler did not draw; changes nothing that `state` gives."""

    def images(self, source: ImageSource, view: str = "test") -> Iterator[tuple[View, Tensor]]:
        """(View, image ids), every image of `source` exactly once over all ranks."""

    def state(self) -> dict[str, Any]:
        """The state that resuming needs beside the step number: plain values and tensors."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""

    def close(self) -> None:
        """Free threads and memory; the pipeline is unusable afterwards."""


@dataclass
class RunRecord:
    """Settings, costs and results of one run: plain numbers and strings, never formatted. One record.json per run."""

    schema_version: int = 2
    status: str = "running"  # running, ok, failed, interrupted
    error: str | None = None
    # what ran
    cell: str = ""
    suite: str | None = None
    method: str = ""
    preset: str = ""
    detector: str = ""
    augment: str = ""
    augment_deviations: list[str] = field(default_factory=list)
    method_deviations: list[str] = field(default_factory=list)  # from the paper's code, that no option undoes
    pipeline: str = ""
    pretraining: str = ""  # where the backbone's first weights come from, in words
    reported_network: str = ""  # declared before training
    seed: int = 0
    # on which data
    dataset: str = ""
    dataset_sha256: str = ""
    val_sha256: str = ""
    protocol: str = ""
    percent: float | None = 0.0  # None where the split is given as ids, whose share nobody asked for
    shots: int | None = None  # labelled images that each class was to have at least, where the split is drawn by that
    labeled_by_class: dict[str, int] = field(default_factory=dict)  # with shots: class -> labelled images that show it
    fold: int = 0
    split_sha256: str = ""
    labeled_images: int = 0
    unlabeled_images: int = 0
    added_images: int = 0  # of the unlabelled ones: those of the folder data.unlabeled_images
    labeled_boxes: int = 0
    eval_images: int = 0
    evaluated_on: str = (
        "val"  # val: the dataset's own; holdout: taken from the labelled images; tune: for choices alone
    )
    labeller: str | None = None  # who made the pseudo labels of a file; may have seen any of the data
    variant: str | None = None  # the name of the suite's variant that it is
    tune_images: int = 0  # labelled images that settings may be chosen on, and no training sees
    tune_boxes: int = 0
    empty_images: str = ""  # policy for labelled images without a box: keep or drop
    crowd_boxes: str = ""  # policy for crowd boxes: drop or keep
    # for how much compute
    steps: int = 0
    extra_steps: int = 0  # student steps of other runs that this one needs (STAC's stage 1)
    images_labeled: int = 0  # images seen by the student, with repetition
    images_unlabeled: int = 0
    batch_labeled: int = 0
    batch_unlabeled: int = 0
    micro_batch: int = 0
    world_size: int = 1
    wall_seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    images_per_s: float | None = None
    data_stall: float | None = None  # 0..1
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None
    trainable_parameters: int = 0
    resumed_from: list[int] = field(default_factory=list)
    bad_images: int = 0
    # how well, 0..100: the reported network, then each network under its own name
    score_threshold: float = 0.0
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_s: float | None = None
    ap_m: float | None = None
    ap_l: float | None = None
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)  # network -> metric -> value
    per_class: dict[str, dict[str, float | None]] = field(default_factory=dict)  # class -> metric -> value, reported
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)  # kind -> count, lost_ap50; reported
    pseudo_precision: float | None = None  # 0..1, IoU 0.5 and class, against hidden ground truth
    pseudo_recall: float | None = None
    pseudo_iou: float | None = None
    # from which code, where, when
    weights_sha256: str | None = None
    config_sha256: str = ""
    commit: str | None = None
    command: str = ""
    started: str = ""
    finished: str | None = None
    job: dict[str, Any] | None = None  # of Slurm: id, hosts, requeues
    environment: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # what decides the result: no folders, no devices


@dataclass(frozen=True)
class MicroBatch:
    """Which images one forward sees. Positions index the labelled and the unlabelled list of images."""

    step: int
    index: int  # number of the micro-batch within the step
    labeled: np.ndarray  # (Bl,) int64 positions
    unlabeled: np.ndarray  # (Bu,) int64 positions
    labeled_slots: np.ndarray  # (Bl,) int64 places within the step's global batch, for `image_keys`
    unlabeled_slots: np.ndarray  # (Bu,) int64
