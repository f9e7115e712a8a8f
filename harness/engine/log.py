"""What a run says while it goes: the progress line, metrics.jsonl, and TensorBoard, W&B or MLflow.

Everywhere here `step` is the number of a student step, from 0. metrics.jsonl has one JSON object per line:

- `{"kind": "train", "step", "loss", "losses", "metrics", "lr", "images_per_s", "data_wait", "memory_mb",
  "gpu_memory_mb"}` every `every` steps. Losses and metrics are those of that step, so that a resumed run writes the
  same lines as an uninterrupted one; speed and data-wait (0..1) are means since the line before.
- `{"kind": "eval", "step", "network", "metrics"}`: scores of a network after that step.
- `{"kind": "pseudo", "step", "quality"}`: threshold set -> precision, recall, IoU of the pseudo labels on the images of
  the batch whose truth is known, the counts of both there; null is unknown.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from torch import Tensor

from harness.core.console import STDERR
from harness.core.files import open_to_append, read_bytes, write_atomically
from harness.core.readback import EvalLine, Line, metrics_line
from harness.engine.loggers import open_logger

_PLAIN_SECONDS = 30.0
_PROGRESS_SECONDS = 1.0


class RunLog:
    """Log of one run.

    Args:
        run_dir: folder of the run; metrics.jsonl and progress.json go there.
        steps: length of the schedule.
        title: name of the run in the progress line.
        every: steps between two lines; tensors are moved to the host only then, never in between.
        loggers: each "tensorboard", "wandb", "mlflow", or a `_target_` with its keys; imported only when named.
        start_step: first step this process does; lines of metrics.jsonl from there on are cut, so nothing is doubled.
        console: where progress goes; standard error by default.

    Raises:
        UserError: an unknown logger, or one whose package is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        steps: int,
        title: str,
        every: int,
        loggers: Sequence[str | Mapping[str, Any]] = ("tensorboard",),
        start_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self.run_dir, self.steps, self.title, self.every = run_dir, steps, title, max(1, every)
        self.console = console or STDERR
        run_dir.mkdir(parents=True, exist_ok=True)
        self._loggers = [open_logger(name, run_dir, title, start_step) for name in loggers]
        path = run_dir / "metrics.jsonl"
        # Scores of the end are written before the record: a run killed in between scores again, and says it once.
        self._evaluated = cut_lines(path, start_step)
        self._file = open_to_append(path)
        self._images, self._data_seconds, self._step_seconds, self._window_steps = 0, 0.0, 0.0, 0
        self._step_time: float | None = None  # smoothed seconds per step, for the ETA
        self._said_step, self._said_time = start_step, time.monotonic()
        self._written_time = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = progress_bar(self.console)
            self._task = self._bar.add_task(title, total=steps, completed=start_step, note="", eta=None)
            self._bar.start()

    def due(self, step: int) -> bool:
        """Whether a line is written after `step`: every `every` steps and at the end of the schedule."""
        return (step + 1) % self.every == 0 or step + 1 == self.steps

    def step(
        self,
        step: int,
        losses: Mapping[str, float | Tensor],
        metrics: Mapping[str, float | Tensor],
        lr: float,
        images: int,
        data_seconds: float,
        step_seconds: float,
    ) -> None:
        """Takes note of a step; cheap, and without a device synchronisation except every `every` steps.

        Args:
            step: number of the step, from 0.
            losses: name -> 0-d tensor or number, weights applied, so that their sum is the loss.
            metrics: name -> 0-d tensor or number.
            lr: learning rate of the step.
            images: distinct source images consumed, labelled plus unlabelled, over all processes.
            data_seconds: time blocked waiting for the batch.
            step_seconds: wall time of the whole step, the wait included.
        """
        self._images += images
        self._data_seconds += data_seconds
        self._step_seconds += step_seconds
        self._window_steps += 1
        if not self.due(step):
            return
        values = to_host({**{f"l/{k}": v for k, v in losses.items()}, **{f"m/{k}": v for k, v in metrics.items()}})
        host_losses = {k[2:]: v for k, v in values.items() if k.startswith("l/")}
        line: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "loss": sum(host_losses.values()),
            "losses": host_losses,
            "metrics": {k[2:]: v for k, v in values.items() if k.startswith("m/")},
            "lr": lr,
            "images_per_s": self._images / self._step_seconds if self._step_seconds else None,
            "data_wait": self._data_seconds / self._step_seconds if self._step_seconds else None,
            "memory_mb": psutil.Process().memory_info().rss / 2**20,
            "gpu_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else None,
        }
        self._update_step_time()
        self._write(line)
        self._to_loggers(step, train_scalars(line))
        self._show(line)

    def evaluation(self, step: int, network: str, metrics: Mapping[str, float | None]) -> None:
        """Notes the scores (0..100) of a network after `step`."""
        if (step, network) not in self._evaluated:
            self._evaluated.add((step, network))
            self._write({"kind": "eval", "step": step, "network": network, "metrics": dict(metrics)})
        self._to_loggers(step, {f"eval/{network}/{k}": v for k, v in metrics.items() if v is not None})
        shown = "  ".join(f"{name.upper()} {value:.1f}" for name, value in metrics.items() if value is not None)
        self.say(f"{self.title}  step {step + 1}/{self.steps}  {network}  {shown}")

    def pseudo(self, step: int, quality: Mapping[str, Mapping[str, float | None]]) -> None:
        """Notes the quality (0..1) of the pseudo labels, threshold set -> precision, recall, iou; None is unknown."""
        self._write({"kind": "pseudo", "step": step, "quality": {k: dict(v) for k, v in quality.items()}})
        values = {f"pseudo/{name}/{k}": v for name, part in quality.items() for k, v in part.items()}
        self._to_loggers(step, {name: value for name, value in values.items() if value is not None})

    def say(self, text: str) -> None:
        """Prints one line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar and writes what is pending; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        loggers, self._loggers = self._loggers, []
        with contextlib.ExitStack() as closing:  # all of them, even if one cannot write what is pending
            for logger in loggers:
                closing.callback(logger.close)
            self._file.close()

    def _update_step_time(self) -> None:
        """Exponential mean over lines, because a method's phases take different times; then a new window."""
        seconds = self._step_seconds / self._window_steps
        self._step_time = seconds if self._step_time is None else 0.7 * self._step_time + 0.3 * seconds
        self._images, self._data_seconds, self._step_seconds, self._window_steps = 0, 0.0, 0.0, 0

    def _write(self, line: dict[str, Any]) -> None:
        # One write call per line: a killed process leaves at most one torn line, which a resume cuts.
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()

    def _to_loggers(self, step: int, scalars: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, scalars)

    def _show(self, line: dict[str, Any]) -> None:
        done, now = line["step"] + 1, time.monotonic()
        eta = (self.steps - done) * self._step_time if self._step_time is not None else None
        if now - self._written_time >= _PROGRESS_SECONDS or done == self.steps:
            self._written_time = now
            keys = {k: line[k] for k in ("loss", "images_per_s", "data_wait")}
            content = {"step": done, "steps": self.steps, **keys, "eta": eta}
            write_atomically(self.run_dir / "progress.json", msgspec.json.encode(content), durable=False)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=bar_note(line), eta=eta)
            return
        tenth = max(1, self.steps // 10)
        if done // tenth > self._said_step // tenth or now - self._said_time >= _PLAIN_SECONDS or done == self.steps:
            self._said_step, self._said_time = done, now
            self.say(plain_line(self.title, self.steps, line, eta))


def to_host(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Numbers from 0-d tensors, moved off each device together: one synchronisation, not one per value."""
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        return {name: float(value) for name, value in values.items()}
    moved = dict(zip(tensors, torch.stack([t.double() for t in tensors.values()]).tolist(), strict=True))
    return {name: moved[name] if name in moved else float(value) for name, value in values.items()}


def cut_lines(path: Path, start_step: int) -> set[tuple[int, str]]:
    """Removes the lines of metrics.jsonl of `start_step` and later, and those that are torn or damaged.

    Returns:
        (step, network) of the evaluations that stay.
    """
    if not path.exists():
        return set()
    kept, evaluated = [], set()
    for line in read_bytes(path).splitlines(keepends=True):
        content = _parse(line)
        if content is not None and content.step < start_step:
            kept.append(line)
            if isinstance(content, EvalLine):
                evaluated.add((content.step, content.network))
    write_atomically(path, b"".join(kept))
    return evaluated


def _parse(line: bytes) -> Line | None:
    """A line's content; None when the line is torn or damaged."""
    try:
        return metrics_line(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def train_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Flat names and numbers of a "train" line, for the loggers."""
    scalars = {"train/loss": line["loss"], "train/lr": line["lr"]}
    scalars |= {f"loss/{name}": value for name, value in line["losses"].items()}
    scalars |= {f"metric/{name}": value for name, value in line["metrics"].items()}
    speed = ("images_per_s", "data_wait", "memory_mb", "gpu_memory_mb")
    return scalars | {f"speed/{name}": line[name] for name in speed if line[name] is not None}


def duration(seconds: float | None) -> str:
    """1:02:03, or -:--:-- when it is not known."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def bar_note(line: Mapping[str, Any]) -> str:
    """Loss, images/s, data-wait and learning rate of a "train" line, for the bar."""
    speed = f"{line['images_per_s']:.0f} img/s  wait {line['data_wait']:.0%}" if line["images_per_s"] else ""
    return f"loss {line['loss']:.3f}  {speed}  lr {line['lr']:.1e}"


def plain_line(title: str, steps: int, line: Mapping[str, Any], eta: float | None) -> str:
    """The line for outputs that are not a terminal: step, losses, lr, img/s, data-wait %, memory, ETA."""
    parts = " ".join(f"{name} {value:.3f}" for name, value in line["losses"].items())
    rate, wait = line["images_per_s"], line["data_wait"]
    memory = f"{line['memory_mb'] / 1024:.2f} GB"
    if line["gpu_memory_mb"] is not None:
        memory += f" + {line['gpu_memory_mb'] / 1024:.2f} GB GPU"
    speed = f"{rate:.1f} img/s  data-wait {wait:.1%}" if rate is not None else "- img/s"
    return (
        f"{title}  step {line['step'] + 1}/{steps}  loss {line['loss']:.3f} ({parts})  lr {line['lr']:.2e}  {speed}  "
        f"{memory}  ETA {duration(eta)}"
    )


class EtaColumn(ProgressColumn):
    """Time left: the task's field `eta`, in seconds. Rich's own estimate knows nothing of a method's phases."""

    def render(self, task: Task) -> Text:
        return Text(duration(task.fields.get("eta")), style="cyan")


def progress_bar(console: Console) -> Progress:
    """The bar of a run; tasks carry the fields `note` and `eta`."""
    name = TextColumn("{task.description}", style="bold", markup=False)
    columns = (name, BarColumn(bar_width=24), MofNCompleteColumn(), "ETA", EtaColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=console, refresh_per_second=2)
