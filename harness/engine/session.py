"""One run, from its configuration to its record: lock, data, resume, training, evaluation, record."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import os
import resource
import shlex
import socket
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from detectors.methods.pseudo_labels import shares_by_class
from harness.config import saved
from harness.config.identity import differences, identity, without_circumstances
from harness.config.run import RunSettings, settings_of
from harness.core import distributed
from harness.core.console import STDERR
from harness.core.distributed import World
from harness.core.files import write_atomically
from harness.core.lock import RunLock
from harness.core.record import environment, read_record, write_record
from harness.core.stopping import Interrupted, StopRequest
from harness.core.types import RunRecord, UserError
from harness.data import prepare
from harness.data.ground_truth import from_index
from harness.engine import build, checkpoint, offline, start, taught
from harness.engine.analysis import MATCHES, analyse, errors_by_kind
from harness.engine.build import Experiment
from harness.engine.evaluate import METRICS, evaluate, write_predictions
from harness.engine.log import RunLog
from harness.engine.loop import REPORTED_MEASURES, Counters, train
from harness.engine.matches import write_matches
from pipelines.policy import Policy


def say(world: World, text: str) -> None:
    """Tells the user, once for all ranks."""
    if world.is_main:
        STDERR.say(text)


def train_to_record(
    cfg: DictConfig, stage_one: DictConfig | None, world: World, stop: StopRequest, lock_seconds: float = 0.0
) -> int:
    """Takes up or starts the run in `cfg.run_dir` and ends it with a record.

    Args:
        cfg: of the run.
        stage_one: of the run that makes its pseudo labels before training, as `harness.config.compose` gives it.
        world: this process.
        stop: looked at after every step.
        lock_seconds: how long to wait where another process has the run folder.
    """
    settings = distributed.on_every_rank(world, lambda: settings_of(cfg, stage_one))
    return train_run(settings, world, stop, lock_seconds)


def train_run(settings: RunSettings, world: World, stop: StopRequest, lock_seconds: float = 0.0) -> int:
    """`train_to_record` by the settings of the run."""
    run_dir = settings.run_dir
    lock = RunLock(run_dir)
    with stop.at_once():
        distributed.from_main(world, lambda: lock.wait_and_acquire(lock_seconds, STDERR.say) and None)
    begun = False
    try:
        if distributed.from_main(world, lambda: is_finished(run_dir, settings.identity, settings.config_sha256)):
            say(
                world,
                f"the run in {run_dir} is finished: see {run_dir / 'record.json'}; delete the folder to run it anew",
            )
            return 0
        with stop.at_once():
            opened = distributed.on_every_rank(world, lambda: build.data(settings))
            classes = opened.dataset.train.category_names
            begin = distributed.on_every_rank(world, lambda: start.read(settings.detector, classes))
        for warning in opened.warnings:
            say(world, f"warning: {warning}")
        data, extra = offline.label(settings, opened, world, stop, train_run)
        with stop.at_once():
            experiment = distributed.on_every_rank(world, lambda: build.experiment(settings, world, data, begin))
        begun = True
        try:
            return _Session(experiment, extra, stop).run()
        finally:
            experiment.pipeline.close()
    finally:
        lock.release(discard=not begun)


def is_finished(run_dir: Path, own: dict[str, Any], config_sha256: str) -> bool:
    """Whether an ok record of the configuration of this identity is there, beside the run's own config.yaml.

    Raises:
        UserError: when something was trained in the folder under another configuration.
    """
    path = run_dir / "record.json"
    record = read_record(path) if path.exists() else None
    finished = record is not None and record.status == "ok"
    if record is not None and finished and record.config_sha256 != config_sha256:
        before = without_circumstances(copy.deepcopy(record.config))
        checkpoint.refuse_foreign(run_dir, differences(before, own) or ["its record is of another run"])
    is_run = (run_dir / "config.yaml").exists()
    if is_run and (finished or checkpoint.checkpoints(run_dir)):
        before = identity(saved.read_config(run_dir))
        checkpoint.refuse_foreign(run_dir, differences(before, own))
    return finished and is_run


class _Session:
    """The state of one process's part in a run."""

    def __init__(self, experiment: Experiment, extra: offline.Extra, stop: StopRequest) -> None:
        self.run_, self.settings, self.world, self.stop = experiment, experiment.settings, experiment.world, stop
        self.run_dir, self.steps = self.settings.run_dir, self.settings.schedule.steps
        self.extra = extra
        self.counters = Counters()
        self.started = time.perf_counter()
        self.scores: dict[str, dict[str, float | None]] = {}
        self.predictions: dict[str, np.ndarray] = {}
        self.record = new_record(experiment, extra)
        self.bad_images: dict[str, str] = {}  # of all ranks, as last gathered
        self.log: RunLog | None = None

    def run(self) -> int:
        """Resumes or starts, trains, evaluates, records."""
        distributed.on_every_rank(self.world, self._resume)
        threads = self.counters.threads
        threads += [torch.get_num_threads()] if torch.get_num_threads() not in threads else []
        self.record.environment["threads"] = threads[0] if len(threads) == 1 else list(threads)
        try:
            distributed.from_main(self.world, self._open)
            train(self.run_, self.counters, self.log, self.stop, self._save, self._evaluate, self._rescue)
            self._evaluate()
            self._finish()
            self._close_log()
            say(self.world, f"finished: {self.run_dir / 'record.json'}; `{_next(self.run_dir)}` shows what it finds")
            return 0
        except Interrupted as stopped:
            with contextlib.suppress(OSError):  # the state is saved, which matters more
                self._write_record("interrupted", str(stopped))
            raise
        except BaseException as error:
            with contextlib.suppress(OSError, UserError):  # what failed first is what is told
                self._record_failure(error)
            raise
        finally:
            with contextlib.suppress(OSError):
                self._close_log()

    def _open(self) -> None:
        """What the main process writes before the first step."""
        write_atomically(self.run_dir / "config.yaml", self.settings.text.encode())
        self.log = RunLog(
            self.run_dir,
            steps=self.steps,
            title=self.settings.cell,
            every=self.settings.logging.every,
            loggers=self.settings.logging.loggers,
            start_step=self.counters.step,
            console=STDERR,
        )
        self._write_record("running")

    def _close_log(self) -> None:
        if self.log is not None:
            self.log.close()

    def _record_failure(self, error: BaseException) -> None:
        """Notes in the record why the run ends; of an error of one rank alone, that rank does."""
        alone = not distributed.is_on_all_ranks(error)
        path = self.run_dir / "record.json"
        if (
            alone
            and distributed.is_lost_peer(error)
            and (not self.world.is_main or read_record(path).status != "running")
        ):
            return
        self._write_record("failed", f"{type(error).__name__}: {error}", alone)

    def _identity(self) -> dict[str, str]:
        data = self.run_.data
        identity = {
            "config": self.settings.config_sha256,
            "split": data.split.sha256,
            "dataset": data.dataset.train.sha256,
            "evaluation set": data.dataset.val.sha256,
        }
        return identity | ({"stage 1": self.extra.stage_one} if self.extra.stage_one else {})

    def _resume(self) -> None:
        """Takes up the newest valid checkpoint, if there is one and it belongs to this run."""
        with warnings.catch_warnings(record=True) as passed_over:
            warnings.simplefilter("always")
            state = checkpoint.newest(self.run_dir)
        for warning in passed_over:
            say(self.world, f"ssodbench: {warning.message}")
        if state is None:
            return
        own = {key: value for key, value in self._identity().items() if key in state["identity"]}  # old ones have fewer
        checkpoint.refuse_foreign(self.run_dir, differences(state["identity"], own))
        try:
            self.run_.method.load_state_dict(state["method"])
            checkpoint.take_up(self.run_.optimizer, state["optimizer"])
            self.run_.pipeline.load_state(state["pipeline"])
            self.counters = Counters(**state["counters"])
            self._warn_of_threads()
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # whatever a load may find
            raise UserError(checkpoint.misfit(checkpoint.path_of(self.run_dir, state["step"]), error)) from error
        if self.counters.step < self.steps:
            self.counters.resumed_from.append(self.counters.step)
            self._show_again()
        say(self.world, f"continuing from step {self.counters.step} of {self.steps}")

    def _show_again(self) -> None:
        """Gives the method the images that its state needs, each on the rank that has its lane."""
        for step, lane in self.run_.method.missing():
            if lane % self.world.size == self.world.rank:
                self.run_.method.remember(self.run_.pipeline.batch_of(self.run_.sampler.draw(step, lane)), step)

    def _warn_of_threads(self) -> None:
        """Says so where steps to come are rounded in another way than those of the run so far.

        PyTorch splits the sums of matrix products and of convolutions' weight gradients by the number of CPU threads.
        """
        before, now = self.counters.threads, torch.get_num_threads()
        if self.world.device.type == "cpu" and before and now not in before:
            say(
                self.world,
                f"ssodbench: warning: this run was computed with threads={', '.join(map(str, before))} and goes on "
                f"with threads={now}: sums are added up in another order, so that its weights will not be those of one "
                "number of threads; the record says so",
            )

    def _state(self, pipeline: dict[str, Any]) -> dict[str, Any]:
        self.counters.wall_seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        return {
            "step": self.counters.step,
            "identity": self._identity(),
            "method": self.run_.method.state_dict(),
            "optimizer": self.run_.optimizer.state_dict(),
            "pipeline": pipeline,
            "counters": dataclasses.asdict(self.counters),
            "detector": self.run_.method.networks()[self.run_.method.reported].name,
            "classes": list(self.run_.data.dataset.train.category_names),
            "category_ids": self.run_.data.dataset.train.category_ids.tolist(),
        }

    def _pipeline_state(self) -> dict[str, Any]:
        """What the pipelines of all ranks know; each of them meets its share of the images alone."""
        state = merge_states(distributed.gather(self.world, self.run_.pipeline.state()))
        self.bad_images = state["bad_images"]
        return state

    def _save(self) -> None:
        keep = self.settings.checkpointing
        state = self._state(self._pipeline_state())
        distributed.from_main(
            self.world, lambda: checkpoint.save(self.run_dir, state, keep.keep, keep.keep_every) and None
        )

    def _rescue(self) -> None:
        """Saves from this rank alone, unless the step is saved: all ranks have the same method and optimiser."""
        keep, pipeline = self.settings.checkpointing, self.run_.pipeline.state()
        pipeline["bad_images"] = self.bad_images | pipeline["bad_images"]
        folder = os.open(self.run_dir, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # one rank after the other
            if not checkpoint.is_saved(self.run_dir, self.counters.step):
                checkpoint.save(self.run_dir, self._state(pipeline), keep.keep, keep.keep_every)
        finally:
            os.close(folder)

    def _evaluate(self) -> None:
        """Scores the networks: at the end all, before it those that `evaluation.between` names."""
        data, begin = self.run_.data, time.perf_counter()
        at_end = self.counters.step == self.steps
        quick = not at_end and self.settings.evaluation.scorer == "quick"
        for name, network in self.run_.method.networks().items():
            if not at_end and self.settings.evaluation.between == "reported" and name != self.run_.method.reported:
                continue
            metrics, rows = evaluate(
                network,
                self.run_.pipeline,
                data.val,
                from_index(data.dataset.val) if quick else data.dataset.val.coco_ground_truth(),
                data.dataset.val.category_ids,
                self.settings.evaluation.score_threshold,
                self.world,
                self.stop,
            )
            self.scores[name], self.predictions[name] = metrics, rows
            self.run_.method.scored(self.counters.step, name, metrics["ap"])
            if self.log is not None:
                self.log.evaluation(self.counters.step - 1, name, metrics)
        self.counters.eval_seconds += time.perf_counter() - begin

    def _finish(self) -> None:
        reported = self.run_.method.reported
        self.record.scores = {name: {key: metrics[key] for key in METRICS} for name, metrics in self.scores.items()}
        for key in METRICS:
            setattr(self.record, key, self.scores[reported][key])
        self.record.weights_sha256 = build.weights_sha256(self.run_.method.networks()[reported])
        self._pipeline_state()  # the evaluation may have met bad images
        if self.world.is_main:
            self._analyse()
            self._keep_pseudo_labels()
        self._write_record("ok")

    def _keep_pseudo_labels(self) -> None:
        """A few for reports to show; whatever goes wrong with them is told, and costs no finished run."""
        try:
            taught.keep(self.run_)
        except Exception as error:  # of any kind: the record is written, and hours of training must not end in this
            say(self.world, f"warning: no pseudo labels are kept for reports ({type(error).__name__}: {error})")

    def _analyse(self) -> None:
        """What the report reads beside COCO's metrics: in the record, in predictions.json and in matches.npz."""
        dataset, reported = self.run_.data.dataset, self.run_.method.reported
        truth = from_index(dataset.val)
        found = {name: analyse(rows, truth, dataset.voc_ap) for name, rows in self.predictions.items()}
        for name, analysis in found.items():
            self.record.scores[name] |= {key: v for key, v in analysis.scores.items() if key not in METRICS}
        self.record.per_class = found[reported].per_class
        counts = np.array(self.counters.by_class) if self.counters.by_class else self.extra.by_class
        if counts is not None:
            for name, shares in shares_by_class(counts, dataset.train.category_names).items():
                self.record.per_class.setdefault(name, {}).update(shares)
        for measure, values in self.run_.method.class_measures().items():
            for name, value in zip(dataset.train.category_names, values.tolist(), strict=True):
                self.record.per_class.setdefault(name, {})[measure] = value
        self.record.errors = errors_by_kind(self.predictions[reported], truth)
        write_predictions(self.run_dir / "predictions.json", self.predictions[reported])
        write_matches(self.run_dir / MATCHES, found[reported].matches)

    def _write_record(self, status: str, error: str | None = None, alone: bool = False) -> None:
        """Writes record.json with what is known by now; rank 0 does, or one that is `alone` with an error."""
        record, counters, world = self.record, self.counters, self.world
        record.status, record.error = status, error
        record.finished = None if status == "running" else _now()
        record.images_labeled, record.images_unlabeled = counters.images_labeled, counters.images_unlabeled
        record.wall_seconds = counters.wall_seconds + time.perf_counter() - self.started
        record.train_seconds, record.eval_seconds = counters.train_seconds, counters.eval_seconds
        record.resumed_from = list(counters.resumed_from)
        if counters.train_seconds:
            record.images_per_s = (counters.images_labeled + counters.images_unlabeled) / counters.train_seconds
            record.data_stall = counters.wait_seconds / counters.train_seconds
        if counters.measurements:
            for name in REPORTED_MEASURES:
                setattr(record, f"pseudo_{name}", counters.measured[name] / counters.measurements)
        record.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if world.device.type == "cuda":
            record.peak_gpu_memory_mb = torch.cuda.max_memory_allocated() / 2**20
        record.bad_images = len(self.run_.data.bad_images | self.bad_images | self.run_.pipeline.bad_images)
        if world.is_main or alone:
            write_record(self.run_dir / "record.json", record)


def _next(run_dir: Path) -> str:
    return f"ssodbench predict {shlex.quote(f'run_dir={run_dir}')} images=FOLDER"


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The union of the pipeline states of all ranks: the bad images, and which images were drawn."""
    bad: dict[str, str] = {}
    for state in states:
        for path, reason in state["bad_images"].items():
            bad.setdefault(path, reason)
    drawn = [torch.stack(parts).any(0) for parts in zip(*(state["drawn"] for state in states), strict=True)]
    return {"bad_images": bad, "drawn": drawn}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _job(world: World) -> dict[str, Any] | None:
    """The Slurm job that this run is: its number, its machines, how often it was put into the queue again; else None.

    Every rank calls it.
    """
    given = os.environ
    if "SLURM_JOB_ID" not in given:
        return None
    hosts = distributed.gather(world, given.get("SLURMD_NODENAME") or socket.gethostname())
    number = given["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in given:
        number = f"{given['SLURM_ARRAY_JOB_ID']}_{given['SLURM_ARRAY_TASK_ID']}"
    return {"id": number, "hosts": sorted(set(hosts)), "requeues": int(given.get("SLURM_RESTART_COUNT", 0))}


def new_record(run_: Experiment, extra: offline.Extra) -> RunRecord:
    """A record with all that is known before training, the reported network among it."""
    settings, data, method = run_.settings, run_.data, run_.method
    feed, batch = settings.feed, settings.batch
    environ = environment()
    network = method.networks()[method.reported]
    record = RunRecord(
        cell=settings.cell,
        suite=os.environ.get("SSODBENCH_SUITE"),
        method=settings.method["name"],
        preset=settings.preset,
        detector=settings.detector["name"],
        augment=feed.augment["name"],
        augment_deviations=list(Policy.from_config(feed.augment).deviations),
        method_deviations=list(method.deviations),
        pipeline=feed.pipeline["name"],
        pretraining=network.pretraining,
        reported_network=method.reported,
        seed=settings.seed,
        dataset=data.dataset.name,
        dataset_sha256=data.dataset.train.sha256,
        val_sha256=data.dataset.val.sha256,
        protocol=data.split.protocol,
        percent=float(data.split.percent),
        shots=data.split.shots,
        labeled_by_class={} if data.split.shots is None else prepare.images_by_class(data.dataset.train, data.labeled),
        fold=int(data.split.fold),
        split_sha256=data.split.sha256,
        labeled_images=len(data.labeled),
        unlabeled_images=len(data.unlabeled) if data.unlabeled is not None else 0,
        added_images=prepare.added_pictures(data.dataset, data.unlabeled),
        labeled_boxes=len(data.labeled.boxes),
        eval_images=len(data.val),
        labeller=extra.labeller,
        variant=settings.variant,
        evaluated_on=data.dataset.evaluated_on,
        tune_images=len(data.dataset.tune) if data.dataset.tune else 0,
        tune_boxes=len(data.dataset.tune.boxes) if data.dataset.tune else 0,
        empty_images=data.policy.empty_images,
        crowd_boxes=data.policy.crowd_boxes,
        steps=settings.schedule.steps,
        extra_steps=extra.steps,
        batch_labeled=batch.labeled,
        batch_unlabeled=batch.unlabeled if method.views.unlabeled else 0,
        micro_batch=run_.sampler.micro,
        world_size=run_.world.size,
        trainable_parameters=sum(p.numel() for p in method.trainable().parameters() if p.requires_grad),
        pseudo_precision=extra.quality.get("precision"),
        pseudo_recall=extra.quality.get("recall"),
        pseudo_iou=extra.quality.get("iou"),
        score_threshold=float(settings.evaluation.score_threshold),
        config_sha256=settings.config_sha256,
        commit=environ.pop("commit", None),
        command=shlex.join(["ssodbench", "train", *settings.command]),
        started=_now(),
        job=_job(run_.world),
        environment=environ,
    )
    record.config = settings.identity
    return record
