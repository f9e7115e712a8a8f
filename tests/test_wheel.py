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
