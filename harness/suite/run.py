"""A suite: methods x percents x folds x seeds, every cell a process of its own, taken up where it stopped.

A cell whose record says ok under the same configuration is not run again. A method whose configuration names a first
stage (`offline.stage1`) waits for that method's cell of the same percent, fold and seed, and starts from its folder.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
from omegaconf import DictConfig, OmegaConf

from harness.config import checks, compose
from harness.core.console import STDERR, Console
from harness.core.files import refusal, write_atomically
from harness.core.record import read_record
from harness.core.types import RunError, UserError
from harness.engine.checkpoint import RunLock
from harness.report import report
from harness.report.tables import BASELINE
from harness.suite.cells import Cell, collecting_stops, default_jobs, environments, execute
from harness.suite.view import View

_OWN_KEYS = {
    "method": "suite.methods=[...]",
    "split.percent": "suite.percents=[...]",
    "split.fold": "suite.folds=[...]",
    "seed": "suite.seeds=[...]",
    "run_dir": "runs_dir=DIR",
}


def run(cfg: DictConfig) -> int:
    """Runs what is missing of a suite, writes its report and prints the table.

    Args:
        cfg: the configuration with a suite chosen; what the command line said (`cfg.cli`) reaches every cell.

    Returns:
        0 when every cell is ok, 1 when one is not, 128 + signal number when interrupted.

    Raises:
        UserError: no suite was chosen, a value cannot work, or another process works on the same suite.
    """
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
        steps += [lambda: report.run(suite_dir, html.parent), lambda: report.show(suite_dir, console)]
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


def plan(cfg: DictConfig) -> list[Cell]:
    """The cells of a suite, each with its checked configuration, before anything is run or written.

    Raises:
        UserError: no suite, a key that the suite itself sets, an empty list, or a cell that cannot work.
    """
    suite = cfg.get("suite")
    if suite is None:
        raise UserError("no suite is chosen: say suite=quick (or smoke, shapes, bccd, coco)")
    overrides, config_dirs = list(cfg.cli.overrides), list(cfg.cli.config_dirs)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key in _OWN_KEYS:
            raise UserError(f"{key} is set by the suite for each cell: say {_OWN_KEYS[key]} instead")
    methods, percents, folds = _axis(suite, "methods", str), _axis(suite, "percents", float), _axis(suite, "folds", int)
    seeds = [None] if suite.get("seeds") is None else _axis(suite, "seeds", int)
    wanted = list(product(percents, folds, seeds, methods))
    if suite.get("reference"):
        wanted += [(100.0, fold, seed, BASELINE) for fold, seed in product(folds, seeds)]
    suite_dir = Path(cfg.runs_dir) / suite.name
    wanted = list(dict.fromkeys(wanted))
    named = dict.fromkeys(method for *_, method in wanted)
    special = OmegaConf.to_container(suite, resolve=True).get("method_overrides") or {}  # type: ignore[union-attr]
    extra = {method: [*overrides, f"method={method}", *special.get(method, [])] for method in named}
    composed = {method: compose.load(extra[method], config_dirs) for method in named}
    for of_method in composed.values():
        checks.check_devices(of_method)
    protocols = {method: str(of_method.split.protocol) for method, of_method in composed.items()}
    if len(set(protocols.values())) > 1:
        listed = ", ".join(f"{method} {protocol}" for method, protocol in protocols.items())
        raise UserError(f"the methods of a suite share one split protocol, not {listed}: set split.protocol=NAME")
    cells = []
    for percent, fold, seed, method in wanted:
        number = fold if seed is None else seed
        share = int(percent) if percent == int(percent) else percent
        own = [f"split.percent={share}", f"split.fold={fold}", f"seed={number}"]
        cell_cfg = _with_place(composed[method], share, fold, number)
        name = compose.cell_name(cell_cfg)
        run_dir = suite_dir / name
        cost = float((suite.get("cost") or {}).get(method, 1.0))
        given = [*extra[method], *own, f"run_dir={run_dir}"]
        cells.append(Cell(name, method, percent, fold, number, run_dir, given, cell_cfg, cost=cost))
    _check_apart(cells)
    _link(cells)
    return cells


def _check_apart(cells: list[Cell]) -> None:
    """Raises UserError where a split does not read what tells two cells apart."""
    names = [cell.name for cell in cells]
    for row, name in enumerate(names):
        if name in names[:row]:
            raise UserError(
                f"the suite has the cell {name} more than once, since split.protocol={cells[row].cfg.split.protocol} "
                "does not read split.percent or split.fold: give one value in suite.percents and suite.folds, without "
                "suite.reference, or for split.protocol=ids write {percent} and {fold} in split.index_file"
            )


def _with_place(composed: DictConfig, percent: float, fold: int, seed: int) -> DictConfig:
    """A cell's configuration, as its own process will compose it, without composing it anew."""
    cfg = copy.deepcopy(composed)
    cfg.split.percent, cfg.split.fold, cfg.seed = percent, fold, seed
    checks.check(cfg)
    return cfg


def _axis(suite: DictConfig, key: str, kind: Callable[[Any], Any]) -> list[Any]:
    """The values of one axis of the suite."""
    values = OmegaConf.to_container(suite, resolve=True)[key]  # type: ignore[call-overload, index]
    if not isinstance(values, list) or not values:
        raise UserError(f"suite.{key}={values} must be a list of at least one value, such as suite.{key}=[1]")
    try:
        return [kind(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"suite.{key}={values} holds a value that is not of the right kind ({error})") from error


def _link(cells: list[Cell]) -> None:
    """Connects each cell to the one it starts from, and says how urgent each is."""
    by_place = {(cell.method, cell.percent, cell.fold, cell.seed): cell for cell in cells}
    for cell in cells:
        stage1 = OmegaConf.select(cell.cfg, "method.offline.stage1")
        given = OmegaConf.select(cell.cfg, "method.offline.checkpoint")
        if stage1 is not None and given is None:
            cell.needs = by_place.get((stage1, cell.percent, cell.fold, cell.seed))
    for cell in cells:
        cell.urgency = cell.cost + max((c.cost for c in cells if c.needs is cell), default=0.0)


def standing(cell: Cell) -> str:
    """ "ok" for a cell that is finished, "waiting" for one that is to be run.

    Raises:
        UserError: it was finished under another configuration, or its record is damaged.
    """
    path = cell.run_dir / "record.json"
    if not path.exists():
        return "waiting"
    record = read_record(path)
    if record.status != "ok":
        return "waiting"
    if record.config_sha256 != compose.config_sha256(cell.cfg):
        differing = compose.differences(compose.without_circumstances(record.config), compose.identity(cell.cfg))
        shown = "; ".join(differing[:5]) or "the code's defaults"
        raise UserError(
            f"{cell.run_dir} was made with other settings ({shown}): give the same ones, set suite.name=NAME or "
            "runs_dir=DIR to start a new suite, or delete that folder"
        )
    return "ok"


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


def write_plan(suite_dir: Path, cfg: DictConfig, cells: list[Cell]) -> None:
    """suite.json: every cell with its state, so that a report can say why one is missing."""
    keys = ("name", "method", "percent", "fold", "seed", "state", "reason")
    rows = [
        {key: getattr(cell, key) for key in keys}
        | {"dataset": compose.group_name(cell.cfg, "data"), "protocol": cell.cfg.split.protocol}
        for cell in cells
    ]
    content = {"suite": cfg.suite.name, "cells": rows}
    write_atomically(suite_dir / "suite.json", msgspec.json.format(msgspec.json.encode(content), indent=1))
