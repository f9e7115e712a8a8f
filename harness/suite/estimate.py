"""What a suite would cost, before it is run: `ssodbench suite suite=NAME suite.dry_run=true`.

A few steps of every method are trained by as many processes at once as the suite would run side by side, since they
slow each other down; what they took is kept by configuration and machine. The rest is arithmetic: steps times seconds,
evaluations times images, and cells dealt out to processes as the suite does it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table

from harness.config import sections
from harness.config.identity import identity
from harness.config.run import settings_of
from harness.core import distributed
from harness.core.console import STDERR, Console, counted
from harness.core.distributed import World
from harness.core.files import write_atomically
from harness.core.record import environment
from harness.core.stopping import StopRequest
from harness.core.types import UserError
from harness.engine import build
from harness.engine.build import Experiment
from harness.engine.evaluate import detect_all
from harness.engine.log import duration
from harness.engine.step_profile import build_run, measure, open_data
from harness.suite.cells import default_jobs
from harness.suite.plan import SuiteCell, state_of

SECONDS, FEWEST = 4.0, 2  # of steps that are measured in each phase of a method, and at least so many
IMAGES = 48  # that are evaluated
SCORING = 0.011  # seconds of pycocotools for an image of COCO, with 100 boxes
AROUND = 10.0  # seconds of a cell around its training: start, first batches, record, logs
REPORT = 15.0  # seconds of a suite's report
MODEL_ERROR = 0.15  # share by which a training differs from its first steps, as far as we have seen
DISK_MIB = 3.0  # logs, predictions, matches of a run


@dataclass(frozen=True)
class MethodCost:
    """What a method takes on this machine, with the suite's processes side by side."""

    burn_in: float  # seconds of a step before unlabelled images are drawn
    step: float  # and after that
    unlabeled_from: int  # first step of the latter
    spread: float  # share by which processes and steps differed
    image: float  # seconds to evaluate an image with one network
    networks: int
    val_images: int
    checkpoint_mib: float

    def seconds(self, cfg: DictConfig, steps: int | None = None) -> float:
        """Of a whole run, as its configuration says."""
        steps = int(cfg.schedule.steps) if steps is None else steps
        first = min(self.unlabeled_from, steps)
        training = first * self.burn_in + (steps - first) * self.step
        interval = sections.evaluation_interval(cfg.evaluation.every, steps)
        between = (steps - 1) // interval if interval else 0
        scored = between * (1 if cfg.evaluation.between == "reported" else self.networks) + self.networks
        scoring = self.val_images * (self.image * scored + SCORING * self.networks)
        return training + scoring + AROUND

    def disk_mib(self, cfg: DictConfig) -> float:
        """That a finished run keeps."""
        every = cfg.checkpointing.keep_every
        apart = int(cfg.schedule.steps) // int(every) if every else 0
        return (int(cfg.checkpointing.keep) + apart) * self.checkpoint_mib + DISK_MIB


def tell(cfg: DictConfig, cells: Sequence[SuiteCell], suite_dir: Path, console: Console) -> int:
    """Prints what is there, what cannot work, and what the rest would cost; 1 where a cell cannot work, otherwise 0."""
    refused = set_states(cells)
    missing = [cell for cell in cells if cell.state == "waiting"]
    jobs = int(cfg.suite.jobs or default_jobs(cfg))
    costs = _costs(missing, jobs)
    table = Table("cell", "state", "steps", "time", "disk", "", box=None, pad_edge=False)
    for cell in cells:
        row = [cell.name, cell.state]
        if cell.state == "waiting":
            cost = costs[cell.kind]
            row += [f"{_steps(cell)}", duration(_seconds(cell, costs)), f"{cost.disk_mib(cell.cfg):.0f} MiB", ""]
        else:
            row += ["", "", "", cell.reason or ""]
        table.add_row(*map(escape, row))
    console.print(table)
    console.say(f"{len(cells)} cells in {suite_dir}: {len(cells) - len(missing) - len(refused)} there, "
                f"{len(missing)} to run, {len(refused)} that cannot work")  # fmt: skip
    if missing:
        for line in _sum(missing, costs, jobs, int(cfg.devices)):
            console.say(line)
    return 1 if refused else 0


def set_states(cells: Sequence[SuiteCell]) -> list[SuiteCell]:
    """Sets the state of every cell: ok, waiting, or failed where it cannot work; the cells that cannot."""
    opened: dict[str, Any] = {}
    for cell in cells:
        try:
            cell.state = state_of(cell)
            key = json.dumps([sections.group(cell.cfg, "data"), *[cell.cfg.split.get(k) for k in ("holdout", "tune")]])
            if key not in opened:
                opened[key] = build.divided_dataset(cell.cfg)
            if cell.state == "waiting":
                method, split = sections.group(cell.cfg, "method"), sections.split_options(cell.cfg)
                build.check_split(cell.name, method, split, opened[key])
        except UserError as error:
            cell.state, cell.reason = "failed", str(error)
    return [cell for cell in cells if cell.state == "failed"]


def _steps(cell: SuiteCell) -> int:
    """Student steps, those of a first stage that no other cell makes included."""
    steps = int(cell.cfg.schedule.steps)
    return steps + (steps if _makes_stage_one(cell) else 0)


def _makes_stage_one(cell: SuiteCell) -> bool:
    options = cell.cfg.method.get("offline")
    return bool(options) and cell.needs is None and not options.get("checkpoint") and not options.get("labels")


def _seconds(cell: SuiteCell, costs: Mapping[str, MethodCost]) -> float:
    own = costs[cell.kind].seconds(cell.cfg)
    return own + (costs[cell.kind].seconds(cell.cfg) if _makes_stage_one(cell) else 0.0)


def _sum(cells: Sequence[SuiteCell], costs: Mapping[str, MethodCost], jobs: int, devices: int) -> list[str]:
    """The sentences about all cells that are to be run."""
    seconds = {cell.name: _seconds(cell, costs) for cell in cells}
    wall = schedule(cells, seconds, jobs) + REPORT
    share = math.hypot(MODEL_ERROR, max(costs[cell.kind].spread for cell in cells))
    disk = sum(costs[cell.kind].disk_mib(cell.cfg) for cell in cells)
    total = sum(seconds.values()) * devices
    lines = [
        f"{sum(_steps(cell) for cell in cells)} steps, {disk / 1024:.1f} GiB on the disk",
        f"here, {jobs} side by side: {_hours(wall)}, give or take {share:.0%} ({_hours(wall * (1 - share))} to "
        f"{_hours(wall * (1 + share))})",
    ]
    for number in sorted({1, 2, 4, 8, 16} - {jobs}):
        if number <= len(cells):
            lines.append(f"on {counted(number, 'machine')} at this speed, one cell at a time on each: "
                         f"{_hours(schedule(cells, seconds, number) + REPORT)}")  # fmt: skip
    return [*lines, f"all cells one after the other: {total / 3600:.2f} device-hours"]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} min"


def schedule(cells: Sequence[SuiteCell], seconds: Mapping[str, float], jobs: int) -> float:
    """When the last of the cells ends, dealt out as `harness.suite.cells` does: the most urgent one first."""
    waiting, ended = list(cells), {cell.name for cell in cells if cell.state == "ok"}
    names = {cell.name for cell in cells}
    running: list[tuple[float, str]] = []
    now = 0.0
    while waiting or running:
        ready = [c for c in waiting if c.needs is None or c.needs.name not in names or c.needs.name in ended]
        if ready and len(running) < jobs:
            cell = max(ready, key=lambda c: c.urgency)
            waiting.remove(cell)
            heapq.heappush(running, (now + seconds[cell.name], cell.name))
        else:
            now, name = heapq.heappop(running)
            ended.add(name)
    return now


def _costs(cells: Sequence[SuiteCell], jobs: int) -> dict[str, MethodCost]:
    """The cost of every method and variant, measured where it is not known yet."""
    examples: dict[str, SuiteCell] = {}
    for cell in cells:
        examples.setdefault(cell.kind, cell)
    files = {method: _file(cell.cfg, jobs) for method, cell in examples.items()}
    found = {method: cost for method, file in files.items() if (cost := _read(file)) is not None}
    unknown = [method for method in examples if method not in found]
    if found:
        folder = next(iter(files.values())).parent
        STDERR.say(f"{', '.join(found)}: as measured before; delete {folder} to measure anew")
    if not unknown:
        return found
    build.prepare_caches([examples[method].cfg for method in unknown])
    on_gpu = cells[0].cfg.device != "cpu" and torch.cuda.is_available()
    processes = 1 if on_gpu else jobs  # cells on GPUs of their own do not slow each other down
    threads = {name: str(cells[0].cfg.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ |= threads
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_import, range(processes)))
        for method in unknown:
            begin = time.monotonic()
            STDERR.say(f"measuring a few steps of {method}, {processes} processes at once ...")
            plain = OmegaConf.to_container(examples[method].cfg, resolve=True)
            try:
                parts = list(pool.map(_measured, [plain] * processes))
            except BrokenProcessPool as error:
                raise UserError(
                    f"a process that measured {method} has ended (out of memory?): lower suite.jobs (now {jobs}), or "
                    "batch.micro"
                ) from error
            found[method] = mean_cost(parts)
            write_atomically(files[method], msgspec.json.encode(found[method]))
            STDERR.say(f"  {found[method].step:.3f} s a step ({time.monotonic() - begin:.0f} s)")
    return found


def _file(cfg: DictConfig, jobs: int) -> Path:
    """Where a method's cost is kept: by what decides its speed, and by the machine."""
    plain = copy.deepcopy(identity(cfg))
    for key in ("split", "seed"):
        plain.pop(key, None)
    machine = {key: value for key, value in environment().items() if key not in ("commit", "host", "hostname")}
    speed = [jobs, int(cfg.threads), int(cfg.devices), cfg.pipeline.get("threads"), cfg.pipeline.get("prefetch")]
    text = json.dumps([plain, machine, speed, cfg.device], sort_keys=True, default=str)
    return Path(cfg.cache_dir) / "costs" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _read(file: Path) -> MethodCost | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=MethodCost)
    except (OSError, msgspec.DecodeError):
        return None


def _import(_: int) -> None:
    """Lets every process of the pool import what it needs before anything is measured."""
    time.sleep(0.5)


def mean_cost(parts: Sequence[MethodCost]) -> MethodCost:
    """The mean of what several processes measured at the same time."""
    means = {name: sum(getattr(part, name) for part in parts) / len(parts) for name in ("burn_in", "step", "image")}
    apart = max(part.step for part in parts) / min(part.step for part in parts) - 1
    spread = math.hypot(apart / 2, max(part.spread for part in parts))
    return dataclasses.replace(parts[0], **means, spread=spread)


def _measured(plain: Any) -> MethodCost:
    """A few steps of each phase of a method, and a few evaluated images, in this process."""
    cfg = OmegaConf.create(plain)
    assert isinstance(cfg, DictConfig)
    torch.set_num_threads(int(cfg.threads))
    world = distributed.join(distributed.resolve_device(cfg.device, 1))
    settings = settings_of(cfg)
    run = build_run(settings, world, open_data(settings))
    with closing(run.pipeline):
        step, spread = _step_seconds(run, run.method.unlabeled_from)
        burn_in = _step_seconds(run, 0)[0] if run.method.unlabeled_from else step
        image = _image_seconds(run, world)
    shares = min(int(cfg.devices), run.sampler.micro_batches)
    return MethodCost(
        burn_in=burn_in / shares,
        step=step / shares,
        unlabeled_from=run.method.unlabeled_from,
        spread=spread,
        image=image / int(cfg.devices),
        networks=len(run.method.networks()),
        val_images=len(run.data.val),
        checkpoint_mib=_checkpoint_mib(run),
    )


def _step_seconds(run: Experiment, first_step: int) -> tuple[float, float]:
    """Mean seconds of a step, and the share by which that mean may be off."""
    steps, _ = measure(run, StopRequest(), SECONDS, first_step, fewest=FEWEST)
    totals = torch.tensor([sum(step.host.values()) for step in steps])
    return float(totals.mean()), float(2 * totals.std() / totals.mean() / len(totals) ** 0.5) if len(
        totals
    ) > 1 else 0.0


def _image_seconds(run: Experiment, world: World) -> float:
    """Seconds of an evaluation for an image, after a batch that does not count."""
    data, count = run.data, min(IMAGES, len(run.data.val))
    network = run.method.networks()[run.method.reported]
    for images in (min(8, count), count):
        begin = time.perf_counter()
        source = data.val.select(range(images))
        for _ in detect_all(network, run.pipeline.images(source), run.settings.evaluation.score_threshold):
            pass
        if world.device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def _checkpoint_mib(run: Experiment) -> float:
    """Weights of all networks, and what the optimiser keeps of the student's."""
    weights = sum(value.numel() * value.element_size() for value in run.method.state_dict().values())
    kept = sum(
        value.numel() * value.element_size()
        for state in run.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return (weights + kept) / 2**20
