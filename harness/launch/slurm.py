"""Slurm, through submitit: a run is one job of nodes x devices tasks, put into the queue again when it is pre-empted.

Not Hydra's launcher plugin, which blocks and knows no dependencies between cells: a suite starts one waiting process
per cell, as it does on one machine, and each of them submits its job here.
"""

from __future__ import annotations

import io
import signal
import subprocess
import time
from contextlib import redirect_stderr, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.core.console import STDERR
from harness.core.types import RunError, UserError

_POLL_SECONDS = 5.0  # a Slurm controller does not like to be asked often


class TrainJob:
    """What a task of the job does. submitit pickles it, and asks it for its successor when the job is pre-empted."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self) -> int:
        """Joins the tasks' process group and trains; gives the exit code.

        When the job is about to lose its machine, the loop finishes its step and saves, and only then is submitit's
        own handler called, which puts the job into the queue again.
        """
        from submitit import JobEnvironment

        from harness.core import distributed
        from harness.launch.local import run_rank

        _export_ranks()
        cfg = OmegaConf.create(self.plain)
        warning = JobEnvironment._usr_sig()
        requeue = signal.getsignal(warning)
        code = run_rank(self.plain, distributed.resolve_device(cfg.device, cfg.devices), (warning,))
        if code == 128 + warning and callable(requeue):
            requeue(warning, None)  # does not return on the first rank
        return code

    def checkpoint(self) -> Any:
        """The same job again: the run folder's newest checkpoint is where it continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(TrainJob(self.plain))


def _export_ranks() -> None:
    """Sets torchrun's variables from Slurm's; a lone task needs none."""
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def submit(cfg: DictConfig) -> int:
    """Submits a run as `launcher=slurm` says.

    Returns:
        The run's exit code if `launcher.wait`, else 0 as soon as the job is in the queue.

    Raises:
        UserError: when submitit or Slurm is not there.
        RunError: Slurm does not take the job, or it ended without a result.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("launcher=slurm needs submitit: pip install 'ssodbench[slurm]'") from error
    options = cfg.launcher
    logs = Path(options.logs or Path(cfg.run_dir) / "slurm")
    try:
        # submitit counts pre-emptions and time-outs together.
        executor = submitit.AutoExecutor(folder=logs, cluster=options.cluster, slurm_max_num_timeout=options.requeues)
    except RuntimeError as error:
        raise UserError(
            f"launcher=slurm cannot be used here ({error}): start the command on a Slurm login node"
        ) from error
    executor.update_parameters(**_parameters(cfg))
    job_cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    job_cfg.launcher = {"name": "local"}
    job_cfg.run_dir = str(Path(cfg.run_dir).absolute())
    job = _put_into_queue(executor, TrainJob(OmegaConf.to_container(job_cfg, resolve=False)))
    STDERR.say(f"job {job.job_id}, logs in {logs}")
    return _wait(job, _POLL_SECONDS if options.cluster == "slurm" else 0.2) if options.wait else 0


def _put_into_queue(executor: Any, job: TrainJob) -> Any:
    """Submits; what Slurm says to a refusal becomes part of one sentence.

    Raises:
        RunError: Slurm did not take the job.
    """
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what its error holds
            return executor.submit(job)
    except (RuntimeError, subprocess.SubprocessError, FileNotFoundError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"launcher=slurm: Slurm did not take the job ({said}): see with `sinfo` whether its controller answers and "
            "whether launcher.partition, launcher.account and launcher.parameters fit, or train here by launcher=local"
        ) from error


def _parameters(cfg: DictConfig) -> dict[str, Any]:
    """submitit's parameters for a job."""
    options = cfg.launcher
    on_gpus = cfg.device != "cpu"
    common: dict[str, Any] = {
        "name": Path(cfg.run_dir).name,
        "timeout_min": options.minutes,
        "nodes": options.nodes,
        "tasks_per_node": cfg.devices,
        "cpus_per_task": options.cpus_per_device,
        "gpus_per_node": cfg.devices if on_gpus else 0,
    }
    if options.memory_gb is not None:
        common["mem_gb"] = options.memory_gb
    slurm = {f"slurm_{key}": options[key] for key in ("partition", "account") if options[key] is not None}
    # A task that fails alone leaves the others waiting in a collective.
    slurm["slurm_srun_args"] = ["--kill-on-bad-exit=1"]
    extra = OmegaConf.to_container(options.parameters)
    if extra:
        slurm["slurm_additional_parameters"] = extra
    return common | slurm


def _wait(job: Any, poll_seconds: float) -> int:
    """Waits for a job; being told to stop cancels it.

    Raises:
        RunError: the job ended without a result.
    """

    def cancel(number: int, _frame: FrameType | None) -> None:
        with suppress(OSError):  # without Slurm's own programs there is nothing to cancel
            job.cancel(check=False)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, cancel)
    while not job.done():
        time.sleep(poll_seconds)
    error = job.exception()
    if error is not None:
        raise RunError(
            f"job {job.job_id} ended without a result, see {job.paths.stderr}: {str(error).splitlines()[-1]}"
        )
    code = max(int(code) for code in job.results())
    if code:
        STDERR.say(f"job {job.job_id} ended with exit code {code}, see {job.paths.stderr}")
    return code
