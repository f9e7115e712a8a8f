"""Configuration: what the user may write, and how mistakes are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from detectors.methods.method import Losses, Method
from harness import cli
from harness.config import compose, extras
from harness.config.identity import config_sha256
from harness.config.paths import places, quote_path
from harness.config.run import settings_of
from harness.config.targets import CONF_DIR
from harness.core import files
from harness.core.types import Batch, UserError, Views
from harness.engine import build


def test_defaults_compose_and_check() -> None:
    cfg = compose.load([])
    assert cfg.method.name == "supervised"
    assert cfg.preset_name == "small"
    assert cfg.seed == cfg.split.fold == 1
    assert cfg.augment.name == cfg.method.augment


@pytest.mark.parametrize("preset", ["small", "paper", "photos"])
@pytest.mark.parametrize("method", sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml")))
def test_the_policy_of_a_method_is_composed_as_if_it_were_said(method: str, preset: str) -> None:
    given = [f"method={method}", f"preset={preset}", "detector=small"]
    found = compose._composed(given)
    said = compose._composed([*given, f"augment={found.method.augment}"])
    assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(said)


def test_preset_changes_detector_and_the_command_line_wins() -> None:
    paper = compose.load(["preset=paper"])
    assert paper.detector.name == "faster_rcnn_r50"
    assert paper.schedule.steps == 180_000
    mixed = compose.load(["preset=paper", "detector=small", "schedule.steps=7", "evaluation.every=null"])
    assert mixed.detector.name == "small"
    assert mixed.schedule.steps == 7


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("depth", [18, 50, 101])
def test_detectors_are_found_under_their_old_names(family: str, depth: int) -> None:
    old, new = (
        compose.load([f"detector={family}_r{depth}"]),
        compose.load([f"detector={family}", f"detector.depth={depth}"]),
    )
    assert new.detector.name == f"{family}_r{depth}"
    assert config_sha256(old) == config_sha256(new)


def test_old_names_of_detectors_work_in_files_too(tmp_path: Path) -> None:
    """In a preset, a suite and a detector of the user's own, which then have what the old file had."""
    for file, text in {
        "detector/mine": "defaults: [retinanet_r18]\nname: mine\npyramid_channels: 64\n",
        "preset/mine": "# @package _global_\ndefaults:\n  - paper\n  - override /detector: fcos_r101\n",
        "suite/mine": "# @package _global_\ndefaults:\n  - quick\n  - override /detector: faster_rcnn_r18\n",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(text)
    mine = compose.load(["detector=mine"], [tmp_path]).detector
    assert (mine.name, mine.depth, mine.pyramid_channels) == ("mine", 18, 64)
    assert compose.load(["preset=mine"], [tmp_path]).detector.name == "fcos_r101"
    assert compose.load(["suite=mine"], [tmp_path]).detector.name == "faster_rcnn_r18"
    named = compose.load(["detector=faster_rcnn_r50", "detector.depth=101"]).detector
    assert (named.name, named.depth) == ("faster_rcnn_r50", 101)
    with pytest.raises(UserError, match=r"choose one of (?!.*_r50).*faster_rcnn"):
        compose.load(["detector=yolo"])


@pytest.mark.parametrize(
    "method",
    ["supervised", "stac", "unbiased_teacher", "soft_teacher", "mean_teacher", "mixpl", "dense_teacher", "arsl"],
)
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_every_method_composes_in_every_preset(method: str, preset: str) -> None:
    cfg = compose.load([f"method={method}", f"preset={preset}"])
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
        ("schedule.optimizer.lr=1e999", "schedule.optimizer.lr"),
        ("schedule.warmup_factor=abc", "schedule.warmup_factor=abc must be a number"),
        ("schedule.milestones=[a]", "schedule.milestones[0]=a must be a step, or below 1 a fraction"),
        ("schedule.milestones=3", "schedule.milestones=3 must be a list"),
        ("schedule.decay_start=2", "schedule.decay_start=2 must be a number of at least 0 and at most 1"),
        ("batch.anneal_steps=abc", "batch.anneal_steps=abc must be a whole number"),
        ("batch.anneal_steps=5", "needs batch.ratio=bernoulli"),
        ("split.min_side=abc", "split.min_side=abc must be a whole number of at least 0 and at most 100000 or null"),
        ("split.fold=11", "split.fold=11 must be a whole number of at least 1 and at most 10"),
        ("split.empty_images=dropp", "did you mean drop?"),
        ("logging.loggers=[foo]", "logging.loggers[0]=foo must be one of tensorboard, wandb, mlflow"),
        ("logging.loggers=tensorboard", "logging.loggers=tensorboard must be a list"),
        ("compile=maybe", "compile=maybe must be true or false"),
        ("channels_last=1", "channels_last=1 must be true or false"),
        ("seed=-1", "seed=-1 must be"),
        ("seed=9223372036854775808", "at most 9223372036854775807"),
        ("evaluation.score_threshold=2", "evaluation.score_threshold=2 must be a number of at least 0 and at most 1"),
        ("method.ema.momentum=2", "method.ema.momentum=2 must be a number of at least 0 and at most 1"),
        (
            "method.ema=3",
            "method.ema=3 must be keys out of momentum, ramp, gamma, interval, first, update, buffers or null",
        ),
        ("runs_dir=null", "runs_dir=null must be a path"),
        ("run_dir=2024", "run_dir=2024 must be a path (./NAME"),
        ("check=deep", "check=deep must be one of quick, headers, full"),
        ("data=null", "data=null names no option: choose one of bccd, coco, custom, raccoon, shapes, voc"),
        ("method=null", "method=null names no option"),
        ("schedule=null", "schedule=null names no option"),
        ("suite=null", "suite=null names no option"),
        ("data=3", "data=3 names no option"),
        ("~data", "no data is chosen: say data=NAME"),
        ("nonsense", "key=value"),
        ("split.percent=[1", "split.percent"),
    ],
)
def test_mistakes_name_the_key_in_one_sentence(override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        compose.load([override])
    message = str(caught.value)
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=soft_teacher", "batch.unlabeled=0"], "method=soft_teacher needs unlabelled images"),
        (["method=unbiased_teacher", "batch.unlabeled=0"], "method=unbiased_teacher needs unlabelled images"),
        (["batch.labeled=4", "batch.unlabeled=0", "devices=8"], "8 devices cannot share the 4 images of a step"),
        (["batch.micro=8", "devices=4"], "4 devices cannot share the 16 images .*batch.micro=8 makes 2 micro-batches"),
        (["method=soft_teacher", "batch.micro=5"], "batch.micro=5 does not divide the 32 images"),
        (["method=soft_teacher", "batch.micro=1"], "give at least 2"),
    ],
)
def test_batches_that_cannot_work(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose.load(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=supervised", "batch.labeled=15", "batch.micro=5"],
        ["method=supervised", "batch.micro=1"],
        ["method=supervised", "batch.unlabeled=0"],
        ["method=supervised", "batch.micro=4", "devices=4"],
        ["method=soft_teacher", "batch.micro=4", "devices=8"],
    ],
)
def test_unlabelled_images_count_where_the_method_draws_them(overrides: list[str]) -> None:
    compose.load(overrides)


def test_a_method_of_ones_own_is_asked_for_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `lambda_u` its class says whether it draws unlabelled images."""
    module = types.ModuleType("own_method")

    class Own(Method):
        views = Views(("labeled",), ("weak",))

        def forward(self, batch: Batch, step: int) -> tuple[Losses, Losses]:
            raise NotImplementedError

    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_method", module)
    own = ["method._target_=own_method.Own", "~method.labeled_view"]
    with pytest.raises(UserError, match=r"batch\.micro=5 does not divide the 31 images"):
        compose.load([*own, "batch.labeled=15", "batch.micro=5"])
    with pytest.raises(UserError, match=r"method\._target_=nowhere\.Own cannot be imported"):
        compose.load(["method._target_=nowhere.Own", "batch.labeled=15", "batch.micro=5"])


def test_common_configurations_do_not_import_the_methods() -> None:
    script = "import sys; from harness.config import compose; compose.load(['method=soft_teacher', 'preset=paper']); "
    script += "compose.load([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_devices_that_cannot_share_a_step_are_refused_before_data_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without batch.micro a step is one micro-batch; commands that train nothing do not mind."""
    monkeypatch.setattr(build, "dataset", lambda *_: pytest.fail("the data was opened"))
    with pytest.raises(
        UserError, match=r"2 devices cannot share the 16 images .*batch\.micro=null makes 1 micro-batch "
    ):
        build.data(settings_of(compose.load(["devices=2"])))


def test_evaluate_makes_the_folder_of_out_or_tells_before_scoring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "missing" / "x.json"
    files.require_writable(out, "out")
    assert not out.parent.exists()
    files.write_atomically(out, b'{"networks": {}}')
    assert json.loads(out.read_text()) == {"networks": {}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(compose.load([]), resolve=True))
    for wrong, words in ((tmp_path, "is a folder: give a file name"), (out / "y.json", "cannot be written")):
        assert cli.main(["evaluate", f"run_dir={tmp_path}", f"out={wrong}"]) == 2
        assert words in capsys.readouterr().err


_names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)


@settings(deadline=None)
@given(_names.filter(lambda name: name[0] not in "'\"[{$" and not name.isdigit() and name != "null"))
def test_paths_may_hold_any_character(name: str) -> None:
    override = OverridesParser.create().parse_override(quote_path(f"run_dir={name}"))
    assert override.value() == name


def test_a_path_with_spaces_and_signs_reaches_the_configuration() -> None:
    assert compose.load(["run_dir=my runs/a=b, ü"]).run_dir == "my runs/a=b, ü"


def test_home_is_expanded_in_every_key_that_names_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSODBENCH_DATA", "~/data")
    keys = ["runs_dir", "cache_dir", "out", "export_dir", "data.train_annotations", "split.index_file"]
    keys += ["detector.weights", "method.offline.checkpoint", "launcher.logs"]
    groups = ["data=coco", "detector=faster_rcnn_r50", "method=stac", "launcher=slurm"]
    cfg = compose.load([*groups, *(f"{key}=~/{key}" for key in keys)])
    for key in keys:
        assert OmegaConf.select(cfg, key) == f"{tmp_path}/{key}", key
    assert cfg.run_dir.startswith(f"{tmp_path}/runs_dir/train/")
    assert cfg.data.root == f"{tmp_path}/data/coco"  # from the environment, within an interpolation
    assert cfg.detector.cache_dir == f"{tmp_path}/cache_dir"
    assert places(cfg)["data.train_images"] == f"{tmp_path}/data/coco/train2017"
    (tmp_path / "conf").mkdir()
    assert compose.load([], ["~/conf"]).cli.config_dirs == [f"{tmp_path}/conf"]
    assert cli.main(["config", "--config-dir=~/conf", "out=./~x"]) == 0  # a folder of that very name
    assert "out: ./~x" in capsys.readouterr().out
    monkeypatch.setenv("SSODBENCH_CACHE", "~/own")
    assert compose.load([]).cache_dir == f"{tmp_path}/own"


def test_an_interval_of_the_preset_is_capped_and_a_given_one_is_refused() -> None:
    short = compose.load(["preset=paper", "schedule.steps=50"])
    assert short.evaluation.every == 50
    assert compose.load(["preset=paper"]).evaluation.every == 10_000
    with pytest.raises(UserError, match=r"evaluation\.every=60 is larger than schedule\.steps=50"):
        compose.load(["preset=paper", "schedule.steps=50", "evaluation.every=60"])


def test_the_policy_of_the_method_can_be_changed_without_naming_it() -> None:
    assert compose.load(["augment.views.labeled.flip=0.25"]).augment.views.labeled.flip == 0.25


def test_stage_one_is_looked_at_before_data() -> None:
    with pytest.raises(UserError, match=r"stage1_overrides .*schedule\.stesp"):
        compose.load(["method=stac", "method.offline.stage1_overrides=['schedule.stesp=3']"])
    own = ["method=supervised", "+method.offline={stage1: stac, threshold: 0.5}"]
    with pytest.raises(UserError, match="needs pseudo labels itself"):
        compose.load(own)


def test_version_and_help_do_not_load_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"ssodbench \d+\.\d+\S*\n", capsys.readouterr().out)
    script = "import sys; from harness.cli import main; main(['--help']); sys.exit('omegaconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_extras_that_are_not_chosen_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nvidia.dali", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    cfg = compose.load(["pipeline=torchvision", "logging.loggers=[wandb]"])
    extras.check_extras(cfg)
    with pytest.raises(UserError, match=r"ssodbench\[wandb\]"):
        extras.check_extras(cfg, logs=True)
    with pytest.raises(UserError, match=r"ssodbench\[cu13\]"):
        extras.check_extras(compose.load([]))


@pytest.mark.parametrize(
    ("method", "protocol", "group"),
    [
        ("supervised", "soft_teacher", None),
        ("stac", "stac", None),
        ("soft_teacher", "soft_teacher", "joint"),
        ("mean_teacher", "stac", "joint"),
        ("unbiased_teacher", "unbiased_teacher", "separate"),
        ("dense_teacher", "unbiased_teacher", None),
        ("arsl", "stac", None),
        ("consistent_teacher", "soft_teacher", "joint"),
    ],
)
def test_papers_take_their_own_split_and_sampler(method: str, protocol: str, group: str | None) -> None:
    cfg = compose.load([f"method={method}", "preset=paper"])
    assert (cfg.split.protocol, cfg.batch.group_by_aspect) == (protocol, group)
    given = compose.load([f"method={method}", "preset=paper", "split.protocol=ids", "batch.group_by_aspect=null"])
    assert (given.split.protocol, given.batch.group_by_aspect) == ("ids", None)
    small = compose.load([f"method={method}"])
    assert (small.split.protocol, small.batch.group_by_aspect) == ("soft_teacher", None)


@pytest.mark.parametrize("given", [[], ["split.protocol=soft_teacher"]])
def test_stage_one_has_the_split_of_the_run(given: list[str]) -> None:
    cfg = compose.load(["method=stac", "preset=paper", *given])
    assert compose.stage_one(cfg).split == cfg.split
