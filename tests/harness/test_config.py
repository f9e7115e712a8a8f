"""Configuration: what the user may write, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness import config
from harness.types import UserError


def test_defaults_compose_and_check() -> None:
    cfg = config.load([])
    assert cfg.method.name == "supervised"
    assert cfg.preset_name == "small"
    assert cfg.seed == cfg.split.fold == 1
    assert cfg.augment.name == cfg.method.augment


def test_preset_changes_detector_and_the_command_line_wins() -> None:
    paper = config.load(["preset=paper"])
    assert paper.detector.name == "faster_rcnn_r50"
    assert paper.schedule.steps == 180_000
    mixed = config.load(["preset=paper", "detector=small", "schedule.steps=7", "evaluation.every=null"])
    assert mixed.detector.name == "small"
    assert mixed.schedule.steps == 7


@pytest.mark.parametrize("method", ["supervised", "stac", "unbiased_teacher", "soft_teacher", "mean_teacher"])
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_every_method_composes_in_every_preset(method: str, preset: str) -> None:
    cfg = config.load([f"method={method}", f"preset={preset}"])
    assert cfg.method.name == method
    OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("method=soft_teecher", "soft_teacher"),
        ("data=cocoo", "coco"),
        ("scedule.steps=3", "schedule"),
        ("schedule.stesp=3", "schedule.steps"),
        ("split.percent=0", "split.percent"),
        ("split.percent=101", "split.percent"),
        ("split.percent=many", "split.percent"),
        ("split.protocol=stak", "stac"),
        ("batch.labeled=-1", "batch.labeled"),
        ("batch.labeled=1.5", "batch.labeled"),
        ("batch.micro=5", "batch.micro"),
        ("evaluation.every=100000", "evaluation.every"),
        ("devices=0", "devices"),
        ("schedule.optimizer.lr=nan", "schedule.optimizer.lr"),
        ("device=gpu", "device"),
        ("precision=fp16", "precision"),
        ("nonsense", "key=value"),
        ("split.percent=[1", "split.percent"),
    ],
)
def test_mistakes_name_the_key_in_one_sentence(override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load([override])
    message = str(caught.value)
    assert named in message
    assert "\n" not in message


_names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)


@settings(deadline=None)
@given(_names.filter(lambda name: name[0] not in "'\"[{$" and not name.isdigit() and name != "null"))
def test_paths_may_hold_any_character(name: str) -> None:
    override = OverridesParser.create().parse_override(config.quote_path(f"run_dir={name}"))
    assert override.value() == name


def test_a_path_with_spaces_and_signs_reaches_the_configuration() -> None:
    assert config.load(["run_dir=my runs/a=b, ü"]).run_dir == "my runs/a=b, ü"


def test_identity_ignores_circumstances_and_sees_everything_else() -> None:
    one = config.load(["run_dir=a", "threads=1", "checkpointing.every=5"])
    two = config.load(["run_dir=b", "threads=2", "device=cpu"])
    other = config.load(["schedule.steps=999"])
    assert config.config_sha256(one) == config.config_sha256(two)
    assert config.differences(config.identity(one), config.identity(other)) == ["schedule.steps: 600 -> 999"]


def test_user_yaml_is_found_in_a_config_dir(tmp_path: Path) -> None:
    folder = tmp_path / "my conf" / "schedule"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [small]\nsteps: 77\n")
    assert config.load(["schedule=mine"], [tmp_path / "my conf"]).schedule.steps == 77
    with pytest.raises(UserError, match="not a folder"):
        config.load([], [tmp_path / "missing"])


def test_cell_names_are_safe() -> None:
    cfg = config.load(["split.percent=0.5"])
    assert config.cell_name(cfg) == "shapes_supervised_soft_teacher-0.5pct-fold1_seed1"
