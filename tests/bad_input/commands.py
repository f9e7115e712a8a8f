"""Mistakes around what is done with a network: predict, export, and the files they read."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.bad_input.case import Case
from tests.bad_input.conftest import make_pets

PREDICT = "predict images={pets}/val device=cpu out={tmp}/out"


def _weights(about: object | None) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        metadata = None if about is None else {"ssodbench": about if isinstance(about, str) else json.dumps(about)}
        save_file({"weight": torch.zeros(2)}, folder / "net.safetensors", metadata)

    return prepare


ABOUT = {
    "format": "ssodbench.detector/1",
    "classes": ["cat", "dog"],
    "category_ids": [3, 8],
    "detector": {"_target_": "detectors.faster_rcnn.small_faster_rcnn", "name": "small", "weights": "later"},
    "augment": {"name": "small", "views": {"test": {}}},
    "normalize": {},
    "network": "teacher",
    "step": 1,
    "cell": "cell",
    "dataset": "pets",
    "method": "mean_teacher",
    "config_sha256": "",
    "pretraining": "",
    "version": "0.1.0",
}


def _broken_pets(folder: Path) -> None:
    make_pets(folder / "pets")
    (folder / "pets" / "train.json").write_text("{")


def _beside(folder: Path) -> None:
    """Pictures with text labels beside them, as labelling programs write them."""
    make_pets(folder / "pets")
    (folder / "pets" / "train.json").unlink()
    (folder / "pets" / "val.json").unlink()
    for picture in (folder / "pets" / "train").iterdir():
        picture.rename(folder / picture.name)
        (folder / picture.name).with_suffix(".txt").write_text("0 0.5 0.5 0.5 0.5")


MODEL = f"{PREDICT} model={{tmp}}/net.safetensors"

CASES = [
    Case("predict nothing", "predict", ("run_dir=DIR", "model=FILE")),
    Case("predict without pictures", "predict run_dir={tmp}", ("images=FILE", "images=FOLDER")),
    Case("predict with two networks", f"{PREDICT} run_dir=a model=b", ("run_dir", "model", "not both")),
    Case("predict, no run", f"{PREDICT} run_dir={{tmp}}/none", ("{tmp}/none", "config.yaml", "set run_dir")),
    Case("predict, no run in an empty folder", f"{PREDICT} run_dir={{tmp}}", ("{tmp}", "config.yaml")),
    Case("predict, key of training", f"{PREDICT} run_dir={{tmp}} schedule.steps=3", ("schedule.steps", "it takes")),
    Case("predict, misspelt key", f"{PREDICT} run_dir={{tmp}} predict.scores=0.3", ("predict.score",)),
    Case("predict, score beyond 1", f"{PREDICT} run_dir={{tmp}} predict.score=50", ("predict.score=50", "at most 1")),
    Case("predict, no such network", f"{PREDICT} run_dir={{tmp}} network=tutor", ("network=tutor", "teacher")),
    Case("predict, images missing", "predict run_dir={tmp} images={tmp}/photos", ("images={tmp}/photos", "not there")),
    Case("predict, pattern of nothing", "predict run_dir={tmp} images={tmp}/*.jpg", ("no picture", "in quotes")),
    Case("predict, empty folder", "predict run_dir={tmp} images={tmp}", ("images={tmp}", "no picture")),
    Case("predict, no picture", "predict run_dir={tmp} images={pets}/val.json", ("val.json", "is no picture", ".jpg")),
    Case("predict, images null", "predict run_dir={tmp} images=null", ("images=FILE",)),
    Case("predict, images a number", "predict run_dir={tmp} images=7", ("images=7", "a path")),
    Case(
        "predict, out is a file",
        "predict run_dir={tmp} images={pets}/val out={pets}/val.json",
        ("out={pets}/val.json", "no folder"),
    ),
    Case("export nothing", "export out={tmp}/a.pt", ("run_dir=DIR", "model=FILE")),
    Case("export without a file", "export run_dir={tmp}", ("out=FILE",)),
    Case("export of no kind", "export run_dir={tmp} out={tmp}/a.bin", ("out={tmp}/a.bin", ".onnx", "format=KIND")),
    Case("export of another kind", "export run_dir={tmp} out={tmp}/a format=engine", ("format=engine", "onnx")),
    Case("export onto a folder", "export run_dir={tmp} out={tmp}", ("out={tmp}", "is a folder")),
    Case("export, no run", "export run_dir={tmp}/none out={tmp}/a.pt", ("{tmp}/none", "set run_dir")),
    Case("export, canvas of one side", "export run_dir={tmp} out={tmp}/a.onnx export.size=[64]", ("export.size",)),
    Case("export, unused key", "export run_dir={tmp} out={tmp}/a.pt split.percent=5", ("split.percent", "it takes")),
    Case(
        "export without onnx",
        "export run_dir={tmp} out={tmp}/a.onnx",
        ("format=onnx needs onnx", "pip install", "format=pt2"),
        patch=lambda monkeypatch, _: _hide(monkeypatch, "onnx"),
    ),
    Case("evaluate a file and a run", "evaluate run_dir=a model=b", ("run_dir", "model", "not both")),
    Case("evaluate a file, key of training", "evaluate model={tmp}/a.pt seed=3", ("seed", "leave it out")),
    Case("evaluate a file that is missing", "evaluate model={tmp}/a.pt", ("model={tmp}/a.pt", "export wrote")),
    Case("view, no run", "view run_dir={tmp}/none", ("{tmp}/none", "set run_dir")),
    Case("view a run with another policy", "view run_dir={tmp} augment=stac", ("that run's own", "augment")),
    Case("view no pictures", "view view.images=0", ("view.images=0", "at least 1")),
    Case("view, unused key", "view schedule.steps=4", ("schedule.steps", "it takes")),
    Case("view onto a file", "view data=shapes out={pets}/train.json", ("out={pets}/train.json",)),
    Case("view into a page", "view data=shapes out={tmp}/a.html", ("out={tmp}/a.html", "say out=DIR")),
    Case("sources of another command", "train --sources", ("--sources belongs to",)),
    Case("completion of an unknown shell", "--completion fish", ("fish", "bash or zsh")),
    Case("misspelt command", "evalute run_dir={tmp}", ("evalute", "did you mean evaluate?")),
    Case("init nothing", "init", ("init DIR",)),
    Case("init, no folder", "init {tmp}/none", ("{tmp}/none", "No such file")),
    Case("init a file", "init {pets}/train.json", ("{pets}/train.json", "folder")),
    Case("init an empty folder", "init {tmp}", ("{tmp}", "COCO", "Pascal VOC", "YOLO")),
    Case("init pictures alone", "init {pets}/train", ("{pets}/train", "pictures alone")),
    Case("init labels without data.yaml", "init {tmp}", ("data.yaml", "train: .", "split.holdout=0.2"), _beside),
    Case(
        "prepare labels without data.yaml",
        "prepare data=yolo data.root={tmp}",
        ("data.yaml", "which is not there", "names: [FIRST, SECOND]"),
        _beside,
    ),
    Case("init two folders", "init {pets} {tmp}", ("{tmp}", "one value without a key")),
    Case("init, unused key", "init {pets} split.percent=5", ("split.percent", "it takes")),
    Case(
        "init over another file",
        "init {pets} out={tmp}/conf/data/a.yaml",
        ("out={tmp}/conf/data/a.yaml", "is there already"),
        lambda folder: [(folder / "conf" / "data").mkdir(parents=True), (folder / "conf/data/a.yaml").write_text("x")],
    ),
    Case("init to no YAML", "init {pets} out={tmp}/a.txt", ("out={tmp}/a.txt", "data/NAME.yaml")),
    Case("init, broken annotations", "init {tmp}/pets", ("train.json", "cannot be read as JSON"), _broken_pets),
    Case("doctor, unused key", "doctor seed=3", ("seed", "it takes")),
    Case("doctor onto a folder", "doctor out={tmp}", ("out={tmp}", "is a folder")),
    Case(
        "doctor without torchvision",
        "doctor",
        ("cannot be imported", "install"),
        patch=lambda monkeypatch, _: _break(monkeypatch, "harness.engine", "doctor"),
        code=1,
    ),
    Case("exported file missing", MODEL, ("model={tmp}/net.safetensors", "No such file", "export wrote")),
    Case("exported file a folder", f"{PREDICT} model={{tmp}}", ("model={tmp}", "run_dir={tmp}")),
    Case("run_dir an exported file", f"{PREDICT} run_dir={{tmp}}/net.safetensors", ("model={tmp}",), _weights(ABOUT)),
    Case("exported file empty", MODEL, ("no whole file",), lambda folder: (folder / "net.safetensors").touch()),
    Case(
        "exported file half",
        MODEL,
        ("no whole file", "export wrote"),
        lambda folder: [_weights(ABOUT)(folder), _halve(folder / "net.safetensors")],
    ),
    Case("weights of another program", MODEL, ("does not say what network",), _weights(None)),
    Case("description not JSON", MODEL, ("no whole file",), _weights("{")),
    Case("description of a later form", MODEL, ("format", "export it again"), _weights(ABOUT | {"format": "x/2"})),
    Case("description without classes", MODEL, ("classes", "export it again"), _weights(ABOUT | {"classes": []})),
    Case("description with a class too many", MODEL, ("3 classes, 2 ids",), _weights(ABOUT | {"classes": ["a"] * 3})),
    Case("weights of another network", MODEL, ("Missing key", "export it again"), _weights(ABOUT)),
    Case(
        "another program's .pt",
        f"{PREDICT} model={{tmp}}/net.pt",
        ("net.pt", "does not say what network"),
        lambda folder: torch.save({"weight": torch.zeros(2)}, folder / "net.pt"),
    ),
    Case(
        "a checkpoint as an exported file",
        f"{PREDICT} model={{tmp}}/run/checkpoints/step-00000001.pt",
        ("checkpoint", "run_dir={tmp}/run"),
        lambda folder: [
            (folder / "run" / "checkpoints").mkdir(parents=True),
            torch.save({"method": {}, "optimizer": {}}, folder / "run" / "checkpoints" / "step-00000001.pt"),
        ],
    ),
]


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As if a package were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else found(name))


def _break(monkeypatch: pytest.MonkeyPatch, package: str, module: str) -> None:
    """As if importing a module failed, for what it imports itself."""
    monkeypatch.delattr(importlib.import_module(package), module, raising=False)
    monkeypatch.setitem(sys.modules, f"{package}.{module}", None)
