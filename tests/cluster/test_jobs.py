"""Runs as jobs of a real Slurm: nothing that was computed is lost, and nobody is left waiting."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from harness.core.lock import RunLock
from harness.engine import checkpoint
from tests.cluster.conftest import (
    SMALL,
    SSODBENCH,
    UNSAVED,
    Cluster,
    end_of,
    environment,
    memory_of,
    shown_by_slurm,
    until,
)
from tests.cluster.virtual_slurm import ask


def _saved_step(cluster: Cluster) -> int:
    """The step of the newest checkpoint."""
    state = checkpoint.newest(cluster.run_dir)
    assert state is not None
    return int(state["step"])


_PREEMPTED = ["schedule.steps=160", UNSAVED]


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the run that is pre-empted below, trained here without a break."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    local = [word for word in SMALL if not word.startswith("launcher")]
    command = [*SSODBENCH, "train", *local, *_PREEMPTED, f"run_dir={run_dir}", f"cache_dir={cache}"]
    subprocess.run(command, check=True, cwd=run_dir.parent, env=environment(), stdout=subprocess.DEVNULL)
    return json.loads((run_dir / "record.json").read_text())["weights_sha256"]


@pytest.mark.parametrize("partition", ["main", "cancelled"])
def test_a_preempted_job_loses_no_step_and_ends_as_one_that_was_not(
    cluster: Cluster, partition: str, undisturbed: str
) -> None:
    """Slurm's default: SIGCONT, SIGTERM and a grace time; the partition then requeues or cancels what is left."""
    given = [*_PREEMPTED, f"launcher.partition={partition}"]
    command = cluster.submit(*given)
    done = cluster.wait_for_step(20)
    cluster.preempt()
    code, said = end_of(command)
    assert code == 0, said + cluster.log
    record = cluster.record()
    assert record["status"] == "ok"
    (resumed,) = record["resumed_from"]
    assert resumed >= done  # the step was finished and saved
    assert record["job"] == {"id": cluster.job, "hosts": ["n1"], "requeues": 1}
    assert "goes back into the queue" in cluster.log
    assert re.search(r"job \d+: PENDING .*\n(.*\n)*.*RUNNING", said)
    assert record["weights_sha256"] == undisturbed


def test_a_preempted_job_of_two_nodes_loses_no_step(cluster: Cluster) -> None:
    command = cluster.submit("schedule.steps=120", UNSAVED, "launcher.nodes=2", "batch.micro=2")
    done = cluster.wait_for_step(10)
    cluster.preempt()
    code, said = end_of(command)
    assert code == 0, said + cluster.log
    record = cluster.record()
    assert record["world_size"] == 2
    assert record["resumed_from"][0] >= done
    assert record["job"]["hosts"] == ["n1", "n2"]
    assert record["job"]["requeues"] == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_signal_before_the_time_limit_saves_and_requeues(cluster: Cluster, nodes: int) -> None:
    given = ["schedule.steps=120", UNSAVED, f"launcher.nodes={nodes}", "batch.micro=2"]
    command = cluster.submit(*given)
    done = cluster.wait_for_step(10)
    subprocess.run(["scancel", "--signal=USR2", cluster.job], check=True)
    code, said = end_of(command)
    assert code == 0, said + cluster.log
    assert cluster.record()["resumed_from"][0] >= done


def test_a_time_limit_saves_and_requeues(cluster: Cluster) -> None:
    """Slurm counts in minutes, and sends the signal up to a minute early."""
    given = ["schedule.steps=100000", UNSAVED, "launcher.time=2:00", "launcher.signal_seconds=60"]
    cluster.submit(*given)
    until(lambda: (cluster.run_dir / "slurm/jobs.json").exists(), "a job")
    until(lambda: shown_by_slurm(cluster.job, "Restarts") == "1", "a second start")
    assert _saved_step(cluster) > 5
    assert "saved its state and goes back into the queue" in cluster.log


def test_requeues_have_an_end(cluster: Cluster) -> None:
    command = cluster.submit("schedule.steps=100000", UNSAVED, "launcher.requeues=0")
    cluster.wait_for_step(5)
    subprocess.run(["scancel", "--signal=USR2", cluster.job], check=True)
    code, said = end_of(command)
    assert code == 128 + signal.SIGUSR2
    assert "launcher.requeues=0 are used up" in said
    assert shown_by_slurm(cluster.job, "JobState") == "FAILED"
    assert cluster.record()["status"] == "interrupted"


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_cancelled_job_is_saved_and_told_within_a_minute(cluster: Cluster, nodes: int) -> None:
    """The cluster keeps no accounts."""
    command = cluster.submit("schedule.steps=100000", UNSAVED, f"launcher.nodes={nodes}", "batch.micro=2")
    done = cluster.wait_for_step(10)
    subprocess.run(["scancel", cluster.job], check=True)
    begin = time.monotonic()
    code, said = end_of(command)
    assert code == 1
    assert time.monotonic() - begin < 60
    assert f"job {cluster.job} ended as CANCELLED" in said.splitlines()[-1]
    assert "start the same command again" in said.splitlines()[-1]
    assert shown_by_slurm(cluster.job, "JobState") == "CANCELLED"
    assert cluster.record()["status"] == "interrupted"
    assert _saved_step(cluster) >= done


def test_a_job_cancelled_in_the_queue_is_told(cluster: Cluster) -> None:
    command = cluster.submit("launcher.parameters.hold=true")
    until(lambda: (cluster.run_dir / "slurm/jobs.json").exists(), "a job")
    subprocess.run(["scancel", cluster.job], check=True)
    code, said = end_of(command)
    assert code == 1
    assert f"job {cluster.job} ended as CANCELLED" in said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_same_command_attaches_to_the_job_of_one_that_has_gone(cluster: Cluster, number: int) -> None:
    first = cluster.submit("schedule.steps=300", UNSAVED)
    cluster.wait_for_step(3)
    job = cluster.job
    print(f"\nwaiting for a job: {memory_of(first):.0f} MB")  # noqa: T201
    os.killpg(first.pid, number)
    code, said = end_of(first)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or f"scancel {job}" in said
    code, said = cluster.train("schedule.steps=300", UNSAVED)
    assert code == 0
    assert f"job {job} of this run is in the queue already" in said
    assert cluster.job == job
    assert cluster.record()["resumed_from"] == []
    code, said = cluster.train("schedule.steps=300", UNSAVED)
    assert code == 0
    assert "is finished" in said  # without a job


def test_a_job_waits_for_the_process_of_before(cluster: Cluster) -> None:
    lock = RunLock(cluster.run_dir).acquire()
    command = cluster.submit("schedule.steps=6")
    until(lambda: "waiting up to 600 s for the run folder" in _log(cluster), "word of waiting")
    lock.release()
    assert end_of(command)[0] == 0
    assert cluster.record()["status"] == "ok"


def test_a_job_waits_no_longer_than_is_said(cluster: Cluster) -> None:
    lock = RunLock(cluster.run_dir).acquire()
    code, said = cluster.train("launcher.lock_seconds=2")
    lock.release()
    assert code == 2
    assert f"is held by process {os.getpid()}" in said


def _log(cluster: Cluster) -> str:
    try:
        return cluster.log
    except OSError:
        return ""


def test_exit_codes_reach_slurm(cluster: Cluster) -> None:
    mistake = f"detector.weights={cluster.folder / 'nothing.safetensors'}"
    code, said = cluster.train(mistake)
    assert code == 2, said
    assert "nothing.safetensors" in said
    assert shown_by_slurm(cluster.job, "JobState") == "FAILED"
    assert shown_by_slurm(cluster.job, "ExitCode") == "2:0"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_was_asked_for_and_is_not_there_is_told(cluster: Cluster, device: str) -> None:
    """The nodes have files in place of GPUs, which Slurm gives away, and no driver."""
    code, said = cluster.train(f"device={device}", "devices=2", "batch.micro=2")
    assert code == 2
    assert f"asked for devices=2 on n1 by device={device}, but CUDA is not there" in said
    assert "say device=cpu" in said
    assert not (cluster.run_dir / "record.json").exists()
    assert (
        shown_by_slurm(cluster.job, "Restarts") == "0"
    )  # the other process was ended for it, and that is no pre-emption


def test_a_lost_node_is_survived(cluster: Cluster) -> None:
    """The job is NODE_FAIL for some seconds before it is PENDING again, which is no end."""
    command = cluster.submit("schedule.steps=200", "checkpointing.every=10")
    cluster.wait_for_step(15)
    (node,) = ask("squeue", "-h", "-j", cluster.job, "-o", "%N").split()
    cluster.slurm.lose_node(node)
    try:
        code, said = end_of(command)
    finally:
        cluster.slurm.start_node(node)
        cluster.slurm.wait_for_nodes()
    assert code == 0, said + cluster.log
    record = cluster.record()
    assert record["status"] == "ok"
    assert record["resumed_from"][0] >= 10
    assert record["job"]["hosts"] != [node]


def test_a_result_of_an_earlier_job_is_not_read(cluster: Cluster) -> None:
    """Numbers of jobs begin anew with a new controller."""
    last = int(subprocess.check_output(["sbatch", "--parsable", "-o", "/dev/null", "--wrap=true"], cwd=cluster.folder))
    folder = cluster.run_dir / "slurm"
    folder.mkdir(parents=True)
    (folder / f"{last + 1}.exit").write_text("0\n")
    (folder / "jobs.json").write_text(f'{{"run": {{"id": "{last}", "name": "run"}}}}')
    code, said = cluster.train(f"detector.weights={cluster.folder / 'nothing.safetensors'}")
    assert code == 2, said
    assert cluster.job == str(last + 1)
    assert (folder / f"{last + 1}.exit").read_text() == "2\n"


def test_what_slurm_refuses_is_one_sentence(cluster: Cluster) -> None:
    code, said = cluster.train("launcher.partition=nowhere")
    assert code == 1
    (line,) = said.splitlines()
    assert "invalid partition specified: nowhere" in line


def test_options_reach_slurm(cluster: Cluster) -> None:
    given = ["launcher.time=2-00:00:00", "launcher.memory=512M", "launcher.exclude=n[1]", "launcher.wait=false"]
    more = [
        "launcher.parameters.comment=mine",
        "launcher.setup=['export MARK=set', 'echo mark $MARK']",
        "launcher.cpus=2",
    ]
    assert cluster.train(*given, *more)[0] == 0
    for key, value in {
        "TimeLimit": "2-00:00:00",
        "MinMemoryNode": "512M",
        "ExcNodeList": "n1",
        "Comment": "mine",
    }.items():
        assert shown_by_slurm(cluster.job, key) == value, key
    until(lambda: (cluster.run_dir / "record.json").exists() and cluster.record()["status"] == "ok", "the end")
    assert "mark set" in cluster.log
    assert cluster.record()["job"]["hosts"] == ["n2"]
