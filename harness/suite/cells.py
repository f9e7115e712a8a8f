"""Cells as processes side by side: how many, in which order, stopped in order, their ends explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from omegaconf import DictConfig

from harness.core.files import open_to_append, refusal
from harness.core.readback import tail
from harness.core.record import available_cores, read_record, write_record
from harness.core.stopping import StopRequest
from harness.core.types import RunRecord, UserError
from harness.launch.launcher import THREAD_VARIABLES
from harness.suite.claims import Claims
from harness.suite.fork_server import ForkedCell, ForkServer, end_with_parent
from harness.suite.plan import SuiteCell, state_of

if TYPE_CHECKING:
    from harness.suite.view import SuiteView

CellProcess = subprocess.Popen[bytes] | ForkedCell
GIB_PER_RUN = 1.5  # what one run of the small preset may take, for the number side by side
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0  # between looks at cells that other processes run
_SUITE_PROCESS = "SSODBENCH_SUITE_PROCESS"  # tells a cell whose child it is


def default_jobs(cfg: DictConfig) -> int:
    """Cells side by side: one per GPU, otherwise one per core as far as memory allows."""
    if cfg.device != "cpu" and torch.cuda.is_available():
        return max(1, torch.cuda.device_count() // cfg.devices)
    by_cores = available_cores() // (cfg.threads * cfg.devices)
    by_memory = int(available_gib() / (GIB_PER_RUN * cfg.devices))
    return max(1, min(by_cores, by_memory))


def available_gib() -> float:
    """Memory that is free, or that the control group leaves where that is less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        limit = free
    return min(free, limit) / 2**30


def environments(cfg: DictConfig, jobs: int) -> list[dict[str, str]]:
    """One environment per process side by side: its threads, and its GPUs where there are any."""
    base = dict(os.environ) | dict.fromkeys(THREAD_VARIABLES, str(cfg.threads))
    base["SSODBENCH_SUITE"] = cfg.suite.name
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return [base] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    groups = max(1, len(gpus) // cfg.devices)
    own = [gpus[(i % groups) * cfg.devices :][: cfg.devices] for i in range(jobs)]
    return [base | {"CUDA_VISIBLE_DEVICES": ",".join(names)} for names in own]


class Suite:
    """The cells of a suite, as this process runs them.

    Args:
        cells: all of them; their states are kept up to date.
        suite_dir: the suite's folder.
        slots: the environments of the processes side by side.
        stop: requests to stop.
        view: what a person sees.
        claims: which cells this process has, where several share the folder.
        wait: whether to wait for cells that other processes run.
        server: what forks the cells' processes; None: each is started anew.
    """

    def __init__(
        self,
        cells: list[SuiteCell],
        suite_dir: Path,
        slots: list[dict[str, str]],
        stop: StopRequest,
        view: SuiteView,
        claims: Claims,
        wait: bool = True,
        server: ForkServer | None = None,
    ) -> None:
        self.cells, self.suite_dir, self.slots = cells, suite_dir, slots
        self.stop, self.view, self.claims, self.wait, self.server = stop, view, claims, wait, server
        self._running: dict[int, tuple[SuiteCell, CellProcess, float]] = {}
        self._told = 0
        self._looked = time.monotonic()

    def execute(self) -> None:
        """Runs the waiting cells, most urgent first, as many side by side as there are slots."""
        try:
            with self.view:
                while True:
                    self._take_ended()
                    self._fill_slots()
                    self._pass_on_stop()
                    self._look_at_held()
                    if not self._running and self._is_over():
                        break
                    self.view.update()
                    time.sleep(_POLL_SECONDS)
        finally:
            for _, process, _ in self._running.values():
                kill(process)

    def _take_ended(self) -> None:
        for slot, (cell, process, begin) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                finish(cell, process.returncode, self.suite_dir, self.stop)
                self.claims.release(cell.name, failed=cell.reason if cell.state == "failed" else None)
                self.view.finished(cell, time.monotonic() - begin, self.suite_dir)

    def _fill_slots(self) -> None:
        for slot in range(len(self.slots)):
            while slot not in self._running and not self.stop.signal_number:
                cell = next_cell(self.cells)
                if cell is None:
                    return
                if (process := self._begin(cell, self.slots[slot])) is not None:
                    self._running[slot] = (cell, process, time.monotonic())
                    self.view.started(cell)

    def _begin(self, cell: SuiteCell, environment: dict[str, str]) -> CellProcess | None:
        """Takes and starts a cell; None where it cannot be had, cannot be started, or is finished by now."""
        try:
            if not self.claims.take(cell.name, cell.run_dir):
                self._leave_to_others(cell)
                return None
        except OSError as error:
            cell.state, cell.reason = "failed", str(refusal(error, {"runs_dir": self.suite_dir}))
            self.view.finished(cell, 0.0, self.suite_dir)
            return None
        self._refresh(cell)  # another process may have finished it since we looked
        process = try_to_start(cell, self.suite_dir, environment, self.server) if cell.state == "waiting" else None
        if process is None:
            self.claims.release(cell.name)
            self.view.finished(cell, 0.0, self.suite_dir)
        return process

    def _leave_to_others(self, cell: SuiteCell) -> None:
        holder = self.claims.holder(cell.name, cell.run_dir) or "another process"
        cell.state, cell.reason = "held", f"run by {holder}"
        self.view.held(cell)

    def _pass_on_stop(self) -> None:
        if self.stop.count > self._told:
            self._told = self.stop.count
            first = self._told == 1
            self.view.say("stopping: the running cells save their state" if first else "stopping at once")
            for _, process, _ in self._running.values():
                process.terminate() if first else kill(process)

    def _look_at_held(self) -> None:
        """Looks, now and then, how the cells stand that other processes run."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for cell in self.cells:
            if cell.state == "held" and self.claims.holder(cell.name, cell.run_dir) is None:
                self._refresh(cell)
                if cell.state != "waiting":
                    self.view.finished(cell, 0.0, self.suite_dir)

    def _refresh(self, cell: SuiteCell) -> None:
        """Sets the state of a cell that other processes may have run: what has failed there is not tried again."""
        try:
            cell.state, cell.reason = state_of(cell), self.claims.failure(cell.name)
        except UserError as error:
            cell.state, cell.reason = "failed", str(error)
        if cell.state == "waiting" and cell.reason is not None:
            cell.state = "failed"

    def _is_over(self) -> bool:
        if self.stop.signal_number:
            return True
        return next_cell(self.cells) is None and not (self.wait and any(cell.state == "held" for cell in self.cells))


def kill(process: CellProcess) -> None:
    """Ends a cell at once, the processes that it started itself included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def next_cell(cells: list[SuiteCell]) -> SuiteCell | None:
    """The most urgent cell that can start now; marks those as skipped that never can."""
    for cell in cells:
        if cell.state == "waiting" and cell.needs is not None and cell.needs.state in ("failed", "skipped"):
            cell.state, cell.reason = "skipped", f"its first stage {cell.needs.name} failed"
    ready = [c for c in cells if c.state == "waiting" and (c.needs is None or c.needs.state == "ok")]
    return max(ready, key=lambda cell: cell.urgency, default=None)


def try_to_start(
    cell: SuiteCell, suite_dir: Path, environment: dict[str, str], server: ForkServer | None = None
) -> CellProcess | None:
    """`start`; where the system refuses it, the cell has failed (None), and those that run go on."""
    try:
        process = start(cell, suite_dir, environment, server)
    except OSError as error:
        cell.state, cell.reason = "failed", str(refusal(error, {"runs_dir": suite_dir}))
        return None
    cell.state = "running"
    return process


def arguments(cell: SuiteCell) -> list[str]:
    """Of `ssodbench`, to run a cell."""
    folders = [word for folder in cell.cfg.cli.config_dirs for word in ("--config-dir", str(folder))]
    stage_one = [f"method.offline.checkpoint={cell.needs.run_dir}"] if cell.needs is not None else []
    return ["train", *folders, *cell.overrides, *stage_one]


def start(
    cell: SuiteCell, suite_dir: Path, environment: dict[str, str], server: ForkServer | None = None
) -> CellProcess:
    """Starts a cell's process, forked where there is a server; what it prints goes to logs/CELL.log.

    It has a session of its own: Ctrl-C reaches the suite alone, which then asks each cell once to save and stop.
    """
    log = suite_dir / "logs" / f"{cell.name}.log"
    with open_to_append(log) as output:
        output.write(b"\n")
        if server is not None:
            output.flush()
            return server.start(arguments(cell), log, environment)
        return subprocess.Popen(
            [*train_command(), *arguments(cell)[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | {_SUITE_PROCESS: str(os.getpid())},
            start_new_session=True,
        )


def fork_server(cfg: DictConfig, environment: dict[str, str]) -> ForkServer | None:
    """What forks the cells; None where they may use a GPU, or are started by another launcher."""
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    return None if on_gpu or not is_local(cfg) else ForkServer(environment)


def is_local(cfg: DictConfig) -> bool:
    """Whether cells are trained on this machine, not on a cluster."""
    return str(cfg.launcher.get("_target_", "")).startswith("harness.launch.local.")


def end_with_suite() -> None:
    """Lets this process end with the suite that started it.

    Otherwise the cells of a killed suite would run on and hold their folders.
    """
    parent = os.environ.pop(_SUITE_PROCESS, None)  # processes that a cell starts are not the suite's
    if parent is not None:
        end_with_parent(int(parent))


def train_command() -> list[str]:
    """How a cell is started; with -P no file of the working folder is taken for a module, as in the suite itself."""
    return [sys.executable, "-P", "-m", "harness.cli", "train"]


def finish(cell: SuiteCell, code: int, suite_dir: Path, stop: StopRequest) -> None:
    """Sets a cell's state from its exit code and its record, and mends a record that a killed process left behind."""
    path = cell.run_dir / "record.json"
    try:
        record = read_record(path) if path.exists() else None
    except UserError as error:
        cell.state, cell.reason = "failed", str(error)
        return
    if code == 0 and record is not None and record.status == "ok":
        cell.state, cell.reason = "ok", None
    elif stop.signal_number:
        cell.state, cell.reason = "interrupted", "interrupted; the same command continues it"
    else:
        cell.state, cell.reason = "failed", explain(code, record, suite_dir / "logs" / f"{cell.name}.log")
        if record is not None and record.status == "running":
            with suppress(OSError):  # the suite's own plan says it too
                write_record(path, replace(record, status="failed", error=cell.reason))


def explain(code: int, record: RunRecord | None, log: Path) -> str:
    """Why a cell failed: the signal that ended it, what its record says, or the last line it printed."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    if record is not None and record.status == "failed" and record.error:
        return record.error
    return tail(log, 1) or f"exit code {code}"
