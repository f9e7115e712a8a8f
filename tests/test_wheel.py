"""The wheel: used from another folder, without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import harness

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel, built from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left = shutil.ignore_patterns(".*", "runs", "build", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def ssodbench(folder: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Runs a command in a folder with nothing on PATH (no git) and a home that cannot be written; gives its output."""
    plain = {"PATH": "", "HOME": "/proc/none", "LANG": os.environ.get("LANG", "C.UTF-8")}
    command = [sys.executable, "-m", "harness", *arguments]
    ran = subprocess.run(command, cwd=folder, env=plain | environment, capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_commands_that_only_read_need_neither_home_nor_git(installed: Path, tmp_path: Path) -> None:
    paths = {"PYTHONPATH": str(installed)}
    assert "steps: 600" in ssodbench(tmp_path, "config", **paths)
    cells = ssodbench(tmp_path, "suite", "suite=smoke", "suite.status=true", **paths)
    assert all(method in cells for method in ("supervised", "stac", "soft_teacher"))
    assert not (tmp_path / "runs" / "smoke").exists()
    records = sorted((ROOT / "tests" / "data" / "schema1" / "records").glob("*.json"))
    (tmp_path / "kept").mkdir()
    lines = [json.dumps(json.loads(record.read_text())) for record in records]
    (tmp_path / "kept" / "records.jsonl").write_text("\n".join(lines) + "\n")
    ssodbench(tmp_path, "report", "runs_dir=kept", "out=report", "report.resamples=0", **paths)
    assert "Soft Teacher" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "report.json").exists()


WITHOUT_DALI = """
import sys
from importlib.machinery import PathFinder


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[:2] == ["nvidia", "dali"] else super().find_spec(name, path, target)


sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_dali_torchvision_trains_and_is_suggested(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(WITHOUT_DALI)
    paths = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "blocked"), str(installed)]),
        "SSODBENCH_CACHE": str(tmp_path / "cache"),
    }
    small = ["data.train_images=20", "data.val_images=4", "schedule=smoke", "schedule.steps=2", "split.percent=20"]
    small += ["evaluation.every=null", "detector.weights=scratch", "device=cpu", "logging.loggers=[]", "run_dir=run"]
    told = ssodbench(tmp_path, "train", "method=supervised", *small, code=2, **paths)
    assert "ssodbench[cu13]" in told
    assert "pipeline=torchvision" in told
    assert not (tmp_path / "run").exists()
    ssodbench(tmp_path, "train", "method=mean_teacher", *small, "pipeline=torchvision", **paths)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["status"], record["steps"], record["pipeline"]) == ("ok", 2, "torchvision")
    assert record["commit"] is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_works_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "SSODBENCH_CACHE": str(tmp_path / "cache"),
        "NUMBA_CACHE_DIR": str(tmp_path / "numba"),
        "PATH": "/usr/bin:/bin",
    }

    def ssodbench(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "harness", *arguments]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    where = [sys.executable, "-c", "import harness; print(harness.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(installed))
    assert f"ssodbench {harness.__version__}" in ssodbench("--version")
    assert "split.percent" in ssodbench("train", "--help")
    assert "schedule.steps: 180000" in ssodbench("config", "--sources", "preset=paper", "method=soft_teacher")
    small = ["schedule=smoke", "evaluation.every=null", "device=cpu", "pipeline=torchvision", "pipeline.threads=0"]
    ssodbench("train", "method=mean_teacher", "data.train_images=40", "data.val_images=8", "run_dir=runs/a", *small)
    record = json.loads((tmp_path / "runs" / "a" / "record.json").read_text())
    assert record["status"] == "ok"
    ssodbench("report", "runs_dir=runs", "out=report")
    assert (tmp_path / "report" / "report.html").exists()
    ssodbench("export", "run_dir=runs/a", "out=net.safetensors")
    ssodbench("predict", "model=net.safetensors", "images=cache", "out=found", "pipeline=torchvision", "device=cpu")
    assert (tmp_path / "found" / "contact_sheet.jpg").exists()
    assert (installed / "results" / "published.csv").exists()
