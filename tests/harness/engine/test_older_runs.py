"""Runs and records that the first layout of the packages wrote: read, evaluated, taken up and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from harness.cli import main
from harness.config import compose, moved, saved
from harness.config.identity import config_sha256
from harness.core.record import read_record

pytestmark = pytest.mark.timeout(200)

OLD = Path(__file__).parents[2] / "data" / "schema1"
COMMAND = [
    "data=shapes", "data.train_images=40", "data.val_images=12", "detector.weights=scratch",
    "detector.channels=[8,8,16,16]", "detector.pyramid_channels=16", "detector.roi.hidden=32", "schedule=smoke",
    "split.percent=20", "batch.labeled=4", "batch.unlabeled=4", "device=cpu", "logging.loggers=[]",
    "method=soft_teacher", "logging.every=2", "schedule.optimizer.name=sgd", "schedule.optimizer.lr=0.01",
    "checkpointing.keep=1", "+schedule.optimizer.momentum=0", "evaluation.every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_everything_that_moved_is_where_the_table_says() -> None:
    for name in moved.MOVED.values():
        assert callable(get_object(name))


@pytest.mark.parametrize("run", ["whole", "stopped"])
def test_saved_configuration_has_the_identity_that_it_had(run: str) -> None:
    config = saved.read_config(OLD / run)
    assert config_sha256(config) == read_record(OLD / run / "record.json").config_sha256
    assert config_sha256(compose.load(COMMAND)) == config_sha256(config)


def test_configuration_file_with_old_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.yaml").write_text(
        "_target_: harness.datasets.coco_dataset\nname: own\nroot: x\n"
        "small: {short_side: 64, max_side: 64, anchor_sizes: [8, 16, 32]}\n"
    )
    cfg = compose.load(["data=own"], [tmp_path])
    assert cfg.data._target_ == "harness.data.datasets.coco_dataset"


def test_stopped_run_is_taken_up_and_ends_as_one_in_one_piece(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(OLD / "stopped", tmp_path / "stopped")
    for name in ("stopped", "anew"):
        assert main(["train", *COMMAND, f"cache_dir={cache}", f"run_dir={tmp_path / name}"]) == 0
    resumed, anew = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("stopped", "anew"))
    assert resumed["resumed_from"] == [3]
    assert resumed["config_sha256"] == anew["config_sha256"]
    for key in ("images_labeled", "images_unlabeled", "split_sha256", "dataset_sha256"):
        assert resumed[key] == anew[key]


def test_finished_run_is_finished_and_can_be_evaluated(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "whole"
    shutil.copytree(OLD / "whole", run_dir)
    assert main(["train", *COMMAND, f"cache_dir={cache}", f"run_dir={run_dir}"]) == 0
    assert "is finished" in capfd.readouterr().err
    assert main(["evaluate", f"run_dir={run_dir}", f"cache_dir={cache}"]) == 0
    again = json.loads((run_dir / "evaluation_0.05.json").read_text())["networks"]
    record = json.loads((OLD / "whole" / "record.json").read_text())
    for network in ("student", "teacher"):  # another processor rounds otherwise
        assert again[network]["ap"] == pytest.approx(record[f"{network}_ap"], abs=1.0)


def test_records_become_a_report(tmp_path: Path) -> None:
    for path in sorted((OLD / "records").glob("*.json")):
        (tmp_path / "runs" / path.stem).mkdir(parents=True)
        shutil.copy(path, tmp_path / "runs" / path.stem / "record.json")
    assert main(["report", f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'out'}"]) == 0
    table = (tmp_path / "out" / "report.md").read_text()
    for value in ("19.6", "64.0", "67.5"):  # supervised 1 %, STAC 5 %, Soft Teacher 10 %
        assert value in table


def test_saved_configurations_are_read_without_a_change_to_the_file() -> None:
    before = OmegaConf.load(OLD / "whole" / "config.yaml")
    assert before.method._target_ == "detectors.soft_teacher.SoftTeacher"
    assert saved.read_config(OLD / "whole").method._target_ == "detectors.methods.soft_teacher.SoftTeacher"
