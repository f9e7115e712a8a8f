"""Pseudo labels made before training: whose they are, and when they are made anew. Real runs, few steps."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.cli import main
from harness.config import compose
from harness.core.types import UserError
from harness.engine import label_file, offline
from harness.engine.optim import LearningRateFactor

pytestmark = pytest.mark.timeout(300)

SMALL = [
    "data.train_images=20",
    "data.val_images=4",
    "detector.weights=scratch",
    "schedule=smoke",
    "schedule.steps=2",
    "split.percent=20",
    "batch.labeled=2",
    "batch.unlabeled=2",
    "evaluation.every=null",
    "device=cpu",
    "logging.loggers=[]",
]
KEEP = "method.offline.drop_empty=false"  # an untrained stage 1 may find nothing


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a finished supervised run."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(_command(folder, "supervised")) == 0
    return folder


def _command(runs: Path, method: str, *overrides: str) -> list[str]:
    return ["train", *SMALL, f"method={method}", f"runs_dir={runs}", f"cache_dir={runs / 'cache'}", *overrides]


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each labelling, as it happens."""
    calls: list[dict[str, Any]] = []
    label = offline.label_offline

    def note(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return label(*arguments, **options)

    monkeypatch.setattr(offline, "label_offline", note)
    return calls


def test_finished_run_of_the_same_split_is_stage_one(runs: Path, tmp_path: Path) -> None:
    assert main(_command(runs, "stac", KEEP, f"run_dir={tmp_path / 'found'}")) == 0
    assert not (tmp_path / "found" / "stage1").exists()
    elsewhere = ["runs_dir=nowhere", f"run_dir={tmp_path / 'trained'}"]
    assert main(_command(runs, "stac", KEEP, *elsewhere)) == 0
    assert (tmp_path / "trained" / "stage1" / "record.json").exists()
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("found", "trained")]
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]
    assert [record["extra_steps"] for record in records] == [2, 2]


def test_labels_are_kept_for_the_same_options_and_made_anew_for_others(
    runs: Path, tmp_path: Path, labelled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    place = f"run_dir={tmp_path / 'run'}"
    with monkeypatch.context() as patch:
        patch.setattr("harness.engine.build.experiment", killed)  # after labelling, before training
        for threshold in (0.9, 0.9, 0.6):
            assert main(_command(runs, "stac", KEEP, place, f"method.offline.threshold={threshold}")) == 130
    assert [options["threshold"] for options in labelled] == [0.9, 0.6]


def test_labels_of_another_stage_one_are_refused_once_training_has_begun(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = f"run_dir={tmp_path / 'run'}"
    assert main(_command(runs, "stac", KEEP, place)) == 0
    (tmp_path / "run" / "record.json").unlink()  # as if it had been killed at the end
    other = tmp_path / "other"
    assert main(_command(runs, "supervised", "schedule.optimizer.lr=0.001", f"run_dir={other}")) == 0
    assert main(_command(runs, "stac", KEEP, place, f"method.offline.checkpoint={other}")) == 2
    assert "began with pseudo labels of another stage 1" in capfd.readouterr().err
    assert main(_command(runs, "stac", KEEP, place)) == 0


def test_signal_while_labelling_is_heard_before_the_next_batch(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label, seen = offline.label_offline, []

    def signalled(detector: Any, batches: Any, source: Any, **options: Any) -> Any:
        def noted() -> Any:
            for batch in batches:
                seen.append(1)
                signal.raise_signal(signal.SIGTERM)
                yield batch

        return label(detector, noted(), source, **options)

    command = _command(runs, "stac", KEEP, f"run_dir={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(offline, "label_offline", signalled)
        assert main(command) == 143
    assert len(seen) == 1  # of 2
    assert not (tmp_path / "run").exists()


def test_damaged_labels_are_made_again_once_training_has_begun(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place, labels = f"run_dir={tmp_path / 'run'}", tmp_path / "run" / "pseudo_labels.npz"
    assert main(_command(runs, "stac", KEEP, place)) == 0
    (tmp_path / "run" / "record.json").unlink()
    good = labels.read_bytes()
    labels.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    other = tmp_path / "other"
    assert main(_command(runs, "supervised", "schedule.optimizer.lr=0.001", f"run_dir={other}")) == 0
    capfd.readouterr()
    assert main(_command(runs, "stac", KEEP, place, f"method.offline.checkpoint={other}")) == 2
    assert "began with pseudo labels of another stage 1" in capfd.readouterr().err
    assert main(_command(runs, "stac", KEEP, place)) == 0
    with np.load(labels) as again, np.load(io.BytesIO(good)) as before:
        assert all((again[name] == before[name]).all() for name in before.files)


def test_stage_one_must_be_finished(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stage = tmp_path / "stage"
    assert main(_command(runs, "supervised", f"run_dir={stage}")) == 0
    record = json.loads((stage / "record.json").read_text())
    (stage / "record.json").write_text(json.dumps(record | {"status": "interrupted"}))
    assert main(_command(runs, "stac", f"method.offline.checkpoint={stage}", f"run_dir={tmp_path / 'run'}")) == 2
    assert "is not finished (status interrupted)" in capfd.readouterr().err


def test_nothing_found_can_be_mended_in_the_same_folder(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place, nothing = f"run_dir={tmp_path / 'run'}", "method.offline.score_threshold=0.999999"
    assert main(_command(runs, "stac", place, nothing)) == 2
    assert "found no box" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(_command(runs, "stac", place, nothing, KEEP)) == 0
    with np.load(tmp_path / "run" / "pseudo_labels.npz") as arrays:
        assert len(arrays["boxes"]) == 0


def test_stage_one_of_the_paper_preset_is_stacs_own() -> None:
    paper = ["method=stac", "preset=paper", "data=coco", "split.percent=10", "run_dir=x"]
    stage = compose.stage_one(compose.load(paper))
    assert (stage.method.name, stage.augment.name, stage.detector.style) == ("supervised", "stac", "tensorpack")
    assert (stage.schedule.warmup_steps, stage.schedule.warmup_factor) == (1000, 0.33)
    rate = stage.schedule.optimizer.lr * LearningRateFactor(stage.schedule)(0)
    assert rate == pytest.approx(0.0033)
    assert not stage.schedule.optimizer.decay_norm_and_bias
    given = compose.stage_one(compose.load([*paper, "detector_style=detectron", "schedule.warmup_steps=7"]))
    assert (given.detector.style, given.schedule.warmup_steps, given.augment.name) == ("detectron", 7, "stac")


@pytest.mark.parametrize(
    ("method", "style"),
    [
        ("supervised", "mmdetection"),
        ("soft_teacher", "mmdetection"),
        ("mean_teacher", "mmdetection"),
        ("unbiased_teacher", "detectron"),
        ("stac", "tensorpack"),
    ],
)
def test_paper_preset_takes_the_numbers_of_the_official_codebase(method: str, style: str) -> None:
    overrides = [f"method={method}", "preset=paper", "data=coco", "split.percent=10"]
    assert compose.load(overrides).detector.style == style
    assert compose.load([*overrides, "detector.style=torchvision"]).detector.style == "torchvision"
    if method in ("supervised", "stac", "mean_teacher"):
        assert compose.load([*overrides, "detector=retinanet_r50"]).detector.style == "torchvision"
    assert compose.load([*overrides, "suite=coco"]).detector.style == "mmdetection"


GOOD = {
    "ids": np.array([3, 5]),
    "boxes": np.array([[0, 0, 4, 4]], np.float32),
    "labels": np.array([1]),
    "scores": np.array([0.9], np.float32),
    "offsets": np.array([0, 1, 1]),
    "made_by": '{"stage 1": "x"}',
    "steps": 3,
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scores": ...}, "required field `scores`"),
        ({"made_by": ...}, "made_by is missing"),
        ({"boxes": np.zeros(3)}, "boxes is float64"),
        ({"offsets": np.array([0, 2, 1])}, "offsets do not divide"),
        ({"labels": np.array([0])}, "below 1"),
        ({"scores": np.array([np.nan], np.float32)}, "not a number"),
    ],
)
def test_labels_that_no_stage_one_gives_are_damaged(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = tmp_path / "pseudo_labels.npz"
    np.savez(path, **GOOD)
    assert offline._are_there(path, {"stage 1": "x"})
    np.savez(path, **{key: value for key, value in (GOOD | changes).items() if value is not ...})
    with pytest.raises(UserError, match=named):
        label_file.decode_label_file(path)
    assert not offline._are_there(path, {"stage 1": "x"})


def test_labels_of_a_file_need_no_stage_one(tmp_path: Path) -> None:
    """A foreign labeller is a run of its own name, its record says who made the labels, and nothing else is trained."""
    labels = tmp_path / "labels.json"
    boxes = [{"image_id": n, "category_id": 1, "bbox": [5, 5, 20, 20], "score": 0.95} for n in range(1, 21)]
    labels.write_text(json.dumps(boxes))
    keys = ["method.name=stac_owl", f"method.offline.labels={labels}", "method.offline.labeller=OWL"]
    run_dir = tmp_path / "run"
    assert main(_command(tmp_path, "stac", *keys, f"run_dir={run_dir}")) == 0
    record = json.loads((run_dir / "record.json").read_text())
    assert (record["status"], record["method"], record["labeller"]) == ("ok", "stac_owl", "OWL")
    assert (record["extra_steps"], (run_dir / "stage1").exists()) == (0, False)
    assert record["pseudo_precision"] is not None  # measured like those of any stage 1
    with np.load(run_dir / label_file.LABELS) as kept:
        assert kept["boxes"].tolist() == [[5, 5, 25, 25]] * record["unlabeled_images"]
    labels.write_text("[]")  # a finished run needs the file no more
    assert main(_command(tmp_path, "stac", *keys, f"run_dir={run_dir}")) == 0
