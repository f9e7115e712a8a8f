"""The driver of studies: what it runs, what it knows again, and what its table says."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest
from scipy import stats

from harness.config import compose

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


study = loaded("study")
STAGES = {
    "recipe": study.Stage({"plain": ("method=supervised",), "slow": ("method=supervised", "x=1")}, data=("a", "b")),
    "tuning": study.Stage(
        {"supervised": ("method=supervised",), "stac": ("method=stac", study.STAGE_1)}, folds=(1,), data=("a", "b")
    ),
}


@pytest.fixture
def trained(monkeypatch):
    """Runs do nothing but write a record; these are their commands."""
    commands = []

    def run(command, **_):
        commands.append(command[3:])
        folder = Path(next(part for part in command if part.startswith("run_dir=")).removeprefix("run_dir="))
        record = {"status": "ok", "ap": 10.0 + len(commands), "command": shlex.join(["ssodbench", *command[3:]])}
        (folder / "record.json").write_text(json.dumps(record))

    monkeypatch.setattr(study.subprocess, "run", run)
    return commands


def go(stage, tmp_path, records=None):
    its = study.Study(STAGES, tmp_path / "records", {"data.root=a": "A"})
    records = records or study.Records(its.records)
    for run in study.runs_of(STAGES[stage]):
        study.train(its, stage, run, records, tmp_path / "data", tmp_path / "runs")
    return records


def test_a_training_is_run_once_over_all_stages_and_sessions(trained, tmp_path):
    go("recipe", tmp_path)
    assert len(trained) == 8
    assert f"data.root={tmp_path}/data/A" in trained[0]  # the datasets that lie in the folder of data
    assert not any(part.startswith("data.root=") for part in trained[1])
    go("recipe", tmp_path)
    assert len(trained) == 8
    go("tuning", tmp_path)
    assert len(trained) == 10  # supervised training was there
    assert all("method=stac" in command for command in trained[8:])
    lines = (tmp_path / "records" / "tuning" / "records.jsonl").read_text()
    assert [json.loads(line)["variant"] for line in lines.splitlines()] == ["supervised", "supervised", "stac", "stac"]
    assert str(tmp_path) not in lines


def test_a_network_that_others_begin_with_is_trained_again_where_its_folder_is_gone(trained, tmp_path):
    go("recipe", tmp_path)
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    go("tuning", tmp_path)
    methods = [next(part for part in command if part.startswith("method=")) for command in trained[8:]]
    assert methods == ["method=supervised", "method=supervised", "method=stac", "method=stac"]
    begun = next(part for part in trained[-1] if part.startswith(study.STAGE_1)).removeprefix(study.STAGE_1)
    assert f"run_dir={begun}" in trained[9]


def test_gains_are_paired_and_have_the_interval_of_paired_t(tmp_path):
    records = study.Records(tmp_path)
    ap = {("plain", "a"): (10, 20), ("plain", "b"): (30, 40), ("slow", "a"): (12, 21), ("slow", "b"): (34, 41)}
    for run in study.runs_of(STAGES["recipe"]):
        if (run.setting, run.data) in ap:
            records.found[study.what(run.overrides())] = {"ap": ap[run.setting, run.data][run.fold - 1]}
    found = stats.ttest_rel([12, 21, 34, 41], [10, 20, 30, 40]).confidence_interval(0.95)
    *_, plain, slow = study.table(STAGES["recipe"], records).splitlines()
    assert plain == "| plain | 15.0 | 35.0 | 4 | 0.0 | - |"
    assert slow == f"| slow | 16.5 | 37.5 | 4 | 2.0 | {found.low:+.1f} to {found.high:+.1f} |"


@pytest.mark.parametrize("name", ["photographs", "tune_methods"])
def test_every_setting_of_a_protocol_is_one_of_the_product(name):
    its = loaded(name).STUDY
    for stage in its.stages.values():
        assert all(stage.baseline(setting) in stage.settings for setting in stage.settings)
        for setting in stage.settings:
            run = study.Run(stage, setting, stage.data[0], stage.folds[0])
            own = (f"{override}here" if override in its.places else override for override in run.overrides())
            compose.load([override for override in own if override != study.STAGE_1])


def test_what_was_measured_is_known_again():
    its = loaded("photographs").STUDY
    known = study.Records(its.records)
    assert all(known.of(run) is not None for run in study.runs_of(its.stages["curve"]))
