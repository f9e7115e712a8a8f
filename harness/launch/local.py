"""From a command to the processes that train on this machine, one or several, and how they end.

Errors are said once, in one sentence where the user can mend them, and become the exit code.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

from harness.config import compose
from harness.config.paths import places
from harness.config.run import settings_of
from harness.config.sections import step_shape
from harness.core import distributed, escape
from harness.core.console import STDERR, settle
from harness.core.distributed import World
from harness.core.files import refusal
from harness.core.record import available_cores
from harness.core.stopping import Interrupted, StopRequest, note_failure, stop_code, stop_signals
from harness.core.types import UserError
from harness.engine import build
from harness.engine.loop import RunError
from harness.engine.session import say, train_to_record

MOST_PER_CORE = 4  # processes
LAUNCHER_SECONDS = 10.0  # in which a launcher notices that a process has ended, and stops the others

logger = logging.getLogger(__name__)


class LocalLauncher:
    """This process, or `devices` of them on this machine, or the group that torchrun started."""

    def run(self, cfg: DictConfig) -> int:
        """See `Launcher.run`."""
        device = distributed.resolve_device(cfg.device, cfg.devices)
        plain = OmegaConf.to_container(cfg, resolve=False)
        if cfg.devices > 1 and "LOCAL_RANK" not in os.environ:
            if device == "cpu":
                _check_cores(int(cfg.devices))
            build.data(settings_of(cfg))  # a mistake is told once, and before many processes start
            return launch(_work, (plain, device), cfg.devices, [*stop_signals(), signal.SIGQUIT])
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


def run_rank(plain: Any, device: str, stop: StopRequest | None = None, lock_seconds: float = 0.0) -> int:
    """Trains in one process of the group; says errors once and gives the exit code.

    An error of one rank alone ends its process at once: the others wait for it in a collective, and only the launcher,
    which sees it end, can stop them.

    Args:
        plain: the configuration.
        device: cpu or cuda.
        stop: takes the signals that ask to stop; None: those of `stop_signals`.
        lock_seconds: how long to wait where another process has the run folder.
    """
    cfg = OmegaConf.create(plain)
    assert isinstance(cfg, DictConfig)
    world = distributed.join(device)
    torch.set_num_threads(int(cfg.threads))
    if stop is None:
        stop = StopRequest()
        stop.install()
    try:
        return train_to_record(cfg, compose.stage_one(cfg), world, stop, lock_seconds)
    except Interrupted as stopped:
        say(world, f"{stopped}; start the same command again to continue")
        return stop_code(stopped.signal_number)
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
            f"out of memory on {world.device}: lower batch.micro (now {step_shape(cfg).micro_images}) or "
            f"evaluation.batch (now {cfg.evaluation.batch}), or set precision=bf16"
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
        note_failure(1)
    else:
        STDERR.say(f"ssodbench: rank {world.rank}: {told[0]}")
        note_failure(told[1])
    settle()
    os._exit(told[1] if told else 1)  # leaving the group in order would wait for the others


def _is_out_of_memory(error: BaseException) -> bool:
    """A GPU's error has a class of its own; what torch raises on a CPU is a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


SHUTDOWN_SECONDS = 600  # what workers get to finish a step and save, before the elastic agent kills them


def launch(entry: Callable[..., int], arguments: Sequence[Any], processes: int, signals: Sequence[int]) -> int:
    """Runs `entry(*arguments)` in `processes` processes of this machine through torch's elastic launcher.

    The launcher passes a signal on to its workers and waits for them; it stops them all when one ends by itself with an
    exit code other than 0. What a worker has to say it says itself.

    Args:
        entry: what each process runs; gives its exit code.
        arguments: of `entry`.
        processes: how many.
        signals: that ask the workers to stop, and that the launcher passes on.

    Returns:
        0 if all gave 0, 128 + n after signal n, else the exit code of the first worker that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # tracebacks of the launcher's own
    # By its variable, since not every version has the argument.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"ssodbench-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        signals_to_handle=",".join(signal.Signals(number).name for number in signals),
    )
    others = set(multiprocessing.active_children())
    try:
        return max(elastic_launch(config, entry)(*arguments).values())
    except SignalException as stopped:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # one that the launcher had not finished starting
        return stop_code(int(stopped.sigval))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        logger.error("ssodbench: the process of rank %d was ended by %s%s", rank, name, hint)
        return 128 - failure.exitcode
