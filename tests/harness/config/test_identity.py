"""What a configuration is known by: its identity, its cell's name, and what was typed."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config import compose
from harness.config.identity import config_sha256, differences, identity
from harness.config.names import cell_name
from harness.config.plain import resolved


def test_identity_ignores_circumstances_and_sees_everything_else() -> None:
    one = compose.load(["run_dir=a", "threads=1", "checkpointing.every=5"])
    two = compose.load(["run_dir=b", "threads=2", "device=cpu"])
    other = compose.load(["schedule.steps=999"])
    assert config_sha256(one) == config_sha256(two)
    assert differences(identity(one), identity(other)) == ["schedule.steps: 600 -> 999"]


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ({"protocol": "stac", "percent": 0.5, "fold": 2}, "stac-0.5pct-fold2"),
        ({"protocol": "unbiased_teacher", "index_file": "x.txt"}, "unbiased_teacher-10pct-fold1"),
        ({"protocol": "ids", "index_file": "lists/mine.json"}, "ids-mine"),
        ({"protocol": "ids", "index_file": "lists/my list of {fold}.json", "fold": 3}, "ids-my-list-of-3"),
        ({"protocol": "ids", "index_file": "lists/{percent}/{fold}.json", "percent": 5, "fold": 2}, "ids-5pct-fold2"),
        ({"protocol": "ids", "index_file": "instances_train2017.1@10.json"}, "ids-10pct-fold1"),
        ({"protocol": "ids"}, "ids-"),
        ({"protocol": "annotated", "fold": 4}, "annotated"),
        ({"protocol": "full"}, "full"),
    ],
)
def test_cell_name_says_what_is_labelled(split: dict[str, Any], name: str) -> None:
    cfg = compose.load([f"split.{key}={value}" for key, value in split.items()] + ["seed=1"])
    assert cell_name(cfg) == f"shapes_supervised_{name}_seed1"


def test_cell_names_are_safe() -> None:
    cfg = compose.load(["split.percent=0.5"])
    assert cell_name(cfg) == "shapes_supervised_soft_teacher-0.5pct-fold1_seed1"


# Of these configurations before values were checked: runs that began then are taken up again.
IDENTITIES = {
    "": "70eac051569ab92280417dea42f76b78ae0a1648fb917578c7e6a39fff3fbdf1",
    "method=stac preset=small": "e4c38a8419f4a9d204cf41c26ef4b026334610b1f64588645c9772d6228fa23d",
    "method=unbiased_teacher preset=small": "1983335eb882aa67f0c4e54254711f643ea35f6d5fbb8d15ca02e0ab676fa058",
    "suite=quick": "70eac051569ab92280417dea42f76b78ae0a1648fb917578c7e6a39fff3fbdf1",
    "detector=small_fcos": "f0e6b9e9f152ec1966ad730958d47e1fc8adb0d5b313d5e75c5919deb75ddae6",
    "method=mean_teacher detector=fcos_r18 preset=paper": (
        "b59fff6c5aad1287441248fc9ea272b7bcbc34bedeeda36bedd64762d98aa3e8"
    ),
}


@pytest.mark.parametrize("overrides", IDENTITIES)
def test_the_identity_of_runs_that_exist_stays(overrides: str) -> None:
    assert config_sha256(compose.load(overrides.split())) == IDENTITIES[overrides]


@pytest.mark.parametrize("given", ["schedule.steps=${batch.labeled}", r"variant=a\${b}"])
def test_what_was_typed_is_kept_as_it_was_typed(given):
    cfg = compose.load(["preset=small", given])
    assert list(cfg.cli.overrides) == resolved(cfg)["cli"]["overrides"] == ["preset=small", given]
    again = compose.load(cfg.cli.overrides)
    assert config_sha256(again) == config_sha256(cfg)
