"""The driver of studies: what it runs, what it knows again, and what its table says."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
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
RECIPE = study.Stage("recipe", {"plain": ("method=supervised",), "slow": ("method=supervised", "x=1")}, data=("a", "b"))
TUNING = study.Stage(
    "tuning",
    {"supervised": ("method=supervised",), "stac": ("method=stac", study.STAGE_1)},
    folds=(1,),
    data=("a", "b"),
)


@pytest.fixture
def trained(monkeypatch):
    """Runs do nothing but write a record; these are their commands."""
    commands = []

    def run(command, **_):
        commands.append(command[3:])
        folder = Path(next(part for part in command if part.startswith("run_dir=")).removeprefix("run_dir="))
        given = dict(part.split("=", 1) for part in command[4:])
        record = {
            "status": "ok",
            "ap": 10.0 + len(commands),
            "command": shlex.join(["ssodbench", *command[3:]]),
            "dataset": given["data"],
            "fold": int(given["split.fold"]),
        }
        (folder / "record.json").write_text(json.dumps(record))

    monkeypatch.setattr(study.subprocess, "run", run)
    return commands


def go(stage, tmp_path):
    its = study.Study((stage,), tmp_path / "records", {"data.root=a": "A"})
    records = study.Records(its)
    for run in study.runs_of(stage):
        study.train(its, run, records, tmp_path / "data", tmp_path / "runs")


def test_a_training_is_run_once_over_all_stages_and_sessions(trained, tmp_path):
    go(RECIPE, tmp_path)
    assert len(trained) == 8
    assert f"data.root={tmp_path}/data/A" in trained[0]  # the datasets that lie in the folder of data
    assert not any(part.startswith("data.root=") for part in trained[1])
    go(RECIPE, tmp_path)
    assert len(trained) == 8
    go(TUNING, tmp_path)
    assert len(trained) == 10  # supervised training was there
    assert all("method=stac" in command for command in trained[8:])
    lines = (tmp_path / "records" / "tuning" / "records.jsonl").read_text()
    assert [json.loads(line)["variant"] for line in lines.splitlines()] == ["supervised", "supervised", "stac", "stac"]
    assert str(tmp_path) not in lines


def test_stages_together_are_one_suite_with_each_training_once(trained, tmp_path, monkeypatch):
    its = study.Study((RECIPE, TUNING), tmp_path / "records")
    for stage in its.stages:
        go(stage, tmp_path)
    assert len(trained) == 10
    out = tmp_path / "new" / "records.jsonl"
    monkeypatch.setattr(sys, "argv", ["photographs.py", "recipe", "tuning", "--together", str(out)])
    study.main(its, None)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["ap"] for record in found] == [11.0 + place for place in range(10)]
    assert {record["variant"] for record in found} == {None}
    assert len(trained) == 10


def test_a_network_that_others_begin_with_is_trained_again_where_its_folder_is_gone(trained, tmp_path):
    go(RECIPE, tmp_path)
    for folder in (tmp_path / "runs").iterdir():
        folder.rename(tmp_path / folder.name)
    go(TUNING, tmp_path)
    methods = [next(part for part in command if part.startswith("method=")) for command in trained[8:]]
    assert methods == ["method=supervised", "method=supervised", "method=stac", "method=stac"]
    begun = next(part for part in trained[-1] if part.startswith(study.STAGE_1)).removeprefix(study.STAGE_1)
    assert f"run_dir={begun}" in trained[9]


def test_gains_are_paired_and_have_the_interval_of_paired_t(tmp_path):
    records = study.Records(study.Study((RECIPE,), tmp_path))
    ap = {("plain", "a"): (10, 20), ("plain", "b"): (30, 40), ("slow", "a"): (12, 21), ("slow", "b"): (34, 41)}
    for run in study.runs_of(RECIPE):
        if (run.setting, run.data) in ap:
            records.known[study.what(run.overrides())] = {"ap": ap[run.setting, run.data][run.fold - 1]}
    found = stats.ttest_rel([12, 21, 34, 41], [10, 20, 30, 40]).confidence_interval(0.95)
    *_, plain, slow = study.table(RECIPE, records).splitlines()
    assert plain == "| plain | 15.0 | 35.0 | 4 | 0.0 | - |"
    assert slow == f"| slow | 16.5 | 37.5 | 4 | 2.0 | {found.low:+.1f} to {found.high:+.1f} |"


def test_a_setting_that_says_more_is_known_again_by_its_name(trained, tmp_path):
    go(RECIPE, tmp_path)
    go(replace(RECIPE, settings={**RECIPE.settings, "slow": ("method=supervised", "x=1", "preset_was=2")}), tmp_path)
    assert len(trained) == 8


def test_a_record_of_other_values_is_not_taken_nor_written_over(trained, tmp_path):
    go(RECIPE, tmp_path)
    other = replace(RECIPE, settings={**RECIPE.settings, "slow": ("method=supervised", "x=2")})
    with pytest.raises(ValueError, match="'slow' of the stage recipe was run with other values of x"):
        go(other, tmp_path)
    assert len(trained) == 8


@pytest.mark.parametrize("name", ["photographs", "tune_methods"])
def test_every_setting_of_a_protocol_is_what_its_record_ran(name):
    its = loaded(name).STUDY
    records = study.Records(its)
    composed = {}
    for stage in its.stages:
        assert all(stage.baseline(setting) in stage.settings for setting in stage.settings)
        for setting in stage.settings:
            run = study.Run(stage, setting, stage.data[0], stage.folds[0])
            places = {override: f"DATA/{place}" for override, place in its.places.items()}  # as records say them
            own = tuple(f"{override}{places.get(override, '')}" for override in run.overrides())
            own = tuple(override for override in own if override != study.STAGE_1)
            if own not in composed:
                composed[own] = OmegaConf.to_container(compose.load(own), resolve=True)
            if record := records.of(run):
                assert same(composed[own], record["config"]), (stage.name, setting)


def same(now, then):
    """Whether two configurations have the same values, of the keys that both have; classes may have moved."""
    if isinstance(now, dict) and isinstance(then, dict):
        return all(same(now[key], then[key]) for key in now.keys() & then.keys() - {"_target_"})
    return now == then
