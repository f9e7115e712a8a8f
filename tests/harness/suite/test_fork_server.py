"""Cells that are forked: their streams, ends and signals are those of processes that are started anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.suite.fork_server import ForkServer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server():
    made = ForkServer(dict(os.environ))
    yield made
    made.close()


def run(server: ForkServer, log: Path, *arguments: str, **environment: str) -> int:
    return server.start(list(arguments), log, {**os.environ, **environment}).wait()


def test_output_and_exit_codes(server: ForkServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    assert run(server, log, "--version") == 0
    assert run(server, log, "trian") == 2
    before, version, mistake = log.read_text().splitlines()
    assert (before, version.split()[0]) == ("before", "ssodbench")
    assert "did you mean train" in mistake


def test_environment_is_the_cells_own(server: ForkServer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run(server, tmp_path / f"{name}.log", "config", SSODBENCH_CACHE=str(tmp_path / name)) == 0
        assert f"cache_dir: {tmp_path / name}" in (tmp_path / f"{name}.log").read_text()


@pytest.mark.parametrize("end", ["terminate", "kill", "the suite is killed"])
def test_ends(tmp_path: Path, end: str) -> None:
    """A slow training, which a signal ends before it has begun, and which ends with the suite that is killed."""
    code = f"""
import os, time
from harness.suite.fork_server import ForkServer
server = ForkServer(dict(os.environ))
command = ["train", "schedule.steps=100000", "method=supervised", "run_dir={tmp_path}/run", "data.train_images=40",
           "data.val_images=12", "detector.weights=scratch", "logging.loggers=[]", "cache_dir={tmp_path}/cache",
           "batch.labeled=2"]
cell = server.start(command, "{tmp_path}/log", dict(os.environ))
print(cell.pid, flush=True)
print(cell.wait(), flush=True)
"""
    suite = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert suite.stdout is not None
    pid = int(suite.stdout.readline())
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "progress.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert os.getsid(pid) == pid
    if end == "the suite is killed":
        suite.kill()
    else:
        os.kill(pid, signal.SIGTERM if end == "terminate" else signal.SIGKILL)
        assert int(suite.stdout.readline()) == (143 if end == "terminate" else -signal.SIGKILL)
    suite.wait()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)
    if end != "kill":
        assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))  # it has saved
