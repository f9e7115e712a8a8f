"""What `doctor` says of a machine that works, and of one in which something is made not to."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
from pathlib import Path

import pytest

from harness.cli import main
from harness.core import files
from harness.engine import doctor

pytestmark = pytest.mark.timeout(180)


def test_this_machine_can_train_and_the_file_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", f"out={tmp_path / 'doctor.json'}", f"run_dir={tmp_path / 'run'}", "device=cpu"])
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "doctor.json").read_text())
    by_name = {found["what"]: found for found in content["findings"]}
    assert code == 0, said
    assert "training can work here" in said
    assert {
        "Python",
        "torch",
        "GPU",
        "DALI on the CPU",
        "memory",
        "shared memory",
        "open files",
        "cache_dir",
        "run_dir",
    } <= set(by_name)
    assert by_name["DALI on the CPU"]["state"] == "ok"
    assert by_name["run_dir"]["state"] == "ok"
    assert content["environment"]
    assert os.listdir(tmp_path) == ["doctor.json"]  # nothing is left of what was tried


def test_a_mount_without_locks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "take_lock", refuse)
    found = doctor.mount(tmp_path)
    assert found.state == "fails"
    assert "locking does not work" in found.said
    assert "local disk" in found.remedy


def test_a_lock_that_keeps_nobody_out_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "take_lock", lambda *_, **__: None)
    assert "same lock" in doctor.mount(tmp_path).said


def test_broken_dali_fails_only_the_pipeline_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "python", stderr="Traceback\nImportError: libcuda.so.1\n")

    monkeypatch.setattr(subprocess, "run", fail)
    needed = doctor._dali("dali", "cpu")
    assert (needed.state, "libcuda.so.1" in needed.said) == ("fails", True)
    assert doctor._dali("torchvision", "cpu").state == "note"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    missing = doctor._dali("dali", "cpu")
    assert missing.said == "not installed"
    assert "cu13" in missing.remedy
    assert "pipeline=torchvision" in missing.remedy


def test_a_folder_that_cannot_be_written_fails_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "file" not in str(path) and real(path, mode))
    monkeypatch.setattr(doctor, "_dali", lambda *_: doctor.Outcome("DALI", "ok", ""))
    assert main(["doctor", f"runs_dir={tmp_path / 'file' / 'runs'}", "device=cpu"]) == 1
    said = capsys.readouterr().out
    assert "training cannot work here: runs_dir" in said
    assert "runs_dir=DIR" in said


def test_few_open_files_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    found = doctor._open_files()
    assert found.state == "note"
    assert "ulimit -n 4096" in found.remedy


def test_cuda_without_a_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert doctor._gpu("cuda").state == "fails"
    assert doctor._gpu("auto").state == "note"
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    assert "update the driver" in doctor._gpu("auto").remedy
