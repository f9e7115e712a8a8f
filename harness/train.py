"""The training loop.

The loop owns time: which step it is, the learning rate, when to log, save and evaluate. The method owns loss, teacher
and state. `python -m harness.train key=value ...` is `ssodbench train`, so that torchrun can start it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from detectors.pseudo_labels import quality
from harness.boxes import transform_source
from harness.build import Experiment
from harness.config import evaluation_interval
from harness.dist import FlatGradients, average_buffers, average_values
from harness.log import RunLog
from harness.optim import learning_rate_factor, set_learning_rate
from harness.types import Batch

logger = logging.getLogger(__name__)

FEW = 0.1  # pseudo labels per image, as a share of the labelled images' boxes, below which a warning is given


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


@dataclass(frozen=True)
class StepTaken:
    """What tells a step apart afterwards."""

    step: int
    losses: dict[str, Tensor]
    batch: Batch  # without its pixels


class StepFlags:
    """Reads the flags that rode along in the all-reduce: a request to stop, and how many losses were not finite.

    On a GPU those of a step are read while the next one is under way, so that nothing waits for the device, except
    where the state is about to be saved.

    Args:
        run: what is trained.
        flags: (2,) of the step.
        late: whether reading may lag one step behind.
    """

    def __init__(self, run: Experiment, flags: Tensor, late: bool) -> None:
        self._run, self._flags, self._late = run, flags, late
        self._unread: deque[tuple[StepTaken, Tensor, torch.cuda.Event | None]] = deque()

    def read(self, taken: StepTaken, at_once: bool) -> bool:
        """Takes the flags of a step.

        Args:
            taken: the step.
            at_once: whether to know them now; otherwise those of the step before may be the last that are known.

        Returns:
            Whether some rank was asked to stop; the flags are then known up to this step.

        Raises:
            RunError: a loss of `taken` or of the step before is not finite.
        """
        self._unread.append((taken, *self._copy()))
        stop = False
        while len(self._unread) > int(self._late and not at_once and not stop):
            known, values, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            stop_asked, not_finite = values.tolist()
            if not_finite:
                raise non_finite(self._run, known)
            stop = stop or stop_asked > 0
        return stop

    def _copy(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._flags.device.type != "cuda":
            return self._flags.clone(), None
        values = torch.empty(self._flags.shape, dtype=self._flags.dtype, pin_memory=True)
        values.copy_(self._flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return values, event


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
    flags = StepFlags(run, gradients.flags, late=run.world.device.type == "cuda")
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
        last = step + 1 == cfg.schedule.steps
        save_due = (step + 1) % cfg.checkpointing.every == 0 or last
        taken = StepTaken(step, losses, dataclasses.replace(batch, labeled={}, unlabeled={}))
        stop_asked = flags.read(taken, at_once=save_due)
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
        if counters.step % cfg.logging.every == 0 or last:  # what `log.due` says, on every rank
            losses, metrics = average_values(run.world, losses), average_values(run.world, metrics)
        if log is not None:
            log.step(step, losses, metrics, rate, labeled + unlabeled, waited, seconds)
            if log.due(step):
                warn_of_few_pseudo_labels(run, step, metrics)
                measure_pseudo_labels(run, batch, step, counters, log)
        if interval and counters.step % interval == 0 and not last:
            evaluate()
        if save_due or stop_asked:
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


def non_finite(run: Experiment, taken: StepTaken) -> RunError:
    """Writes what is needed to replay a step whose loss is not finite."""
    step, losses, batch = taken.step, taken.losses, taken.batch
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


def warn_of_few_pseudo_labels(run: Experiment, step: int, metrics: dict[str, Tensor]) -> None:
    """Says so, once, if a teacher that begins to teach is sure of next to nothing."""
    begun = step - run.method.unlabeled_from
    if not 0 <= begun < run.cfg.logging.every or not {"pseudo_boxes", "labeled_boxes"} <= metrics.keys():
        return
    found, usual = float(metrics["pseudo_boxes"]), float(metrics["labeled_boxes"])
    if found < FEW * usual:
        logger.warning(
            "at step %d the teacher gives %.2f boxes per unlabelled image, where labelled ones have %.2f: it knows too "
            "little to teach yet; lengthen method.burn_in, or lower its score thresholds",
            step, found, usual,
        )  # fmt: skip


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
