"""What is handed to Slurm: the script that the first machine of a job runs, and its answer."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.files import write_atomically
from harness.core.stopping import FAILURE_VARIABLE, stop_code
from harness.core.types import RunError, UserError
from harness.launch.ranks import JOB_SIGNALS, JOB_VARIABLE

_ANSWER_SECONDS = 120.0  # in which sbatch has answered, also where its controller is busy

_SCRIPT = """#!/bin/bash
# Written by ssodbench and handed to: sbatch {options}
{setup}
export {environment}
case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{cases}
  *) echo "this job has no task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
# The last task of an array has the number of the whole array as its SLURM_JOB_ID.
id=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
end={folder}/$id.exit
export {failure}={folder}/$id.failure
rm -f "$end" "${failure}" # of an earlier job of that number
trap : TERM {signals} # for the processes below, which finish their step and save; this script waits for them
srun {srun} "$@"
code=$?
# srun gives the highest code, which is that of the processes that it has ended because another one failed.
if [ -s "${failure}" ]; then code=$(cat "${failure}"); fi
if {stopped}; then # saved before its time
  if [ "$(squeue --noheader --states=all --job="$id" --format=%T)" != RUNNING ]; then
    echo "ssodbench: job $id saved its state and ends, since Slurm ends it"
  elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {requeues} ]; then
    echo "ssodbench: job $id saved its state and ends: launcher.requeues={requeues} are used up"
  else
    # Said first, since Slurm ends this script at once.
    echo "ssodbench: job $id saved its state and goes back into the queue"
    if scontrol requeue "$id"; then
      sleep 600 # which Slurm breaks off
    elif scontrol --oneliner show job "$id" | grep -q 'PreemptTime=[0-9]'; then
      echo "ssodbench: job $id leaves it to Slurm to put it into the queue again"
      sleep 3600
    else
      echo "ssodbench: job $id ends, since Slurm does not put it into the queue again"
    fi
  fi
fi
echo $code > "$end.new" && mv -f "$end.new" "$end"
exit $code
"""


@dataclass(frozen=True)
class BatchJob:
    """A job, or an array of jobs, as it is handed to sbatch.

    Args:
        name: of the job.
        folder: where its script, logs and exit codes go; absolute.
        tasks: arguments of `ssodbench` for each task of an array; a job that is no array has the task 0 alone.
        options: of sbatch, each `--KEY=VALUE`.
        limit: how many tasks of the array may run at once; None: it is no array.
        environment: variables of the processes.
        setup: lines of shell that come first.
        srun: further options of srun.
        requeues: how often the job may be put into the queue again.
        logs: where a task appends what it says; otherwise to NUMBER.log in `folder`, as what Slurm itself says.
    """

    name: str
    folder: Path
    tasks: Mapping[int, Sequence[str]]
    options: Sequence[str] = ()
    limit: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()
    srun: Sequence[str] = ()
    requeues: int = 0
    logs: Mapping[int, Path] = field(default_factory=dict)

    @property
    def all_options(self) -> list[str]:
        """Of sbatch: those that are the job's own, and those that each job has."""
        task = "%A_%a" if self.limit is not None else "%j"
        common = [f"--job-name={self.name}", f"--output={self.folder}/{task}.log", "--open-mode=append", "--requeue"]
        if self.limit is not None:
            common.append(f"--array={_ranges(self.tasks)}%{self.limit}")
        return [*common, *self.options]

    def script(self) -> str:
        """The script of the job."""
        program = [sys.executable, "-P", "-m", "harness.cli"]  # no file of the working folder is taken for a module
        cases = [f"  {task}) {self._log(task)}set -- {shlex.join([*program, *g])} ;;" for task, g in self.tasks.items()]
        variables = {JOB_VARIABLE: "1", **self.environment}
        codes = [stop_code(number) for number in JOB_SIGNALS]
        return _SCRIPT.format(
            options=shlex.join(self.all_options),
            setup="\n".join(self.setup),
            environment=" ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items()),
            cases="\n".join(cases),
            folder=shlex.quote(str(self.folder)),
            signals=" ".join(number.name.removeprefix("SIG") for number in JOB_SIGNALS if number.name != "SIGTERM"),
            srun=shlex.join(self.srun),
            failure=FAILURE_VARIABLE,
            stopped=" || ".join(f"[ $code -eq {code} ]" for code in codes),
            requeues=self.requeues,
        )

    def _log(self, task: int) -> str:
        return f"exec >> {shlex.quote(str(self.logs[task]))} 2>&1; " if task in self.logs else ""

    def submit(self) -> str:
        """Hands the job to Slurm.

        Returns:
            Its number.

        Raises:
            UserError: there is no Slurm here.
            RunError: Slurm does not take the job, with its own words.
        """
        script = self.folder / f"{self.name}.sh"
        write_atomically(script, self.script().encode())
        command = ["sbatch", "--parsable", *self.all_options, str(script)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS, env=_environment()
            )
        except FileNotFoundError as error:
            raise UserError(
                "launcher=slurm cannot be used here (sbatch is not found): start the command on a Slurm login node"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise _refused(f"no answer within {_ANSWER_SECONDS:.0f} s") from error
        match = re.match(r"\d+", done.stdout.strip())
        if done.returncode or not match:
            raise _refused(done.stderr or done.stdout or f"exit code {done.returncode}")
        return match[0]


def _environment() -> dict[str, str]:
    """Without what would make of a job submitted from within another one a part of that; defaults of sbatch stay."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    return {
        key: value
        for key, value in os.environ.items()
        if key in kept or (not key.startswith("SLURM") and key not in (JOB_VARIABLE, "SBATCH_ARRAY_INX"))
    }


def _refused(said: str) -> RunError:
    words = " ".join(re.sub(r"sbatch: (error: )?", "", said).split())
    return RunError(
        f"launcher=slurm: Slurm did not take the job ({words}): see with `sinfo` whether its controller answers, and "
        "whether launcher.partition, launcher.account and the other keys of launcher fit, or train here by "
        "launcher=local"
    )


def _ranges(numbers: Iterable[int]) -> str:
    """As Slurm writes them: 0-3,7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
