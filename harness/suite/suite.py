"""A suite: methods x percents x folds x seeds, every cell a process of its own, taken up where it stopped.

A cell whose record says ok under the same configuration is not run again, and one that another process runs is left to
it. A method whose configuration names a first stage (`offline.stage1`) waits for that method's cell of the same
percent, fold and seed, and starts from its folder.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from harness.config import extras
from harness.core.console import STDERR, Console
from harness.core.files import refusal
from harness.core.stopping import StopRequest, stop_code
from harness.core.types import RunError, UserError
from harness.report import report
from harness.suite.cells import Suite, default_jobs, environments, fork_server, is_local
from harness.suite.claims import Claims, remove_if_empty, require_suite_folder
from harness.suite.cluster import CellArray, ClusterSuite, is_on_slurm
from harness.suite.plan import SuiteCell, first_state, plan, write_plan
from harness.suite.view import CellStatus, SuiteView, status_of

HELD = 3  # exit code: what is missing is being run by other processes, and nothing has failed


def run(cfg: DictConfig) -> int:
    """Runs what is missing of a suite, writes its report and prints the table.

    Several processes may work on the same folder, also from several hosts: each cell is run by one of them.

    Args:
        cfg: the configuration with a suite chosen; what the command line said (`cfg.cli`) reaches every cell.

    Returns:
        0 when every cell is ok, 1 when one has failed, 3 when other processes still run what is missing and
        `suite.wait` is false, 128 + signal number when interrupted.

    Raises:
        UserError: no suite was chosen, or a value cannot work.
    """
    begun = time.time()
    extras.check_extras(cfg, logs=True)
    cells = plan(cfg)
    suite_dir = Path(cfg.runs_dir) / cfg.suite.name
    console = Console()
    claims = Claims(suite_dir, begun)
    if is_on_slurm(cfg):
        return _on_slurm(cfg, ClusterSuite(cfg, cells, suite_dir), claims, console)
    if cfg.suite.get("cancel"):
        raise UserError("suite.cancel=true is for launcher=slurm: end a suite of this machine by Ctrl-C")
    if cfg.suite.get("status"):
        return status(cells, suite_dir, [status_of(cell, claims) for cell in cells], console)
    if cfg.suite.get("dry_run"):
        from harness.suite import estimate

        return estimate.tell(cfg, cells, suite_dir, console)
    if cfg.suite.get("report"):
        _set_states(cfg, cells)
        return 0 if conclude(suite_dir, cfg, cells, console) else 1
    require_suite_folder(claims, suite_dir)
    try:
        return _run(cfg, cells, suite_dir, claims, console)
    finally:
        remove_if_empty(claims, suite_dir)


def _run(cfg: DictConfig, cells: list[SuiteCell], suite_dir: Path, claims: Claims, console: Console) -> int:
    _set_states(cfg, cells)
    missing = [cell for cell in cells if cell.state == "waiting"]
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
    wait = cfg.suite.get("wait")
    if wait is None:
        wait = is_local(cfg)
    stop = StopRequest(second_ends=False)
    with stop.installed():
        if missing:
            slots = environments(cfg, jobs)
            server = fork_server(cfg, slots[0])
            Suite(cells, suite_dir, slots, stop, SuiteView(cells, console), claims, wait, server).execute()
    told = conclude(suite_dir, cfg, cells, console, quickly=bool(stop.signal_number))
    if stop.signal_number:
        return 128 + stop.signal_number
    states = {cell.state for cell in cells}
    if not told or states & {"failed", "skipped", "interrupted"}:
        return 1
    return HELD if states != {"ok"} else 0


def _set_states(cfg: DictConfig, cells: list[SuiteCell]) -> None:
    for cell in cells:
        cell.state, cell.reason = first_state(cell, bool(cfg.suite.get("retry_failed", True)))


def _on_slurm(cfg: DictConfig, suite: ClusterSuite, claims: Claims, console: Console) -> int:
    """Submits what is missing as jobs and returns, or does what `suite.status`, `.report`, `.cancel` or `.wait` say.

    Returns:
        0 when every cell is ok or in the queue, 1 when one has failed, 128 + n when the watching ended by signal n.
    """
    cells, suite_dir = suite.cells, suite.suite_dir
    if cfg.suite.get("report"):
        try:
            suite.look()
        except RunError:  # a node may not reach Slurm's controller; the records say enough
            _set_states(cfg, cells)
        return 0 if conclude(suite_dir, cfg, cells, console) else 1
    if cfg.suite.get("status"):
        return status(cells, suite_dir, _statuses(suite, claims, console), console)
    if cfg.suite.get("cancel"):
        suite.look()
        jobs = suite.cancel()
        _say(console, f"cancelled {len(jobs)} jobs: {' '.join(jobs) or 'none was in the queue'}")
        return 0
    require_suite_folder(claims, suite_dir)
    with suite.submitted.alone():
        suite.look()
        _submit(cfg, suite, claims, console)
    reported = False
    if cfg.suite.get("wait"):
        stop = StopRequest()
        with stop.installed():
            suite.watch(SuiteView(cells, console), stop)
        if stop.signal_number:
            _say(console, "the jobs go on: the same command watches them again, with suite.cancel=true it cancels them")
            return stop_code(stop.signal_number)
        reported = suite.has_reported()
    if reported:
        _show_report(suite_dir, console)
    elif not suite.queued:
        conclude(suite_dir, cfg, cells, console)
    return 1 if {cell.state for cell in cells} & {"failed", "skipped", "interrupted"} else 0


def _statuses(suite: ClusterSuite, claims: Claims, console: Console) -> list[CellStatus]:
    """How the cells stand by records and queue, or by the records alone where Slurm does not answer, which is told."""
    try:
        suite.look()
    except RunError as error:
        _say(console, f"Slurm does not say what is in the queue ({error.__cause__}): this is what the records say")
        return [status_of(cell, claims) for cell in suite.cells]
    return [suite.status(cell) for cell in suite.cells]


def _show_report(suite_dir: Path, console: Console) -> None:
    """Prints the table, and where the report is that the last job has written."""
    if _done(lambda: report.show(suite_dir, console), suite_dir):
        _say(console, f"report: {suite_dir / 'report' / 'report.html'}")


def _submit(cfg: DictConfig, suite: ClusterSuite, claims: Claims, console: Console) -> None:
    """Hands over the cells that are missing, and tells what is in the queue."""
    missing = suite.missing(bool(cfg.suite.get("retry_failed", True)))
    for cell in list(missing):
        if (holder := claims.holder(cell.name, cell.run_dir)) is not None:
            missing.remove(cell)
            cell.state, cell.reason = "held", f"run by {holder}"
            _say(console, f"held    {cell.name}  {cell.reason}")
    missing = [cell for cell in missing if cell.needs is None or cell.needs.state != "held"]
    counted = f"{len(suite.cells)} cells, {len(suite.queued)} jobs in the queue, {len(missing)} cells to submit"
    _say(console, f"suite {cfg.suite.name}: {counted}, in {suite.suite_dir}")
    if not missing:
        return
    prepare(missing, console)
    write_plan(suite.suite_dir, cfg, suite.cells)
    made = suite.submit(missing)
    for array in made:
        after = array.after.job if isinstance(array.after, CellArray) else array.after
        _say(console, f"job {array.job}: {len(array.cells)} cells{f', after {after}' if after else ''}")
    try:
        _say(console, f"job {suite.submit_report()}: the report, after all of them")
    except RunError as error:
        _say(console, f"the report is not made by itself ({error}): the same command with suite.report=true makes it")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def status(cells: list[SuiteCell], suite_dir: Path, statuses: list[CellStatus], console: Console) -> int:
    """Prints how the cells of a folder stand, also while other processes run them; runs and writes nothing."""
    table = Table("cell", "state", "AP", "steps", "ETA", "", box=None, pad_edge=False)
    counts: Counter[str] = Counter()
    for cell, stands in zip(cells, statuses, strict=True):
        counts[stands.state] += 1
        table.add_row(*map(escape, (cell.name, stands.state, stands.score, stands.steps, stands.eta, stands.note)))
    console.print(table)
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.print(f"{len(cells)} cells in {suite_dir}: {summary}", soft_wrap=True, highlight=False, markup=False)
    return 0


def conclude(suite_dir: Path, cfg: DictConfig, cells: list[SuiteCell], console: Console, quickly: bool = False) -> bool:
    """Writes how every cell ended and the report, and prints the table; an error of one stops none of the others.

    Args:
        suite_dir, cfg, cells, console: of the suite.
        quickly: without what takes a report long, as somebody waits for the suite to stop.

    Returns:
        Whether all of that could be done. What could not is told; the records are whole in any case.
    """
    steps: list[Callable[[], Any]] = [lambda: write_plan(suite_dir, cfg, cells)]
    if any((cell.run_dir / "record.json").exists() for cell in cells):
        html = suite_dir / "report" / "report.html"
        resamples, gallery = (0, 0) if quickly else (cfg.report.resamples, cfg.report.gallery)
        steps += [
            lambda: report.run(suite_dir, html.parent, resamples, gallery, Path(cfg.cache_dir)),
            lambda: report.show(suite_dir, console),
        ]
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


def _no_record(cells: list[SuiteCell]) -> str:
    reasons = [cell.reason for cell in cells if cell.reason]
    return f"there is nothing to report, no cell has left a record{f': {reasons[0]}' if reasons else ''}"


def prepare(cells: list[SuiteCell], console: Console) -> None:
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
