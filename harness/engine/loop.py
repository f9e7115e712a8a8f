"""The training loop.

The loop owns time: which step it is, the learning rate, when to log, save and evaluate. The method owns loss, teacher
and state.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detectors.methods.method import Method
from harness.config.sections import evaluation_interval
from harness.core.distributed import (
    FlatGradients,
    average_buffers,
    average_values,
    gather_micro_batches,
    on_all_ranks,
)
from harness.core.stages import begin_step, end_step, stage
from harness.core.stopping import Interrupted, StopRequest
from harness.core.types import Batch, ImageSource, RunError, Target, UnusableImages
from harness.engine.build import Experiment
from harness.engine.log import RunLog
from harness.engine.optim import LearningRateFactor, set_learning_rate

logger = logging.getLogger(__name__)

REPORTED_MEASURES = ("precision", "recall", "iou")  # of pseudo labels, that a record gives as means


@dataclass
class Counters:
    """Steps, images, seconds and measurements of a run so far; saved in every checkpoint."""

    step: int = 0  # steps done
    evaluated: int = 0  # the step after which the networks were scored last
    images_labeled: int = 0
    images_unlabeled: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    eval_seconds: float = 0.0
    wall_seconds: float = 0.0
    resumed_from: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)  # CPU threads that steps were computed with, in order of first use
    # What `Method.inspect` measured, summed over the last tenth of the schedule, and how often it did.
    measured: dict[str, float] = field(default_factory=dict)
    measurements: int = 0
    by_class: list[list[int]] = field(default_factory=list)  # (C, 3), the sum of `Method.inspect_classes`


def todays_counters(saved: Any) -> Any:
    """Counters from a checkpoint under today's names: older ones kept the sums of three measures in a list."""
    if not isinstance(saved, dict) or not isinstance(saved.get("pseudo"), list):
        return saved
    values = dict(saved)
    sums, count = values.pop("pseudo"), values.pop("pseudo_count", 0)
    return values | {
        "measured": dict(zip(REPORTED_MEASURES, sums, strict=False)) if count else {},
        "measurements": count,
    }


@dataclass(frozen=True)
class MicroBatchTaken:
    """Images and random keys of a micro-batch that was learnt from, kept until its loss is known to be finite."""

    batch: Batch  # without its pixels
    finite: Tensor  # () bool, on the device: whether its loss is


@dataclass(frozen=True)
class StepTaken:
    """Losses, gradient norm and micro-batches of a step, kept until they are known to be finite."""

    step: int
    losses: dict[str, Tensor]
    norm: Tensor  # () of the gradient
    micro_batches: list[MicroBatchTaken]  # of this rank


@dataclass(frozen=True)
class Work:
    """What the forwards and backwards of a step gave on this rank."""

    losses: dict[str, Tensor]  # means over its micro-batches
    metrics: dict[str, Tensor]  # means over its micro-batches
    batch: Batch  # the last one
    observed: list[dict[str, Tensor]]  # what the method saw in each of its micro-batches
    micro_batches: list[MicroBatchTaken]
    waited: float  # seconds that the pipeline kept us waiting


class StepFlags:
    """Reads the flags that rode along in the all-reduce, a request to stop and how many losses were not finite, and the
    norm of the gradient, which is then the same on all ranks.

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
            RunError: a loss or the gradient of `taken` or of the step before is not finite.
        """
        self._unread.append((taken, *self._copy(taken.norm)))
        return self._read(keep=int(self._late and not at_once))

    def read_rest(self) -> None:
        """Takes the flags that are not known yet; raises as `read` does."""
        self._read(keep=0)

    def _read(self, keep: int) -> bool:
        stop = False
        while len(self._unread) > (0 if stop else keep):
            known, values, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            stop_asked, not_finite, norm = values.tolist()
            if not_finite or not math.isfinite(norm):
                raise on_all_ranks(non_finite(self._run, known, of_loss=not_finite > 0))
            stop = stop or stop_asked > 0
        return stop

    def _copy(self, norm: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        together = torch.cat([self._flags, norm.to(self._flags.dtype).reshape(1)])
        if together.device.type != "cuda":
            return together, None
        values = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        values.copy_(together, non_blocking=True)
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
    rescue: Callable[[], None],
) -> None:
    """Trains from `counters.step` to the end of the schedule.

    Args:
        run: what is trained, on what.
        counters: where the run stands; kept up to date.
        log: where losses go; None on all ranks but the first.
        stop: looked at after every step.
        save: writes a checkpoint.
        evaluate: scores the networks and logs that; raises Interrupted when asked to stop.
        rescue: writes a checkpoint from this rank alone, whatever the others do.

    Raises:
        RunError: a loss or the gradient is not finite.
        UnusableImages: the pictures have gone; the state after the last step is saved.
        Interrupted: after a request to stop; the state is saved.
    """
    gradients = FlatGradients(run.method.trainable(), run.sampler.micro_batches)
    flags = StepFlags(run, gradients.flags, late=run.world.device.type == "cuda")
    try:
        _steps(run, counters, log, stop, save, evaluate, gradients, flags)
    except UnusableImages as error:
        flags.read_rest()
        raise _rescued(error, counters.step, rescue) from error


def _steps(
    run: Experiment,
    counters: Counters,
    log: RunLog | None,
    stop: StopRequest,
    save: Callable[[], None],
    evaluate: Callable[[], None],
    gradients: FlatGradients,
    flags: StepFlags,
) -> None:
    """The loop of `train`."""
    settings, schedule, method = run.settings, run.settings.schedule, run.method
    batches = run.pipeline.batches(counters.step)
    method.train()
    interval, factor = evaluation_interval(settings.evaluation.every, schedule.steps), LearningRateFactor(schedule)
    if _evaluation_due(counters.step, interval, schedule.steps) and counters.evaluated != counters.step:
        _evaluate_or_save(counters, evaluate, save)  # it was interrupted
    for step in range(counters.step, schedule.steps):
        begin = time.perf_counter()
        begin_step()
        rate = schedule.optimizer["lr"] * factor(step)
        set_learning_rate(run.optimizer, rate)
        with stage("gradients"):
            gradients.zero()
        work = accumulate(run, batches, step, gradients)
        losses, metrics, waited = work.losses, work.metrics, work.waited
        gradients.flags[0] = float(stop.signal_number > 0)
        with stage("gradients"):
            gradients.combine(run.world)
            norm = gradients.clip(schedule.clip_norm)
        last = step + 1 == schedule.steps
        save_due = (step + 1) % settings.checkpointing.every == 0 or last
        evaluation_due = _evaluation_due(step + 1, interval, schedule.steps)
        # An evaluation that is interrupted saves as well.
        stop_asked = flags.read(StepTaken(step, losses, norm, work.micro_batches), at_once=save_due or evaluation_due)
        with stage("optimizer"):
            run.optimizer.step()
        with stage("gradients"):
            average_buffers(run.world, [method.trainable()])
        observed = gather_micro_batches(run.world, work.observed)
        if observed:
            method.absorb(step, observed)
        method.after_step(step)
        counters.step = step + 1
        labeled, unlabeled = run.sampler.images(step)
        counters.images_labeled += labeled
        counters.images_unlabeled += unlabeled
        seconds = time.perf_counter() - begin
        counters.train_seconds += seconds
        counters.wait_seconds += waited
        if counters.step % settings.logging.every == 0 or last:  # what `log.due` says, on every rank
            losses, metrics = average_values(run.world, losses), average_values(run.world, metrics)
        if log is not None:
            log.step(step, losses, metrics, rate, labeled + unlabeled, waited, seconds)
            if log.due(step):
                labeled_loss = sum(value for name, value in losses.items() if not name.startswith("unlabeled_"))
                told = {**metrics, "labeled_loss": torch.as_tensor(labeled_loss)}
                for doubt in method.doubts(range(step + 1 - settings.logging.every, step + 1), told):
                    logger.warning("warning: at step %d %s", step, doubt)
                inspect(run, work.batch, step, counters, log)
        end_step()
        if stop_asked and not last:
            save()
            raise Interrupted(stop.signal_number or signal.SIGTERM)
        if evaluation_due:
            _evaluate_or_save(counters, evaluate, save)
        if save_due:
            save()


def _rescued(error: UnusableImages, step: int, rescue: Callable[[], None]) -> UnusableImages:
    """Saves what was learnt before the pictures went; the error with what became of that."""
    if step == 0:
        return error
    try:
        rescue()
    except (RunError, OSError) as other:
        return UnusableImages(f"{error}; the state could not be saved: {other}")
    return UnusableImages(
        f"{error}; the state after step {step} is saved: start the same command again to continue from it"
    )


def _evaluation_due(steps_done: int, interval: int | None, steps: int) -> bool:
    """Whether the networks are scored after so many steps; the caller of `train` does so at the end."""
    return bool(interval) and 0 < steps_done < steps and steps_done % (interval or 1) == 0


def _evaluate_or_save(counters: Counters, evaluate: Callable[[], None], save: Callable[[], None]) -> None:
    """Scores the networks; when that is interrupted, the state is saved and says that scores are missing.

    Nothing is counted twice when they are made after all: the log leaves out what it has.
    """
    try:
        evaluate()
    except Interrupted:
        save()
        raise
    counters.evaluated = counters.step


def accumulate(run: Experiment, batches: Iterator[Batch], step: int, gradients: FlatGradients) -> Work:
    """The beginning of a step: forward and backward of this rank's micro-batches.

    Losses are normalised within a micro-batch, as they were within a GPU in the papers, and averaged over the
    micro-batches of all ranks.

    Raises:
        UnusableImages: the pictures have gone; the method is as it was before the step.
    """
    count = run.sampler.micro_batches // run.world.size
    begin = time.perf_counter()
    with stage("wait"):
        first = next(batches)  # before the method changes
    waited = time.perf_counter() - begin
    before = _unlearnt(run.method) if count > 1 else {}
    run.method.before_step(step)
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    taken: list[MicroBatchTaken] = []
    observed: list[dict[str, Tensor]] = []
    for number in range(count):
        begin = time.perf_counter()
        try:
            with stage("wait"):
                batch = next(batches) if number else first
        except UnusableImages:
            run.method.load_state_dict(before, strict=False)
            raise
        waited += time.perf_counter() - begin
        with (
            stage("forward"),
            torch.autocast(run.world.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"),
        ):
            terms, measured = run.method(batch, step)
        observed.append(run.method.observe())
        total = torch.stack([value.float() for value in terms.values()]).sum()
        with stage("backward"):
            (total / run.sampler.micro_batches).backward()
        with stage("gradients"):
            gradients.collect()
        finite = torch.isfinite(total.detach())
        gradients.flags[1] += (~finite).float()
        taken.append(MicroBatchTaken(dataclasses.replace(batch, labeled={}, unlabeled={}), finite))
        for into, values in ((losses, terms), (metrics, measured)):
            for name, value in values.items():
                into[name] = into.get(name, 0) + value.detach() / count
    return Work(losses, metrics, batch, observed, taken, waited)


def _unlearnt(method: Method) -> dict[str, Tensor]:
    """Copies of what a step changes before the optimiser does: averaged networks and running statistics."""
    learnt = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    return {name: value.clone() for name, value in method.state_dict().items() if name not in learnt}


def non_finite(run: Experiment, taken: StepTaken, of_loss: bool) -> RunError:
    """Writes what is needed to replay a step whose loss, or else its gradient, is not finite."""
    losses = {name: float(value) for name, value in taken.losses.items()}
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    finite = [bool(micro.finite) for micro in taken.micro_batches]
    path = run.settings.run_dir / f"non_finite_rank{run.world.rank}.json"
    replay = {
        "step": taken.step,
        "seed": run.settings.seed,
        "losses": {name: str(value) for name, value in losses.items()},
        "gradient_norm": str(float(taken.norm)),
        "micro_batches": [
            {"finite": is_finite, **_draws(micro.batch)}
            for is_finite, micro in zip(finite, taken.micro_batches, strict=True)
        ],
    }
    if of_loss:
        names = ", ".join(bad) or ("on another rank" if all(finite) else "their sum")
        what = f"the loss is not finite at step {taken.step} ({names})"
    else:
        what = f"the gradient is not finite at step {taken.step}, though the losses are"
    try:
        path.write_text(json.dumps(replay, indent=2))
        where = f"the images and draws are in {path}"
    except OSError as error:
        where = f"the images and draws could not be written to {path} ({error.strerror})"
    return RunError(
        f"{what}: {where}, the last good checkpoint is kept; start anew in another run_dir with a lower "
        "schedule.optimizer.lr or a schedule.clip_norm"
    )


def _draws(batch: Batch) -> dict[str, list[int]]:
    """Images and random keys of a micro-batch."""
    names = ("labeled_ids", "unlabeled_ids", "labeled_keys", "unlabeled_keys")
    return {name: getattr(batch, name).tolist() for name in names}


@torch.no_grad()
def inspect(run: Experiment, batch: Batch, step: int, counters: Counters, log: RunLog) -> None:
    """Lets the method measure itself against boxes that were hidden from it, and notes the result."""
    truth = hidden_truth(run.data.hidden, batch.unlabeled_ids)
    found = run.method.inspect(batch, truth)
    if not found:
        return
    log.pseudo(step, found)
    known = {name: value for name, value in next(iter(found.values())).items() if value is not None}
    if step >= 0.9 * run.settings.schedule.steps and set(REPORTED_MEASURES) <= known.keys():
        for name, value in known.items():
            counters.measured[name] = counters.measured.get(name, 0.0) + value
        counters.measurements += 1
        if (counts := run.method.inspect_classes(batch, truth)) is not None:
            counters.by_class = (counts + (np.array(counters.by_class, np.int64) if counters.by_class else 0)).tolist()


def hidden_truth(hidden: ImageSource | None, ids: Tensor) -> list[Target | None]:
    """Boxes of images in original pixels; None for those whose boxes nobody knows.

    Args:
        hidden: the images whose boxes are known.
        ids: (B,) of the images that are asked for.
    """
    if hidden is None:
        return [None] * len(ids)
    places = [np.flatnonzero(hidden.ids == image_id) for image_id in ids.tolist()]
    return [hidden.target(int(place[0])) if len(place) else None for place in places]
