"""The training loop.

The loop owns time: which step it is, the learning rate, when to log, save and evaluate. The method owns loss, teacher
and state. `python -m harness.train key=value ...` is `ssodbench train`, so that torchrun can start it.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from detectors.pseudo_labels import quality
from harness.boxes import transform_source
from harness.build import Experiment
from harness.config import evaluation_interval
from harness.dist import FlatGradients, World, average_buffers, average_values
from harness.log import RunLog
from harness.optim import learning_rate_factor, set_learning_rate
from harness.types import Batch


class RunError(Exception):
    """A run that cannot go on, for a reason that one sentence tells; the record is written, exit code 1."""


class Interrupted(Exception):  # noqa: N818  not an error
    """The run was asked to stop and has saved its state."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class StopRequest:
    """SIGTERM and SIGINT ask the loop to finish its step and save; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    def install(self, numbers: Sequence[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        """Takes over the signals that ask this process to stop."""
        for number in numbers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number = number


@dataclass
class Counters:
    """What a run counts; travels in every checkpoint."""

    step: int = 0  # steps done
    images_labeled: int = 0
    images_unlabeled: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    eval_seconds: float = 0.0
    wall_seconds: float = 0.0
    resumed_from: list[int] = field(default_factory=list)
    # precision, recall and IoU of the pseudo labels, summed over measurements in the last tenth of the schedule
    pseudo: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    pseudo_count: int = 0


class StepFlags:
    """Reads the flags that rode along in the all-reduce, one step late on a GPU so that nothing waits for it."""

    def __init__(self, world: World, flags: Tensor) -> None:
        self.late = world.device.type == "cuda"
        self.flags = flags
        self._copy = torch.zeros(len(flags), pin_memory=True) if self.late else flags
        self._event: Any = None

    def read(self) -> list[float]:
        """Flags of this step on a CPU, of the step before on a GPU."""
        if not self.late:
            return self.flags.tolist()
        values = [0.0] * len(self.flags)
        if self._event is not None:
            self._event.synchronize()
            values = self._copy.tolist()
        self._copy.copy_(self.flags, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return values


def train(
    run: Experiment,
    counters: Counters,
    log: RunLog | None,
    stop: StopRequest,
    save: Callable[[], None],
    evaluate: Callable[[], None],
) -> None:
    """Trains from `counters.step` to the end of the schedule.

    Args:
        run: what is trained, on what.
        counters: where the run stands; kept up to date.
        log: where losses go; None on all ranks but the first.
        stop: looked at after every step.
        save: writes a checkpoint.
        evaluate: scores the networks and logs that.

    Raises:
        RunError: a loss is not finite.
        Interrupted: after a request to stop; the state is saved.
    """
    cfg, method = run.cfg, run.method
    gradients = FlatGradients(method.trainable(), run.sampler.micro_batches)
    flags = StepFlags(run.world, gradients.flags)
    batches = run.pipeline.train(counters.step)
    method.train()
    interval = evaluation_interval(cfg)
    for step in range(counters.step, cfg.schedule.steps):
        begin = time.perf_counter()
        rate = cfg.schedule.optimizer.lr * learning_rate_factor(step, cfg.schedule)
        set_learning_rate(run.optimizer, rate)
        method.before_step(step)
        gradients.zero()
        losses, metrics, batch, waited = accumulate(run, batches, step, gradients)
        gradients.flags[0] = float(stop.signal_number > 0)
        gradients.combine(run.world)
        gradients.clip(cfg.schedule.clip_norm)
        stop_asked, not_finite = flags.read()
        if not_finite:
            raise non_finite(run, step, losses, batch)
        run.optimizer.step()
        average_buffers(run.world, [method.trainable()])
        method.after_step(step)
        counters.step = step + 1
        labeled, unlabeled = run.sampler.images(step)
        counters.images_labeled += labeled
        counters.images_unlabeled += unlabeled
        seconds = time.perf_counter() - begin
        counters.train_seconds += seconds
        counters.wait_seconds += waited
        last = counters.step == cfg.schedule.steps
        if counters.step % cfg.logging.every == 0 or last:  # what `log.due` says, on every rank
            losses, metrics = average_values(run.world, losses), average_values(run.world, metrics)
        if log is not None:
            log.step(step, losses, metrics, rate, labeled + unlabeled, waited, seconds)
            if log.due(step):
                measure_pseudo_labels(run, batch, step, counters, log)
        if interval and counters.step % interval == 0 and not last:
            evaluate()
        if counters.step % cfg.checkpointing.every == 0 or last or stop_asked:
            save()
        if stop_asked and not last:
            raise Interrupted(stop.signal_number or signal.SIGTERM)


def accumulate(
    run: Experiment, batches: Iterator[Batch], step: int, gradients: FlatGradients
) -> tuple[dict[str, Tensor], dict[str, Tensor], Batch, float]:
    """Forward and backward of this rank's micro-batches of a step.

    Losses are normalised within a micro-batch, as they were within a GPU in the papers, and averaged over the
    micro-batches of all ranks.

    Returns:
        Losses and metrics, averaged over this rank's micro-batches, the last micro-batch, and the seconds that the
        pipeline kept us waiting.
    """
    count = run.sampler.micro_batches // run.world.size
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    waited = 0.0
    for _ in range(count):
        begin = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - begin
        with torch.autocast(run.world.device.type, torch.bfloat16, enabled=run.cfg.precision == "bf16"):
            terms, measured = run.method(batch, step)
        total = torch.stack([value.float() for value in terms.values()]).sum()
        (total / run.sampler.micro_batches).backward()
        gradients.collect()
        gradients.flags[1] += (~torch.isfinite(total.detach())).float()
        for into, values in ((losses, terms), (metrics, measured)):
            for name, value in values.items():
                into[name] = into.get(name, 0) + value.detach() / count
    return losses, metrics, batch, waited


def non_finite(run: Experiment, step: int, losses: dict[str, Tensor], batch: Batch) -> RunError:
    """Writes what is needed to replay a step whose loss is not finite."""
    values = {name: float(value) for name, value in losses.items()}
    bad = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
    path = Path(run.cfg.run_dir) / f"non_finite_rank{run.world.rank}.json"
    replay = {
        "step": step,
        "seed": int(run.cfg.seed),
        "losses": {name: str(value) for name, value in values.items()},
        "labeled_ids": batch.labeled_ids.tolist(),
        "unlabeled_ids": batch.unlabeled_ids.tolist(),
        "labeled_keys": batch.labeled_keys.tolist(),
        "unlabeled_keys": batch.unlabeled_keys.tolist(),
    }
    path.write_text(json.dumps(replay, indent=2))
    return RunError(
        f"the loss is not finite at step {step} ({', '.join(bad) or 'on another rank'}): "
        f"the images and draws are in {path}, the last good checkpoint is kept; "
        "lower schedule.optimizer.lr or set schedule.clip_norm"
    )


@torch.no_grad()
def measure_pseudo_labels(run: Experiment, batch: Batch, step: int, counters: Counters, log: RunLog) -> None:
    """Compares the last pseudo labels with the ground truth that was hidden from the method."""
    if run.data.hidden is None or not run.method.pseudo_labels or batch.strong is None:
        return
    truth = transform_source(run.data.hidden, batch.unlabeled_ids, batch.strong)
    measured = {name: quality(labels, truth) for name, labels in run.method.pseudo_labels.items()}
    log.pseudo(step, measured)
    first = next(iter(measured.values()))
    if step >= 0.9 * run.cfg.schedule.steps and first:
        for i, key in enumerate(("precision", "recall", "iou")):
            counters.pseudo[i] += first[key]
        counters.pseudo_count += 1


if __name__ == "__main__":
    from harness.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
