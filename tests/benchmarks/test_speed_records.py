"""The records of speed: every command composes, and there is a record of each and of nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from harness.config import checks, compose

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("speed_records", ROOT / "benchmarks" / "speed_records.py")
speed_records = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(speed_records)
COMMANDS = speed_records.commands("DIR")


@pytest.mark.parametrize("place", COMMANDS)
def test_its_command_is_one_and_its_record_is_of_that_command(place):
    cfg = compose.load(list(COMMANDS[place]))
    checks.check_config(cfg)
    record = json.loads((speed_records.REFERENCE / f"{place}.json").read_text())
    said = record.get("what", record)
    assert said["augment"] == cfg.augment.name
    assert said["data"] == cfg.data.name
    if "pipelines" in record:
        assert list(record["pipelines"]) == list(cfg.profile.pipelines)
        assert (record["batch"], record["workers"]) == (cfg.profile.batch, cfg.profile.workers)
        assert len(record["pipelines"]["opencv"]["first_over_it"]) == 3
    else:
        assert said["method"] == cfg.method.name


def test_there_are_no_other_records():
    folders = {place.split("/")[0] for place in COMMANDS}
    there = {f"{folder}/{file.stem}" for folder in folders for file in (speed_records.REFERENCE / folder).iterdir()}
    assert there == set(COMMANDS)
