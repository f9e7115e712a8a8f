"""Throughput of pipelines side by side: `ssodbench profile profile.pipelines=[dali,torchvision,opencv] out=FILE.json`.

All pipelines are open at once and take turns, so that a disturbance of the machine meets all of them. A turn is a
training of a fixed number of batches from its first to its last, so that nothing prefetched is carried from one turn
to the next. CPU time is that of this process and its worker processes, all threads included.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from harness.config import sections
from harness.config.sections import FeedOptions
from harness.config.step import StepShape
from harness.core.console import Console
from harness.core.distributed import join, resolve_device
from harness.core.files import require_writable, write_atomically
from harness.core.types import ImageSource, MicroBatch, Normalize, Pipeline, UserError, Views
from harness.data.sampling import BatchSampler
from harness.engine import build
from pipelines.policy import Policy

_PIPELINES = Path(__file__).parents[1] / "conf" / "pipeline"


@dataclass
class Meter:
    """What one pipeline did in its turns."""

    images: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    rates: list[float] = field(default_factory=list)  # images/s of each turn

    def result(self) -> dict[str, float]:
        """Rates, as they are written."""
        return {
            "images_per_s": self.images / self.wall,
            "cpu_ms_per_image": 1000 * self.cpu / self.images,
            "cores": self.cpu / self.wall,
            "images": self.images,
            "seconds": self.wall,
        }


def cpu_seconds() -> float:
    """CPU time so far of this process and of those of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def alternate(
    works: dict[str, Callable[[int], int]], seconds: float, rounds: int, synchronize: Callable[[], Any]
) -> dict[str, Meter]:
    """Measures works in turns.

    Args:
        works: name -> function that renders so many batches to the end and returns their images.
        seconds: for each work in all, not counting the first turns, which estimate how many batches that is.
        rounds: turns of each.
        synchronize: waits for the device.
    """

    def turn(work: Callable[[int], int], batches: int, meter: Meter) -> None:
        cpu, wall = cpu_seconds(), time.perf_counter()
        images = work(batches)
        synchronize()
        seconds = time.perf_counter() - wall
        meter.images += images
        meter.wall += seconds
        meter.rates.append(images / seconds)
        meter.cpu += cpu_seconds() - cpu

    meters = {name: Meter() for name in works}
    batches = {}
    for name, work in works.items():
        turn(work, 1, Meter())
        estimate = Meter()
        turn(work, 4, estimate)
        batches[name] = max(1, round(4 * seconds / rounds / estimate.wall))
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            turn(works[name], batches[name], meters[name])
    return meters


def ratio(rates: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
    """How many times faster one work is than another, from turns that they took in the same rounds.

    Args:
        rates: of the one in each round.
        others: of the other one.

    Returns:
        `ratio`, the geometric mean over the rounds, and the ends `low` and `high` of its 95 % confidence interval
        (Student's t on the logarithms); None with fewer than two rounds.
    """
    logs = np.log(rates) - np.log(others)
    if len(logs) < 2:
        return {"ratio": float(np.exp(logs.mean())), "low": None, "high": None}
    half = scipy.stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    low, middle, high = np.exp(logs.mean() + np.array([-half, 0.0, half])).tolist()
    return {"ratio": middle, "low": low, "high": high}


def _views(policy: Policy, wanted: list[str] | None) -> tuple[str, ...]:
    """The views to time: those asked for, or weak and strong, or the labelled one of a policy without a weak view."""
    names = wanted or (["weak", "strong"] if "weak" in policy.views else ["labeled"])
    for name in names:
        policy.view(name)
    return tuple(names)


class _Finite(BatchSampler):
    """A sampler whose stream ends."""

    steps = 1

    def stream(self, start_step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
        """The first `steps` micro-batches."""
        return itertools.islice(super().stream(start_step, rank, world_size), self.steps)


def _train(pipeline: Pipeline, sampler: _Finite) -> Callable[[int], int]:
    def work(batches: int) -> int:
        sampler.steps = batches
        return sum(batch.images_seen for batch in pipeline.batches(0))

    return work


def _read(source: ImageSource, batch: int) -> Callable[[int], int]:
    """Reads files and does nothing with them."""
    rows = itertools.cycle(range(len(source)))

    def work(batches: int) -> int:
        for row in itertools.islice(rows, batches * batch):
            source.read(row)
        return batches * batch

    return work


def _table(title: str, results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in ("", "images/s", "CPU ms/image", "cores", "the first over it"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in results.items():
        shown = ratio_text(row["first_over_it"]) if "first_over_it" in row else ""
        table.add_row(
            name, f"{row['images_per_s']:.1f}", f"{row['cpu_ms_per_image']:.2f}", f"{row['cores']:.2f}", shown
        )
    return table


def ratio_text(found: dict[str, float | None]) -> str:
    """1.52 (1.40 to 1.65)."""
    if found["low"] is None:
        return f"{found['ratio']:.2f}"
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _compared(meters: dict[str, Meter]) -> dict[str, dict[str, Any]]:
    """The figures of each, and how many times faster the first one is."""
    first = next(iter(meters.values()))
    return {
        name: {**meter.result(), **({} if meter is first else {"first_over_it": ratio(first.rates, meter.rates)})}
        for name, meter in meters.items()
    }


def _known(config_dirs: Sequence[str]) -> dict[str, Path]:
    """Name -> YAML of the pipelines that there are, in the folders that --config-dir gave too."""
    folders = [_PIPELINES, *(Path(folder) / "pipeline" for folder in config_dirs)]
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def run(cfg: DictConfig) -> dict[str, Any]:
    """The command: measures, prints a table, writes `out` if given.

    Returns:
        What is written: `pipelines` and `ceilings`, each {name: {images_per_s, cpu_ms_per_image, cores, images,
        seconds}}; cores is CPU time over wall time. `first_over_it` says of every pipeline but the first how many
        times faster the first one is, see `ratio`.

    Raises:
        UserError: for an unknown pipeline.
    """
    options = cfg.profile
    names = list(options.pipelines)
    known = _known(cfg.cli.config_dirs)
    for name in names:
        if name not in known:
            raise UserError(f"profile.pipelines names {name!r}, which is none of {', '.join(sorted(known))}")
    if cfg.out:
        require_writable(Path(cfg.out), "out")
    from pipelines.dali.pipeline import DecodeOnly

    torch.set_num_threads(1)
    world = join(resolve_device(cfg.device, cfg.devices))
    augment = sections.group(cfg, "augment")
    policy = Policy.from_config(augment)
    source = build.dataset(sections.group(cfg, "data"), Path(cfg.cache_dir)).train.source()
    views = _views(policy, list(options.views) if options.views else None)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else int(options.workers)
    batch, seconds, rounds = int(options.batch), float(options.seconds), int(options.rounds)

    def synchronize() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    with ExitStack() as stack:
        works: dict[str, Callable[[int], int]] = {}
        for name in names:
            threads = max(1, workers) if name == "dali" else workers
            settings = OmegaConf.merge(OmegaConf.load(known[name]), {"threads": threads})
            changed = OmegaConf.merge(cfg, {"pipeline": settings})
            assert isinstance(changed, DictConfig)
            feed = FeedOptions(sections.group(changed, "pipeline"), augment, int(cfg.evaluation.batch))
            sampler = _Finite(len(source), 0, StepShape(batch, 0), seed=int(cfg.seed or 0))
            pipeline = build.pipeline(feed, world, Normalize(), Views(views), sampler, source)
            stack.enter_context(closing(pipeline))
            works[name] = _train(pipeline, sampler)
        meters = alternate(works, seconds, rounds, synchronize)
        decode = stack.enter_context(closing(DecodeOnly(source, batch, max(1, workers), str(world.device))))
        limits = {"read": _read(source, batch), "decode": decode.run}
        ceilings = alternate(limits, min(5.0, seconds), 2, synchronize)
    result = {
        "pipelines": _compared(meters),
        "ceilings": {name: meter.result() for name, meter in ceilings.items()},
        "data": cfg.data.name,
        "augment": policy.name,
        "color_at": policy.color_at,
        "antialias": policy.antialias,
        "views": list(views),
        "batch": batch,
        "workers": workers,
        "device": str(world.device),
        "cpus": os.cpu_count(),
    }
    if cfg.out:
        write_atomically(Path(cfg.out), json.dumps(result, indent=1).encode() + b"\n")
    console = Console()
    console.print(_table(f"{policy.name}, views {', '.join(result['views'])}, batch {batch}", result["pipelines"]))
    console.print(_table("ceilings", result["ceilings"]))
    return result
