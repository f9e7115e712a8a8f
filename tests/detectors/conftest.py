"""Synthetic batches and small detectors, made without any pipeline."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from detectors.faster_rcnn import FasterRcnn, small_faster_rcnn
from harness.core.draws import image_keys
from harness.core.types import Batch, Target, View

CLASSES = 3


def random_target(generator: torch.Generator, count: int, size: int) -> Target:
    sides = torch.rand(count, 2, generator=generator) * size * 0.3 + size * 0.12
    corner = torch.rand(count, 2, generator=generator) * (size - sides)
    labels = torch.randint(1, CLASSES + 1, (count,), generator=generator)
    return Target(torch.cat([corner, corner + sides], 1), labels, torch.ones(count))


def draw(target: Target, generator: torch.Generator, size: int) -> torch.Tensor:
    """Noise with one plain rectangle per box, coloured by class."""
    image = torch.randn(3, size, size, generator=generator) * 0.2
    for (x1, y1, x2, y2), label in zip(target.boxes.round().int().tolist(), target.labels.tolist(), strict=True):
        image[:, y1:y2, x1:x2] = torch.eye(3)[label - 1][:, None, None] * 2 - 1
    return image


def from_original(image: int) -> torch.Tensor:
    """To the pixels of the weak and labelled views: nothing that would be its own inverse, and not all images alike."""
    return torch.tensor([[0.5 + 0.1 * (image % 2), 0.0, 3.0], [0.0, 0.8, -2.0], [0.0, 0.0, 1.0]])


def to_strong(image: int, size: int) -> torch.Tensor:
    """From a view of `from_original` to the strong one: mirror, scale and shift."""
    scale, shift = 0.75 - 0.05 * (image % 2), 3.0 + 2.0 * (image % 2)
    return torch.tensor([[-scale, 0.0, scale * size + shift], [0.0, 0.875, -2.0], [0.0, 0.0, 1.0]])


def view_of(targets: list[Target], generator: torch.Generator, size: int = 64) -> View:
    images = torch.stack([draw(target, generator, size) for target in targets])
    sizes = torch.full((len(targets), 2), size)
    return View(images, sizes, torch.stack([from_original(i) for i in range(len(targets))]), targets)


def warped(image: torch.Tensor, matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The image behind a matrix, in its upper left `height` x `width` pixels; padding around it."""
    size = image.shape[-1]
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    place = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(matrix).T
    grid = place[None, :, :, :2] / size * 2 - 1
    (result,) = torch.nn.functional.grid_sample(image[None], grid, align_corners=False)
    result[:, height:] = 0
    result[:, :, width:] = 0
    return result


def strong_of(view: View, shown: bool) -> View:
    """The view mirrored, scaled, shifted and cut to another size, padded to the same one; with its boxes if `shown`."""
    size = view.images.shape[-1]
    height, width = size * 13 // 16, size * 3 // 4
    matrices = torch.stack([to_strong(i, size) for i in range(len(view))])
    targets = []
    for target, (x_row, y_row, _) in zip(view.targets or [], matrices.tolist(), strict=True):
        x1, y1, x2, y2 = target.boxes.unbind(1)
        x1, x2 = x_row[0] * x2 + x_row[2], x_row[0] * x1 + x_row[2]
        y1, y2 = y_row[1] * y1 + y_row[2], y_row[1] * y2 + y_row[2]
        boxes = torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], 1)
        targets.append(Target(boxes, target.labels, target.scores))
    pairs = zip(view.images, matrices, strict=True)
    return View(
        torch.stack([warped(image, matrix, height, width) for image, matrix in pairs]),
        torch.tensor([[height, width]] * len(view)),
        matrices @ view.to_view,
        targets if shown else None,
    )


def mapped(
    box: list[float], source: torch.Tensor, destination: torch.Tensor, size: list[int]
) -> tuple[float, float, float, float]:
    """One box of a view in another one of (height, width) `size`: back to the original, forth, hull, clip."""
    back, forth = np.linalg.inv(source.double().numpy()), destination.double().numpy()
    xs, ys = [], []
    for x in (box[0], box[2]):
        for y in (box[1], box[3]):
            u, v, w = forth @ (back @ np.array([x, y, 1.0]))
            xs.append(min(max(u / w, 0.0), size[1]))
            ys.append(min(max(v / w, 0.0), size[0]))
    return min(xs), min(ys), max(xs), max(ys)


def hidden(view: View) -> View:
    return View(view.images, view.sizes, view.to_view, None)


def build_batch(
    seed: int = 0,
    labeled_boxes: tuple[int, ...] = (2, 1),
    unlabeled_boxes: tuple[int, ...] = (2, 3),
    size: int = 64,
    pseudo: bool = False,
) -> Batch:
    """A micro-batch with every view that a method may want; `pseudo` puts boxes on the unlabelled views."""
    generator = torch.Generator().manual_seed(seed)
    labeled = view_of([random_target(generator, n, size) for n in labeled_boxes], generator, size)
    weak = view_of([random_target(generator, n, size) for n in unlabeled_boxes], generator, size)
    strong = strong_of(weak, pseudo)
    count = len(labeled_boxes)
    keys = torch.from_numpy(image_keys(3, seed, list(range(count + len(unlabeled_boxes)))))
    return Batch(
        labeled={"labeled": labeled, "weak": labeled, "strong": strong_of(labeled, True)},
        unlabeled={"weak": hidden(weak), "strong": strong},
        labeled_ids=torch.arange(count),
        unlabeled_ids=torch.arange(len(unlabeled_boxes)) + 100,
        labeled_keys=keys[:count],
        unlabeled_keys=keys[count:],
    )


def build_small(seed: int = 0, **options: object) -> FasterRcnn:
    """The small detector at half its width, from scratch."""
    torch.manual_seed(seed)
    settings: dict = {
        "rpn": {"batch": 32, "positive_iou": 0.6, "train_proposals": [60, 30], "test_proposals": [40, 20]},
        "roi": {
            "batch": 16,
            "positive_fraction": 0.5,
            "output": 3,
            "hidden": 32,
            "batch_norm": True,
            "sampling_ratio": 1,
            "canonical_scale": 32,
            "canonical_level": 3,
            "detections": 20,
        },
    }
    for key, value in options.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return small_faster_rcnn(
        num_classes=CLASSES,
        name="small",
        cache_dir=".",
        weights="scratch",
        channels=(8, 8, 16, 16),
        pyramid_channels=16,
        **settings,
    )


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return build_batch


@pytest.fixture
def make_small() -> Callable[..., FasterRcnn]:
    return build_small


@pytest.fixture
def map_box() -> Callable[..., tuple[float, float, float, float]]:
    """See `mapped`."""
    return mapped


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
