"""Mistakes with run folders: files of another run in them, damaged ones, keys that a finished run does not take."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

from harness.cli import main
from harness.config.compose import load
from harness.config.names import cell_name
from tests.bad_input.case import Case

SMALL = (
    "data=shapes data.train_images=10 data.val_images=2 method=supervised schedule=smoke schedule.steps=1 device=cpu "
    "split.percent=20 batch.labeled=2 batch.unlabeled=0 detector.weights=scratch logging.loggers=[] "
    "pipeline=torchvision pipeline.threads=0"
)
EVALUATE = "evaluate run_dir={tmp}/run device=cpu"


@cache
def _trained(root: Path, fold: int = 1) -> Path:
    """A finished run, trained once for all cases of a session, whose folders lie in `root`."""
    run_dir = root / f"run_of_fold_{fold}"
    assert main(["train", *SMALL.split(), f"run_dir={run_dir}", f"split.fold={fold}"]) == 0
    return run_dir


def _run(tmp: Path) -> Path:
    """A copy of it in the case's folder."""
    return Path(shutil.copytree(_trained(tmp.parent), tmp / "run"))


def _foreign_checkpoint(tmp: Path) -> None:
    (checkpoint,) = (_trained(tmp.parent, 2) / "checkpoints").iterdir()
    shutil.copy(checkpoint, _run(tmp) / "checkpoints" / "step-00000001.pt")


def _foreign_record(tmp: Path) -> None:
    shutil.copy(_trained(tmp.parent, 2) / "record.json", _run(tmp) / "record.json")


def _record_alone(tmp: Path) -> None:
    (tmp / "run").mkdir()
    shutil.copy(_trained(tmp.parent) / "record.json", tmp / "run")


def _flipped_bit(tmp: Path) -> None:
    (checkpoint,) = (_run(tmp) / "checkpoints").iterdir()
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 16
    checkpoint.write_bytes(content)


def _no_checkpoint(tmp: Path) -> None:
    shutil.rmtree(_run(tmp) / "checkpoints")


def _no_configuration(tmp: Path) -> None:
    (_run(tmp) / "config.yaml").unlink()


def _under_its_name(tmp: Path) -> None:
    name = cell_name(load(SMALL.split()))
    shutil.copytree(_trained(tmp.parent), tmp / "train" / name)


def _unfinished_stage_one(tmp: Path) -> None:
    path = _run(tmp) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "failed"}))


CASES = [
    Case(
        "data are missing for several processes",
        f"train {SMALL} data=custom data.root={{tmp}}/nothing batch.micro=1 devices=2 run_dir={{tmp}}/run".replace(
            "data=shapes data.train_images=10 data.val_images=2 ", ""
        ),
        ("{tmp}/nothing", "data.root"),
    ),
    Case(
        "more processes than a machine can mean",
        f"train {SMALL} batch.labeled=1000 batch.micro=1 devices=250 run_dir={{tmp}}/run",
        ("devices=250", "core"),
    ),
    Case(
        "another run's checkpoint is evaluated",
        EVALUATE,
        ("{tmp}/run/checkpoints/step-00000001.pt", "another run", "config"),
        _foreign_checkpoint,
    ),
    Case("another run's record is evaluated", EVALUATE, ("{tmp}/run/record.json", "another run"), _foreign_record),
    Case("a checkpoint with a flipped bit is evaluated", EVALUATE, ("step-00000001.pt", "checksum"), _flipped_bit),
    Case("a run without a checkpoint is evaluated", EVALUATE, "no checkpoint at {tmp}/run", _no_checkpoint),
    Case(
        "a run without its configuration is evaluated",
        EVALUATE,
        ("no run in {tmp}/run", "config.yaml"),
        _no_configuration,
    ),
    Case("no run is evaluated", EVALUATE, ("no run in {tmp}/run", "set run_dir")),
    *(
        Case(f"evaluate is given {key}", f"{EVALUATE} {key}={value}", f"evaluate does not use {key}", _run)
        for key, value in {
            "method": "stac",
            "split.percent": "5",
            "schedule.steps": "3",
            "seed": "2",
            "devices": "2",
            "detector": "small",
            "evaluation.every": "2",
            "logging.every": "2",
            "suite": "quick",
        }.items()
    ),
    Case(
        "evaluate on data with other classes",
        f"{EVALUATE} data=custom data.root={{pets}}",
        ("cat, dog", "data=", "same classes"),
        _run,
    ),
    Case(
        "evaluate with other settings than those of the run that they find",
        f"evaluate runs_dir={{tmp}} {SMALL} schedule.optimizer.lr=0.5".replace("logging.loggers=[] ", ""),
        ("schedule.optimizer.lr: 0.002 -> 0.5", "run_dir={tmp}/train/"),
        _under_its_name,
    ),
    Case(
        "tiles of a mosaic whose largest side is the smaller one",
        f"train {SMALL.replace('batch.unlabeled=0', 'batch.unlabeled=2')} method=mixpl method.mosaic_side=[800,400]"
        " run_dir={tmp}/run",
        ("method.mosaic_side=[800,400]", "the smaller one first"),
    ),
    Case(
        "thresholds from class statistics of scores that are not looked at",
        f"train {SMALL.replace('batch.unlabeled=0', 'batch.unlabeled=2')} method=mixpl method.candidate_score=0.1"
        " method.adaptive={share:0.2} run_dir={tmp}/run",
        ("method.candidate_score=0.1", "method.adaptive.floor=0.05"),
    ),
    Case(
        "a finished record of another method is in the run folder",
        f"train {SMALL.replace('batch.unlabeled=0', 'batch.unlabeled=2')} method=mean_teacher run_dir={{tmp}}/run",
        ("{tmp}/run", "method.name: supervised -> mean_teacher", "run_dir"),
        _record_alone,
    ),
    Case(
        "a finished record of another fold is in the run folder",
        f"train {SMALL} split.fold=2 run_dir={{tmp}}/run",
        ("{tmp}/run", "split.fold: 1 -> 2"),
        _record_alone,
    ),
    Case(
        "a stage 1 that is not finished",
        f"train {SMALL} method=stac batch.unlabeled=2 method.offline.checkpoint={{tmp}}/run run_dir={{tmp}}/stac",
        ("{tmp}/run", "not finished", "method.offline.checkpoint"),
        _unfinished_stage_one,
    ),
]
