"""Slurm: a run is one job of nodes x devices processes, put into the queue again when it is about to lose its machine.

The job runs the command that submitted it, in the same folder: there it trains instead of submitting. Not Hydra's
launcher plugin and not submitit: a suite needs dependencies, arrays of jobs, and exit codes that Slurm sees.
"""

from __future__ import annotations

import os
import re
import time as clock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig

from harness.config import compose, sections
from harness.config.identity import config_sha256, identity
from harness.core.console import STDERR
from harness.core.readback import tail
from harness.core.record import read_record
from harness.core.stopping import StopRequest, stop_code
from harness.core.types import RunError, UserError
from harness.core.validate import File, Limits
from harness.engine.session import is_finished
from harness.launch.launcher import THREAD_VARIABLES
from harness.launch.ranks import JOB_VARIABLE, train_in_job
from harness.launch.sbatch import BatchJob
from harness.launch.slurm_queue import PASSING, JobState, NoAnswer, ended, listed
from harness.launch.submitted import JobEntry, Submitted

POLL_SECONDS = 5.0  # a Slurm controller does not like to be asked often
PASSING_SECONDS = 20.0  # after which a job that could come back within seconds has ended

_Word = Annotated[str, Limits(least=1, most=1000, words="a text, in quotes if it looks like a number")]
_TIME = r"\A(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){1,2})\Z"
_Time = Annotated[str, Limits(pattern=_TIME, words="a time as Slurm writes it, in quotes: 12:00:00 or 2-00:00:00")]
_Memory = Annotated[str, Limits(pattern=r"\A\d+[KMGT]\Z", words="a number with its unit, as Slurm writes it: 64G")]
# Options of sbatch that this launcher sets itself -> the key that says them.
_SET_BY = {
    **dict.fromkeys(("time", "t"), "launcher.time"),
    **dict.fromkeys(("nodes", "N"), "launcher.nodes"),
    **dict.fromkeys(("partition", "p"), "launcher.partition"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node", "gpus-per-node"), "devices"),
    **dict.fromkeys(("cpus-per-task", "c"), "launcher.cpus"),
    **dict.fromkeys(("mem",), "launcher.memory"),
    **dict.fromkeys(("signal",), "launcher.signal_seconds"),
    **dict.fromkeys(("requeue", "no-requeue"), "launcher.requeues"),
    **dict.fromkeys(("output", "o", "error", "e"), "launcher.logs"),
    **dict.fromkeys(("job-name", "J"), "run_dir"),
    **dict.fromkeys(("array", "a", "dependency", "d", "kill-on-invalid-dep"), "ssodbench suite"),
    **dict.fromkeys(("parsable", "wrap", "wait", "W", "chdir", "D", "open-mode"), "ssodbench"),
}


class SlurmLauncher:
    """One job of nodes x devices processes.

    Args:
        nodes: machines, with `devices` processes on each.
        partition, account, qos, constraint, reservation: of the job; None for Slurm's own choice.
        gres: GPUs of each node, such as gpu:h100:8; None: `devices` of any kind, where a device is no CPU.
        time: its limit; a job that runs into it saves, and is put into the queue again.
        cpus: cores of each process.
        memory: of each node; None for Slurm's own choice.
        exclude, nodelist: machines that are not, or that must be used.
        mail, mail_type: who is told, and of what.
        signal_seconds: how long before its time limit the job is told to save.
        requeues: how often it is put into the queue again at the most, whether for its time limit or a pre-emption.
        lock_seconds: how long a job waits for the run folder that its own processes of before may still hold.
        setup: lines of shell that come before the training.
        container: of `srun --container`.
        srun_args: further options of srun.
        parameters: further options of sbatch, by their long names; true: an option without a value.
        logs: folder of scripts, logs and exit codes; None for run_dir/slurm.
        wait: whether to stay until the job has ended.
    """

    def __init__(
        self,
        *,
        nodes: Annotated[int, Limits(ge=1, le=1024)] = 1,
        partition: _Word | None = None,
        account: _Word | None = None,
        qos: _Word | None = None,
        gres: _Word | None = None,
        constraint: _Word | None = None,
        time: _Time = "1-00:00:00",
        memory: _Memory | None = None,
        cpus: Annotated[int, Limits(ge=1, le=1024)] = 8,
        exclude: _Word | None = None,
        nodelist: _Word | None = None,
        reservation: _Word | None = None,
        mail: _Word | None = None,
        mail_type: _Word = "END,FAIL",
        signal_seconds: Annotated[int, Limits(ge=10, le=65_535)] = 120,
        requeues: Annotated[int, Limits(ge=0, le=10_000)] = 100,
        lock_seconds: Annotated[float, Limits(ge=0, le=86_400)] = 600.0,
        setup: Sequence[str] = (),
        container: _Word | None = None,
        srun_args: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        logs: File | None = None,
        wait: bool = True,
    ) -> None:
        self.nodes, self.gres, self.time, self.cpus, self.memory = nodes, gres, time, cpus, memory
        self.signal_seconds, self.requeues, self.lock_seconds = signal_seconds, requeues, lock_seconds
        self.setup, self.container, self.srun_args = list(setup), container, list(srun_args)
        self.more, self.logs, self.wait = dict(parameters or {}), logs, wait
        self._words = {
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "exclude": exclude,
            "nodelist": nodelist,
            "reservation": reservation,
            "mail-user": mail,
            "mail-type": mail_type if mail else None,
        }

    def run(self, cfg: DictConfig) -> int:
        """Submits a run, or attaches to its job that is in the queue; within the job it trains.

        Returns:
            The run's exit code if `wait`, else 0 as soon as the job is in the queue.

        Raises:
            UserError: there is no Slurm here, values do not fit together, or torchrun started this process.
            RunError: Slurm does not take the job, or it ended without a result.
        """
        if JOB_VARIABLE in os.environ:
            return train_in_job(cfg, self.lock_seconds)
        if "LOCAL_RANK" in os.environ:
            raise UserError("launcher=slurm starts all processes itself: start `ssodbench train`, not torchrun")
        self.check(cfg)
        run_dir = Path(cfg.run_dir)
        submitted = Submitted(Path(self.logs or run_dir / "slurm").absolute())
        with submitted.alone():
            state = in_queue(submitted.read()).get("run")
            if state is not None:
                STDERR.say(f"job {state.id} of this run is in the queue already: {described(state)}")
            elif _is_done(cfg, run_dir):
                return 0
            else:
                state = self._submit(cfg, submitted)
        return wait_for(state.id, submitted.folder, run_dir) if self.wait else 0

    def _submit(self, cfg: DictConfig, submitted: Submitted) -> JobState:
        name = Path(cfg.run_dir).absolute().name
        job = self.batch(cfg, name, submitted.folder, {0: command_of(cfg)})
        state = JobState(job.submit(), "PENDING", name=name)
        submitted.add({"run": JobEntry(state.id, name)})
        STDERR.say(f"job {state.id}, log {submitted.folder / state.id}.log")
        return state

    def check(self, cfg: DictConfig) -> None:
        """Checks what sbatch would refuse, or what would only be found once the job runs.

        Raises:
            UserError: naming the key.
        """
        sections.step_shape(cfg, sections.processes(cfg))
        seconds = _seconds(self.time)
        if seconds <= self.signal_seconds:
            raise UserError(
                f"launcher.time={self.time} is not longer than launcher.signal_seconds={self.signal_seconds}, in which "
                "the job saves: give it more time"
            )
        for key in self.more:
            name = str(key).replace("_", "-").lstrip("-")
            if name in _SET_BY or name in self._words or name == "gres":
                by = _SET_BY.get(name) or f"launcher.{name.replace('mail-user', 'mail').replace('-', '_')}"
                raise UserError(f"launcher.parameters.{key} is set by {by}: leave it out, and say that instead")
        match = re.search(r"\bgpu(?::[\w.-]+)?:(\d+)\Z|\bgpu(?::[A-Za-z][\w.-]*)?\Z", self.gres or "")
        if match and cfg.device != "cpu" and int(match[1] or 1) < cfg.devices:
            raise UserError(
                f"launcher.gres={self.gres} gives each node {match[1] or 1} GPUs, but devices={cfg.devices} processes "
                "need one each: make them equal"
            )

    def batch(
        self,
        cfg: DictConfig,
        name: str,
        folder: Path,
        tasks: Mapping[int, Sequence[str]],
        limit: int | None = None,
        options: Sequence[str] = (),
        logs: Mapping[int, Path] | None = None,
    ) -> BatchJob:
        """The job, or the array of jobs, for runs that need the same machines.

        Args:
            cfg: of one of the runs.
            name: of the job.
            folder: of its script and logs.
            tasks: for each task the arguments of `ssodbench`.
            limit: tasks that may run at once; None: no array.
            options: further ones of sbatch.
            logs: where each task appends what it says; None: beside the script.
        """
        threads = str(cfg.threads)
        variables = dict.fromkeys(THREAD_VARIABLES, threads)
        if cfg.get("suite") is not None and limit is not None:
            variables["SSODBENCH_SUITE"] = str(cfg.suite.name)
        return BatchJob(
            name=name,
            folder=folder,
            tasks=tasks,
            options=[*self.options(cfg), *options],
            limit=limit,
            environment=variables,
            setup=self.setup,
            srun=self._srun(),
            requeues=self.requeues,
            logs=logs or {},
        )

    def options(self, cfg: DictConfig) -> list[str]:
        """Options of sbatch for a run."""
        values: dict[str, Any] = {
            "nodes": self.nodes,
            "ntasks": self.nodes * cfg.devices,
            "ntasks-per-node": cfg.devices,
            "cpus-per-task": self.cpus,
            "time": self.time,
            "mem": self.memory,
            "signal": f"USR2@{self.signal_seconds}",
        }
        if self.gres:
            values["gres"] = self.gres
        elif cfg.device != "cpu":
            values["gpus-per-node"] = cfg.devices
        return [*_options(values), *_options(self._words), *_options(self.more)]

    def _srun(self) -> list[str]:
        # One that fails alone leaves the others waiting in a collective. srun does not take over cpus-per-task.
        own = ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus}"]
        return [*own, *([f"--container={self.container}"] if self.container else []), *self.srun_args]


def command_of(cfg: DictConfig) -> list[str]:
    """Arguments of `ssodbench` that train as this configuration says."""
    folders = [word for folder in cfg.cli.config_dirs for word in ("--config-dir", str(folder))]
    return ["train", *folders, *cfg.cli.overrides]


def in_queue(jobs: Mapping[str, JobEntry]) -> dict[str, JobState]:
    """Of jobs that were submitted those that wait or run, under the same names.

    Raises:
        RunError: Slurm does not answer, so that nobody knows.
    """
    try:
        states = listed(entry.id for entry in jobs.values())
    except NoAnswer as error:
        raise RunError(
            f"what was submitted before may be in the queue, but Slurm does not say ({error}): try again when it does"
        ) from error
    found = {name: (states.get(entry.id), entry) for name, entry in jobs.items()}
    return {name: state for name, (state, entry) in found.items() if state and _is_same(state, entry)}


def _is_same(state: JobState, entry: JobEntry) -> bool:
    return state.name == entry.name and (not state.is_over or state.state in ("NODE_FAIL", "PREEMPTED"))


def described(state: JobState) -> str:
    """How a job stands, in a few words."""
    where = f" on {state.hosts}" if state.hosts else ""
    return f"{state.state}{where}{f' ({state.reason})' if state.reason else ''}"


def wait_for(identifier: str, folder: Path, run_dir: Path) -> int:
    """Waits for a job; told to stop, this process ends, and the job goes on.

    Args:
        identifier: of the job.
        folder: of its log and exit code.
        run_dir: of its run.

    Returns:
        Its exit code, 128 + n after signal n to this process.

    Raises:
        RunError: it ended without one.
    """
    stop, told = StopRequest(), ""
    stop.install()
    since: float | None = None
    while True:
        state = _look(identifier)
        if state is not None and state.is_over:
            since = clock.monotonic() if since is None else since
            if state.state not in PASSING or clock.monotonic() - since >= PASSING_SECONDS:
                return result_of(ended(identifier, folder), folder, run_dir)
        elif state is not None:
            since = None
            if described(state) != told:
                told = described(state)
                STDERR.say(f"job {identifier}: {told}")
        end = clock.monotonic() + POLL_SECONDS
        while clock.monotonic() < end:
            if stop.signal_number:
                STDERR.say(
                    f"job {identifier} goes on without this command: the same command attaches to it, "
                    f"`scancel {identifier}` ends it"
                )
                return stop_code(stop.signal_number)
            clock.sleep(0.1)


def _look(identifier: str) -> JobState | None:
    """How the job stands; None while Slurm's controller does not answer."""
    try:
        return listed([identifier]).get(identifier, JobState(identifier, "GONE"))
    except NoAnswer:
        return None


def result_of(state: JobState, folder: Path, run_dir: Path) -> int:
    """What the end of a job means for its run: the exit code, with a word about it where it is not 0.

    Raises:
        RunError: it ended without an exit code of its own.
    """
    if state.state == "COMPLETED":
        return 0
    log = folder / f"{state.id}.log"
    if state.state == "FAILED" and state.code is not None and state.code > 0:
        why = last_word(log) or error_of(run_dir, state.id) or tail(log, 1) or "it said nothing"
        STDERR.say(f"job {state.id} ended with exit code {state.code}{_on(state)}: {why}; see {log}")
        return state.code
    if state.state == "GONE" and _record_status(run_dir, state.id) == "ok":
        return 0
    raise RunError(
        f"job {state.id} ended as {described(state)} without a result: start the same command again, which continues "
        f"from the newest checkpoint; see {log}"
    )


def _on(state: JobState) -> str:
    return f" on {state.hosts}" if state.hosts else ""


def error_of(run_dir: Path, identifier: str) -> str | None:
    """The error in a run's record, if this job wrote it."""
    record = _record(run_dir, identifier)
    return record.error if record is not None else None


def last_word(log: Path) -> str | None:
    """The last sentence of ours in a log, after which Slurm may write, too; None if there is none."""
    ours = [line for line in tail(log, 50).splitlines() if line.startswith("ssodbench: ")]
    return ours[-1].removeprefix("ssodbench: ") if ours else None


def _record_status(run_dir: Path, identifier: str) -> str | None:
    record = _record(run_dir, identifier)
    return record.status if record is not None else None


def _record(run_dir: Path, identifier: str) -> Any:
    """The record of a run, if this job wrote it."""
    try:
        record = read_record(run_dir / "record.json")
    except UserError:
        return None
    return record if record.job is not None and record.job.get("id") == identifier else None


def _is_done(cfg: DictConfig, run_dir: Path) -> bool:
    """Whether the run is finished, which is told.

    Raises:
        UserError: the folder holds a run of another configuration.
    """
    compose.stage_one(cfg)
    done = is_finished(run_dir, identity(cfg), config_sha256(cfg))
    if done:
        STDERR.say(f"the run in {run_dir} is finished: see {run_dir / 'record.json'}; delete the folder to run it anew")
    return done


def _options(values: Mapping[str, Any]) -> list[str]:
    """As sbatch takes them; what is null or false is left out."""
    said = []
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if value is True:
            said.append(f"--{name}")
        elif value is not None and value is not False:
            said.append(f"--{name}={value}")
    return said


def _seconds(text: str) -> int:
    """A time as Slurm writes it: M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = (0, *parts) if len(parts) == 2 else parts
    return (hours * 60 + minutes) * 60 + seconds
