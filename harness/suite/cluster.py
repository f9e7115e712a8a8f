"""A suite as jobs of Slurm: handed over at once, in arrays that wait for each other; no process of ours stays.

Cells that need the same machines are one array, and a cell with a first stage is in an array in which each task waits
for the same task of the array of its first stage.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from omegaconf import DictConfig

from harness.config.make import make
from harness.core.record import read_record
from harness.core.stopping import StopRequest
from harness.core.types import RunError, RunRecord, UserError
from harness.launch.slurm import POLL_SECONDS, SlurmLauncher, command_of, described, in_queue
from harness.launch.slurm_queue import JobState, ended
from harness.launch.submitted import JobEntry, Submitted
from harness.suite.cells import arguments
from harness.suite.plan import SuiteCell, state_of
from harness.suite.view import CellStatus, SuiteView, steps_of

MOST_TASKS = 1000  # of an array, whose numbers are below MaxArraySize (1001 unless a cluster says otherwise)
REPORT = "report"  # the job that writes the report, among the jobs of the cells


def is_on_slurm(cfg: DictConfig) -> bool:
    """Whether cells become jobs of Slurm."""
    return str(cfg.launcher.get("_target_", "")) == f"{SlurmLauncher.__module__}.{SlurmLauncher.__name__}"


@dataclass(eq=False)
class CellArray:
    """Cells that are one array of jobs.

    Args:
        cells: by the number of their task.
        after: the array whose tasks come first, each for the task of its number here; or the job that comes first.
        job: its number once it is submitted.
    """

    cells: dict[int, SuiteCell] = field(default_factory=dict)
    after: CellArray | str | None = None
    job: str = ""

    @property
    def dependency(self) -> list[str]:
        """Options of sbatch: a task for which what comes first has failed is taken out of the queue."""
        if self.after is None:
            return []
        said = f"aftercorr:{self.after.job}" if isinstance(self.after, CellArray) else f"afterok:{self.after}"
        return [f"--dependency={said}", "--kill-on-invalid-dep=yes"]


def arrays(
    cells: Iterable[SuiteCell], queued: Mapping[str, JobState], machines: Mapping[str, object]
) -> list[CellArray]:
    """The arrays that cells become, those that others wait for first.

    Args:
        cells: that are to be submitted.
        queued: jobs in the queue, by the names of their cells.
        machines: what each cell needs, by its name: an array is of cells that need the same.
    """
    made: list[tuple[object, CellArray]] = []
    places: dict[str, tuple[CellArray, int]] = {}
    waiting = sorted(cells, key=lambda cell: (cell.needs is not None, -cell.urgency))
    for cell in waiting:
        first, number = places.get(cell.needs.name, (None, None)) if cell.needs is not None else (None, None)
        after = first or (queued[cell.needs.name].id if cell.needs is not None and cell.needs.name in queued else None)
        for machine, array in made:
            place = len(array.cells) if number is None else number
            alike = machine == machines[cell.name] and array.after == after
            if alike and place not in array.cells and place < MOST_TASKS:
                break
        else:
            array, place = CellArray(after=after), 0 if number is None else number
            made.append((machines[cell.name], array))
        array.cells[place] = cell
        places[cell.name] = (array, place)
    return [array for _, array in made]


class ClusterSuite:
    """The jobs of a suite.

    Args:
        cfg: of the suite.
        cells: all of them; their states are kept up to date.
        suite_dir: the suite's folder.
    """

    def __init__(self, cfg: DictConfig, cells: list[SuiteCell], suite_dir: Path) -> None:
        self.cfg, self.cells, self.suite_dir = cfg, cells, suite_dir
        self.submitted = Submitted((suite_dir / "slurm").absolute())
        self.queued: dict[str, JobState] = {}
        self._watched_report: str | None = None  # number of the job that wrote the report while this process watched

    def look(self) -> None:
        """Sets the state of every cell by its record and by the queue.

        Raises:
            RunError: Slurm does not answer.
            UserError: a record is damaged, or of other settings.
        """
        jobs = self.submitted.read()
        self.queued = in_queue(jobs)
        for cell in self.cells:
            cell.state, cell.reason = self._state(cell, jobs.get(cell.name))
        for cell in self.cells:
            if cell.needs is not None and cell.needs.state in ("failed", "skipped") and cell.state in _STOPPED:
                cell.state, cell.reason = "skipped", f"its first stage {cell.needs.name} failed"

    def _state(self, cell: SuiteCell, entry: JobEntry | None) -> tuple[str, str | None]:
        if (job := self.queued.get(cell.name)) is not None:
            return "waiting" if job.state == "PENDING" else "running", f"job {job.id} {described(job)}"
        if state_of(cell) == "ok":
            return "ok", None
        record = _record(cell)
        if record is not None and record.status == "failed":
            return "failed", record.error
        if entry is None:
            return "waiting", None
        return _ended_as(ended(entry.id, self.submitted.folder), record, self._log(cell))

    def missing(self, retry_failed: bool) -> list[SuiteCell]:
        """Cells that are neither finished nor in the queue, nor have failed where that is not tried again.

        Args:
            retry_failed: whether cells that have failed are tried again.
        """
        left_out = ("ok",) if retry_failed else ("ok", "failed", "skipped")
        return [cell for cell in self.cells if cell.state not in left_out and cell.name not in self.queued]

    def submit(self, cells: list[SuiteCell]) -> list[CellArray]:
        """Hands cells to Slurm, and after them what writes the report.

        Raises:
            UserError: there is no Slurm here, or a value cannot work.
            RunError: Slurm does not take a job; those before it are in the queue.
        """
        launchers = {cell.name: _launcher(cell.cfg) for cell in cells}
        machines = {cell.name: tuple(launchers[cell.name].options(cell.cfg)) for cell in cells}
        made = arrays(cells, self.queued, machines)
        (self.suite_dir / "logs").mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(made, 1):
            first = next(iter(array.cells.values()))
            name = f"{self.cfg.suite.name}-{number}"
            job = launchers[first.name].batch(
                first.cfg,
                name,
                self.submitted.folder,
                {place: arguments(cell) for place, cell in array.cells.items()},
                limit=self.cfg.suite.jobs or len(array.cells),
                options=array.dependency,
                logs={place: self._log(cell) for place, cell in array.cells.items()},
            )
            array.job = job.submit()
            self._note(array, name)
        return made

    def _note(self, array: CellArray, name: str) -> None:
        """Keeps the numbers of an array that was submitted."""
        entries = {cell.name: JobEntry(f"{array.job}_{place}", name) for place, cell in array.cells.items()}
        self.submitted.add(entries)
        for cell in array.cells.values():
            self.queued[cell.name] = JobState(entries[cell.name].id, "PENDING", name=name)
            cell.state, cell.reason = "waiting", None

    def submit_report(self) -> str:
        """Hands over the job that writes the report once all others are over; one of before is taken back.

        Returns:
            Its number.

        Raises:
            RunError: Slurm does not take it.
        """
        if REPORT in self.queued:
            scancel([self.queued[REPORT].id])
        jobs = dict.fromkeys(job.id.split("_")[0] for name, job in self.queued.items() if name != REPORT)
        name = f"{self.cfg.suite.name}-{REPORT}"
        cfg = self.cfg.copy()
        cfg.device, cfg.devices = "cpu", 1
        launcher = _launcher(cfg)
        launcher.nodes, launcher.gres = 1, None
        command = ["suite", *command_of(self.cfg)[1:], "suite.report=true", "suite.wait=null"]
        job = launcher.batch(
            cfg, name, self.submitted.folder, {0: command}, options=[f"--dependency=afterany:{':'.join(jobs)}"]
        )
        identifier = job.submit()
        self.submitted.add({REPORT: JobEntry(identifier, name)})
        self.queued[REPORT] = JobState(identifier, "PENDING", name=name)
        return identifier

    def watch(self, view: SuiteView, stop: StopRequest) -> None:
        """Tells what starts and ends, until nothing is in the queue any more or this process is told to stop.

        The job that writes the report is waited for, too: it ends last, so that nobody else has to write it.

        Args:
            view: what a person sees.
            stop: requests to stop, which the jobs do not get.
        """
        before = {cell.name: "waiting" if cell.name in self.queued else cell.state for cell in self.cells}
        begun = dict.fromkeys(before, time.monotonic())
        self._note_report()
        with view:
            while not stop.signal_number:
                self._look_patiently()
                self._note_report()
                for cell in self.cells:
                    if cell.state != before[cell.name]:
                        self._tell(cell, view, begun)
                        before[cell.name] = cell.state
                if not self.queued:
                    return
                view.update()
                end = time.monotonic() + POLL_SECONDS
                while time.monotonic() < end and not stop.signal_number:
                    time.sleep(0.1)

    def _note_report(self) -> None:
        if REPORT in self.queued:
            self._watched_report = self.queued[REPORT].id

    def has_reported(self) -> bool:
        """Whether the last job has written the report while `watch` waited for it."""
        if self._watched_report is None:
            return False
        return ended(self._watched_report, self.submitted.folder).state == "COMPLETED"

    def _look_patiently(self) -> None:
        try:
            self.look()
        except RunError:  # the next look may get an answer
            time.sleep(POLL_SECONDS)

    def _tell(self, cell: SuiteCell, view: SuiteView, begun: dict[str, float]) -> None:
        if cell.state == "running":
            begun[cell.name] = time.monotonic()
            view.started(cell)
        elif cell.state != "waiting":
            view.finished(cell, time.monotonic() - begun[cell.name], self.suite_dir)

    def status(self, cell: SuiteCell) -> CellStatus:
        """How a cell stands after `look`, as texts."""
        steps, eta = steps_of(cell)
        job = self.queued.get(cell.name)
        if job is not None and job.state == "PENDING":
            return CellStatus("queued", steps=steps, note=cell.reason or "")
        if job is not None:
            return CellStatus("running", steps=steps, eta=eta, note=cell.reason or "")
        record = _record(cell)
        score = f"{record.ap:.1f}" if record is not None and record.ap is not None and cell.state == "ok" else "-"
        return CellStatus(cell.state, score, steps, note=cell.reason or "")

    def cancel(self) -> list[str]:
        """Takes the suite's jobs out of the queue; those that run save first. Gives their numbers."""
        jobs = [job.id for job in self.queued.values()]
        scancel(jobs)
        return jobs

    def _log(self, cell: SuiteCell) -> Path:
        return (self.suite_dir / "logs" / f"{cell.name}.log").absolute()


_STOPPED = ("waiting", "failed", "interrupted")


def _launcher(cfg: DictConfig) -> SlurmLauncher:
    launcher = cast(SlurmLauncher, make("launcher", cfg.launcher))
    launcher.check(cfg)
    return launcher


def _record(cell: SuiteCell) -> RunRecord | None:
    path = cell.run_dir / "record.json"
    return read_record(path) if path.exists() else None


def _ended_as(job: JobState, record: RunRecord | None, log: Path) -> tuple[str, str]:
    """State and reason of a cell whose job is over, and whose record does not tell how."""
    if job.state == "FAILED" and job.code is not None and job.code > 0 and record is None:
        return "failed", f"job {job.id} ended with exit code {job.code}, see {log}"
    said = f"job {job.id} ended as {described(job)}"
    kept = record is not None and record.status in ("interrupted", "running")
    return "interrupted" if kept else "failed", f"{said}; the same command submits it again"


def scancel(jobs: list[str]) -> None:
    """Takes jobs out of the queue.

    Raises:
        UserError: there is no scancel here.
        RunError: Slurm does not do it.
    """
    if not jobs:
        return
    try:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("scancel is not found: start the command on a Slurm login node") from error
    if done.returncode:
        raise RunError(f"Slurm did not cancel the jobs ({' '.join(done.stderr.split())}): try again")
