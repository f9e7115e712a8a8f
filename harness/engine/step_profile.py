"""Where the time of a training step goes, and what the machine could do: `ssodbench profile method=... data=...`.

The step is that of `harness.engine.loop.train` itself, with the method's ranges (`harness.core.stages`) measured. It
begins where the method's unlabelled part does, since that is what nearly all steps of a schedule are, and with a
learning rate so small that the weights hardly move: no figure depends on how a training would go. A method that wants
pseudo labels made beforehand gets boxes of labelled images in their place.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from harness.config.run import RunSettings
from harness.core.distributed import World, on_every_rank
from harness.core.record import available_cores
from harness.core.stages import Recorder, StepTimes, measured
from harness.core.stopping import Interrupted, StopRequest
from harness.core.types import ImageSource, Pipeline
from harness.engine import build, gpu_meter, start
from harness.engine.build import Data, Experiment
from harness.engine.loop import Counters, train
from pipelines.cached import CachedPipeline

WARM_UP_STEPS, WARM_UP_SHARE = 3, 0.25  # steps that do not count: so many, and this share of the seconds
FEWEST_STEPS = 5  # that count, however slow they are
LEARNING_RATE = 1e-3  # times the schedule's


@dataclass(frozen=True)
class Timing:
    """What steps took, as milliseconds of one step."""

    steps: int
    ms: float  # mean wall time from the beginning of a step to its end
    median_ms: float
    p95_ms: float
    images: int  # distinct images of a step, over all devices
    clock: str  # of the stages: host, or device (time between events on the GPU)
    stages_ms: dict[str, dict[str, float]]  # stage -> mean, median, p95, and share of all stages
    host_ms: dict[str, float]  # stage -> mean on the host; on a CPU the means of `stages_ms`

    @property
    def images_per_s(self) -> float:
        """Distinct images per second."""
        return 1000 * self.images / self.ms


def timing(steps: list[StepTimes], images: int) -> Timing:
    """Summary of measured steps."""
    totals = np.array([sum(step.host.values()) for step in steps])
    on_device = steps[0].device is not None
    stages = _milliseconds([step.device or step.host for step in steps])
    total = sum(values.mean() for values in stages.values())
    return Timing(
        steps=len(steps),
        ms=1000 * float(totals.mean()),
        median_ms=1000 * float(np.median(totals)),
        p95_ms=1000 * float(np.percentile(totals, 95)),
        images=images,
        clock="device" if on_device else "host",
        stages_ms={
            name: {
                "mean": float(values.mean()),
                "median": float(np.median(values)),
                "p95": float(np.percentile(values, 95)),
                "share": float(values.mean() / total),
            }
            for name, values in stages.items()
        },
        host_ms={name: float(v.mean()) for name, v in _milliseconds([step.host for step in steps]).items()},
    )


def _milliseconds(steps: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Stage -> (N,) milliseconds in each step, 0 where it did not occur; stages in the order of their first end."""
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: 1000 * np.array([step.get(name, 0.0) for step in steps]) for name in names}


@dataclass
class Usage:
    """What a block took of the machine."""

    seconds: float = 0.0
    cores: float = 0.0  # CPU time of this process and its workers over wall time
    gpu: dict[str, float] | None = None  # see `harness.engine.gpu_meter`

    def add(self, other: Usage) -> None:
        """Takes up another block."""
        seconds = self.seconds + other.seconds
        mine, theirs = self.seconds / seconds, other.seconds / seconds
        self.cores = mine * self.cores + theirs * other.cores
        if other.gpu is not None:
            before = self.gpu or dict.fromkeys(other.gpu, 0.0)
            self.gpu = {
                "utilization": mine * before["utilization"] + theirs * other.gpu["utilization"],
                "memory_mb": max(before["memory_mb"], other.gpu["memory_mb"]),
            }
            if "joules" in other.gpu:
                self.gpu["joules"] = before["joules"] + other.gpu["joules"]
        self.seconds = seconds


@contextmanager
def used(device: torch.device) -> Iterator[Usage]:
    """Measures a block."""
    usage, before, begin = Usage(), _cpu_seconds(), time.perf_counter()
    with gpu_meter.metered(device) as gpu:
        yield usage
    usage.seconds = time.perf_counter() - begin
    usage.cores = (_cpu_seconds() - before) / usage.seconds
    usage.gpu = gpu.result()


def _cpu_seconds() -> float:
    """CPU time so far of this process and of its children, living or not."""
    times = os.times()
    living = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.Error:
            continue
        living += spent.user + spent.system
    return time.process_time() + times.children_user + times.children_system + living


class _Enough:
    """Asks a training to stop when it has been measured for long enough.

    Args:
        stop: what it is asked by.
        seconds: of the steps that count.
        decides: whether this process is the one that asks; the others hear of it through the step's all-reduce.
        fewest: steps that count, however slow they are.
    """

    def __init__(self, stop: StopRequest, seconds: float, decides: bool, fewest: int) -> None:
        self._stop, self._seconds, self._decides = stop, seconds, decides
        self._warm_up_steps, self._fewest = min(WARM_UP_STEPS, fewest), fewest
        self._begin = time.perf_counter()
        self.warm_up = 0  # steps that do not count

    def __call__(self, steps: int) -> None:
        now = time.perf_counter()
        if not self.warm_up:
            if steps >= self._warm_up_steps and now - self._begin >= WARM_UP_SHARE * self._seconds:
                self.warm_up, self._begin = steps, now
        elif self._decides and steps - self.warm_up >= self._fewest and now - self._begin >= self._seconds:
            self._stop.signal_number = self._stop.signal_number or signal.SIGALRM


def _nothing() -> None:
    """Nothing is saved and nothing scored in a profile."""


def endless(settings: RunSettings, first_step: int) -> RunSettings:
    """The settings of a training that does not end, evaluate, save or learn much."""
    optimizer = {**settings.schedule.optimizer, "lr": LEARNING_RATE * settings.schedule.optimizer["lr"]}
    return dataclasses.replace(
        settings,
        schedule=dataclasses.replace(settings.schedule, steps=first_step + 10**9, optimizer=optimizer),
        evaluation=dataclasses.replace(settings.evaluation, every=None),
        checkpointing=dataclasses.replace(settings.checkpointing, every=10**10),
        logging=dataclasses.replace(settings.logging, every=10**10),
    )


def measure(
    run: Experiment,
    stop: StopRequest,
    seconds: float,
    first_step: int,
    trace: bool = False,
    fewest: int = FEWEST_STEPS,
) -> tuple[list[StepTimes], Usage]:
    """Trains for some seconds after a warm-up and measures its steps.

    Args:
        run: what is trained.
        stop: requests to stop from outside.
        seconds: of the steps that count.
        first_step: the number of the first one.
        trace: whether the stages also show in a trace of torch.profiler that is being made.
        fewest: steps that count, however slow they are.

    Raises:
        Interrupted: `stop` was asked from outside.
    """
    enough = _Enough(stop, seconds, run.world.is_main, fewest)
    recorder = Recorder(run.world.device, trace, after_step=enough)
    endless_run = dataclasses.replace(run, settings=endless(run.settings, first_step))
    with measured(recorder), used(run.world.device) as usage:
        try:
            train(endless_run, Counters(step=first_step), None, stop, _nothing, _nothing, _nothing)
        except Interrupted:
            if stop.signal_number not in (0, signal.SIGALRM):
                raise
            stop.signal_number = 0
    return recorder.steps()[enough.warm_up :], usage


def rate_alone(pipeline: Pipeline, first_step: int, seconds: float, synchronize: Callable[[], Any]) -> float:
    """Images/s of this process's pipeline when nobody trains on its batches."""
    with closing(_closable(pipeline.batches(first_step))) as batches:
        for _ in itertools.islice(batches, 4):  # what is prepared ahead
            pass
        synchronize()
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds or not images:
            images += next(batches).images_seen
        synchronize()
        return images / (time.perf_counter() - begin)


def _closable(batches: Iterator[Any]) -> Any:
    """An iterator that can be closed: pipelines give generators."""
    return batches if hasattr(batches, "close") else (batch for batch in batches)


def stand_in_labels(labeled: ImageSource, unlabeled: ImageSource) -> ImageSource:
    """Unlabelled images with the boxes of labelled ones, dealt out in turn and scaled to the images' sizes."""
    rows = np.arange(len(unlabeled)) % len(labeled)
    lent = labeled.select(rows)
    image = np.repeat(np.arange(len(unlabeled)), np.diff(lent.offsets))
    scale = (unlabeled.sizes / lent.sizes)[image][:, [1, 0, 1, 0]]
    return unlabeled.with_boxes((lent.boxes * scale).astype(np.float32), lent.labels, lent.scores, lent.offsets)


def open_data(settings: RunSettings) -> Data:
    """The data of a run, with boxes in place of the pseudo labels that it would make first."""
    data = build.data(settings)
    if settings.method.get("offline") and data.unlabeled is not None:
        data = dataclasses.replace(data, unlabeled=stand_in_labels(data.labeled, data.unlabeled))
    return data


def build_run(settings: RunSettings, world: World, data: Data) -> Experiment:
    """What is trained; its weights are those of `detector.start` where that is given."""
    classes = data.dataset.train.category_names
    begin = on_every_rank(world, lambda: start.read(settings.detector, classes))
    return on_every_rank(world, lambda: build.experiment(settings, world, data, begin))


def profile_step(
    settings: RunSettings, world: World, stop: StopRequest, seconds: float, rounds: int, trace: Path | None = None
) -> dict[str, Any]:
    """Measures the step of a configuration and its ceilings.

    Args:
        settings: of the run.
        world: this process.
        stop: requests to stop.
        seconds: for the step, and for each ceiling.
        rounds: of alternation between the step and its ceilings.
        trace: where a Chrome trace of a few steps goes.

    Returns:
        What is written; docs/profiling.md explains it key by key.
    """
    run = build_run(settings, world, open_data(settings))
    first = run.method.unlabeled_from
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    with closing(run.pipeline):
        replay = dataclasses.replace(run, pipeline=CachedPipeline(run.pipeline, _kept(run)))
        as_it_is: list[StepTimes] = []
        replayed: list[StepTimes] = []
        alone: list[float] = []
        usage = Usage()
        for _ in range(rounds):
            steps, used_now = measure(run, stop, seconds / rounds, first)
            as_it_is += steps
            usage.add(used_now)
            replayed += measure(replay, stop, seconds / rounds, first)[0]
            alone.append(world.size * rate_alone(run.pipeline, first, seconds / rounds, synchronizer(world)))
        images = sum(run.sampler.images(first))
        times, free = timing(as_it_is, images), timing(replayed, images)
        if trace is not None:
            write_trace(run, stop, first, trace)
    return {
        "step": {**_shown(times), "data_wait": _wait(times) / times.ms},
        "ceilings": ceilings(times, free, float(np.mean(alone))),
        "cpu": {"cores_used": usage.cores * world.size, "cores": available_cores()},
        "gpu": usage.gpu,
        "memory": _memory(world),
        "energy": _energy(usage, times),
        "what": {
            "method": settings.method["name"],
            "detector": settings.detector["name"],
            "data": run.data.dataset.name,
            "pipeline": settings.feed.pipeline["name"],
            "augment": settings.feed.augment["name"],
            "images": times.images,
            "micro_batches": run.sampler.micro_batches,
            "precision": settings.precision,
            "channels_last": settings.channels_last,
            "compile": settings.compile,
            "device": world.device.type,
            "devices": world.size,
            "threads": torch.get_num_threads(),
            "pipeline_threads": settings.feed.pipeline.get("threads"),
            "first_step": first,
        },
    }


def ceilings(times: Timing, free: Timing, alone: float) -> dict[str, Any]:
    """Which side holds the step up, and what each would give without the other.

    Args:
        times: of the step as it is.
        free: of the step on replayed batches.
        alone: images/s of the loader without a model.
    """
    return {
        "bottleneck": "loader" if free.images_per_s > alone else "model",
        "free_loader": {
            "images_per_s": free.images_per_s,
            "gain": free.images_per_s / times.images_per_s,
            "ms": free.ms,
        },
        "loader_alone": {"images_per_s": alone, "gain": alone / times.images_per_s},
    }


def synchronizer(world: World) -> Callable[[], None]:
    """Waits for the device."""
    return torch.cuda.synchronize if world.device.type == "cuda" else _nothing


def write_trace(run: Experiment, stop: StopRequest, first_step: int, path: Path) -> None:
    """Writes a Chrome trace of a few steps, which https://ui.perfetto.dev opens, with our stages as ranges."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        measure(run, stop, 0.1, first_step, trace=True)
    if run.world.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))


def _kept(run: Experiment) -> int:
    """Micro-batches that are replayed: those of a few steps on this rank."""
    return max(4, run.sampler.micro_batches // run.world.size)


def _shown(times: Timing) -> dict[str, Any]:
    return {**dataclasses.asdict(times), "images_per_s": times.images_per_s}


def _wait(times: Timing) -> float:
    """Milliseconds of a step that the host waits for its batch, feeds the pipeline or takes the batch over."""
    return sum(times.host_ms.get(name, 0.0) for name in ("wait", "feed", "hand-over"))


def _memory(world: World) -> dict[str, float | None]:
    """Peaks of this process in MiB."""
    on_gpu = world.device.type == "cuda"
    return {
        "host_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device_peak_mb": torch.cuda.max_memory_allocated(world.device) / 2**20 if on_gpu else None,
    }


def _energy(usage: Usage, times: Timing) -> dict[str, float] | None:
    """Energy of the GPU as it counts it; None where it does not."""
    if usage.gpu is None or "joules" not in usage.gpu:
        return None
    watts = usage.gpu["joules"] / usage.seconds
    return {"watts": watts, "joules_per_image": watts / times.images_per_s}
