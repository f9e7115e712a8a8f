"""The display of a running suite: a line per cell, or a table on a terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from harness.core.readback import Progress as RunProgress
from harness.core.readback import read_progress, tail
from harness.core.record import read_record
from harness.core.types import UserError
from harness.engine.log import EtaColumn, duration
from harness.suite.claims import Claims
from harness.suite.plan import SuiteCell, state_of

UNFINISHED = ("waiting", "running", "held")


@dataclass(frozen=True)
class CellStatus:
    """How a cell stands on the disk, as texts."""

    state: str
    score: str = "-"
    steps: str = "-"
    eta: str = "-"
    note: str = ""


def steps_of(cell: SuiteCell) -> tuple[str, str]:
    """How far a cell is, and how long it takes still, as texts."""
    progress = read_progress(cell.run_dir)
    steps = f"{progress.step}/{progress.steps}" if progress is not None else "-"
    return steps, duration(progress.eta if progress else None)


def status_of(cell: SuiteCell, claims: Claims) -> CellStatus:
    """The status of a cell: its progress while a live process holds its folder, otherwise that of its record."""
    steps, eta = steps_of(cell)
    if (holder := claims.holder(cell.name, cell.run_dir)) is not None:
        return CellStatus("running", steps=steps, eta=eta, note=holder)
    path = cell.run_dir / "record.json"
    if not path.exists():
        return CellStatus("waiting")
    try:
        if state_of(cell) == "ok":
            ap = read_record(path).ap
            return CellStatus("ok", "-" if ap is None else f"{ap:.1f}", steps)
        record = read_record(path)
    except UserError as error:
        return CellStatus("unusable", note=str(error))
    if record.status == "running":  # and nobody holds it
        return CellStatus("interrupted", steps=steps, note="its process has gone; the same command continues it")
    return CellStatus(record.status, steps=steps, note=record.error or "")


class SuiteView:
    """Bars of the suite and of each running cell on a terminal, otherwise one line when a cell starts or ends."""

    def __init__(self, cells: list[SuiteCell], console: Console) -> None:
        self.cells, self.console = cells, console
        self.begin = time.monotonic()
        self.done_before = self._done()
        name = TextColumn("{task.description}", style="bold", markup=False)
        columns = (name, BarColumn(bar_width=24), "{task.percentage:>3.0f}%", "ETA", EtaColumn())
        self.bars = Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=console)
        self.total = self.bars.add_task("suite", total=1.0, note="", eta=None)
        self.tasks: dict[str, Any] = {}
        self.live = self.bars if console.is_terminal else None

    def __enter__(self) -> SuiteView:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line, above the bars where there are any."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, cell: SuiteCell) -> None:
        """A cell has been started."""
        if self.live is not None:
            self.tasks[cell.name] = self.bars.add_task(cell.name, total=1.0, note="starting", eta=None)
        else:
            self.say(f"start   {cell.name}")

    def held(self, cell: SuiteCell) -> None:
        """A cell is left to the process that runs it."""
        self.say(f"held    {cell.name}  {cell.reason}")

    def finished(self, cell: SuiteCell, seconds: float, suite_dir: Path) -> None:
        """A cell has ended: its score, or the end of what it printed."""
        if cell.name in self.tasks:
            self.bars.remove_task(self.tasks.pop(cell.name))
        ended = sum(c.state not in UNFINISHED for c in self.cells)
        line = f"{cell.state:<7} {cell.name}"
        if cell.state == "ok":
            ap = read_record(cell.run_dir / "record.json").ap
            line += f"  AP {ap:.1f}" if ap is not None else "  AP -"
        self.say(f"{line}  {seconds:.0f} s  [{ended}/{len(self.cells)}]  ETA {duration(self.eta())}")
        if cell.state == "failed":
            log = suite_dir / "logs" / f"{cell.name}.log"
            self.say(f"  {cell.reason}\n  the end of {log}:\n" + tail(log, 12))

    def update(self) -> None:
        """Reads how far the running cells are."""
        for cell in self.cells:
            if cell.state in ("running", "held"):
                cell.progress = read_progress(cell.run_dir) or cell.progress
                if cell.name in self.tasks:
                    note, eta = progress_note(cell.progress), cell.progress.eta if cell.progress else None
                    self.bars.update(self.tasks[cell.name], completed=cell.done, note=note, eta=eta)
        if self.live is not None:
            ended = sum(c.state not in UNFINISHED for c in self.cells)
            share = self._done() / sum(c.cost for c in self.cells)
            self.bars.update(self.total, completed=share, note=f"{ended}/{len(self.cells)} cells", eta=self.eta())

    def _done(self) -> float:
        return sum(cell.cost * cell.done for cell in self.cells)

    def eta(self) -> float | None:
        """Seconds left at the pace so far; None before there is one."""
        done = self._done() - self.done_before
        left = sum(c.cost * (1 - c.done) for c in self.cells if c.state in UNFINISHED)
        if left == 0:
            return 0.0
        return (time.monotonic() - self.begin) / done * left if done > 0 else None


def progress_note(progress: RunProgress | None) -> str:
    """Loss, img/s and data-wait of a running cell."""
    parts = []
    if progress is not None and progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress is not None and progress.images_per_s is not None:
        parts.append(f"{progress.images_per_s:.0f} img/s")
    if progress is not None and progress.data_wait is not None:
        parts.append(f"wait {progress.data_wait:.0%}")
    return "  ".join(parts) or "starting"
