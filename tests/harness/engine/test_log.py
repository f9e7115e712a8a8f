"""The log of a run: lines, their cut on resume, the plain progress line, and loggers that are imported when chosen."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from harness.config import compose
from harness.core.types import UserError
from harness.engine import log as logs


def run(tmp_path, first, last, *, steps=10, every=2, loggers=(), console=None):
    """Logs steps first..last - 1, each with a loss that depends on the step alone."""
    console = console or Console(file=io.StringIO(), width=200)
    log = logs.RunLog(
        tmp_path, steps=steps, title="cell", every=every, loggers=loggers, start_step=first, console=console
    )
    for step in range(first, last):
        losses = {"roi": torch.tensor(1.0 / (step + 1), requires_grad=True), "rpn": torch.tensor(0.5)}
        log.step(step, losses, {"boxes": torch.tensor(step)}, 1e-3, images=8, data_seconds=0.25, step_seconds=1.0)
        if step == 5:
            log.evaluation(step, "teacher", {"ap": 12.5, "ap_s": None})
            log.pseudo(step, {"box": {"precision": 0.5, "recall": 0.25, "iou": 0.75}})
    log.close()
    return console


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_lines(tmp_path):
    run(tmp_path, 0, 10, every=4)
    train = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in train] == [3, 7, 9]  # every 4 steps, and the last
    assert train[0]["losses"] == {"roi": pytest.approx(0.25), "rpn": 0.5}
    assert train[0]["loss"] == pytest.approx(0.75)
    assert train[0]["metrics"] == {"boxes": 3.0}
    assert train[0]["images_per_s"] == pytest.approx(8.0)
    assert train[0]["data_wait"] == pytest.approx(0.25)
    assert train[0]["memory_mb"] > 1
    assert {"kind": "eval", "step": 5, "network": "teacher", "metrics": {"ap": 12.5, "ap_s": None}} in lines(tmp_path)
    quality = {"box": {"precision": 0.5, "recall": 0.25, "iou": 0.75}}
    assert {"kind": "pseudo", "step": 5, "quality": quality} in lines(tmp_path)


@pytest.mark.parametrize(("resumed_from", "stopped_at"), [(f, s) for f in (0, 3, 6) for s in range(f, 10)])
def test_a_resumed_run_writes_the_same_lines(tmp_path, resumed_from, stopped_at):
    run(tmp_path / "whole", 0, 10, every=4)
    run(tmp_path / "cut", 0, stopped_at, every=4)
    with (tmp_path / "cut/metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"train","step":')  # killed within a line
    run(tmp_path / "cut", resumed_from, 10, every=4)
    varying = ("images_per_s", "data_wait", "memory_mb")
    whole, cut = (
        [{k: v for k, v in x.items() if k not in varying} for x in lines(tmp_path / n)] for n in ("whole", "cut")
    )
    assert whole == cut


def test_scores_of_the_end_are_written_once(tmp_path):
    for start_step in (0, 10):
        run(tmp_path, start_step, 10)
        log = logs.RunLog(tmp_path, steps=10, title="cell", every=2, loggers=(), start_step=10)
        log.evaluation(9, "student", {"ap": 1.0})
        log.close()
    assert [line["kind"] for line in lines(tmp_path) if line["step"] == 9] == ["train", "eval"]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind":"train","step":0}\n')
    run(tmp_path, 0, 1)
    assert lines(tmp_path) == []


def test_no_value_is_read_between_two_lines(tmp_path, monkeypatch):
    log = logs.RunLog(tmp_path, steps=100, title="cell", every=10, loggers=(), console=Console(file=io.StringIO()))
    reads = []
    monkeypatch.setattr(logs, "to_host", lambda values: reads.append(1) or dict.fromkeys(values, 0.0))
    for step in range(30):
        log.step(step, {"a": torch.tensor(1.0)}, {}, 0.1, 1, 0.0, 1.0)
    log.close()
    assert len(reads) == 3


def test_non_finite_losses_leave_valid_json(tmp_path):
    log = logs.RunLog(tmp_path, steps=1, title="cell", every=1, loggers=(), console=Console(file=io.StringIO()))
    log.step(0, {"a": torch.tensor(float("nan"))}, {}, 0.1, 1, 0.0, 1.0)
    log.close()
    assert lines(tmp_path)[0]["losses"] == {"a": None}


def test_progress_file(tmp_path):
    run(tmp_path, 0, 10)
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["step"] == progress["steps"] == 10
    assert progress["eta"] == 0
    assert progress["loss"] == pytest.approx(0.6)


def test_plain_line_has_everything(tmp_path):
    text = run(tmp_path, 0, 10, every=1).file.getvalue()
    first = text.splitlines()[0]
    for word in (
        "cell",
        "step 1/10",
        "loss 1.500",
        "roi 1.000",
        "lr 1.00e-03",
        "8.0 img/s",
        "data-wait 25.0%",
        "GB",
        "ETA 0:00:09",
    ):
        assert word in first
    assert "teacher  AP 12.5" in text
    assert len(text.splitlines()) == 11  # one per 10 %, and the evaluation


def test_plain_lines_are_few(tmp_path):
    text = run(tmp_path, 0, 1000, steps=1000, every=1).file.getvalue()
    assert len(text.splitlines()) == 11


def test_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), width=160, force_terminal=True, force_interactive=True)
    text = run(tmp_path, 0, 10, console=console).file.getvalue()
    assert "10/10" in text
    assert "8 img/s" in text
    assert "wait 25%" in text


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 0, 10, loggers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 3, 5, 7, 9]
    assert events.Scalars("eval/teacher/ap")[0].value == 12.5
    assert events.Scalars("pseudo/box/recall")[0].value == 0.25


def test_loggers_are_imported_only_when_chosen(tmp_path):
    code = (
        "import sys; from pathlib import Path; from harness.engine.log import RunLog;"
        f"RunLog(Path({str(tmp_path)!r}), steps=1, title='t', every=1, loggers=()).close();"
        "sys.exit(any(name in sys.modules for name in ('tensorboard', 'wandb', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name}, which is not installed"):
        logs.open_logger(name, tmp_path, "t", 0)


def test_every_logger_is_closed_even_if_the_file_cannot_be(tmp_path, monkeypatch):
    closed = []
    logger = types.SimpleNamespace(log=lambda *_: None, close=lambda: closed.append(1))
    monkeypatch.setattr(logs, "open_logger", lambda *_: logger)
    log = logs.RunLog(tmp_path, steps=1, title="t", every=1, loggers=["tensorboard"])
    log._file.close()

    def full():
        raise OSError(28, "No space left on device")

    log._file = types.SimpleNamespace(close=full)
    with pytest.raises(OSError, match="space"):
        log.close()
    assert closed == [1]


def test_an_unknown_logger(tmp_path):
    with pytest.raises(UserError, match="tensorbord"):
        logs.open_logger("tensorbord", tmp_path, "t", 0)


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []
    session = types.SimpleNamespace(log=lambda scalars, step: logged.append((step, scalars)), finish=lambda: None)
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **keys: started.append(keys) or session
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path, 0, 4, loggers=["wandb"])
    run(tmp_path, 4, 6, loggers=["wandb"])
    assert len({keys["id"] for keys in started}) == 1
    assert [step for step, scalars in logged if "train/loss" in scalars] == [1, 3, 5]


class Remembering:
    """A logger of one's own."""

    def __init__(self, run_dir: Path, title: str, start_step: int, prefix: str = "") -> None:
        self.path, self.prefix = run_dir / f"{title}.txt", prefix
        self.first = start_step

    def log(self, step, scalars):
        with self.path.open("a") as file:
            file.writelines(f"{self.prefix}{name} {step} {value}\n" for name, value in scalars.items())

    def close(self):
        with self.path.open("a") as file:
            file.write(f"closed, begun at {self.first}\n")


def test_a_logger_of_ones_own_is_one_target(tmp_path, monkeypatch):
    module = types.ModuleType("own_logger")
    module.Remembering = Remembering
    monkeypatch.setitem(sys.modules, "own_logger", module)
    chosen = ["logging.loggers=[{_target_: own_logger.Remembering, prefix: 'my '}]"]
    run(tmp_path, 2, 4, loggers=list(compose.load(chosen).logging.loggers))
    lines = (tmp_path / "cell.txt").read_text().splitlines()
    assert [line.split()[2] for line in lines if line.startswith("my train/loss ")] == ["3"]
    assert lines[-1] == "closed, begun at 2"
    with pytest.raises(UserError, match=r"logging\.loggers\[0\]\.prefx is not known; did you mean prefix"):
        compose.load(["logging.loggers=[{_target_: own_logger.Remembering, prefx: x}]"])
