"""Batches of every policy from every backend; `ssodbench profile` compares them in alternating turns.

    python -m pytest benchmarks/bench_pipelines.py --benchmark-only --benchmark-timer=time.process_time

With that timer the table is in CPU time, all threads of the process included: use it on a machine that does other
work. The peers render in the benchmark's process, as moving batches between processes costs CPU time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from harness.config.step import StepShape
from harness.core.types import ImageSource, Normalize, Views
from harness.data.sampling import BatchSampler
from pipelines.dali.pipeline import DaliPipeline
from pipelines.opencv import OpencvPipeline
from pipelines.policy import Policy
from pipelines.torchvision import TorchvisionPipeline

AUGMENT = Path(__file__).parents[1] / "harness" / "conf" / "augment"
PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "coco_tiny" / "train2017"
BACKENDS = {"dali": DaliPipeline, "torchvision": TorchvisionPipeline, "opencv": OpencvPipeline}
BOTH = ("weak", "strong")
Case = tuple[str, dict[str, Any], tuple[str, ...]]
CASES: dict[str, Case] = {
    "soft_teacher, color at view": ("soft_teacher", {}, BOTH),
    "soft_teacher, color at source": ("soft_teacher", {"color_at": "source"}, BOTH),
    "soft_teacher_mmdet": ("soft_teacher_mmdet", {}, BOTH),
    "stac": ("stac", {}, ("strong",)),
    "unbiased_teacher": ("unbiased_teacher", {}, BOTH),
    "supervised": ("supervised", {}, ("labeled",)),
    "small, short side 128": ("small", {}, BOTH),
}
BATCH = 8


def _synthetic(folder: Path) -> list[Path]:
    """Photograph-sized JPEG files with edges at all scales."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(40):
        layers = [rng.integers(0, 256, (4 * 3**i, 5 * 3**i, 3), dtype=np.uint8) for i in range(4)]
        resized = [np.asarray(Image.fromarray(layer).resize((640, 480)), dtype=np.float32) for layer in layers]
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(np.mean(resized, axis=0).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """A few COCO photographs where they are present, else synthetic pictures of their size."""
    paths = sorted(PHOTOS.glob("*.jpg")) or _synthetic(tmp_path_factory.mktemp("pictures"))
    sizes = [Image.open(path).size[::-1] for path in paths]
    count = len(paths)
    return ImageSource(
        paths=[str(path) for path in paths],
        ids=np.arange(count, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        boxes=np.tile(np.array([[50, 50, 200, 200]], dtype=np.float32), (count, 1)),
        labels=np.ones(count, dtype=np.int64),
        scores=np.ones(count, dtype=np.float32),
        offsets=np.arange(count + 1, dtype=np.int64),
    )


def _policy(name: str, changes: dict[str, Any]) -> Policy:
    whole = OmegaConf.create({"data": {"small": {"short_side": 128, "max_side": None}}})
    whole = OmegaConf.merge(whole, {"augment": OmegaConf.load(AUGMENT / f"{name}.yaml")})
    config = OmegaConf.to_container(whole["augment"], resolve=True)
    assert isinstance(config, dict)
    return Policy.from_config({**{str(key): value for key, value in config.items()}, **changes})


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Policy, changed keys, views."""
    return CASES[request.param]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch(backend: str, case: Case, source: ImageSource, benchmark: Any) -> None:
    """One batch of 8 images, each in every view of the case."""
    torch.set_num_threads(1)
    name, changes, views = case
    pipeline = BACKENDS[backend](
        _policy(name, changes),
        Normalize(),
        views=Views(views),
        sampler=BatchSampler(len(source), 0, StepShape(BATCH, 0)),
        labeled=source,
        threads=1 if backend == "dali" else 0,
    )
    batches: Iterator[Any] = pipeline.batches()
    benchmark.extra_info["images"] = BATCH
    benchmark.pedantic(lambda: next(batches), rounds=10, iterations=2, warmup_rounds=2)
    batches.close()
    pipeline.close()
