"""A process among those of a Slurm job: which it is, how it finds the others, and what it trains on."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import torch
from omegaconf import DictConfig, OmegaConf

from harness.core.stopping import StopRequest, stop_signals
from harness.core.types import UserError
from harness.launch.local import run_rank

JOB_VARIABLE = "SSODBENCH_JOB"  # set in the processes of a job, which train instead of submitting another one
# What asks a job to save: SIGTERM from a pre-emption or scancel, SIGUSR2 from the time limit (sbatch --signal).
JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_PORTS = range(20_000, 32_000)  # below those that systems give out by themselves


def train_in_job(cfg: DictConfig, lock_seconds: float) -> int:
    """Trains as one process of a job.

    Signals after the first one change nothing: Slurm repeats them, and ends the process by SIGKILL when it must.

    Args:
        cfg: of the run.
        lock_seconds: how long to wait for the run folder, which the job's processes on another machine may still hold.

    Returns:
        Exit code; of what all processes agree on the first one alone gives it, since Slurm kills the rest of a job as
        soon as one process has ended with another code than 0.

    Raises:
        UserError: GPUs were asked for, and CUDA is not there.
    """
    stop = StopRequest(second_ends=False)
    stop.install([*stop_signals(), *JOB_SIGNALS])
    device = _device(cfg)
    if device is None:
        return 0  # the first process of this machine tells it
    _export_ranks()
    plain = OmegaConf.to_container(cfg, resolve=False)
    code = run_rank(plain, device, stop, lock_seconds)
    return code if os.environ.get("RANK", "0") == "0" else 0


def _device(cfg: DictConfig) -> str | None:
    """cpu where that was asked for, else cuda, which must be there; None: another process tells that it is not."""
    if cfg.device == "cpu":
        return "cpu"
    found = torch.cuda.device_count()
    if found >= cfg.devices:
        return "cuda"
    if found == 1 and int(os.environ.get("SLURM_GPUS_ON_NODE") or 1) >= cfg.devices:
        os.environ["SLURM_LOCALID"] = "0"  # each process of the machine has been given one of its own
        return "cuda"
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        return None
    node, job = os.environ.get("SLURMD_NODENAME", "this machine"), os.environ.get("SLURM_JOB_ID", "")
    seen = f"only {found} can be used there" if found else "CUDA is not there"
    raise UserError(
        f"job {job} asked for devices={cfg.devices} on {node} by device={cfg.device}, but {seen}: choose a partition "
        "with GPUs (launcher.partition, launcher.gres), look at the driver of that machine, or say device=cpu to train "
        "without"
    )


def _export_ranks() -> None:
    """Sets torchrun's variables from Slurm's; a lone process needs none."""
    given = os.environ
    if int(given.get("SLURM_NTASKS", 1)) == 1:
        return
    given["RANK"], given["WORLD_SIZE"] = given["SLURM_PROCID"], given["SLURM_NTASKS"]
    given["LOCAL_RANK"] = given["SLURM_LOCALID"]
    given["MASTER_ADDR"] = _first_host(given["SLURM_JOB_NODELIST"])
    given["MASTER_PORT"] = str(_PORTS[int(given["SLURM_JOB_ID"]) % len(_PORTS)])


def _first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: gpu[03-05,9]."""
    for _ in range(3):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
        time.sleep(1.0)
    raise UserError(f"the machines {nodes} of this job cannot be told apart: `scontrol show hostnames` does not answer")
