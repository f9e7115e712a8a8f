"""From a command to the processes that train: here, in several of them, or in a job; and how they end.

Errors are said once, in one sentence where the user can mend them, and become the exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

from harness.config.compose import places
from harness.core import distributed, escape
from harness.core.console import STDERR, settle
from harness.core.distributed import World
from harness.core.files import refusal
from harness.core.record import available_cores
from harness.core.types import UserError
from harness.engine import build
from harness.engine.loop import Interrupted, RunError, StopRequest, stop_signals
from harness.engine.session import say, train_to_record
from harness.launch import slurm

MOST_PER_CORE = 4  # processes
LAUNCHER_SECONDS = 10.0  # in which a launcher notices that a process has ended, and stops the others


def run(cfg: DictConfig) -> int:
    """Trains as the configuration says: in this process, in `devices` of them, or in a job on a cluster.

    Returns:
        Exit code: 0 ok, 1 failed, 2 a mistake of the user's, 128 + n after signal n.
    """
    if cfg.launcher.name == "slurm":
        return _submit(cfg)  # before GPUs are looked for: a login node has none
    device = distributed.resolve_device(cfg.device, cfg.devices)
    plain = OmegaConf.to_container(cfg, resolve=False)
    if cfg.devices > 1 and "LOCAL_RANK" not in os.environ:
        if device == "cpu":
            _check_cores(int(cfg.devices))
        build.data(cfg)  # a mistake is told once, and before many processes start
        return distributed.launch(_work, (plain, device), cfg.devices, [*stop_signals(), signal.SIGQUIT])
    return run_rank(plain, device)


def _check_cores(processes: int) -> None:
    """Raises UserError for more processes than a CPU can mean, and warns of more than it has cores for."""
    cores = available_cores()
    if processes > MOST_PER_CORE * cores:
        raise UserError(
            f"devices={processes} on the {cores} core{'s' if cores > 1 else ''} of this machine: lower devices to at "
            f"most {MOST_PER_CORE * cores}; a step has the same images with any number of them"
        )
    if processes > cores:
        STDERR.say(f"devices={processes} share {cores} core{'s' if cores > 1 else ''}: fewer are not slower")


def _submit(cfg: DictConfig) -> int:
    if "LOCAL_RANK" in os.environ:
        raise UserError("launcher=slurm starts all processes itself: start `ssodbench train`, not torchrun")
    try:
        return slurm.submit(cfg)
    except RunError as error:
        STDERR.say(f"ssodbench: {error}")
        return 1


def _work(plain: Any, device: str) -> int:
    """`run_rank` in a worker of the elastic launcher, which takes only the end of a process for a failure."""
    try:
        code = run_rank(plain, device)
    except Exception:
        STDERR.say(traceback.format_exc())
        code = 1
    settle()
    if code:
        sys.exit(code)
    return code


def run_rank(plain: Any, device: str, signals: Sequence[int] | None = None) -> int:
    """`run` in one process of the group; says errors once and gives the exit code.

    An error of one rank alone ends its process at once: the others wait for it in a collective, and only the launcher,
    which sees it end, can stop them.
    """
    cfg = OmegaConf.create(plain)
    assert isinstance(cfg, DictConfig)
    world = distributed.join(device)
    torch.set_num_threads(int(cfg.threads))
    stop = StopRequest()
    stop.install(signals)
    try:
        return train_to_record(cfg, world, stop)
    except Interrupted as stopped:
        say(world, f"{stopped}; start the same command again to continue")
        return 128 + stopped.signal_number
    except Exception as error:
        told = _explain(cfg, world, error)
        if world.size > 1 and not distributed.is_on_all_ranks(error):
            _end_alone(world, stop, error, told)
        if told is None and world.is_main:
            raise
        if told is None:
            return 1
        say(world, f"ssodbench: {escape.plain(told[0])}")
        return told[1]
    finally:
        distributed.leave()


def _explain(cfg: DictConfig, world: World, error: Exception) -> tuple[str, int] | None:
    """One sentence and the exit code; None for what should not have happened."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, RunError):
        return str(error), 1
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            f"a worker process of pipeline={cfg.pipeline.name} has ended ({str(error).splitlines()[0]}): free memory, "
            "or set pipeline.threads=0, and start the same command again, which continues from the newest checkpoint"
        ), 1
    if _is_out_of_memory(error):
        return (
            f"out of memory on {world.device}: lower batch.micro (now {_micro(cfg)}) or evaluation.batch "
            f"(now {cfg.evaluation.batch}), or set precision=bf16"
        ), 1
    if isinstance(error, OSError) and error.errno is not None:
        error.filename = error.filename or cfg.run_dir  # what the libraries write without naming it
        told = refusal(error, places(cfg))
        return str(told), 2 if isinstance(told, UserError) else 1
    return None


def _end_alone(world: World, stop: StopRequest, error: Exception, told: tuple[str, int] | None) -> NoReturn:
    """Ends this rank's process, its error said; a rank that merely lost another one leaves the exit code to that."""
    if distributed.is_lost_peer(error):
        end = time.monotonic() + LAUNCHER_SECONDS
        while not stop.signal_number and time.monotonic() < end:
            time.sleep(0.05)
        STDERR.say(f"ssodbench: rank {world.rank} stops, because another process of the run has ended")
        told = ("", 1)
    elif told is None:
        STDERR.say("".join(traceback.format_exception(error)))
    else:
        STDERR.say(f"ssodbench: rank {world.rank}: {told[0]}")
    settle()
    os._exit(told[1] if told else 1)  # leaving the group in order would wait for the others


def _is_out_of_memory(error: BaseException) -> bool:
    """A GPU's error has a class of its own; what torch raises on a CPU is a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _micro(cfg: DictConfig) -> int:
    """Images in one forward."""
    return int(cfg.batch.micro or cfg.batch.labeled + cfg.batch.unlabeled)
