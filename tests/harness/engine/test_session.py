"""Runs from the command line: records, repetition, resumption, mistakes. Real data, real training, few steps."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

import harness.engine.evaluate
import harness.engine.log
import harness.engine.loggers
import harness.engine.session
from detectors.methods.supervised import Supervised
from harness.cli import main
from harness.config import saved
from harness.core import lock
from harness.core.stopping import stop_signals
from harness.core.types import Batch
from harness.data.drawing import CLASSES
from harness.engine import checkpoint, pretrain
from harness.engine.accumulate import scores
from harness.engine.errors import KINDS
from harness.engine.evaluate import METRICS
from harness.engine.loop import RunError
from harness.engine.matches import read_matches
from harness.engine.taught import PSEUDO_LABELS

pytestmark = pytest.mark.timeout(300)

SMALL = [
    "data=shapes",
    "data.train_images=40",
    "data.val_images=12",
    "detector.weights=scratch",
    "schedule=smoke",
    "split.percent=20",
    "batch.labeled=4",
    "batch.unlabeled=4",
    "device=cpu",
    "logging.loggers=[]",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _command(cache: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["train", *SMALL, f"cache_dir={cache}", f"run_dir={run_dir}", *overrides]


def _record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "record.json").read_text())


def _outcome(run_dir: Path) -> dict[str, Any]:
    """What must not depend on time, place or interruptions."""
    record = _record(run_dir)
    keys = [k for k in record if k.startswith(("ap", "scores", "pseudo_", "images_")) or k.endswith("sha256")]
    outcome = {key: record[key] for key in keys if key != "images_per_s"}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("images_per_s", "data_wait", "memory_mb", "gpu_memory_mb"):
            line.pop(key, None)
    kept = run_dir / PSEUDO_LABELS
    assert kept.exists() == (record["method"] not in ("supervised", "stac"))  # of teachers alone
    labels = kept.read_text() if kept.exists() else ""
    return {**outcome, "lines": lines, "predictions": (run_dir / "predictions.json").read_text(), "labels": labels}


METHODS = {
    "supervised": (),
    "stac": ("method.offline.drop_empty=false",),  # an untrained stage 1 may find nothing
    "soft_teacher": (),
    "unbiased_teacher": (),
    "mean_teacher": (),
    "dense_teacher": ("detector=small_fcos", "detector.weights=scratch"),
    "arsl": ("detector=small_fcos_iou", "detector.weights=scratch"),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_same_command_in_two_folders_gives_the_same_bits(cache: Path, tmp_path: Path, method: str) -> None:
    for name in ("one", "two"):
        assert main(_command(cache, tmp_path / name, f"method={method}", *METHODS[method])) == 0
    one = _record(tmp_path / "one")
    assert one["status"] == "ok"
    assert one["ap"] is not None
    assert one["reported_network"] in ("student", "teacher")
    assert one["ap"] == one["scores"][one["reported_network"]]["ap"]
    assert one["labeled_images"] == 8
    assert _outcome(tmp_path / "one") == _outcome(tmp_path / "two")


def test_finished_run_says_so_and_a_changed_command_is_refused(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(_command(cache, tmp_path / "run")) == 0
    before = (tmp_path / "run" / "record.json").read_bytes()
    assert main(_command(cache, tmp_path / "run")) == 0
    assert "finished" in capfd.readouterr().err
    assert main(_command(cache, tmp_path / "run", "schedule.optimizer.lr=0.5")) == 2
    assert "schedule.optimizer.lr: 0.002 -> 0.5" in capfd.readouterr().err
    assert (tmp_path / "run" / "record.json").read_bytes() == before


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _wait_for_checkpoint(process: subprocess.Popen[bytes], run_dir: Path, count: int) -> None:
    while process.poll() is None and len(checkpoint.checkpoints(run_dir)) < count:
        time.sleep(0.005)


LONGER = ("schedule.steps=24", "schedule.warmup_steps=2", "checkpointing.every=1", "checkpointing.keep=50")


def _kill_at_random_moments(cache: Path, tmp_path: Path, method: str, kills: int, seed: int) -> None:
    overrides = (f"method={method}", *LONGER)
    assert main(_command(cache, tmp_path / "whole", *overrides)) == 0
    generator = random.Random(seed)
    for kill in range(kills):
        process = _start(_command(cache, tmp_path / "killed", *overrides))
        _wait_for_checkpoint(process, tmp_path / "killed", (kill + 1) * 20 // kills)
        time.sleep(generator.random() * 0.1)
        process.kill()
        process.wait()
    assert main(_command(cache, tmp_path / "killed", *overrides)) == 0
    assert _outcome(tmp_path / "killed") == _outcome(tmp_path / "whole")
    resumed = _record(tmp_path / "killed")["resumed_from"]
    assert resumed
    assert resumed == sorted(resumed)


@pytest.mark.parametrize(("method", "kills"), [("supervised", 1), ("soft_teacher", 2)])
def test_killed_run_continues_bit_for_bit(cache: Path, tmp_path: Path, method: str, kills: int) -> None:
    _kill_at_random_moments(cache, tmp_path, method, kills, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["supervised", "soft_teacher"])
def test_run_killed_ten_times_continues_bit_for_bit(cache: Path, tmp_path: Path, method: str) -> None:
    _kill_at_random_moments(cache, tmp_path, method, kills=10, seed=2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signals_save_and_exit_with_the_conventional_code(cache: Path, tmp_path: Path, number: int, code: int) -> None:
    overrides = ("schedule.steps=400", "checkpointing.every=5")
    process = _start(_command(cache, tmp_path / "run", *overrides))
    _wait_for_checkpoint(process, tmp_path / "run", 1)
    process.send_signal(number)
    if number == signal.SIGHUP:
        process.send_signal(number)  # the shell of a closed terminal sends its own
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors.decode()
    record = _record(tmp_path / "run")
    assert record["status"] == "interrupted"
    state = checkpoint.newest(tmp_path / "run")
    assert state is not None
    assert state["step"] > 5 or state["step"] == 5
    assert b"Traceback" not in errors


def test_closed_terminal_saves(cache: Path, tmp_path: Path) -> None:
    """Its process gets SIGHUP, and every write to the terminal fails from then on."""
    command = _command(cache, tmp_path / "run", "schedule.steps=400", "checkpointing.every=5", "logging.every=1")
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-m", "harness.cli", *command])
    end = time.monotonic() + 60
    while time.monotonic() < end and not checkpoint.checkpoints(tmp_path / "run"):
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert _record(tmp_path / "run")["status"] == "interrupted"


def test_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_while_the_backbone_is_trained_is_heard_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls, augment = [], pretrain.augment

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return augment(*arguments)

    monkeypatch.setattr(pretrain, "augment", signalled)
    monkeypatch.setattr(pretrain.Recipe, "__init__", partialmethod(pretrain.Recipe.__init__, patches=320))
    overrides = ("detector.weights=generated", "detector.channels=[8,8,8,8]")
    assert main(_command(tmp_path / "cache", tmp_path / "run", *overrides)) == 143
    assert len(calls) == 3
    assert not (tmp_path / "run").exists()
    assert "interrupted by SIGTERM; start the same command again" in capfd.readouterr().err


def test_loss_that_is_not_finite_stops_the_run_and_can_be_replayed(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = (
        "schedule.optimizer.name=sgd",
        "schedule.optimizer.lr=1000",
        "schedule.clip_norm=null",
        "checkpointing.every=1",
        "batch.unlabeled=0",
        "batch.micro=2",
    )
    assert main(_command(cache, tmp_path / "run", *overrides)) == 1
    errors = capfd.readouterr().err
    assert "not finite at step" in errors
    assert _record(tmp_path / "run")["status"] == "failed"
    replay = json.loads((tmp_path / "run" / "non_finite_rank0.json").read_text())
    assert [len(micro["labeled_ids"]) for micro in replay["micro_batches"]] == [2, 2]
    assert "in another run_dir" in errors
    state = checkpoint.newest(tmp_path / "run")
    assert state is None or state["step"] <= replay["step"]


def test_gradient_that_is_not_finite_is_never_saved(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Supervised.forward

    def finite_loss_alone(self: Supervised, batch: Batch, step: int) -> Any:
        losses, metrics = forward(self, batch, step)
        if step == 3:
            zero = next(p for p in self.student.parameters() if p.requires_grad).sum() * 0
            losses["root"] = zero.sqrt()  # 0, with a slope that is infinite
        return losses, metrics

    monkeypatch.setattr(Supervised, "forward", finite_loss_alone)
    assert main(_command(cache, tmp_path / "run", "checkpointing.every=1")) == 1
    assert "the gradient is not finite at step 3, though the losses are" in capfd.readouterr().err
    state = checkpoint.newest(tmp_path / "run")
    assert state is not None
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["method"].values())


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (harness.engine.log.RunLog, "_write"),
        (harness.engine.log, "write_atomically"),  # progress.json
        (harness.engine.loggers.TensorBoardLogger, "log"),
        (harness.engine.session, "write_predictions"),
        (harness.engine.session, "write_record"),
        (torch, "save"),
    ],
)
def test_full_disk_is_told_and_the_same_command_continues(
    cache: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
) -> None:
    command = _command(cache, tmp_path / "run", "logging.loggers=[tensorboard]")
    monkeypatch.setattr(owner, name, _full_disk)
    assert main(command) == 1
    errors = capfd.readouterr().err
    assert "No space left on device" in errors
    assert "free space on that disk" in errors
    assert "Traceback" not in errors
    monkeypatch.undo()
    if name != "write_record":
        assert _record(tmp_path / "run")["status"] == "failed"
    assert main(command) == 0


def test_record_that_cannot_be_written_does_not_hide_why_the_run_failed(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        monkeypatch.setattr(harness.engine.session, "write_record", _full_disk)
        raise RunError("the loss is not finite")

    monkeypatch.setattr(harness.engine.session, "train", fails)
    assert main(_command(cache, tmp_path / "run")) == 1
    assert "the loss is not finite" in capfd.readouterr().err


def test_folder_in_which_nothing_was_trained_takes_another_configuration(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(_command(cache, tmp_path / "run", "logging.loggers=[wandb]")) == 2
    assert "wandb, which is not installed" in capfd.readouterr().err
    assert main(_command(cache, tmp_path / "run", "schedule.optimizer.lr=0.001")) == 0
    assert saved.read_config(tmp_path / "run").schedule.optimizer.lr == 0.001


# Batches of an evaluation: 3 per network, two networks after 6 steps, two at the end.
@pytest.mark.parametrize("batch", [2, 5, 8])
def test_signal_is_heard_in_an_evaluation_which_is_made_up_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    overrides = (
        "method=soft_teacher",
        "schedule.steps=12",
        "evaluation.every=6",
        "evaluation.between=all",
        "evaluation.batch=4",
        "checkpointing.every=100",
    )
    assert main(_command(cache, tmp_path / "whole", *overrides)) == 0
    seen, to_original = [], harness.engine.evaluate.to_original

    def signalled(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == batch:
            signal.raise_signal(signal.SIGTERM)
        return to_original(*arguments)

    monkeypatch.setattr(harness.engine.evaluate, "to_original", signalled)
    assert main(_command(cache, tmp_path / "run", *overrides)) == 143
    assert len(seen) == batch
    assert _record(tmp_path / "run")["status"] == "interrupted"
    assert main(_command(cache, tmp_path / "run", *overrides)) == 0
    assert len(seen) == batch + 3 * (4 if batch < 7 else 2)
    assert _outcome(tmp_path / "run") == _outcome(tmp_path / "whole")


def test_states_of_all_ranks_are_merged() -> None:
    def state(bad: dict[str, str], drawn: list[bool]) -> dict[str, Any]:
        return {"bad_images": bad, "drawn": [torch.tensor(drawn), torch.zeros(0, dtype=torch.bool)]}

    merged = harness.engine.session.merge_states(
        [
            state({"a": "torn", "b": "empty"}, [True, False, False]),
            state({"b": "", "c": "no JPEG"}, [True, True, False]),
        ]
    )
    assert merged["bad_images"] == {"a": "torn", "b": "empty", "c": "no JPEG"}
    assert merged["drawn"][0].tolist() == [True, True, False]
    assert len(merged["drawn"][1]) == 0


def test_running_out_of_memory_names_the_setting_to_lower(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.engine.session, "train", lambda *_: torch.empty(1 << 60))
    assert main(_command(cache, tmp_path / "run")) == 1
    errors = capfd.readouterr().err
    assert "out of memory on cpu: lower batch.micro (now 4)" in errors  # supervised: of 4 labelled images alone
    assert "Traceback" not in errors
    assert _record(tmp_path / "run")["status"] == "failed"


def test_run_folder_of_a_live_run_is_refused(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held = lock.RunLock(tmp_path / "run").acquire()
    assert main(_command(cache, tmp_path / "run")) == 2
    held.release()
    assert "held by process" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["method=nonsense"], "nonsense"),
        (["data=nonsense"], "nonsense"),
        (["batch.labelled=3"], "batch.labeled"),
        (["data=coco", "data.train_images=a", "data.val_images=b", "data.root=missing folder"], "missing folder"),
        (["split.percent=0.01"], "split.percent"),
        (["batch.micro=3"], "batch.micro"),
        (["method=soft_teacher", "split.percent=100"], "unlabelled"),
        (["devices=2", "device=cuda"], "cuda"),
    ],
)
def test_mistakes_give_one_sentence_and_leave_nothing(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], named: str
) -> None:
    assert main(_command(cache, tmp_path / "run", *overrides)) == 2
    errors = capfd.readouterr().err
    assert named in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_share_below_one_image_is_refused(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(_command(cache, tmp_path / "run", "split.percent=1")) == 2  # of 40 images
    assert "less than one" in capfd.readouterr().err
    assert main(_command(cache, tmp_path / "run", "split.percent=2.5")) == 0
    assert _record(tmp_path / "run")["labeled_images"] == 1


def test_evaluate_scores_a_run_again(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(_command(cache, tmp_path / "run")) == 0
    record, file = _record(tmp_path / "run"), tmp_path / "run/matches.npz"
    kept = scores(read_matches(file))
    for metric in METRICS:
        assert kept[metric] == pytest.approx(record[metric], abs=1e-9)
    assert record["scores"][record["reported_network"]]["ar"] == pytest.approx(kept["ar"])
    assert set(record["per_class"]) == set(CLASSES)
    assert set(record["errors"]) == set(KINDS)
    file.unlink()
    assert (
        main(["evaluate", f"run_dir={tmp_path / 'run'}", f"cache_dir={cache}", "evaluation.score_threshold=0.1"]) == 0
    )
    assert not file.exists()
    assert main(["evaluate", f"run_dir={tmp_path / 'run'}", f"cache_dir={cache}"]) == 0
    assert scores(read_matches(file)) == pytest.approx(kept, abs=0.01)
    scored = json.loads((tmp_path / "run" / "evaluation_0.05.json").read_text())
    assert scored["networks"]["student"]["ap"] == _record(tmp_path / "run")["scores"]["student"]["ap"]
    assert "ap50" in capfd.readouterr().out


def test_evaluate_takes_other_data_of_the_same_classes_and_a_run_by_its_settings(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL, f"cache_dir={cache}", f"runs_dir={tmp_path}"]
    assert main(["train", *settings]) == 0
    (run_dir,) = (tmp_path / "train").iterdir()
    of_run = [word for word in settings if not word.startswith("logging")]
    assert main(["evaluate", *of_run, "pipeline=torchvision", "evaluation.score_threshold=0.5"]) == 0
    assert (run_dir / "evaluation_0.5.json").exists()
    (generated,) = (path for path in (cache / "shapes").iterdir() if (path / "tune.json").exists())
    other = ["data=custom", f"data.root={generated}", "data.val_annotations=tune.json", "data.val_images=tune"]
    assert main(["evaluate", f"run_dir={run_dir}", "device=cpu", f"cache_dir={cache}", *other]) == 0
    (file,) = (path for path in run_dir.glob("evaluation_*.json") if path.name != "evaluation_0.5.json")
    tuned = json.loads(file.read_text())
    assert tuned["val_sha256"] == hashlib.sha256((generated / "tune.json").read_bytes()).hexdigest()
    assert tuned["val_sha256"] != _record(run_dir)["val_sha256"]
    assert file.name == "evaluation_custom_0.05.json"
    assert "on data=" in capfd.readouterr().out


def test_record_without_its_configuration_is_not_a_finished_run(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(_command(cache, tmp_path / "run")) == 0
    before = _outcome(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    capfd.readouterr()
    assert main(_command(cache, tmp_path / "run")) == 0
    assert "is finished" not in capfd.readouterr().err
    assert (tmp_path / "run" / "config.yaml").exists()
    assert _outcome(tmp_path / "run") == before


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("prepare", "train", "suite", "report", "evaluate", "profile"))
    assert len(shown.splitlines()) < 40
    assert main(["trian"]) == 2
    assert "trian" in capsys.readouterr().err
    assert main(["train", "--nonsense"]) == 2
