"""Settings of a training step side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cli import main
from harness.core.types import UserError
from harness.engine.sweep import combinations, line_of
from tests.harness.engine.test_step_profile import SMALL

pytestmark = pytest.mark.timeout(300)


def test_every_combination_once() -> None:
    found = combinations({"batch.micro": [4, None], "precision": ["fp32", "bf16"]})
    assert [line_of(chosen) for chosen in found] == [
        "batch.micro=4 precision=fp32",
        "batch.micro=4 precision=bf16",
        "batch.micro=null precision=fp32",
        "batch.micro=null precision=bf16",
    ]
    with pytest.raises(UserError, match="makes 25 combinations"):
        combinations({"batch.micro": list(range(5)), "threads": list(range(5))})


def test_a_sweep_recommends_what_was_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile_sweep.json"
    options = ["profile.sweep={batch.micro: [2, 8], pipeline.prefetch: [1]}", "profile.seconds=0.6", "profile.rounds=2"]
    command = ["profile", *SMALL, "method=mean_teacher", *options, f"out={out}", f"cache_dir={tmp_path / 'cache'}"]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert [row["settings"] for row in found["variants"]] == [
        {"batch.micro": 2, "pipeline.prefetch": 1},
        {"batch.micro": 8, "pipeline.prefetch": 1},
    ]
    best = max(found["variants"], key=lambda row: row["images_per_s"])
    assert found["recommendation"] == line_of(best["settings"])
    assert "best_over_it" not in best
    assert [len(row["rounds"]) for row in found["variants"]] == [2, 2]
    assert found["changes_result"] == ["batch.micro"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"fastest on this machine: {found['recommendation']}" in printed
    assert "batch.micro changes what is computed" in printed
