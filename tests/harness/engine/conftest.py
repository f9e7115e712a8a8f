"""A run that was really trained, for what is done with one afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.cli import main
from tests.bad_input.conftest import make_pets


@pytest.fixture(scope="session")
def pets_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of a student and a teacher on cats and dogs (`PETS/train`, `PETS/val` beside it)."""
    root = tmp_path_factory.mktemp("pets_run")
    make_pets(root)
    before = os.environ.get("SSODBENCH_CACHE")
    os.environ["SSODBENCH_CACHE"] = str(root / "cache")
    try:
        assert main(_command(root)) == 0
    finally:
        if before is None:
            del os.environ["SSODBENCH_CACHE"]
        else:
            os.environ["SSODBENCH_CACHE"] = before
    return root / "run"


def _command(root: Path) -> list[str]:
    return [
        *("train", "method=mean_teacher", "data=custom", f"data.root={root}", f"run_dir={root / 'run'}", "device=cpu"),
        *("schedule=smoke", "schedule.steps=12", "detector.weights=scratch", "split.percent=50", "batch.labeled=4"),
        *("batch.unlabeled=4", "pipeline=torchvision", "pipeline.threads=0", "logging.loggers=[]"),
        *("evaluation.score_threshold=0.02", "evaluation.every=null"),
    ]
