"""Jobs on a cluster, with submitit's local executor in Slurm's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from harness.cli import main
from harness.config import compose
from harness.config.make import make
from harness.core.types import UserError
from harness.engine import checkpoint
from harness.launch import slurm

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


SLURM = ["launcher=slurm", "launcher.cluster=local"]


def _jobs(run_dir: Path) -> list[Path]:
    return list((run_dir / "slurm").glob("*_submitted.pkl"))


def test_job_trains_and_gives_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", *SMALL, *SLURM, f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "ok"
    assert len(_jobs(tmp_path / "run")) == 1
    assert main([*command, "schedule.optimizer.lr=1.0"]) == 2  # the folder belongs to another configuration
    assert len(_jobs(tmp_path / "run")) == 2
    assert "ended with exit code 2, see" in capfd.readouterr().err


def test_job_is_submitted_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a login node."""
    monkeypatch.setattr(slurm, "_put_into_queue", lambda *_: SimpleNamespace(job_id=7))
    monkeypatch.setattr(slurm, "_wait", lambda *_: 0)
    place = [f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *SMALL, *SLURM, *place, "device=cuda", "devices=8"]) == 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", *SMALL, *SLURM, *place]) == 2  # torchrun would submit one job per process


def test_job_that_leaves_no_result_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "TrainJob", _Dies)
    assert main(["train", *SMALL, *SLURM, f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]) == 1
    errors = capfd.readouterr().err
    assert "ended without a result, see" in errors
    assert "Traceback" not in errors


class _Dies:
    """A job that is killed."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_preempted_job_is_queued_again_and_continues(tmp_path: Path) -> None:
    place = [f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    length = ["schedule.steps=150", "checkpointing.every=2"]
    command = [sys.executable, "-m", "harness.cli", "train", *SMALL, *SLURM, *length, *place]
    waiting = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not checkpoint.checkpoints(tmp_path / "run") and waiting.poll() is None:
        time.sleep(0.05)
    (job,) = psutil.Process(waiting.pid).children()
    (task,) = job.children()
    task.send_signal(signal.SIGUSR2)  # as Slurm does before it takes the machine away
    _, errors = waiting.communicate(timeout=200)
    assert waiting.returncode == 0, errors.decode()
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "ok"
    assert len(record["resumed_from"]) == 1


def test_job_parameters_follow_the_configuration() -> None:
    cfg = compose.load(["launcher=slurm", "launcher.partition=gpu", "devices=8", "run_dir=runs/x"])
    parameters = make("launcher", cfg.launcher).parameters(cfg)
    assert parameters["nodes"] == 1
    assert parameters["tasks_per_node"] == parameters["gpus_per_node"] == 8
    assert parameters["slurm_partition"] == "gpu"
    assert "slurm_account" not in parameters
    executor = submitit.AutoExecutor(folder="logs", cluster="local")
    executor.update_parameters(**parameters)  # submitit itself refuses names that it does not know


def _programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Makes these shell scripts all that PATH has of Slurm, whatever the machine has."""
    folder.mkdir()
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_missing_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _programs(tmp_path / "bin", monkeypatch)
    cfg = compose.load(["launcher=slurm", f"run_dir={tmp_path}"])
    with pytest.raises(UserError, match="login node"):
        make("launcher", cfg.launcher).run(cfg)


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        ({"srun": "", "sbatch": "echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1"}, "controller"),
        ({"srun": "", "sbatch": "echo no number"}, "no number"),
        ({"srun": ""}, "sbatch"),
    ],
)
def test_slurm_that_takes_no_job_is_told_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    programs: dict[str, str],
    words: str,
) -> None:
    _programs(tmp_path / "bin", monkeypatch, **programs)
    assert main(["train", "launcher=slurm", f"run_dir={tmp_path / 'run'}"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ssodbench: launcher=slurm: Slurm did not take the job (")
    assert words in line
    assert "sinfo" in line
