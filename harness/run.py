"""One run, from its configuration to its record: lock, data, resume, training, evaluation, record."""

from __future__ import annotations

import dataclasses
import os
import resource
import shlex
import signal
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness import build, checkpoint, config, dist, offline
from harness.build import Experiment
from harness.checkpoint import RunLock
from harness.dist import World
from harness.evaluate import METRICS, evaluate, write_predictions
from harness.log import RunLog
from harness.record import environment, read_record, write_atomically, write_record
from harness.train import Counters, Interrupted, RunError, StopRequest, train
from harness.types import RunRecord, UserError

_console = Console(stderr=True)


def run(cfg: DictConfig) -> int:
    """Trains as the configuration says, in this process or in `devices` of them.

    Returns:
        Exit code: 0 ok, 1 failed, 2 a mistake of the user's, 128 + n after signal n.
    """
    device = dist.resolve_device(cfg.device, cfg.devices)
    plain = OmegaConf.to_container(cfg, resolve=False)
    if cfg.devices > 1 and "LOCAL_RANK" not in os.environ:
        return dist.launch(run_rank, (plain, device), cfg.devices)
    return run_rank(plain, device)


def run_rank(plain: Any, device: str, stop_signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)) -> int:
    """`run` in one process of the group; says errors once and gives the exit code."""
    cfg = OmegaConf.create(plain)
    assert isinstance(cfg, DictConfig)
    world = dist.join(device)
    torch.set_num_threads(int(cfg.threads))
    stop = StopRequest()
    stop.install(stop_signals)
    try:
        return train_to_record(cfg, world, stop)
    except Interrupted as stopped:
        _say(world, f"{stopped}; start the same command again to continue")
        return 128 + stopped.signal_number
    except (UserError, RunError) as error:
        _say(world, f"ssodbench: {error}")
        return 2 if isinstance(error, UserError) else 1
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        _say(
            world,
            f"ssodbench: out of memory on {world.device}: lower batch.micro (now {_micro(cfg)}) or evaluation.batch "
            f"(now {cfg.evaluation.batch}), or set precision=bf16",
        )
        return 1
    finally:
        dist.leave()


def _is_out_of_memory(error: BaseException) -> bool:
    """A GPU's error has a class of its own; what torch raises on a CPU is a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _say(world: World, text: str) -> None:
    if world.is_main:
        _console.print(text, markup=False, highlight=False, soft_wrap=True)


def _micro(cfg: DictConfig) -> int:
    """Images in one forward."""
    return int(cfg.batch.micro or cfg.batch.labeled + cfg.batch.unlabeled)


def train_to_record(cfg: DictConfig, world: World, stop: StopRequest) -> int:
    """Takes up or starts the run in `cfg.run_dir` and ends it with a record."""
    run_dir = Path(cfg.run_dir)
    lock = RunLock(run_dir)
    dist.from_main(world, lambda: lock.acquire() and None)
    begun = False
    try:
        if dist.from_main(world, lambda: _is_finished(cfg, run_dir)):
            _say(
                world,
                f"the run in {run_dir} is finished: see {run_dir / 'record.json'}; delete the folder to run it anew",
            )
            return 0
        data = build.data(cfg)
        data, extra = offline.label(cfg, data, world, stop)
        experiment = build.experiment(cfg, world, data)
        begun = True
        try:
            return _Session(experiment, extra, stop).run()
        finally:
            experiment.pipeline.close()
    finally:
        lock.release(discard=not begun)


def _is_finished(cfg: DictConfig, run_dir: Path) -> bool:
    """Whether an ok record of this configuration is there.

    Raises:
        UserError: when the folder belongs to another configuration.
    """
    if (run_dir / "config.yaml").exists():
        before = config.identity(_load_yaml(run_dir / "config.yaml"))
        checkpoint.refuse_foreign(run_dir, config.differences(before, config.identity(cfg)))
    path = run_dir / "record.json"
    return path.exists() and read_record(path).status == "ok"


def _load_yaml(path: Path) -> DictConfig:
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    return cfg


class _Session:
    """The state of one process's part in a run."""

    def __init__(self, experiment: Experiment, extra: offline.Extra, stop: StopRequest) -> None:
        self.run_, self.cfg, self.world, self.stop = experiment, experiment.cfg, experiment.world, stop
        self.run_dir = Path(self.cfg.run_dir)
        self.extra = extra
        self.counters = Counters()
        self.started = time.perf_counter()
        self.scores: dict[str, dict[str, float | None]] = {}
        self.predictions: dict[str, np.ndarray] = {}
        self.record = new_record(experiment, extra)
        self.log: RunLog | None = None

    def run(self) -> int:
        """Resumes or starts, trains, evaluates, records."""
        self._resume()
        if self.world.is_main:
            write_atomically(self.run_dir / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True).encode())
            self.log = RunLog(
                self.run_dir,
                steps=int(self.cfg.schedule.steps),
                title=config.cell_name(self.cfg),
                every=int(self.cfg.logging.every),
                loggers=list(self.cfg.logging.loggers),
                start_step=self.counters.step,
                console=_console,
            )
            self._write_record("running")
        try:
            train(self.run_, self.counters, self.log, self.stop, self._save, self._evaluate)
            self._evaluate()
            self._finish()
            return 0
        except Interrupted as stopped:
            self._write_record("interrupted", str(stopped))
            raise
        except BaseException as error:
            self._write_record("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            if self.log is not None:
                self.log.close()

    def _identity(self) -> dict[str, str]:
        data = self.run_.data
        return {
            "config": config.config_sha256(self.cfg),
            "split": data.split.sha256,
            "dataset": data.dataset.train.sha256,
            "evaluation set": data.dataset.val.sha256,
        }

    def _resume(self) -> None:
        """Takes up the newest valid checkpoint, if there is one and it belongs to this run."""
        with warnings.catch_warnings(record=True) as passed_over:
            warnings.simplefilter("always")
            state = checkpoint.newest(self.run_dir, self.world.device)
        for warning in passed_over:
            _say(self.world, f"ssodbench: {warning.message}")
        if state is None:
            return
        checkpoint.refuse_foreign(self.run_dir, config.differences(state["identity"], self._identity()))
        self.run_.method.load_state_dict(state["method"])
        self.run_.optimizer.load_state_dict(state["optimizer"])
        self.run_.pipeline.load_state(state["pipeline"])
        self.counters = Counters(**state["counters"])
        if self.counters.step < self.cfg.schedule.steps:
            self.counters.resumed_from.append(self.counters.step)
        _say(self.world, f"continuing from step {self.counters.step} of {self.cfg.schedule.steps}")

    def _state(self) -> dict[str, Any]:
        self.counters.wall_seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        return {
            "step": self.counters.step,
            "identity": self._identity(),
            "method": self.run_.method.state_dict(),
            "optimizer": self.run_.optimizer.state_dict(),
            "pipeline": self.run_.pipeline.state(),
            "counters": dataclasses.asdict(self.counters),
            "detector": self.run_.method.networks()[self.run_.method.reported].name,
        }

    def _save(self) -> None:
        keep = self.cfg.checkpointing
        state = self._state()
        dist.from_main(self.world, lambda: checkpoint.save(self.run_dir, state, keep.keep, keep.keep_every) and None)

    def _evaluate(self) -> None:
        """Scores the networks: at the end all, before it those that `evaluation.between` names."""
        data, begin = self.run_.data, time.perf_counter()
        at_end = self.counters.step == self.cfg.schedule.steps
        for name, network in self.run_.method.networks().items():
            if not at_end and self.cfg.evaluation.between == "reported" and name != self.run_.method.reported:
                continue
            metrics, rows = evaluate(
                network,
                self.run_.pipeline,
                data.val,
                data.dataset.val.coco_ground_truth(),
                data.dataset.val.category_ids,
                float(self.cfg.evaluation.score_threshold),
                self.world,
            )
            self.scores[name], self.predictions[name] = metrics, rows
            if self.log is not None:
                self.log.evaluation(self.counters.step - 1, name, metrics)
        self.counters.eval_seconds += time.perf_counter() - begin

    def _finish(self) -> None:
        reported = self.run_.method.reported
        for name, metrics in self.scores.items():
            for key in METRICS:
                setattr(self.record, f"{name}_{key}", metrics[key])
        for key in METRICS:
            setattr(self.record, key, self.scores[reported][key])
        self.record.weights_sha256 = build.weights_sha256(self.run_.method.networks()[reported])
        if self.world.is_main:
            write_predictions(self.run_dir / "predictions.json", self.predictions[reported])
        self._write_record("ok")

    def _write_record(self, status: str, error: str | None = None) -> None:
        """Writes record.json with what is known by now."""
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
        if counters.pseudo_count:
            means = [value / counters.pseudo_count for value in counters.pseudo]
            record.pseudo_precision, record.pseudo_recall, record.pseudo_iou = means
        record.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if world.device.type == "cuda":
            record.peak_gpu_memory_mb = torch.cuda.max_memory_allocated() / 2**20
        record.bad_images = self.run_.data.bad_images + len(self.run_.pipeline.bad_images)
        if world.is_main:
            write_record(self.run_dir / "record.json", record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_record(run_: Experiment, extra: offline.Extra) -> RunRecord:
    """A record with all that is known before training, the reported network among it."""
    cfg, data, method = run_.cfg, run_.data, run_.method
    environ = environment()
    network = method.networks()[method.reported]
    record = RunRecord(
        cell=config.cell_name(cfg),
        suite=os.environ.get("SSODBENCH_SUITE"),
        method=cfg.method.name,
        preset=str(cfg.get("preset_name", "")),
        detector=cfg.detector.name,
        augment=cfg.augment.name,
        augment_deviations=list(build.policy(cfg).deviations),
        pipeline=cfg.pipeline.name,
        pretraining=network.pretraining,
        reported_network=method.reported,
        seed=int(cfg.seed),
        dataset=data.dataset.name,
        dataset_sha256=data.dataset.train.sha256,
        val_sha256=data.dataset.val.sha256,
        protocol=data.split.protocol,
        percent=float(data.split.percent),
        fold=int(data.split.fold),
        split_sha256=data.split.sha256,
        labeled_images=len(data.labeled),
        unlabeled_images=len(data.unlabeled) if data.unlabeled is not None else 0,
        labeled_boxes=len(data.labeled.boxes),
        eval_images=len(data.val),
        empty_images=data.policy.empty_images,
        crowd_boxes=data.policy.crowd_boxes,
        steps=int(cfg.schedule.steps),
        extra_steps=extra.steps,
        batch_labeled=int(cfg.batch.labeled),
        batch_unlabeled=int(cfg.batch.unlabeled) if method.views.unlabeled else 0,
        micro_batch=run_.sampler.micro,
        world_size=run_.world.size,
        trainable_parameters=sum(p.numel() for p in method.trainable().parameters() if p.requires_grad),
        pseudo_precision=extra.quality.get("precision"),
        pseudo_recall=extra.quality.get("recall"),
        pseudo_iou=extra.quality.get("iou"),
        score_threshold=float(cfg.evaluation.score_threshold),
        config_sha256=config.config_sha256(cfg),
        commit=environ.pop("commit", None),
        command=shlex.join(["ssodbench", "train", *cfg.cli.overrides]),
        started=_now(),
        environment=environ,
    )
    record.config = config.identity(cfg)
    return record
