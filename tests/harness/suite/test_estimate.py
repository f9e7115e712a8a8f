"""What a suite would cost: arithmetic by hand, cells that cannot work, and a command that runs nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from harness.cli import main
from harness.suite import estimate
from harness.suite.estimate import MethodCost, mean_cost, schedule

COST = MethodCost(
    burn_in=1.0, step=3.0, unlabeled_from=10, spread=0.1, image=0.5, networks=2, val_images=4, checkpoint_mib=7.0
)


def _cfg(**evaluation: Any) -> Any:
    scored = {"every": None, "between": "all", **evaluation}
    kept = {"keep": 2, "keep_every": None}
    return OmegaConf.create({"schedule": {"steps": 30}, "evaluation": scored, "checkpointing": kept})


def _cell(name: str, urgency: float, needs: Any = None, state: str = "waiting") -> Any:
    return SimpleNamespace(name=name, urgency=urgency, needs=needs, state=state)


def test_seconds_of_a_run_by_hand() -> None:
    around = estimate.AROUND + 4 * estimate.SCORING * 2
    assert COST.seconds(_cfg()) == pytest.approx(10 * 1 + 20 * 3 + 4 * 0.5 * 2 + around)
    every = COST.seconds(_cfg(every=10)) - COST.seconds(_cfg())
    assert every == pytest.approx(2 * 4 * 0.5 * 2)  # after 10 and 20 steps, both networks; the end counts anyway
    reported = COST.seconds(_cfg(every=10, between="reported")) - COST.seconds(_cfg())
    assert reported == pytest.approx(2 * 4 * 0.5)
    assert COST.disk_mib(_cfg()) == 14 + estimate.DISK_MIB


def test_cells_are_dealt_out_as_the_suite_does_it() -> None:
    first = _cell("first", 5)
    cells = [first, _cell("after", 1, needs=first), _cell("a", 3), _cell("b", 2)]
    seconds = {"first": 2.0, "after": 4.0, "a": 3.0, "b": 1.0}
    assert schedule(cells, seconds, 1) == 10
    # first and a at 0; at 2 b (more urgent than after) until 3; after from 3 to 7
    assert schedule(cells, seconds, 2) == 7
    assert schedule(cells, seconds, 4) == 6
    assert schedule([], {}, 2) == 0


def test_processes_are_averaged_and_their_differences_kept() -> None:
    slow = MethodCost(**{**{k: getattr(COST, k) for k in COST.__dataclass_fields__}, "step": 4.5, "spread": 0.0})
    found = mean_cost([COST, slow])
    assert found.step == 3.75
    assert found.spread == pytest.approx(((0.5 / 2) ** 2 + 0.1**2) ** 0.5)


@pytest.mark.timeout(300)
def test_a_dry_run_measures_once_and_runs_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["suite", "suite=smoke", "suite.methods=[supervised,mean_teacher]", "suite.percents=[0.1,20]"]
    command += ["suite.dry_run=true", "data.train_images=24", "data.val_images=4", "detector.weights=scratch"]
    command += ["device=cpu", "suite.jobs=1", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    assert main(command) == 1
    said = capfd.readouterr()
    assert said.err.count("measuring a few steps of") == 2
    assert "2 to run, 2 that cannot work" in said.out
    assert "here, 1 side by side" in said.out
    assert not (tmp_path / "runs").exists()
    assert main(command) == 1
    assert "measuring" not in capfd.readouterr().err
