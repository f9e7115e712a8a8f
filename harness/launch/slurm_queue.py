"""How jobs of Slurm stand: from squeue, and once they have left the queue from scontrol, sacct or what they left."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.core.files import read_bytes

_ANSWER_SECONDS = 60.0
# States in which a job is over; any other one is of a job that waits or runs.
_OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"),
    *("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED"),
)
# Of these a job that may be put into the queue again can come back within seconds.
PASSING = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "CANCELLED", "GONE")


class NoAnswer(Exception):  # noqa: N818  a state of the cluster, not an error of ours
    """Slurm's controller does not answer, which says nothing about a job."""


@dataclass(frozen=True)
class JobState:
    """How a job stands.

    Args:
        id: its number, of a task of an array `12_3`.
        state: as Slurm calls it, in full: PENDING, RUNNING, FAILED, ...; GONE: Slurm does not know it.
        reason: why it waits or has ended, in Slurm's words; empty if it says none.
        hosts: its machines.
        name: of the job.
        code: exit code, -n after signal n; None while it is not known.
    """

    id: str
    state: str
    reason: str = ""
    hosts: str = ""
    name: str = ""
    code: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, for the time being at least where its state is in `PASSING`."""
        return self.state == "GONE" or self.state in _OVER


def listed(identifiers: Iterable[str] | None = None) -> dict[str, JobState]:
    """The user's jobs that Slurm's controller knows, by their numbers.

    Those that have ended are among them for some minutes (MinJobAge).

    Args:
        identifiers: which of them; None: all.

    Raises:
        NoAnswer: the controller does not answer.
    """
    wanted = None if identifiers is None else set(identifiers)
    if wanted is not None and not wanted:
        return {}
    said = _ask("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%N|%r|%j")
    rows = [line.strip().split("|", 4) for line in said.splitlines() if line.count("|") >= 4]
    states = [JobState(id=row[0], state=row[1], reason=_reason(row[3]), hosts=row[2], name=row[4]) for row in rows]
    return {state.id: state for state in states if wanted is None or state.id in wanted}


def ended(identifier: str, folder: Path) -> JobState:
    """How a job that is no longer in the queue has ended, by the first that knows it.

    Args:
        identifier: its number.
        folder: where its script writes its exit code.
    """
    for ask in (_by_scontrol, _by_sacct):
        try:
            state = ask(identifier)
        except NoAnswer:
            continue
        if state is not None and (state.is_over or state.state == "COMPLETING"):
            return state
    try:
        code = int(read_bytes(folder / f"{identifier}.exit"))
    except (OSError, ValueError):
        return JobState(identifier, "GONE", "Slurm does not know it any more, and it left no exit code")
    return JobState(identifier, "FAILED" if code else "COMPLETED", code=code)


def _by_scontrol(identifier: str) -> JobState | None:
    said = _ask("scontrol", "--oneliner", "show", "job", identifier, unknown="Invalid job id")
    values = dict(re.findall(r"(\w+)=(\S*)", said))
    if "JobState" not in values:
        return None
    reason, code = _reason(values.get("Reason", "")), _code(values.get("ExitCode", ""))
    return JobState(identifier, values["JobState"], reason, values.get("NodeList", ""), code=code)


def _by_sacct(identifier: str) -> JobState | None:
    columns = "State,ExitCode,NodeList,JobID"
    array = identifier.split("_")[0]  # by its task nothing is found where none of the array ever ran
    said = _ask("sacct", "-n", "-P", "-X", "-D", "-j", array, f"--format={columns}", unknown="is disabled")
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 3]
    rows = [row for row in rows if row[3] == identifier] or [row for row in rows if _is_among(identifier, row[3])]
    if not rows:
        return None
    state, code, hosts, _ = rows[-1]  # earlier ones are of before it was put into the queue again
    word, _, more = state.partition(" ")  # CANCELLED by 1000
    return JobState(identifier, word, more, "" if hosts == "None assigned" else hosts, code=_code(code))


def _is_among(identifier: str, numbers: str) -> bool:
    """Whether a task is among those that never ran, which are one row of sacct's: 12_[0-3,7%4]."""
    array, _, tasks = numbers.partition("_[")
    job, _, task = identifier.partition("_")
    if not tasks or array != job:
        return False
    ranges = [part.partition("-") for part in re.split(r"[%:\]]", tasks)[0].split(",")]
    return task.isdigit() and any(int(first) <= int(task) <= int(last or first) for first, _, last in ranges)


def _code(text: str) -> int | None:
    """Slurm's CODE:SIGNAL."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        return None
    return -int(match[2]) if int(match[2]) else int(match[1])


def _reason(text: str) -> str:
    return "" if text in ("None", "(null)", "N/A") else text


def _ask(*command: str, unknown: str = "\0") -> str:
    """What a program of Slurm says; nothing where its error is `unknown`.

    Raises:
        NoAnswer: it is not there, or has got no answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]} gives no answer ({type(error).__name__})") from error
    if done.returncode and unknown not in done.stderr:
        raise NoAnswer(f"{command[0]}: {' '.join(done.stderr.split())}")
    return "" if done.returncode else done.stdout
