"""Synthetic batches and small detectors, made without any pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from detectors.faster_rcnn import FasterRcnn, small_faster_rcnn
from harness.sampling import image_keys
from harness.types import Batch, Target, View

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


def view_of(targets: list[Target], generator: torch.Generator, size: int = 64) -> View:
    images = torch.stack([draw(target, generator, size) for target in targets])
    sizes = torch.full((len(targets), 2), size)
    return View(images, sizes, torch.eye(3).repeat(len(targets), 1, 1), targets)


def flipped(view: View, shown: bool) -> View:
    """The mirrored view, with its boxes if `shown`."""
    size = view.images.shape[-1]
    mirror = torch.tensor([[-1.0, 0.0, size], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    targets = []
    for target in view.targets or []:
        x1, y1, x2, y2 = target.boxes.unbind(1)
        targets.append(Target(torch.stack([size - x2, y1, size - x1, y2], 1), target.labels, target.scores))
    return View(view.images.flip(-1).contiguous(), view.sizes, mirror @ view.to_view, targets if shown else None)


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
    strong = flipped(weak, pseudo)
    count = len(labeled_boxes)
    keys = torch.from_numpy(image_keys(3, seed, list(range(count + len(unlabeled_boxes)))))
    return Batch(
        labeled={"labeled": labeled, "weak": labeled, "strong": flipped(labeled, True)},
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
        "rpn": {"batch": 32, "positive_iou": 0.6, "train_proposals": [60, 30], "test_proposals": [60, 30]},
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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
