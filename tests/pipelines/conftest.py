"""Small synthetic photographs, policies from the shipped YAML files, and the three backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from detectors.detector import join_views
from harness.config.step import StepShape
from harness.core.types import ImageSource, Normalize, View, Views
from harness.data.sampling import BatchSampler
from pipelines.base import BasePipeline
from pipelines.dali.pipeline import DaliPipeline
from pipelines.opencv import OpencvPipeline
from pipelines.policy import Policy
from pipelines.torchvision import TorchvisionPipeline

AUGMENT = Path(__file__).parents[2] / "harness" / "conf" / "augment"
BACKENDS: dict[str, type[BasePipeline]] = {
    "dali": DaliPipeline,
    "torchvision": TorchvisionPipeline,
    "opencv": OpencvPipeline,
}
RAW = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # views keep their pixel values


def policy_config(name: str, **changes: Any) -> dict[str, Any]:
    """A shipped policy as plain data, for a dataset whose small images have a short side of 64."""
    whole = OmegaConf.merge({"data": {"small": {"short_side": 64, "max_side": None}}}, {"augment": {}})
    whole = OmegaConf.merge(whole, {"augment": OmegaConf.load(AUGMENT / f"{name}.yaml")})
    config = OmegaConf.to_container(whole["augment"], resolve=True)
    assert isinstance(config, dict)
    return {**{str(k): v for k, v in config.items()}, **changes}


def make_source(paths: list[Path], sizes: list[tuple[int, int]], boxes: list[np.ndarray] | None = None) -> ImageSource:
    """A source of these images with ids 100, 101, ..."""
    annotated = boxes is not None
    boxes = boxes if boxes is not None else [np.zeros((0, 4))] * len(paths)
    counts = np.array([len(b) for b in boxes], dtype=np.int64)
    total = int(counts.sum())
    return ImageSource(
        paths=[str(path) for path in paths],
        ids=np.arange(len(paths), dtype=np.int64) + 100,
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        boxes=np.concatenate(boxes).astype(np.float32).reshape(-1, 4),
        labels=np.arange(total, dtype=np.int64) % 3 + 1,
        scores=np.ones(total, dtype=np.float32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotated=annotated,
    )


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth colours with a few hard-edged rectangles."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(4):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        image[top : top + rng.integers(8, 20), left : left + rng.integers(8, 20)] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """23 JPEG files of different sizes, each with up to three boxes."""
    folder = tmp_path_factory.mktemp("photos with ü, = and spaces")
    rng = np.random.default_rng(5)
    paths, sizes, boxes = [], [], []
    for number in range(23):
        height, width = int(rng.integers(90, 150)), int(rng.integers(100, 180))
        path = folder / f"{number}.jpg"
        photograph(rng, height, width).save(path, quality=92)
        corners = rng.uniform(0, 0.6, (number % 4, 2)) * [width, height]
        paths.append(path)
        sizes.append((height, width))
        boxes.append(np.concatenate([corners, corners + rng.uniform(0.1, 0.4, (number % 4, 2)) * [width, height]], 1))
    return make_source(paths, sizes, boxes)


@pytest.fixture(scope="session")
def unlabeled(photos: ImageSource) -> ImageSource:
    """The same files without boxes."""
    return make_source([Path(p) for p in photos.paths], [(int(h), int(w)) for h, w in photos.sizes])


@pytest.fixture(name="policy_config", scope="session")
def policy_config_fixture() -> Callable[..., dict[str, Any]]:
    """See `policy_config`."""
    return policy_config


@pytest.fixture(name="make_source", scope="session")
def make_source_fixture() -> Callable[..., ImageSource]:
    """See `make_source`."""
    return make_source


@pytest.fixture
def build() -> Iterator[Callable[..., Any]]:
    """Builds pipelines and closes them: build(backend, policy config, **arguments)."""
    made: list[BasePipeline] = []

    def make(backend: str, config: dict[str, Any], normalize: Normalize = RAW, **arguments: Any) -> BasePipeline:
        if backend != "dali":
            arguments.setdefault("threads", 0)
        made.append(BACKENDS[backend](Policy.from_config(config), normalize, **arguments))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


@pytest.fixture(scope="session")
def whole() -> Callable[..., tuple[View, torch.Tensor]]:
    """All that `images` gives as one batch in the source's order, padded to a common size: whole(pipeline, source)."""

    def joined(pipeline: BasePipeline, source: ImageSource, view: str = "test") -> tuple[View, torch.Tensor]:
        views, ids = zip(*pipeline.images(source, view), strict=True)
        joint, numbers = join_views(list(views)), torch.cat(ids)
        order = numbers.argsort()
        assert (source.ids[1:] > source.ids[:-1]).all()
        return View(joint.images[order], joint.sizes[order], joint.to_view[order]), numbers[order]

    return joined


@pytest.fixture
def training(photos: ImageSource, unlabeled: ImageSource) -> Callable[..., dict[str, Any]]:
    """Arguments for a pipeline that trains on the photographs with all views of `small`."""

    def arguments(
        labeled: int = 3, unlabeled_images: int = 5, views: Views | None = None, **sampler: Any
    ) -> dict[str, Any]:
        shape = StepShape(labeled, unlabeled_images, sampler.pop("micro", None), ratio=sampler.pop("ratio", "exact"))
        return {
            "views": views or Views(("labeled",), ("weak", "strong")),
            "sampler": BatchSampler(len(photos), len(unlabeled), shape, **{"seed": 7, **sampler}),
            "labeled": photos,
            "unlabeled": unlabeled,
        }

    return arguments
