"""A Slurm of two virtual nodes for all tests of this folder, and a small training to give it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.virtual_slurm import VirtualSlurm, ask, missing

ROOT = Path(__file__).parents[2]
SMALL = [
    *("data=shapes", "data.train_images=40", "data.val_images=12", "detector.weights=scratch", "schedule=smoke"),
    *("split.percent=20", "batch.labeled=4", "logging.loggers=[]", "logging.every=1", "pipeline=torchvision"),
    *("evaluation.every=null", "device=cpu", "launcher=slurm", "launcher.cpus=1"),
]
SSODBENCH = [sys.executable, "-P", "-m", "tests.cluster.impatient"]
UNSAVED = "checkpointing.every=100000"  # whatever is saved was saved because the job had to go


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    why = missing()
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))  # five times what it takes a machine that has nothing else to do
            if why is not None:
                item.add_marker(pytest.mark.skip(reason=why))


class OneSlurm:
    """Slurm with or without accounts, one at a time: both have the same ports and nodes."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._current: VirtualSlurm | None = None

    def get(self, accounting: bool) -> VirtualSlurm:
        """The one that runs, if it is of that kind; otherwise a new one."""
        if self._current is None or self._current.accounting != accounting:
            self.stop()
            folder = self._make_folder("slurm")
            # The one with accounts is soon asked for jobs that its controller has forgotten.
            self._current = VirtualSlurm(folder, accounting, min_job_age=2 if accounting else 600)
            self._current.start()
        return self._current

    def stop(self) -> None:
        """Stops the one that runs, if any does."""
        if self._current is not None:
            self._current.stop()
            self._current = None


@pytest.fixture(scope="session")
def one_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneSlurm]:
    one = OneSlurm(tmp_path_factory.mktemp)
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture
def slurm(one_slurm: OneSlurm) -> VirtualSlurm:
    """A Slurm that keeps no accounts."""
    return one_slurm.get(accounting=False)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset, made once."""
    return tmp_path_factory.mktemp("cache")


class Cluster:
    """Commands on a login node, in a folder of the test's own."""

    def __init__(self, slurm: VirtualSlurm, cache: Path, folder: Path) -> None:
        self.slurm, self.cache, self.folder = slurm, cache, folder
        self.run_dir = folder / "run"
        self._started: list[subprocess.Popen[str]] = []

    def start(self, command: str, *overrides: str) -> subprocess.Popen[str]:
        """`ssodbench COMMAND`, in a process group of its own as a shell starts it."""
        given = [*overrides, f"cache_dir={self.cache}"]
        process = subprocess.Popen(
            [*SSODBENCH, command, *given],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def submit(self, *overrides: str) -> subprocess.Popen[str]:
        """A small training as a job."""
        return self.start("train", *SMALL, f"run_dir={self.run_dir}", *overrides)

    def train(self, *overrides: str) -> tuple[int, str]:
        """Exit code and words of a small training as a job, once it has ended."""
        return end_of(self.submit(*overrides))

    @property
    def job(self) -> str:
        """Number of the run's job, once it has one."""
        return json.loads((self.run_dir / "slurm" / "jobs.json").read_text())["run"]["id"]

    @property
    def log(self) -> str:
        """What the job has said."""
        return (self.run_dir / "slurm" / f"{self.job}.log").read_text()

    def record(self) -> dict[str, Any]:
        """The run's record."""
        return json.loads((self.run_dir / "record.json").read_text())

    def wait_for_step(self, step: int) -> int:
        """Waits until the run has done so many steps; gives how many it has done."""
        until(lambda: self.step() >= step, f"step {step}")
        return self.step()

    def step(self) -> int:
        """Steps that the run has done."""
        try:
            return int(json.loads((self.run_dir / "progress.json").read_text())["step"])
        except (OSError, ValueError):
            return 0

    def preempt(self, seconds: int = 3) -> str:
        """A job that is more urgent takes both nodes; gives its number."""
        command = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null"]
        return subprocess.check_output([*command, f"--wrap=sleep {seconds}"], cwd=self.folder, text=True).strip()

    def close(self) -> None:
        """Ends what the test has started."""
        subprocess.run(["scancel", "-u", "root"], check=False)
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        until(lambda: not ask("squeue", "-h"), "an empty queue")


def environment() -> dict[str, str]:
    """Variables of the commands, and through them of the jobs."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "PYTHONPATH": str(ROOT)}


def end_of(process: subprocess.Popen[str], seconds: float = 400.0) -> tuple[int, str]:
    """Exit code and words of a process."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def memory_of(process: subprocess.Popen[str]) -> float:
    """MB that a process takes with its children, 0 once it has ended."""
    with suppress(psutil.Error):
        own = psutil.Process(process.pid)
        return sum(one.memory_info().rss for one in (own, *own.children(recursive=True))) / 2**20
    return 0.0


def until(holds: Callable[[], Any], what: str, seconds: float = 400.0) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"no {what} after {seconds:.0f} s"
        time.sleep(0.2)


def shown_by_slurm(job: str, key: str) -> str:
    """A value of `scontrol show job`."""
    words = dict(word.split("=", 1) for word in ask("scontrol", "-o", "show", "job", job).split() if "=" in word)
    return words.get(key, "")


@pytest.fixture
def cluster(slurm: VirtualSlurm, cache: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(slurm, cache, tmp_path)
    yield made
    made.close()
