"""The smoke suite for real: nine trainings as processes, scored, recorded and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cli import main


@pytest.mark.timeout(900)
def test_smoke_suite_runs_nine_cells_and_reports_them(
    tmp_path: Path, cache_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = ["data.train_images=200", "data.val_images=20", "logging.loggers=[]"]
    command = ["suite", "suite=smoke", *small, f"runs_dir={tmp_path / 'my runs'}", f"cache_dir={cache_dir}"]
    assert main(command) == 0
    folder = tmp_path / "my runs" / "smoke"
    records = [json.loads(path.read_text()) for path in folder.glob("*/record.json")]
    assert len(records) == 9
    assert all(record["status"] == "ok" and record["ap"] is not None for record in records)
    assert {(record["method"], record["percent"]) for record in records} == {
        (method, percent) for method in ("supervised", "stac", "soft_teacher") for percent in (1.0, 5.0, 10.0)
    }
    assert len({record["split_sha256"] for record in records}) == 3
    assert len({record["steps"] for record in records}) == 1
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert "Soft Teacher" in capfd.readouterr().out
    assert main(command) == 0  # nothing is left to do
    assert "0 to run" in capfd.readouterr().out
