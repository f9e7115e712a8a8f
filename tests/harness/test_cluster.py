"""Jobs on a cluster, with submitit's local executor in Slurm's place."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from harness import checkpoint, cluster, config
from harness.cli import main
from harness.types import UserError

submitit = pytest.importorskip("submitit")
pytestmark = pytest.mark.timeout(300)

SMALL = [
    "data=shapes",
    "data.train_images=40",
    "data.val_images=12",
    "detector.weights=scratch",
    "schedule=smoke",
    "split.percent=20",
    "batch.labeled=4",
    "device=cpu",
    "logging.loggers=[]",
]


def test_job_trains_and_gives_its_exit_code(tmp_path: Path) -> None:
    slurm = ["launcher=slurm", "launcher.cluster=local"]
    command = ["train", *SMALL, *slurm, f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "ok"
    assert main([*command, "schedule.optimizer.lr=1.0"]) == 2  # the folder belongs to another configuration


def test_preempted_job_is_queued_again_and_continues(tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        f"cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        "schedule.steps=150",
        "checkpointing.every=2",
    ]
    plain = OmegaConf.to_container(config.load(overrides), resolve=False)
    executor = submitit.LocalExecutor(folder=tmp_path / "logs")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(cluster.TrainJob(plain))
    while not checkpoint.checkpoints(tmp_path / "run") and not job.done():
        time.sleep(0.05)
    (task,) = psutil.Process(job._process.pid).children()
    task.send_signal(signal.SIGUSR2)  # as Slurm does before it takes the machine away
    assert job.result() == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "ok"
    assert len(record["resumed_from"]) == 1


def test_job_parameters_follow_the_configuration() -> None:
    cfg = config.load(["launcher=slurm", "launcher.partition=gpu", "devices=8", "run_dir=runs/x"])
    parameters = cluster._parameters(cfg)
    assert parameters["nodes"] == 1
    assert parameters["tasks_per_node"] == parameters["gpus_per_node"] == 8
    assert parameters["slurm_partition"] == "gpu"
    assert "slurm_account" not in parameters
    executor = submitit.AutoExecutor(folder="logs", cluster="local")
    executor.update_parameters(**parameters)  # submitit itself refuses names that it does not know


def test_missing_slurm_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="login node"):
        cluster.submit(config.load(["launcher=slurm", f"run_dir={tmp_path}"]))
