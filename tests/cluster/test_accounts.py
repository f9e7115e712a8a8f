"""Jobs that Slurm's controller has forgotten, known by the accounts of a real slurmdbd.

That a job has taken too much memory is told by Slurm where it uses cgroups, which this one does not: what it says then
is a recorded answer in `tests/harness/launch/test_slurm.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.launch.slurm_queue import JobState, ended
from tests.cluster.conftest import UNSAVED, Cluster, OneSlurm, end_of, until
from tests.cluster.test_suites import SUITE
from tests.cluster.virtual_slurm import ask, missing

pytestmark = pytest.mark.skipif(missing(accounting=True) is not None, reason=str(missing(accounting=True)))

ONE_CELL = ["suite.methods=[supervised]", "suite.percents=[10]", UNSAVED]


@dataclass(frozen=True)
class Forgotten:
    """What was submitted and has ended, so long ago that only the accounts know it."""

    cluster: Cluster
    jobs: dict[str, str]  # what has become of it -> number


@pytest.fixture(scope="module")
def forgotten(one_slurm: OneSlurm, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Forgotten:
    slurm = one_slurm.get(accounting=True)
    cluster = Cluster(slurm, cache, tmp_path_factory.mktemp("accounts"))
    jobs = {
        "ran out of time": _sbatch(cluster, "sleep 600", "--time=1"),
        "failed": _sbatch(cluster, "exit 2"),
        "ended": _sbatch(cluster, "true"),
        "cancelled": _sbatch(cluster, "sleep 600"),
        "cancelled in the queue": _sbatch(cluster, "true", "--hold"),
        "requeued": _sbatch(cluster, "[ ${SLURM_RESTART_COUNT:-0} -eq 1 ] || sleep 600", "--requeue"),
        "of an array": _sbatch(cluster, "exit $((SLURM_ARRAY_TASK_ID + 3))", "--array=0-1") + "_1",
    }
    until(lambda: "RUNNING" in ask("squeue", "-h", "-j", jobs["cancelled"], "-o", "%T"), "a running job")
    until(lambda: "RUNNING" in ask("squeue", "-h", "-j", jobs["requeued"], "-o", "%T"), "a running job")
    subprocess.run(["scancel", jobs["cancelled"], jobs["cancelled in the queue"]], check=True)
    subprocess.run(["scontrol", "requeue", jobs["requeued"]], check=True)
    code, said = end_of(cluster.start("suite", *SUITE, *ONE_CELL, "launcher.parameters.hold=true"))
    assert code == 0, said
    entries = json.loads((cluster.folder / "runs/smoke/slurm/jobs.json").read_text())
    subprocess.run(["scancel", *(entry["id"] for entry in entries.values())], check=True)
    jobs["cell"] = next(entry["id"] for name, entry in entries.items() if name != "report")
    until(lambda: not ask("squeue", "-h"), "an empty queue")
    until(lambda: not any(ask("scontrol", "show", "job", job) for job in jobs.values()), "a controller that forgets")
    return Forgotten(cluster, jobs)


def _sbatch(cluster: Cluster, script: str, *options: str) -> str:
    """Submits a script; gives its number."""
    command = ["sbatch", "--parsable", "-o", "/dev/null", *options, f"--wrap={script}"]
    return subprocess.check_output(command, cwd=cluster.folder, text=True).strip()


@pytest.mark.parametrize(
    ("what", "state", "reason", "code"),
    [
        ("ran out of time", "TIMEOUT", "", 0),
        ("failed", "FAILED", "", 2),
        ("ended", "COMPLETED", "", 0),
        ("cancelled", "CANCELLED", "by 0", 0),
        ("cancelled in the queue", "CANCELLED", "by 0", 0),
        ("requeued", "COMPLETED", "", 0),
        ("of an array", "FAILED", "", 4),
    ],
)
def test_how_a_job_has_ended_is_known_from_its_accounts(
    forgotten: Forgotten, tmp_path: Path, what: str, state: str, reason: str, code: int
) -> None:
    found = ended(forgotten.jobs[what], tmp_path)
    assert found == JobState(forgotten.jobs[what], state, reason, found.hosts, code=code)
    assert found.hosts in (("n1", "n2") if what != "cancelled in the queue" else ("",))


def test_the_status_of_a_suite_tells_of_jobs_that_have_ended(forgotten: Forgotten) -> None:
    code, said = end_of(forgotten.cluster.start("suite", *SUITE, *ONE_CELL, "suite.status=true"))
    assert code == 0, said
    assert re.search(rf"supervised.*10pct.* failed .*job {forgotten.jobs['cell']} ended as CANCELLED \(by 0\)", said), (
        said
    )
