"""Suites as jobs of a real Slurm: handed over at once, finished without anybody waiting."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.cluster.conftest import UNSAVED, Cluster, end_of, memory_of, shown_by_slurm, until
from tests.cluster.virtual_slurm import ask

SUITE = [
    *("suite=smoke", "data.train_images=100", "data.val_images=12", "suite.percents=[10,20]", "batch.labeled=4"),
    *("batch.unlabeled=4", "pipeline=torchvision", "logging.loggers=[]", "logging.every=1", "device=cpu"),
    *("launcher=slurm", "launcher.cpus=1", "report.resamples=0", "report.gallery=0"),
]
STAC = ["suite.methods=[supervised,stac]"]


def _suite(cluster: Cluster, *overrides: str, seconds: float = 400.0) -> tuple[int, str]:
    return end_of(cluster.start("suite", *SUITE, *overrides), seconds)


def _folder(cluster: Cluster) -> Path:
    return cluster.folder / "runs" / "smoke"


def _jobs(cluster: Cluster) -> dict[str, str]:
    """The job of each cell, by the method and the percentage in its name, and that of the report."""
    entries = json.loads((_folder(cluster) / "slurm" / "jobs.json").read_text())
    return {_short(name): entry["id"] for name, entry in entries.items()}


def _short(name: str) -> str:
    match = re.match(r"shapes_(\w+)_soft_teacher-(\d+)pct", name)
    return f"{match[1]} {match[2]}" if match else name


def _records(cluster: Cluster) -> dict[str, dict]:
    files = _folder(cluster).glob("*/record.json")
    return {_short(file.parent.name): json.loads(file.read_text()) for file in files}


def _idle() -> bool:
    return not ask("squeue", "-h")


def test_a_suite_is_submitted_and_finishes_by_itself(cluster: Cluster) -> None:
    begin = time.monotonic()
    command = cluster.start("suite", *SUITE, "suite.percents=[10,20,30]", "suite.jobs=4", UNSAVED)
    peak = 0.0
    while command.poll() is None:
        peak = max(peak, memory_of(command))
        time.sleep(0.3)
    code, said = end_of(command)
    assert code == 0, said
    print(f"\nsubmitting nine cells: {time.monotonic() - begin:.0f} s, {peak:.0f} MB, and nothing after it")  # noqa: T201
    jobs = _jobs(cluster)
    first, second = jobs["supervised 10"].split("_")[0], jobs["stac 10"].split("_")[0]
    assert f"job {first}: 6 cells" in said
    assert f"job {second}: 3 cells, after {first}" in said
    for percent in (10, 20, 30):  # each waits for its own first stage
        assert jobs[f"stac {percent}"].split("_")[1] == jobs[f"supervised {percent}"].split("_")[1]
    assert shown_by_slurm(f"{first}_0", "ArrayTaskThrottle") == "4"
    assert f"aftercorr:{first}_*" in shown_by_slurm(jobs["stac 30"], "Dependency")
    until(_idle, "the end of the suite")
    records = _records(cluster)
    assert len(records) == 9
    assert {record["status"] for record in records.values()} == {"ok"}
    assert {record["suite"] for record in records.values()} == {"smoke"}
    assert {name: record["job"]["id"] for name, record in records.items()} == {
        name: job for name, job in jobs.items() if name != "report"
    }
    assert (_folder(cluster) / "report" / "report.html").exists()
    assert {cell["state"] for cell in json.loads((_folder(cluster) / "suite.json").read_text())["cells"]} == {"ok"}
    code, said = _suite(cluster, "suite.percents=[10,20,30]", "suite.jobs=4", UNSAVED)
    assert code == 0
    assert "0 jobs in the queue, 0 cells to submit" in said
    assert _jobs(cluster) == jobs


def test_a_suite_that_is_preempted_and_cancelled_in_part_is_finished_by_the_same_command(cluster: Cluster) -> None:
    given = [*STAC, "schedule.steps=120", UNSAVED]
    assert _suite(cluster, *given)[0] == 0
    cluster.run_dir = next(iter(_wait_for_folders(cluster, 2)))
    done = cluster.wait_for_step(10)
    urgent = cluster.preempt(600)  # so that the cells wait while they are looked at, however long that takes
    jobs = _jobs(cluster)
    for cell in ("supervised 10", "supervised 20"):
        until(lambda cell=cell: shown_by_slurm(jobs[cell], "Restarts") == "1", "a requeue")
    code, said = _suite(cluster, *given, "suite.status=true")
    assert code == 0
    assert re.search(rf"stac.*10pct.* queued .*job {jobs['stac 10']} PENDING \(Dependency\)", said), said + _logs(
        cluster
    )
    code, said = _suite(cluster, *given)  # all of them are in the queue
    assert "5 jobs in the queue, 0 cells to submit" in said
    assert _jobs(cluster) == jobs
    subprocess.run(["scancel", jobs["supervised 20"], urgent], check=True)
    until(_idle, "the end of the suite")
    records = _records(cluster)
    assert records["supervised 10"]["status"] == records["stac 10"]["status"] == "ok"
    assert records["supervised 10"]["job"]["requeues"] == 1
    assert max(record["resumed_from"][0] for record in records.values() if record["resumed_from"]) >= done
    code, said = _suite(cluster, *given, "suite.status=true")
    assert re.search(rf"supervised.*20pct.* interrupted .*job {jobs['supervised 20']} ended as CANCELLED", said), said
    assert "stac" in said
    code, said = _suite(cluster, *given, "suite.wait=true")
    assert code == 0, said
    assert "2 cells to submit" in said
    records = _records(cluster)
    assert {record["status"] for record in records.values()} == {"ok"}
    again = _jobs(cluster)
    assert again["supervised 10"] == jobs["supervised 10"]
    assert again["supervised 20"] != jobs["supervised 20"]
    html = _folder(cluster) / "report" / "report.html"
    left_by_job = _folder(cluster) / "slurm" / f"{again['report']}.exit"
    assert html.stat().st_mtime <= left_by_job.stat().st_mtime  # who watched did not write it once more


def test_nine_cells_of_which_some_are_killed_cancelled_and_preempted_are_finished(cluster: Cluster) -> None:
    given = ["suite.percents=[10,20,30]", "suite.jobs=3", "schedule.steps=200", UNSAVED]
    assert _suite(cluster, *given)[0] == 0
    jobs = _jobs(cluster)
    preempted, killed, cancelled = _wait_for_folders(cluster, 3)[:3]
    for cluster.run_dir in (killed, cancelled, preempted):
        done = cluster.wait_for_step(5)
    holder = re.search(r"\d+", (killed / "lock").read_text())
    assert holder is not None
    os.kill(int(holder[0]), signal.SIGKILL)
    subprocess.run(["scancel", jobs[_short(cancelled.name)]], check=True)
    until(lambda: shown_by_slurm(jobs[_short(killed.name)], "JobState") == "FAILED", "the end of the killed one")
    cluster.preempt()
    until(lambda: shown_by_slurm(jobs[_short(preempted.name)], "Restarts") == "1", "a requeue")
    until(_idle, "the end of what is left")
    records = _records(cluster)
    first = records[_short(preempted.name)]
    assert (first["status"], first["job"]["requeues"]) == ("ok", 1)
    assert first["resumed_from"][0] >= done
    assert records[_short(cancelled.name)]["status"] == "interrupted"
    assert records[_short(killed.name)]["status"] != "ok"
    finished = {name for name, record in records.items() if record["status"] == "ok"}
    code, said = _suite(cluster, *given)
    assert code == 0, said
    assert f"{9 - len(finished)} cells to submit" in said
    until(_idle, "the end of the suite")
    records = _records(cluster)
    assert len(records) == 9
    assert {record["status"] for record in records.values()} == {"ok"}
    again = _jobs(cluster)
    assert {name for name in jobs if again[name] == jobs[name]} == finished
    assert (_folder(cluster) / "report" / "report.html").exists()


def _logs(cluster: Cluster) -> str:
    """What Slurm and the cells have said."""
    files = [*_folder(cluster).glob("slurm/*.log"), *_folder(cluster).glob("logs/*.log")]
    return "".join(f"\n--- {file.name}\n{file.read_text()[-1500:]}" for file in files)


def _wait_for_folders(cluster: Cluster, count: int) -> list[Path]:
    until(lambda: len(list(_folder(cluster).glob("*/progress.json"))) >= count, "running cells")
    return sorted(file.parent for file in _folder(cluster).glob("*/progress.json"))


def test_a_failed_first_stage_is_told_and_what_waits_for_it_is_taken_out(cluster: Cluster) -> None:
    overrides = (
        "+suite.method_overrides.supervised=['schedule.optimizer.lr=1000', 'schedule.optimizer.weight_decay=1000']"
    )
    given = [*STAC, "suite.percents=[10]", overrides, "schedule.warmup_steps=0"]
    code, said = _suite(cluster, *given)
    assert code == 0, said
    until(_idle, "the end of the suite")
    jobs = _jobs(cluster)
    assert shown_by_slurm(jobs["supervised 10"], "JobState") == "FAILED"
    states = {
        cell["method"]: cell["state"] for cell in json.loads((_folder(cluster) / "suite.json").read_text())["cells"]
    }
    assert states == {"supervised": "failed", "stac": "skipped"}
    code, said = _suite(cluster, *given, "suite.retry_failed=false")
    assert code == 1
    assert "0 cells to submit" in said


def test_one_who_watches_may_go_and_come_back(cluster: Cluster) -> None:
    given = ["suite.methods=[supervised]", "suite.percents=[10]", "schedule.steps=100000", UNSAVED]
    watching = cluster.start("suite", *SUITE, *given, "suite.wait=true")
    _wait_for_folders(cluster, 1)
    jobs = _jobs(cluster)
    print(f"\nwatching a suite: {memory_of(watching):.0f} MB")  # noqa: T201
    for number in (signal.SIGHUP, signal.SIGINT):  # a closed terminal; Ctrl-C
        os.killpg(watching.pid, number)
        code, said = end_of(watching)
        assert code == 128 + number
        assert "the jobs go on" in said
        assert shown_by_slurm(jobs["supervised 10"], "JobState") == "RUNNING"
        watching = cluster.start("suite", *SUITE, *given, "suite.wait=true")
        _wait_for_word(watching, "start")
    os.killpg(watching.pid, signal.SIGKILL)
    code, said = _suite(cluster, *given, "suite.cancel=true")
    assert code == 0
    assert re.search(rf"cancelled 2 jobs: .*{jobs['supervised 10']}", said)
    until(_idle, "an empty queue")
    assert _records(cluster)["supervised 10"]["status"] == "interrupted"
    assert _jobs(cluster)["supervised 10"] == jobs["supervised 10"]


def _wait_for_word(process: subprocess.Popen[str], word: str) -> None:
    """Reads what it says until it says that."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if word in line:
            return
    raise AssertionError(f"it ended without {word}: {said}")
