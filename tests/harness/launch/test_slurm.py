"""Jobs of Slurm with stand-ins for its programs; tests/cluster has a real one."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import main
from harness.config import compose
from harness.config.identity import config_sha256
from harness.config.make import make
from harness.core.stopping import note_failure
from harness.core.types import RunError, UserError
from harness.launch import ranks, slurm
from harness.launch.sbatch import BatchJob, _ranges
from harness.launch.slurm_queue import JobState, NoAnswer, ended, listed
from harness.launch.submitted import JobEntry, Submitted

Programs = Callable[..., Path]

# What Slurm 22.05 and 23.11 answer, on clusters with cgroups and accounting.
SACCT = {
    "OUT_OF_MEMORY|0:125|n1|7\n": JobState("7", "OUT_OF_MEMORY", "", "n1", code=-125),
    "CANCELLED by 1000|0:0|n1|7\n": JobState("7", "CANCELLED", "by 1000", "n1", code=0),
    "NODE_FAIL|1:0|n1|7\nCOMPLETED|0:0|n2|7\n": JobState("7", "COMPLETED", "", "n2", code=0),
    "TIMEOUT|0:0|n[1-2]|7\n": JobState("7", "TIMEOUT", "", "n[1-2]", code=0),
    "FAILED|2:0|n1|7\nFAILED|2:0|n1|7_3\n": JobState("7", "FAILED", "", "n1", code=2),
}
SCONTROL = {
    "JobId=7 JobName=x JobState=FAILED Reason=NonZeroExitCode Dependency=(null) ExitCode=137:0 NodeList=n1": JobState(
        "7", "FAILED", "NonZeroExitCode", "n1", code=137
    ),
    "JobId=7 JobState=NODE_FAIL Reason=NodeDown Dependency=(null) ExitCode=0:0 NodeList=n1": JobState(
        "7", "NODE_FAIL", "NodeDown", "n1", code=0
    ),
    "JobId=9 ArrayJobId=7 ArrayTaskId=3 JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125 NodeList=n2": JobState(
        "7", "OUT_OF_MEMORY", "OutOfMemory", "n2", code=-125
    ),
}
UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SILENT = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


# sacct 22.05 of arrays that were cancelled before any of their tasks ran.
SACCT_ARRAYS = [
    ("9_[0%1]", "9_0", True),
    ("9_[0-3,7%4]", "9_3", True),
    ("9_[0-3,7%4]", "9_7", True),
    ("9_[0-3,7%4]", "9_5", False),
    ("19_[0-3]", "9_3", False),
    ("9_[0-3]", "9", False),
]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Makes shell scripts all that PATH has of Slurm, whatever the machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make_programs(**scripts: str) -> Path:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return make_programs


def _cat(tmp_path: Path, text: str) -> str:
    file = tmp_path / f"said-{len(list(tmp_path.iterdir()))}"
    file.write_text(text)
    return f"while IFS= read -r line; do echo \"$line\"; done < '{file}'"


@pytest.mark.parametrize("said", list(SACCT))
def test_what_sacct_says_is_read(tmp_path: Path, programs: Programs, said: str) -> None:
    programs(scontrol=UNKNOWN, sacct=_cat(tmp_path, said))
    assert ended("7", tmp_path) == SACCT[said]


@pytest.mark.parametrize("said", list(SCONTROL))
def test_what_scontrol_says_is_read(tmp_path: Path, programs: Programs, said: str) -> None:
    programs(scontrol=_cat(tmp_path, said + "\n"), sacct="exit 1")
    assert ended("7", tmp_path) == SCONTROL[said]


def test_a_job_that_slurm_has_forgotten_is_known_by_its_exit_code(tmp_path: Path, programs: Programs) -> None:
    programs(scontrol=UNKNOWN, sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert ended("7", tmp_path).state == "GONE"
    (tmp_path / "7.exit").write_text("2\n")
    assert ended("7", tmp_path) == JobState("7", "FAILED", code=2)
    (tmp_path / "7.exit").write_text("0\n")
    assert ended("7", tmp_path).state == "COMPLETED"
    programs(scontrol=SILENT, sacct=SILENT)
    assert ended("7", tmp_path).state == "COMPLETED"


def test_the_queue_is_read(tmp_path: Path, programs: Programs) -> None:
    rows = "7_0|RUNNING|n1|None|a|b\n7_1|PENDING||Resources|a|b\n8|COMPLETED|n[1-2]|None|c\n"
    programs(squeue=_cat(tmp_path, rows))
    states = listed()
    assert states["7_0"] == JobState("7_0", "RUNNING", "", "n1", "a|b")
    assert states["7_1"] == JobState("7_1", "PENDING", "Resources", "", "a|b")
    assert [state.is_over for state in states.values()] == [False, False, True]
    assert list(listed(["8", "9"])) == ["8"]
    assert listed([]) == {}
    programs(squeue=SILENT)
    with pytest.raises(NoAnswer, match="Unable to contact"):
        listed()


def test_a_number_that_was_given_out_anew_is_another_job(tmp_path: Path, programs: Programs) -> None:
    programs(squeue=_cat(tmp_path, "7|RUNNING|n1|None|other\n8|RUNNING|n1|None|mine\n9|FAILED|n1|None|mine\n"))
    jobs = {name: JobEntry(name, "mine") for name in "789"}
    assert list(slurm.in_queue(jobs)) == ["8"]
    programs(squeue=SILENT)
    with pytest.raises(RunError, match="Slurm does not say"):
        slurm.in_queue(jobs)


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["PENDING", "RUNNING", "COMPLETED"], 0),
        (["RUNNING", "NODE_FAIL", "NODE_FAIL", "PENDING", "RUNNING", "COMPLETED"], 0),
        (["RUNNING", "PREEMPTED", "PENDING", "SILENT", "RUNNING", "COMPLETED"], 0),
        (["RUNNING", "GONE", "PENDING", "RUNNING", "COMPLETED"], 0),
        (["RUNNING", *["NODE_FAIL"] * 9], None),
        (["RUNNING", *["GONE"] * 9], None),
        (["RUNNING", *["CANCELLED"] * 9], None),
    ],
)
def test_a_state_that_is_passing_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: list[str], code: int | None
) -> None:
    seen = iter(states)
    now = ["PENDING"]

    def look(_: str) -> JobState | None:
        now[0] = next(seen)
        return None if now[0] == "SILENT" else JobState("7", now[0])

    clock = itertools.count()
    monkeypatch.setattr(slurm, "_look", look)
    monkeypatch.setattr(slurm, "ended", lambda *_: JobState("7", now[0], "Reason"))
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(slurm.clock, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(slurm, "PASSING_SECONDS", 8.0)
    monkeypatch.setattr(slurm.StopRequest, "install", lambda _: None)
    if code is not None:
        assert slurm.wait_for("7", tmp_path, tmp_path) == code
        assert next(seen, None) is None
        return
    with pytest.raises(RunError, match=rf"job 7 ended as {states[-1]} \(Reason\) without a result"):
        slurm.wait_for("7", tmp_path, tmp_path)


def test_the_error_of_a_job_is_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What follows it in the log is Slurm's."""
    (tmp_path / "7.log").write_text("step 3\nssodbench: the loss is not finite\nsrun: error: n1: task 0: Exited\n")
    assert slurm.result_of(JobState("7", "FAILED", "NonZeroExitCode", "n1", code=1), tmp_path, tmp_path) == 1
    assert "job 7 ended with exit code 1 on n1: the loss is not finite; see" in capfd.readouterr().err


def _batch(*overrides: str) -> BatchJob:
    cfg = compose.load(["launcher=slurm", *overrides])
    launcher = make("launcher", cfg.launcher)
    launcher.check(cfg)
    return launcher.batch(cfg, "run", Path("/logs"), {0: slurm.command_of(cfg)})


def test_options_follow_the_configuration() -> None:
    given = {
        "launcher.partition=gpu": "--partition=gpu",
        "launcher.account=lab": "--account=lab",
        "launcher.qos=high": "--qos=high",
        "launcher.gres=gpu:h100:8": "--gres=gpu:h100:8",
        "launcher.constraint=a|b": "--constraint=a|b",
        "launcher.time=2-00:00:00": "--time=2-00:00:00",
        "launcher.memory=64G": "--mem=64G",
        "launcher.cpus=4": "--cpus-per-task=4",
        "launcher.exclude=n[1-2,7]": "--exclude=n[1-2,7]",
        "launcher.nodelist=n3": "--nodelist=n3",
        "launcher.reservation=r": "--reservation=r",
        "launcher.mail=me@here.org": "--mail-user=me@here.org",
        "launcher.mail_type=ALL": "--mail-type=ALL",
        "launcher.signal_seconds=300": "--signal=USR2@300",
        "launcher.parameters.spread_job=true": "--spread-job",
        "launcher.parameters.comment=hello": "--comment=hello",
        "devices=8": "--ntasks-per-node=8",
    }
    options = _batch(*given, "batch.micro=2").all_options
    for override, option in given.items():
        assert option in options, override
    assert not any("gpus-per-node" in option for option in options)
    assert "--gpus-per-node=8" in _batch("devices=8", "batch.micro=2").all_options
    assert not any(re.match("--(gpus|partition|mail|mem)", option) for option in _batch("device=cpu").all_options)
    two = _batch("launcher.parameters={comment: a b, nice: 10}", "launcher.nodes=2", "batch.micro=8")
    assert {"--comment=a b", "--nice=10", "--nodes=2", "--ntasks=2"} <= set(two.all_options)


def test_the_script_is_what_a_shell_reads() -> None:
    setup = "launcher.setup=[module load cuda, 'source env.sh']"
    batch = _batch(setup, "launcher.srun_args=['--mpi=none']", "launcher.container=/images/x", "run_dir=a b'c")
    script = batch.script()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "\nmodule load cuda\nsource env.sh\n" in script
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=8 --export=ALL --container=/images/x --mpi=none" in script
    case = re.search(r"  0\) (set -- .*) ;;", script)
    assert case is not None
    said = subprocess.run(["bash", "-c", f'{case[1]}; printf "%s\\n" "$@"'], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[4:][-1] == "run_dir=a b'c"


@pytest.mark.parametrize(("number", "job", "found"), SACCT_ARRAYS)
def test_tasks_that_never_ran_are_found_in_the_accounts(
    tmp_path: Path, programs: Programs, number: str, job: str, found: bool
) -> None:
    row = f"CANCELLED by 0|0:0|None assigned|{number}\n"
    programs(scontrol=UNKNOWN, sacct=_cat(tmp_path, row))
    assert ended(job, tmp_path) == (
        JobState(job, "CANCELLED", "by 0", code=0) if found else JobState(job, "GONE", ended("1", tmp_path).reason)
    )


@pytest.mark.parametrize(("failure", "code", "requeued"), [("echo 2 > $SSODBENCH_FAILURE", 2, False), (":", 143, True)])
def test_a_failure_is_not_taken_for_the_end_of_those_that_it_ends(
    tmp_path: Path, programs: Programs, failure: str, code: int, requeued: bool
) -> None:
    """srun ends the other processes by SIGTERM, and gives their code, which is the higher one."""
    job = BatchJob("run", tmp_path, {0: ["train"]}, requeues=5)
    programs(
        srun=f"{failure}; exit 143",
        squeue="echo RUNNING",
        scontrol=f"echo $* >> {tmp_path}/asked",
        sleep=f"echo 143 > {tmp_path}/requeued; kill $PPID",
    )
    (tmp_path / "bin/rm").symlink_to("/bin/rm")
    (tmp_path / "bin/mv").symlink_to("/bin/mv")
    (tmp_path / "bin/cat").symlink_to("/bin/cat")
    (tmp_path / "7.failure").write_text("1\n")  # of an earlier job of that number
    environment = {"SLURM_JOB_ID": "7", "PATH": str(tmp_path / "bin")}
    done = subprocess.run(["/bin/bash"], input=job.script(), text=True, env=environment, check=False)
    assert (tmp_path / "asked").exists() == requeued
    if not requeued:
        assert done.returncode == code
        assert (tmp_path / "7.exit").read_text() == f"{code}\n"


def test_the_first_failure_of_a_group_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_failure(2)  # nobody has asked for it
    monkeypatch.setenv("SSODBENCH_FAILURE", str(tmp_path / "failure"))
    for code in (0, 143, 140, 130):
        note_failure(code)
    assert not (tmp_path / "failure").exists()
    for code in (2, 1):
        note_failure(code)
    assert (tmp_path / "failure").read_text() == "2\n"
    (tmp_path / "failure").unlink()
    assert main(["train", "no_such_key=1"]) == 2
    assert (tmp_path / "failure").read_text() == "2\n"


@pytest.mark.parametrize(
    ("numbers", "said"), [([0], "0"), ([0, 1, 2], "0-2"), ([5, 1, 2, 7, 8], "1-2,5,7-8"), ([3, 1], "1,3")]
)
def test_numbers_of_tasks(numbers: list[int], said: str) -> None:
    assert _ranges(numbers) == said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launcher.time=60"], "launcher.time=60 must be a time as Slurm writes it"),
        (["launcher.time=1:00", "launcher.signal_seconds=60"], "not longer than launcher.signal_seconds=60"),
        (["launcher.memory=64"], "launcher.memory=64 must be a number with its unit"),
        (["launcher.nodes=3", "batch.micro=2"], "devices cannot share"),
        (["launcher.gres=gpu:2", "devices=4", "batch.micro=2"], "gives each node 2 GPUs, but devices=4"),
        (["launcher.gres=gpu:h100", "devices=4", "batch.micro=2"], "gives each node 1 GPUs"),
        (["launcher.parameters.time=3"], "launcher.parameters.time is set by launcher.time"),
        (["launcher.parameters.gres=gpu:1"], "is set by launcher.gres"),
        (["launcher.parameters.mail-user=me"], "is set by launcher.mail"),
        (["launcher.parameters={array: 0-3}"], "is set by ssodbench suite"),
        (["launcher.minutes=90"], "launcher.time='0-1:30:00'"),
        (["launcher.cpus_per_device=4"], "launcher.cpus=4"),
        (["launcher.memory_gb=1.5"], "launcher.memory=1536M"),
    ],
)
def test_what_cannot_work_is_told_before_submission(
    tmp_path: Path, programs: Programs, capfd: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    programs(sbatch="echo 1")
    assert main(["train", "launcher=slurm", *overrides, f"run_dir={tmp_path / 'run'}"]) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30:00", 1800), ("1:30:00", 5400), ("2-00", 172_800), ("1-02:03", 93_780), ("1-02:03:04", 93_784)],
)
def test_times_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert slurm._seconds(text) == seconds


def test_a_job_is_submitted_where_there_is_no_gpu(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a login node; the same command finds the job again."""
    programs(sbatch="echo '7;cluster'", squeue="exit 1")
    command = ["train", "launcher=slurm", "device=cuda", "devices=8", "batch.micro=2", "launcher.wait=false"]
    command.append(f"run_dir={tmp_path / 'run'}")
    assert main(command) == 0
    folder = tmp_path / "run" / "slurm"
    assert json.loads((folder / "jobs.json").read_text()) == {"run": {"id": "7", "name": "run"}}
    assert "--gpus-per-node=8" in (folder / "run.sh").read_text()
    assert main(command) == 1  # nobody knows whether it is in the queue
    assert "try again" in capfd.readouterr().err
    programs(sbatch="exit 3", squeue="echo '7|PENDING||Priority|run'")
    assert main(command) == 0
    assert "job 7 of this run is in the queue already: PENDING (Priority)" in capfd.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(command) == 2  # torchrun would submit one job per process


def test_two_commands_do_not_submit_at_once(tmp_path: Path) -> None:
    submitted = Submitted(tmp_path / "slurm")
    with (
        submitted.alone(),
        pytest.raises(UserError, match="another command submits"),
        Submitted(submitted.folder).alone(),
    ):
        pass
    with submitted.alone():
        submitted.add({"a": JobEntry("1", "x")})
        submitted.add({"b": JobEntry("2", "x")})
    assert submitted.read() == {"a": JobEntry("1", "x"), "b": JobEntry("2", "x")}
    submitted.path.write_text("{")
    with pytest.raises(UserError, match=r"jobs\.json"):
        submitted.read()


def test_missing_slurm_is_told(tmp_path: Path, programs: Programs, capfd: pytest.CaptureFixture[str]) -> None:
    programs()
    assert main(["train", "launcher=slurm", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "login node" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("sbatch", "words"),
    [
        (
            "echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1",
            "(Unable to contact slurm controller)",
        ),
        ("echo no number", "(no number)"),
        ("exit 4", "(exit code 4)"),
    ],
)
def test_slurm_that_takes_no_job_is_told_in_one_sentence(
    tmp_path: Path, programs: Programs, capfd: pytest.CaptureFixture[str], sbatch: str, words: str
) -> None:
    programs(sbatch=sbatch)
    assert main(["train", "launcher=slurm", f"run_dir={tmp_path / 'run'}"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"ssodbench: launcher=slurm: Slurm did not take the job {words}")
    assert "sinfo" in line


@pytest.mark.parametrize(
    ("found", "devices", "environment", "device"),
    [
        (0, 1, {}, UserError),
        (0, 2, {"SLURM_LOCALID": "1"}, None),
        (2, 2, {"SLURM_LOCALID": "1"}, "cuda"),
        (1, 2, {"SLURM_GPUS_ON_NODE": "2", "SLURM_LOCALID": "1"}, "cuda"),
        (1, 2, {"SLURM_GPUS_ON_NODE": "1"}, UserError),
        (1, 2, {}, UserError),
    ],
)
def test_a_process_trains_on_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, found: int, devices: int, environment: dict[str, str], device: str | type | None
) -> None:
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: found)
    for key in ("SLURM_LOCALID", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    cfg = compose.load([f"devices={devices}", "batch.micro=2"])
    if device is UserError:
        with pytest.raises(UserError, match=f"devices={devices} on .* by device=auto, but"):
            ranks._device(cfg)
        return
    assert ranks._device(cfg) == device
    assert ranks._device(compose.load(["device=cpu"])) == "cpu"


def test_the_launcher_is_no_part_of_what_a_run_computes() -> None:
    given = ["launcher=slurm", "launcher.qos=x", "launcher.setup=[module load x]", "launcher.parameters.a=b"]
    assert config_sha256(compose.load(given)) == config_sha256(compose.load([]))
