"""A suite: methods x percents x folds x seeds, every cell a process of its own, taken up where it stopped.

A cell whose record says ok under the same configuration is not run again. A method whose configuration names a first
stage (`offline.stage1`) waits for that method's cell of the same percent, fold and seed, and starts from its folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness.config import checks
from harness.core.console import STDERR, Console
from harness.core.files import refusal
from harness.core.lock import RunLock
from harness.core.stopping import collecting_stops
from harness.core.types import RunError, UserError
from harness.report import report
from harness.suite.cells import default_jobs, environments, execute
from harness.suite.plan import Cell, plan, standing, write_plan
from harness.suite.view import View


def run(cfg: DictConfig) -> int:
    """Runs what is missing of a suite, writes its report and prints the table.

    Args:
        cfg: the configuration with a suite chosen; what the command line said (`cfg.cli`) reaches every cell.

    Returns:
        0 when every cell is ok, 1 when one is not, 128 + signal number when interrupted.

    Raises:
        UserError: no suite was chosen, a value cannot work, or another process works on the same suite.
    """
    checks.check_extras(cfg, logs=True)
    cells = plan(cfg)
    suite_dir = Path(cfg.runs_dir) / cfg.suite.name
    console = Console()
    with held(suite_dir):
        for cell in cells:
            cell.state = standing(cell)
        missing = [cell for cell in cells if cell.state != "ok"]
        jobs = cfg.suite.jobs or default_jobs(cfg)
        console.print(
            f"suite {cfg.suite.name}: {len(cells)} cells, {len(missing)} to run, {jobs} side by side, in {suite_dir}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        if missing:
            prepare(missing, console)
            write_plan(suite_dir, cfg, cells)
        with collecting_stops() as stop:
            if missing:
                execute(cells, suite_dir, environments(cfg, jobs), stop, View(cells, console))
        told = conclude(suite_dir, cfg, cells, console)
    if stop.number:
        return 128 + stop.number
    return 0 if told and all(cell.state == "ok" for cell in cells) else 1


def conclude(suite_dir: Path, cfg: DictConfig, cells: list[Cell], console: Console) -> bool:
    """Writes how every cell ended and the report, and prints the table; an error of one stops none of the others.

    Returns:
        Whether all of that could be done. What could not is told; the records are whole in any case.
    """
    steps: list[Callable[[], Any]] = [lambda: write_plan(suite_dir, cfg, cells)]
    if any((cell.run_dir / "record.json").exists() for cell in cells):
        html = suite_dir / "report" / "report.html"
        drawn = cfg.report.resamples, cfg.report.gallery
        steps += [lambda: report.run(suite_dir, html.parent, *drawn), lambda: report.show(suite_dir, console)]
        steps += [lambda: console.print(f"report: {html}", soft_wrap=True, highlight=False, markup=False)]
    else:
        steps += [lambda: console.print(_no_record(cells), soft_wrap=True, highlight=False, markup=False)]
    done = [_done(step, suite_dir) for step in steps]
    return all(done)


def _done(step: Callable[[], Any], suite_dir: Path) -> bool:
    """Does one step; says its error in one sentence."""
    try:
        step()
    except Exception as error:  # of any kind: hours of training must not end in a traceback of their table
        why = refusal(error) if isinstance(error, OSError) else error
        what = f"{why}" if isinstance(why, UserError | RunError) else f"{type(error).__name__}: {error}"
        STDERR.say(
            f"ssodbench: the suite has ended, but not its report ({' '.join(what.split())}): the records in "
            f"{suite_dir} are whole, `ssodbench report runs_dir={suite_dir}` makes the report of them"
        )
        return False
    return True


def _no_record(cells: list[Cell]) -> str:
    reasons = [cell.reason for cell in cells if cell.reason]
    return f"there is nothing to report, no cell has left a record{f': {reasons[0]}' if reasons else ''}"


@contextmanager
def held(suite_dir: Path) -> Iterator[None]:
    """Holds the suite's folder for this process; an empty folder does not stay.

    Raises:
        UserError: a live process works on the same suite, or the folder cannot be written.
    """
    lock = RunLock(suite_dir)
    try:
        lock.acquire()
    except (UserError, RunError) as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, BlockingIOError):  # that one says: held by another
            raise type(error)(_cannot_write(suite_dir, cause)) from error
        raise UserError(
            f"the suite in {suite_dir} is being run by {lock.holder()}: wait for it to end, or set another runs_dir=DIR"
        ) from error
    try:
        yield
    except BaseException:
        lock.release(discard=True)
        raise
    lock.release()


def _cannot_write(suite_dir: Path, error: OSError) -> str:
    """One sentence; `make` passes no settings on, so its users are told the command behind it."""
    command = (
        "run `.venv/bin/ssodbench suite suite=NAME runs_dir=DIR`" if "MAKELEVEL" in os.environ else "set runs_dir=DIR"
    )
    return (
        f"cannot write the suite's folder {suite_dir} ({error.strerror}): {command} with a folder that can be written"
    )


def prepare(cells: list[Cell], console: Console) -> None:
    """Makes what the cells share, once, instead of letting the first ones wait for each other, and looks at their data.

    Raises:
        UserError: the data cannot be used, or has not got the split of a cell.
    """
    from harness.engine.build import prepare_caches

    begin = time.monotonic()
    message = "preparing the dataset and the backbone's first weights (once per machine) ..."
    if not console.is_terminal:
        console.print(message)
    with console.status(message) if console.is_terminal else nullcontext():
        prepare_caches([cell.cfg for cell in cells])
    console.print(f"prepared in {time.monotonic() - begin:.1f} s", highlight=False)
