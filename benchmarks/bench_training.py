"""What the training engine costs beside the model and the data: per step, per checkpoint, per process.

    python -m pytest benchmarks/bench_training.py --benchmark-only

The lines after the table set the numbers in relation: a step to one of 0.5 s, a checkpoint to writing as many bytes
plainly, two processes to one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import compose
from harness.config.run import settings_of
from harness.core.distributed import World
from harness.core.stopping import StopRequest
from harness.core.types import Batch
from harness.engine import build, checkpoint
from harness.engine.log import RunLog
from harness.engine.loop import Counters, train

STEPS = 100
STEP_SECONDS = 0.5  # of the step that the overhead is compared with
SMALL = ["data.train_images=80", "data.val_images=10", "detector.weights=scratch", "device=cpu", "split.percent=20"]


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints past pytest's capture."""
    manager = request.config.pluginmanager.getplugin("capturemanager")

    def show(text: str) -> None:
        with manager.global_and_fixture_disabled():
            print(f"\n{text}")

    return show


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _experiment(cache: Path, run_dir: Path, *overrides: str) -> build.Experiment:
    cfg = compose.load([*SMALL, *overrides, f"cache_dir={cache}", f"run_dir={run_dir}"])
    torch.set_num_threads(1)
    settings = settings_of(cfg)
    return build.experiment(settings, World(0, 1, torch.device("cpu")), build.data(settings))


class _SameBatch:
    """A pipeline that costs nothing."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:  # noqa: ARG002
        """One batch for ever."""
        while True:
            yield self.batch


def _without_model(run: build.Experiment, batch: Batch) -> build.Experiment:
    """The same run, its losses replaced by sums over the parameters: next to nothing, yet each gets a gradient."""
    parameters = list(run.method.trainable().parameters())
    losses, metrics = run.method(batch, 0)

    def forward(_batch: Batch, _step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        total = torch.stack([p.flatten()[0] for p in parameters]).sum()
        return dict.fromkeys(losses, total * 1e-09), {name: value.detach() for name, value in metrics.items()}

    run.method.forward = forward  # type: ignore[method-assign]
    return dataclasses.replace(run, pipeline=_SameBatch(batch))  # type: ignore[arg-type]


def _stand_in_seconds(run: build.Experiment, batch: Batch) -> float:
    """Forward and backward alone of `STEPS` steps."""
    begin = time.perf_counter()
    for step in range(STEPS):
        losses, _ = run.method(batch, step)
        torch.stack(list(losses.values())).sum().backward()
    return time.perf_counter() - begin


@pytest.mark.parametrize("method", ["supervised", "soft_teacher"])
def test_step_overhead(benchmark: Any, cache: Path, tmp_path: Path, say: Callable[[str], None], method: str) -> None:
    """Everything but model and data of the small detector, optimiser, EMA, metrics.jsonl and TensorBoard included."""
    rarely = ["checkpointing.every=100000", "evaluation.every=null"]
    run = _experiment(cache, tmp_path, f"method={method}", f"schedule.steps={STEPS}", *rarely)
    batches = run.pipeline.batches(0)
    batch = next(batches)
    run.pipeline.close()
    run = _without_model(run, batch)
    log = RunLog(tmp_path, steps=10 * STEPS, title="benchmark", every=run.settings.logging.every)

    def steps() -> None:
        train(run, Counters(), log, StopRequest(), lambda: None, lambda: None, lambda: None)

    benchmark.pedantic(steps, rounds=5, warmup_rounds=1)
    log.close()
    # What stands for the model costs time of its own, which is none of the engine's.
    milliseconds = 1000 * (benchmark.stats["median"] - _stand_in_seconds(run, batch)) / STEPS
    benchmark.extra_info["ms per step"] = milliseconds
    share = milliseconds / (1000 * STEP_SECONDS)
    say(f"{method}: {milliseconds:.2f} ms a step outside model and data, {share:.2%} of a step of {STEP_SECONDS} s")


@pytest.mark.parametrize("detector", ["small", "faster_rcnn"])
def test_checkpoint(benchmark: Any, cache: Path, tmp_path: Path, say: Callable[[str], None], detector: str) -> None:
    """Student, teacher and the optimiser's state, synced to the disk; beside the same bytes written plainly."""
    run = _experiment(
        cache, tmp_path / "run", "method=soft_teacher", f"detector={detector}", "detector.weights=scratch"
    )
    for parameter in run.method.trainable().parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()  # makes its state
    run.pipeline.close()
    state = {"step": 1, "method": run.method.state_dict(), "optimizer": run.optimizer.state_dict(), "identity": {}}
    path = checkpoint.save(tmp_path / "run", state, 1, None)
    content = path.read_bytes()

    def plainly() -> None:
        with (tmp_path / "plain").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    plain = []

    def save() -> None:
        state["step"] += 1
        checkpoint.save(tmp_path / "run", state, 1, None)

    def setup() -> None:
        begin = time.perf_counter()
        plainly()
        plain.append(time.perf_counter() - begin)

    benchmark.pedantic(save, setup=setup, rounds=5, warmup_rounds=1)
    seconds, ratio = benchmark.stats["median"], benchmark.stats["median"] / sorted(plain)[len(plain) // 2]
    say(f"{detector}: {len(content) / 2**20:,.0f} MB saved in {seconds:.2f} s, {ratio:.1f} times a plain write")


def test_scaling(benchmark: Any, cache: Path, tmp_path: Path, say: Callable[[str], None]) -> None:
    """The same global batch, two micro-batches of 16 images, on one process and on two, one thread each."""
    rates: dict[int, list[float]] = {1: [], 2: []}

    def run() -> None:
        for devices in rates:
            run_dir = tmp_path / f"{devices}-{len(rates[devices])}"
            overrides = ["method=supervised", "batch.labeled=32", "batch.unlabeled=0", "batch.micro=16"]
            place = [f"devices={devices}", f"cache_dir={cache}", f"run_dir={run_dir}"]
            command = ["train", *SMALL, *overrides, "schedule.steps=60", "logging.loggers=[]", *place]
            subprocess.run(
                [sys.executable, "-m", "harness.cli", *command],
                check=True,
                capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            rates[devices].append(json.loads((run_dir / "record.json").read_text())["images_per_s"])

    benchmark.pedantic(run, rounds=3)
    one, two = (sorted(values)[1] for values in rates.values())
    say(f"1 process {one:.1f} images/s, 2 processes {two:.1f}: {two / one:.2f} times")
