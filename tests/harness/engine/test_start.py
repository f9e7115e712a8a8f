"""Runs that start from a finished run's network, against the checkpoint read by torch alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from harness.cli import main
from harness.config import compose
from harness.config.identity import config_sha256, identity
from harness.config.run import settings_of
from harness.core.distributed import World
from harness.core.types import Normalize, UserError
from harness.engine import build, start
from harness.engine.optim import set_learning_rate

pytestmark = pytest.mark.timeout(300)

SMALL = [
    "data=shapes", "data.train_images=40", "data.val_images=12", "detector.weights=scratch",
    "detector.channels=[8,8,16,16]", "detector.pyramid_channels=16", "detector.roi.hidden=32", "schedule=smoke",
    "schedule.steps=2", "split.percent=20", "batch.labeled=4", "batch.unlabeled=4", "device=cpu", "logging.loggers=[]",
    "evaluation.every=null", "pipeline=torchvision",
]  # fmt: skip
CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside the folder of caches; it reports its teacher, which is not its student."""
    folder = tmp_path_factory.mktemp("first")
    assert (
        main(["train", *SMALL, "method=supervised", f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}"]) == 0
    )
    return folder / "run"


def _settings(first: Path, *overrides: str) -> list[str]:
    return [*SMALL, f"cache_dir={first.parent / 'cache'}", f"detector.start={first}", *overrides]


def _record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "record.json").read_text())


def _reported(run_dir: Path) -> dict[str, torch.Tensor]:
    (file,) = (run_dir / "checkpoints").glob("*.pt")
    state = torch.load(file, weights_only=True)["method"]
    prefix = f"{_record(run_dir)['reported_network']}."
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _begun(cfg: DictConfig) -> build.Experiment:
    settings = settings_of(cfg)
    data = build.data(settings)
    return build.experiment(settings, CPU, data, start.read(settings.detector, data.dataset.train.category_names))


@pytest.mark.parametrize("method", ["supervised", "mean_teacher"])
def test_student_and_teacher_begin_with_the_network_that_was_reported(first: Path, method: str) -> None:
    cfg = compose.load(_settings(first, f"method={method}"))
    begun = _begun(cfg)
    begun.pipeline.close()
    expected = _reported(first)
    assert _record(first)["reported_network"] == "teacher"
    for network in begun.method.networks().values():
        assert network.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_a_run_that_starts_there_is_trained_recorded_taken_up_and_evaluated(
    first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    second = [*_settings(first, "method=supervised"), f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *second]) == 0
    record = _record(tmp_path / "run")
    sha256 = _record(first)["weights_sha256"]
    assert record["pretraining"].startswith(f"the teacher of the finished run {_record(first)['cell']} (2 steps, ")
    assert sha256[:12] in record["pretraining"]
    assert record["pretraining"].endswith(f"which began with: {_record(first)['pretraining']}")
    assert record["config"]["detector"]["start_sha256"] == sha256
    assert "start" not in record["config"]["detector"]
    assert record["weights_sha256"] != sha256
    assert main(["train", *second]) == 0
    assert "is finished" in capfd.readouterr().err
    moved = shutil.copytree(first, tmp_path / "elsewhere")
    assert config_sha256(compose.load(_settings(moved, "method=supervised"))) == record["config_sha256"]
    without = compose.load([word for word in second if not word.startswith("detector.start=")])
    assert config_sha256(without) == _record(first)["config_sha256"]
    shutil.rmtree(moved)
    assert main(["evaluate", f"run_dir={tmp_path / 'run'}", f"cache_dir={first.parent / 'cache'}"]) == 0
    again = json.loads((tmp_path / "run" / "evaluation_0.05.json").read_text())["networks"]
    assert again[record["reported_network"]]["ap"] == record["ap"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("detector.pyramid_channels=32",), "another detector (pyramid_channels: 16 -> 32)"),
        (("detector.anchor_sizes=[10,20,30]",), "another detector (anchor_sizes: "),
        (("detector.style=mmdetection",), "another detector (style: torchvision -> mmdetection)"),
        (("detector.roi.hidden=64",), "do not fit this detector"),
    ],
)
def test_another_detector_is_refused(first: Path, overrides: tuple[str, ...], words: str) -> None:
    cfg = compose.load(_settings(first, *overrides))
    names = list(build.dataset(cfg.data, Path(cfg.cache_dir)).train.category_names)
    with pytest.raises(UserError, match=re.escape(words)):
        _load(cfg, names)


def _load(cfg: Any, names: list[str]) -> None:
    begun = start.read(cfg.detector, names)
    assert begun is not None
    begun.load_into(build.detector(cfg.detector, Path(cfg.cache_dir), len(names)))


def test_other_classes_are_refused(first: Path) -> None:
    cfg = compose.load(_settings(first))
    names = list(build.dataset(cfg.data, Path(cfg.cache_dir)).train.category_names)
    _load(cfg, names)
    for others in (names[::-1], [*names, "another"], names[:-1]):
        with pytest.raises(UserError, match=r"was trained on the classes .* start from a run with the same classes"):
            _load(cfg, others)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_an_exported_file_is_started_from_as_its_run_is(first: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"network.{kind}"
    assert main(["export", f"run_dir={first}", f"out={file}", f"cache_dir={first.parent / 'cache'}"]) == 0
    given = [word for word in _settings(first, "method=mean_teacher") if not word.startswith("detector.start=")]
    cfg = compose.load([*given, f"detector.start={file}"])
    assert identity(cfg)["detector"]["start_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    begun = _begun(cfg)
    begun.pipeline.close()
    expected = _reported(first)
    for network in begun.method.networks().values():
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    pretraining = begun.method.networks()["student"].pretraining
    assert pretraining.startswith(f"the teacher of {_record(first)['cell']} (2 steps, weights sha256 ")
    assert _record(first)["weights_sha256"][:12] in pretraining
    names = list(build.dataset(cfg.data, Path(cfg.cache_dir)).train.category_names)
    with pytest.raises(UserError, match=r"was trained on the classes .* start from a run with the same classes"):
        _load(cfg, names[::-1])
    other = compose.load([*given, f"detector.start={file}", "detector.pyramid_channels=32"])
    with pytest.raises(UserError, match=r"another detector \(pyramid_channels: 16 -> 32\)"):
        _load(other, names)


def test_a_file_of_other_pixels_is_refused(first: Path, tmp_path: Path) -> None:
    assert main(["export", f"run_dir={first}", f"out={tmp_path / 'a.pt'}", f"cache_dir={first.parent / 'cache'}"]) == 0
    cfg = compose.load([*_settings(first)[:-1], f"detector.start={tmp_path / 'a.pt'}"])
    begun = start.read(cfg.detector, list(build.dataset(cfg.data, Path(cfg.cache_dir)).train.category_names))
    assert begun is not None
    network = build.detector(cfg.detector, Path(cfg.cache_dir), 4)
    network.normalize = Normalize(bgr=True)
    with pytest.raises(UserError, match=r"wants .*bgr=False.*, and this detector .*bgr=True.*: set detector\.caffe"):
        begun.load_into(network)


def test_weights_that_are_not_those_of_the_record_are_refused(first: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(first, tmp_path / "copy")
    record = _record(copy)
    (copy / "record.json").write_text(json.dumps({**record, "weights_sha256": "0" * 64}))
    cfg = compose.load(_settings(copy))
    with pytest.raises(UserError, match=r"are not those of the run's record\.json"):
        _load(cfg, list(build.dataset(cfg.data, Path(cfg.cache_dir)).train.category_names))
    (copy / "record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    with pytest.raises(UserError, match=r"is not finished \(status interrupted\)"):
        compose.load(_settings(copy))
    with pytest.raises(UserError, match=r"holds no run \(record\.json: .*\): name the folder of a finished one"):
        compose.load(_settings(tmp_path / "nothing"))


def test_a_backbone_at_a_rate_of_its_own_trains_as_by_hand(first: Path) -> None:
    """Two steps of plain SGD on a detector, its backbone without the pyramid at a tenth of the rate."""
    given = ["method=supervised", "schedule.optimizer.name=sgd", "+schedule.optimizer.momentum=0"]
    given += ["schedule.optimizer.weight_decay=0", "detector.backbone_lr_scale=0.1"]
    cfg = compose.load(_settings(first, *given))
    run = _begun(cfg)
    run.pipeline.close()
    net = run.method.student
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    moved = {name: torch.zeros_like(p) for name, p in before.items()}
    for rate in (0.5, 0.25):
        set_learning_rate(run.optimizer, rate)
        run.optimizer.zero_grad()
        sum((number + 1) * p.square().sum() for number, p in enumerate(net.parameters())).backward()
        for number, (name, p) in enumerate(net.named_parameters()):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, 2 * (number + 1) * p)
            moved[name] -= rate * (0.1 if name.startswith("backbone.body.") else 1.0) * p.grad
        run.optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] + moved[name])
    plain = compose.load(_settings(first, *given[:-1]))
    assert config_sha256(plain) != config_sha256(cfg)
    assert "backbone_lr_scale" not in identity(plain)["detector"]


def test_a_home_folder_may_be_abbreviated(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(first.parent))
    assert compose.load([*SMALL, "detector.start=~/run"]).detector.start == str(first)
