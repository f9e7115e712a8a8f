"""Benchmarks beside their baseline: quotients, the bound, and the exit code."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "compare.py"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it runs no benchmark, and its reference workload takes half a second."""
    spec = importlib.util.spec_from_file_location("compare_script", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_script", module)
    spec.loader.exec_module(module)
    return module


def _report(**medians: float) -> dict[str, Any]:
    rows = [{"fullname": name, "stats": {"median": median}} for name, median in medians.items()]
    return {"code": 0, "reference": 0.5, "report": {"benchmarks": rows}}


def test_a_regression_fails_and_is_named(compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--out={tmp_path / 'out.json'}", f"--baselines={tmp_path / 'baselines'}"]
    compare.run = lambda _: _report(a=1.0, b=2.0)
    assert compare.main([*options, "--write"]) == 0
    assert json.loads(next((tmp_path / "baselines").iterdir()).read_text())["quotients"] == {"a": 2.0, "b": 4.0}
    # twice as slow a machine: the reference workload takes twice as long too
    compare.run = lambda _: {**_report(a=2.0, b=4.0, c=9.0), "reference": 1.0}
    assert compare.main(options) == 0
    assert "1 of them without a baseline, 0 slower" in capsys.readouterr().out
    compare.run = lambda _: _report(a=1.25, b=2.8)
    assert compare.main(options) == 1
    said = capsys.readouterr().out
    assert "b: 1.40 times the baseline" in said
    assert "a:" not in said
    assert compare.main([*options, "--bound=1.5"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["seconds"] == {"a": 1.25, "b": 2.8}


def test_a_benchmark_that_fails_is_told_by_the_exit_code(compare: Any, tmp_path: Path) -> None:
    compare.run = lambda _: {**_report(a=1.0), "code": 3}
    options = [f"--out={tmp_path / 'o.json'}", f"--baselines={tmp_path}"]
    assert compare.main([*options, "--write"]) == 3
    assert compare.main(options) == 3


def test_without_a_baseline_nothing_is_run(compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([f"--out={tmp_path / 'o.json'}", f"--baselines={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("there is no baseline of this kind of machine")
    assert "make benchmarks ARGS=--write" in said
    assert not list(tmp_path.iterdir())


def test_the_reference_takes_measurable_time(compare: Any) -> None:
    assert compare.reference_seconds() > 0.01
    assert compare.machine_kind().endswith("-cores")
