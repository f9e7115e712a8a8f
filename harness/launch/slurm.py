"""Slurm, through submitit: a run is one job of nodes x devices tasks, put into the queue again when it is pre-empted.

Not Hydra's launcher plugin, which blocks and knows no dependencies between cells: a suite starts one waiting process
per cell, as it does on one machine, and each of them submits its job here.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from harness.core.console import STDERR
from harness.core.types import RunError, UserError
from harness.core.validate import File, Limits

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


class SlurmLauncher:
    """One job of nodes x devices tasks.

    Args:
        cluster: `slurm`, or `local` for submitit's stand-in on this machine.
        nodes: machines, with `devices` processes on each.
        partition, account: of the job; None for Slurm's own choice.
        minutes: its time limit; a job that runs into it is put into the queue again.
        cpus_per_device: cores of each process.
        memory_gb: of each node; None for Slurm's own choice.
        parameters: further parameters of sbatch.
        requeues: how often the job is put into the queue again at the most.
        logs: folder of submitit's logs; None for run_dir/slurm.
        wait: whether to stay until the job has ended.
    """

    def __init__(
        self,
        *,
        cluster: Literal["slurm", "local"] = "slurm",
        nodes: Annotated[int, Limits(ge=1, le=1024)] = 1,
        partition: str | None = None,
        account: str | None = None,
        minutes: Annotated[int, Limits(ge=1, le=10**6)] = 1440,
        cpus_per_device: Annotated[int, Limits(ge=1, le=1024)] = 8,
        memory_gb: Annotated[float, Limits(gt=0, le=100_000)] | None = None,
        parameters: Mapping[str, Any] | None = None,
        requeues: Annotated[int, Limits(ge=0, le=10_000)] = 100,
        logs: File | None = None,
        wait: bool = True,
    ) -> None:
        self.cluster, self.requeues, self.logs, self.wait = cluster, requeues, logs, wait
        self._nodes, self._minutes, self._cpus_per_device = nodes, minutes, cpus_per_device
        self._memory_gb, self._extra = memory_gb, dict(parameters or {})
        self._queue = {"partition": partition, "account": account}

    def run(self, cfg: DictConfig) -> int:
        """Submits a run.

        Returns:
            The run's exit code if `wait`, else 0 as soon as the job is in the queue.

        Raises:
            UserError: submitit or Slurm is not there, or torchrun started this process.
            RunError: Slurm does not take the job, or it ended without a result.
        """
        if "LOCAL_RANK" in os.environ:
            raise UserError("launcher=slurm starts all processes itself: start `ssodbench train`, not torchrun")
        try:
            import submitit
        except ImportError as error:
            raise UserError("launcher=slurm needs submitit: pip install 'ssodbench[slurm]'") from error
        logs = Path(self.logs or Path(cfg.run_dir) / "slurm")
        try:
            # submitit counts pre-emptions and time-outs together.
            executor = submitit.AutoExecutor(folder=logs, cluster=self.cluster, slurm_max_num_timeout=self.requeues)
        except RuntimeError as error:
            raise UserError(
                f"launcher=slurm cannot be used here ({error}): start the command on a Slurm login node"
            ) from error
        executor.update_parameters(**self.parameters(cfg))
        job_cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        job_cfg.run_dir = str(Path(cfg.run_dir).absolute())
        job = _put_into_queue(executor, TrainJob(OmegaConf.to_container(job_cfg, resolve=False)))
        STDERR.say(f"job {job.job_id}, logs in {logs}")
        return _wait(job, _POLL_SECONDS if self.cluster == "slurm" else 0.2) if self.wait else 0

    def parameters(self, cfg: DictConfig) -> dict[str, Any]:
        """submitit's parameters for the job of a run."""
        common: dict[str, Any] = {
            "name": Path(cfg.run_dir).name,
            "timeout_min": self._minutes,
            "nodes": self._nodes,
            "tasks_per_node": cfg.devices,
            "cpus_per_task": self._cpus_per_device,
            "gpus_per_node": cfg.devices if cfg.device != "cpu" else 0,
        }
        if self._memory_gb is not None:
            common["mem_gb"] = self._memory_gb
        slurm: dict[str, Any] = {f"slurm_{key}": value for key, value in self._queue.items() if value is not None}
        # A task that fails alone leaves the others waiting in a collective.
        slurm["slurm_srun_args"] = ["--kill-on-bad-exit=1"]
        if self._extra:
            slurm["slurm_additional_parameters"] = self._extra
        return common | slurm


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
