"""Mistakes in files that earlier commands wrote, or that say how to split: damaged, foreign, or something else."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from harness.cli import main
from harness.core.types import RunRecord
from tests.bad_input.case import Case
from tests.bad_input.conftest import make_pets

DATA = "data=custom data.root={pets} device=cpu schedule=smoke detector.weights=scratch split.percent=50"
SMALL = "schedule.steps=2 batch.labeled=2 batch.unlabeled=2 logging.loggers=[] evaluation.every=null pipeline=opencv"
TRAIN = f"train {DATA} {SMALL} run_dir={{tmp}}/run"
STAC = f"{TRAIN} method=stac method.offline.drop_empty=false runs_dir={{tmp}}"
EVALUATE = "evaluate run_dir={tmp}/run device=cpu"
SUITE = (
    f"suite suite=smoke suite.name=mine suite.methods=[supervised] suite.percents=[50] suite.folds=[1] {DATA} {SMALL}"
)
SUITE = SUITE.replace(" split.percent=50", "") + " runs_dir={tmp}/runs suite.reference=false"
CELL = "runs/mine/custom_supervised_soft_teacher-50pct-fold1_seed1/record.json"
SPLIT = f"prepare {DATA} split.index_file={{tmp}}/index.json split.protocol="
REPORT = "report runs_dir={tmp}/runs"
RECORD = "runs/one/record.json"
DEEP = b"[" * 60 + b"]" * 60

Prepare = Callable[[Path], Any]


def record(name: str = RECORD, **changes: Any) -> Prepare:
    """Writes a healthy record with changes; `...` removes a key."""
    healthy = msgspec.to_builtins(RunRecord(status="ok", method="supervised", percent=10.0, ap=50.0))
    values = {key: value for key, value in (healthy | changes).items() if value is not ...}
    return content(json.dumps(values), name)


def content(text: str | bytes, name: str = RECORD) -> Prepare:
    """Writes a file."""

    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return prepare


def folder_named(name: str = RECORD) -> Prepare:
    return lambda folder: (folder / name).mkdir(parents=True)


def fifo(name: str = RECORD) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return prepare


@functools.cache
def trained(method: str) -> Path:
    """The folder of a real run of two steps; made once."""
    root = Path(tempfile.mkdtemp(prefix="read_back."))
    make_pets(root / "pets")
    command = {"supervised": TRAIN, "stac": STAC}[method].replace("{pets}", str(root / "pets"))
    assert main(command.replace("{tmp}", str(root)).split()) == 0
    return root / "run"


def run_with(*damages: Callable[[Path], Any], method: str = "supervised") -> Prepare:
    """A copy of a real run in {tmp}/run, damaged."""

    def prepare(folder: Path) -> None:
        shutil.copytree(trained(method), folder / "run")
        for damage in damages:
            damage(folder / "run")

    return prepare


def unfinished(run: Path) -> None:
    (run / "record.json").unlink()


def replaced(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def damage(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return damage


def written(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return content(text, name)


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Changes what the checkpoint holds."""

    def damage(run: Path) -> None:
        path = run / "checkpoints/step-00000002.pt"
        known = torch.load(path, weights_only=True)
        change(known)
        torch.save(known, path)

    return damage


def cut(name: str, share: float = 0.5) -> Callable[[Path], Any]:
    def damage(run: Path) -> None:
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[: int(len(whole) * share)])

    return damage


def labels(**changes: Any) -> Callable[[Path], Any]:
    """Changes arrays of the pseudo labels; `...` removes one."""

    def damage(run: Path) -> None:
        with np.load(run / "pseudo_labels.npz") as archive:
            arrays = dict(archive) | changes
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in arrays.items() if value is not ...})
        (run / "pseudo_labels.npz").write_bytes(buffer.getvalue())

    return damage


def _first(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """Changes the tensors of one parameter in the optimiser's state."""
    return lambda known: change(known["optimizer"]["state"][0])


CHECKPOINT = "step-00000002.pt"

CASES = [
    # report over a record that is damaged
    Case("record empty", REPORT, ("record.json", "damaged", "delete it"), content("")),
    Case("record cut", REPORT, ("record.json", "not valid JSON"), content('{"schema_version": 1, "ap"')),
    Case("record binary", REPORT, ("record.json", "not valid JSON"), content(b"\x89PNG\r\n\x00\xff")),
    Case("record of zeros", REPORT, ("record.json", "not valid JSON"), content(b"\x00" * 4096)),
    Case("record a list", REPORT, ("record.json", "no schema_version"), content("[]")),
    Case("record null", REPORT, ("record.json", "no schema_version"), content("null")),
    Case("record with NaN", REPORT, ("record.json", "not valid JSON"), content('{"schema_version": 1, "ap": NaN}')),
    Case("record huge", REPORT, ("record.json", "out of range"), content('{"schema_version": 1, "ap": 1e999}')),
    Case("record nested", REPORT, ("nested more",), content(b'{"schema_version": 1, "config": ' + DEEP + b"}")),
    Case("record nested far", REPORT, ("nested too",), content(b"[" * 99999 + b"]" * 99999)),
    Case("record a folder and nothing else", REPORT, "record.json", folder_named()),
    Case("record a FIFO", REPORT, ("record.json", "Not a regular file"), fifo()),
    Case("record too new", REPORT, ("record.json", "too new", "update ssodbench"), record(schema_version=99)),
    Case("record of schema 0", REPORT, ("record.json", "no schema_version"), record(schema_version=0)),
    Case("record with an unknown key", REPORT, ("record.json", "'flavour'"), record(flavour=1)),
    Case("record without a percent", REPORT, ("record.json", "percent is missing"), record(percent=...)),
    Case("record without a method", REPORT, ("record.json", "method is missing"), record(method=...)),
    Case("record with a text as AP", REPORT, ("record.json", "ap: Expected"), record(ap="50")),
    Case("record with true as AP", REPORT, ("record.json", "ap: Expected"), record(ap=True)),
    Case("record with a fold of 1.5", REPORT, ("record.json", "fold: Expected"), record(fold=1.5)),
    Case("record with AP 1000", REPORT, ("record.json", "ap is 1000.0"), record(ap=1000.0)),
    Case("record with percent -1", REPORT, ("record.json", "percent is -1"), record(percent=-1.0)),
    Case("record with a giant number", REPORT, ("record.json", "steps is 1000"), record(steps=10**400)),
    Case("record with an unknown status", REPORT, ("record.json", "status is 'fine'"), record(status="fine")),
    Case("record with GPUs in a text", REPORT, ("record.json", "gpus"), record(environment={"gpus": "A100"})),
    Case("record with a list as config", REPORT, ("record.json", "config: Expected"), record(config=[1])),
    Case("nothing to report", REPORT, ("no record.json", "{tmp}/runs"), lambda folder: (folder / "runs").mkdir()),
    # train over a damaged folder
    Case("train over a cut record", TRAIN, ("run/record.json", "delete it"), run_with(cut("record.json"))),
    Case(
        "train over a record too new",
        TRAIN,
        ("run/record.json", "too new"),
        record("run/record.json", schema_version=9),
    ),
    Case("train over a FIFO as record", TRAIN, ("run/record.json", "Not a regular"), fifo("run/record.json")),
    Case("train over a cut config", TRAIN, "run/config.yaml", run_with(cut("config.yaml", 0.1))),
    Case(
        "train over a config with a tab",
        TRAIN,
        ("run/config.yaml", "line 1"),
        run_with(written("config.yaml", "\ta: 1")),
    ),
    Case(
        "train over a text as config", TRAIN, ("run/config.yaml", "damaged"), run_with(written("config.yaml", "hello"))
    ),
    Case(
        "train over a config with another value",
        TRAIN,
        ("detector.roi.hidden: 7 -> 128", "run_dir=DIR"),
        run_with(replaced("config.yaml", "hidden: 128", "hidden: 7")),
    ),
    Case(
        "train on a checkpoint without its optimiser",
        TRAIN,
        (CHECKPOINT, "lacks 'optimizer'"),
        run_with(unfinished, state(lambda known: known.pop("optimizer"))),
    ),
    Case(
        "train on a checkpoint with a moment of another shape",
        TRAIN,
        (CHECKPOINT, "exp_avg is of shape [3]"),
        run_with(unfinished, state(_first(lambda known: known.update(exp_avg=torch.zeros(3))))),
    ),
    Case(
        "train on a checkpoint without a parameter",
        TRAIN,
        (CHECKPOINT, "Missing key"),
        run_with(unfinished, state(lambda known: known["method"].popitem())),
    ),
    Case(
        "train on a checkpoint of another identity",
        TRAIN,
        ("split: x ->", "run_dir=DIR"),
        run_with(unfinished, state(lambda known: known["identity"].update(split="x"))),
    ),
    # evaluate over a damaged folder
    Case("evaluate a cut config", EVALUATE, "run/config.yaml", run_with(cut("config.yaml", 0.1))),
    Case("evaluate an empty config", EVALUATE, ("run/config.yaml", "`data`"), run_with(written("config.yaml", ""))),
    Case("evaluate a list as config", EVALUATE, "run/config.yaml", run_with(written("config.yaml", "- 1"))),
    Case("evaluate a binary config", EVALUATE, "run/config.yaml", run_with(written("config.yaml", b"\xff\xfe\x00"))),
    Case(
        "evaluate a config with a python tag",
        EVALUATE,
        ("run/config.yaml", "line 1"),
        run_with(written("config.yaml", "a: !!python/object/apply:os.getcwd []")),
    ),
    Case(
        "evaluate a config with a text as number",
        EVALUATE,
        ("run/config.yaml", "detector.roi.hidden: 128 -> many"),
        run_with(replaced("config.yaml", "hidden: 128", "hidden: many")),
    ),
    Case(
        "evaluate a config with another detector",
        EVALUATE,
        ("run/config.yaml", "detector._target_"),
        run_with(replaced("config.yaml", "detectors.faster_rcnn.small_faster_rcnn", "os.getcwd")),
    ),
    Case(
        "evaluate a config with a missing interpolation",
        EVALUATE,
        ("run/config.yaml", "nowhere"),
        run_with(replaced("config.yaml", "hidden: 128", "hidden: ${nowhere}")),
    ),
    Case(
        "evaluate a config with a list as root",
        EVALUATE,
        ("run/config.yaml", "data.root"),
        run_with(written("config.yaml", "data: {_target_: a, name: b, root: [1]}\n")),
    ),
    Case("evaluate a cut record", EVALUATE, ("run/record.json", "delete it"), run_with(cut("record.json"))),
    Case("evaluate a cut checkpoint", EVALUATE, (CHECKPOINT, "damaged"), run_with(cut(f"checkpoints/{CHECKPOINT}"))),
    Case("evaluate an empty checkpoint", EVALUATE, CHECKPOINT, run_with(cut(f"checkpoints/{CHECKPOINT}", 0))),
    Case("evaluate no checkpoint", EVALUATE, "no checkpoint", run_with(lambda run: shutil.rmtree(run / "checkpoints"))),
    Case(
        "evaluate a checkpoint that is a folder",
        EVALUATE,
        "no checkpoint",
        run_with(lambda run: (run / "checkpoints" / CHECKPOINT).unlink(), folder_named(f"checkpoints/{CHECKPOINT}")),
    ),
    Case(
        "evaluate an editor's backup alone",
        EVALUATE,
        "no checkpoint",
        run_with(lambda run: (run / "checkpoints" / CHECKPOINT).rename(run / "checkpoints/step-00000002 (copy).pt")),
    ),
    Case(
        "evaluate a checkpoint with a number as weight",
        EVALUATE,
        (CHECKPOINT, "method", "Expected `Tensor`"),
        run_with(state(lambda known: known["method"].update(dict.fromkeys(list(known["method"])[:1], 3)))),
    ),
    Case(
        "evaluate a checkpoint with a text as step",
        EVALUATE,
        (CHECKPOINT, "step: Expected"),
        run_with(state(lambda known: known.update(step="2"))),
    ),
    Case(
        "evaluate a checkpoint of another step",
        EVALUATE,
        (CHECKPOINT, "1, 2, 2"),
        run_with(state(lambda known: known.update(step=1))),
    ),
    Case(
        "evaluate a checkpoint with a list as identity",
        EVALUATE,
        (CHECKPOINT, "identity: Expected"),
        run_with(state(lambda known: known.update(identity=[]))),
    ),
    Case(
        "evaluate a checkpoint with an unknown counter",
        EVALUATE,
        (CHECKPOINT, "unknown key luck"),
        run_with(state(lambda known: known["counters"].update(luck=1))),
    ),
    Case(
        "evaluate a checkpoint of other tensors",
        EVALUATE,
        (CHECKPOINT, "Missing key"),
        run_with(state(lambda known: known.update(method={"w": torch.zeros(1)}))),
    ),
    # a suite over a damaged cell
    Case("suite over a cut record", SUITE, (CELL, "delete it"), content('{"schema', CELL)),
    Case("suite over a record too new", SUITE, (CELL, "update ssodbench"), record(CELL, schema_version=9)),
    Case("suite over a record with a text as AP", SUITE, (CELL, "ap: Expected"), record(CELL, ap="50")),
    Case("suite over a FIFO as record", SUITE, (CELL, "Not a regular file"), fifo(CELL)),
    # pseudo labels: damaged ones are made again, see the tests of offline labels
    Case(
        "pseudo labels of other images",
        STAC,
        ("pseudo_labels.npz", "image 901"),
        run_with(unfinished, labels(ids=np.arange(901, 909)), method="stac"),
    ),
    # files that say which images are labelled
    Case("ids gone", f"{SPLIT}ids", ("split.index_file={tmp}/index.json", "No such file")),
    Case("ids cut", f"{SPLIT}ids", ("split.index_file", "not JSON"), content("[1, 2", "index.json")),
    Case("ids with NaN", f"{SPLIT}ids", ("split.index_file", "not JSON"), content("[1, NaN]", "index.json")),
    Case(
        "ids with a text", f"{SPLIT}ids", ("split.index_file", "[1]: Expected `int`"), content('[1, "2"]', "index.json")
    ),
    Case("ids with true", f"{SPLIT}ids", ("split.index_file", "`bool`"), content("[true]", "index.json")),
    Case("ids with a fraction", f"{SPLIT}ids", ("split.index_file", "`float`"), content("[1.5]", "index.json")),
    Case("ids with a list", f"{SPLIT}ids", ("split.index_file", "`array`"), content("[[1]]", "index.json")),
    Case("ids beyond 64 bits", f"{SPLIT}ids", "split.index_file", content(f"[{2**70}]", "index.json")),
    Case("ids nested", f"{SPLIT}ids", "split.index_file", content(b"[" * 99999, "index.json")),
    Case("labeled a text", f"{SPLIT}ids", ("split.index_file", "labeled: "), content('{"labeled": "1"}', "index.json")),
    Case(
        "unlabeled a number",
        f"{SPLIT}ids",
        ("split.index_file", "unlabeled: "),
        content('{"labeled": [1], "unlabeled": 2}', "index.json"),
    ),
    Case("images a number", f"{SPLIT}ids", ("split.index_file", "images: "), content('{"images": 3}', "index.json")),
    Case("ids a FIFO", f"{SPLIT}ids", ("split.index_file", "Not a regular file"), fifo("index.json")),
    Case("index a list", f"{SPLIT}unbiased_teacher", ("split.index_file", "`array`"), content("[1]", "index.json")),
    Case(
        "index without folds",
        f"{SPLIT}unbiased_teacher",
        ("split.index_file", "['50']"),
        content('{"50": [1]}', "index.json"),
    ),
    Case(
        "index with a text",
        f"{SPLIT}unbiased_teacher",
        ("split.index_file", "['50']['1']", "[1]: Expected `int`"),
        content('{"50": {"1": [0, "1"]}}', "index.json"),
    ),
    Case(
        "index with a number for a fold",
        f"{SPLIT}unbiased_teacher",
        ("split.index_file", "['50']['1']"),
        content('{"50": {"1": 7}}', "index.json"),
    ),
    Case("index cut", f"{SPLIT}unbiased_teacher", ("split.index_file", "not JSON"), content('{"50', "index.json")),
]
