"""The plan of a suite: its cells, each with its checked configuration and its state."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import msgspec
from omegaconf import DictConfig, OmegaConf

from harness.config import checks, compose, explain, schema, sections, targets
from harness.config.identity import config_sha256, differences, identity, without_circumstances
from harness.config.names import cell_name, group_name
from harness.core import validate
from harness.core.escape import file_name
from harness.core.files import write_atomically
from harness.core.readback import Progress
from harness.core.record import BASELINE, read_record
from harness.core.types import UserError
from harness.core.validate import near


@dataclass
class SuiteCell:
    """One run of a suite, and how it stands."""

    name: str
    method: str
    percent: float  # of the images that are labelled, or the shots that they are drawn by
    fold: int
    seed: int
    run_dir: Path
    overrides: list[str]
    cfg: DictConfig
    needs: SuiteCell | None = None  # the cell whose checkpoint this one starts from
    cost: float = 1.0  # relative time
    urgency: float = 0.0  # its cost and that of what waits for it
    # waiting, running, held (another process runs it), ok, failed, skipped (its first stage failed), interrupted
    state: str = "waiting"
    reason: str | None = None
    progress: Progress | None = None
    variant: str | None = None  # of the suite's variants

    @property
    def kind(self) -> str:
        """Method and variant, in words: what its cost depends on."""
        return self.method if self.variant is None else f"{self.method} {self.variant}"

    @property
    def done(self) -> float:
        """Share of its steps that are done, 0..1."""
        if self.state == "ok":
            return 1.0
        return min(1.0, self.progress.step / self.progress.steps) if self.progress is not None else 0.0


_OWN_KEYS = {
    "method": "suite.methods=[...]",
    "split.percent": "suite.percents=[...]",
    "split.shots": "suite.shots=[...]",
    "split.fold": "suite.folds=[...]",
    "seed": "suite.seeds=[...]",
    "run_dir": "runs_dir=DIR",
    "variant": "suite.variants={NAME: [...]}",
}


def plan(cfg: DictConfig) -> list[SuiteCell]:
    """The cells of a suite, each with its checked configuration, before anything is run or written.

    Raises:
        UserError: no suite, a key that the suite itself sets, an empty list, or a cell that cannot work.
    """
    suite = cfg.get("suite")
    if suite is None:
        raise UserError("no suite is chosen: say suite=quick (or smoke, shapes, methods, raccoon, bccd, coco)")
    overrides, config_dirs = list(cfg.cli.overrides), list(cfg.cli.config_dirs)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key in _OWN_KEYS:
            raise UserError(f"{key} is set by the suite for each cell: say {_OWN_KEYS[key]} instead")
    amount, percents = _amounts(suite, overrides)
    if amount == "split.shots":
        overrides += ["split.protocol=shots", f"{amount}={percents[0]}"]
    methods, folds = _axis(suite, "methods", str), _axis(suite, "folds", int)
    seeds = [None] if suite.get("seeds") is None else _axis(suite, "seeds", int)
    variants = _variants(suite, overrides)
    methods_of = _methods_of(suite, methods, variants)
    every = dict.fromkeys(chain.from_iterable(methods_of.values()))
    wanted = [cell for cell in product(percents, folds, seeds, every, variants) if cell[3] in methods_of[cell[4]]]
    if suite.get("reference"):
        wanted += [(100.0, fold, seed, BASELINE, name) for fold, seed, name in product(folds, seeds, variants)]
    _check_named(suite, config_dirs, variants)
    suite_dir = Path(cfg.runs_dir) / suite.name
    wanted = list(dict.fromkeys(wanted))
    special = OmegaConf.to_container(suite, resolve=True).get("method_overrides") or {}  # type: ignore[union-attr]
    extra, composed = {}, {}
    for method, variant in dict.fromkeys((method, variant) for *_, method, variant in wanted):
        of_method = [*overrides, f"method={method}", *special.get(method, [])]
        extra[method, variant] = [*of_method, *variants[variant], *special.get(f"{method} {variant}", [])]
        composed[method, variant] = _composed(extra[method, variant], config_dirs, method, variant)
    protocols = {kind: str(cfg.split.protocol) for kind, cfg in composed.items()}
    if len(set(protocols.values())) > 1:
        listed = ", ".join(f"{method} {protocol}" for (method, _), protocol in protocols.items())
        raise UserError(f"the methods of a suite share one split protocol, not {listed}: set split.protocol=NAME")
    cells = []
    for percent, fold, seed, method, variant in wanted:
        number = fold if seed is None else seed
        share = int(percent) if percent == int(percent) else percent
        own = [f"{amount}={share}", f"split.fold={fold}", f"seed={number}"]
        cell_cfg = _with_place(composed[method, variant], amount, share, fold, number)
        name = cell_name(cell_cfg)
        run_dir = suite_dir / name
        costs = suite.get("cost") or {}
        cost = float(costs.get(f"{method} {variant}", costs.get(method, 1.0)))
        given = [*(o for o in extra[method, variant] if explain.override_key(o) != amount), *own, f"run_dir={run_dir}"]
        cell = SuiteCell(name, method, percent, fold, number, run_dir, given, cell_cfg, cost=cost, variant=variant)
        cells.append(cell)
    _check_apart(cells)
    _link(cells)
    return cells


def _variants(suite: DictConfig, suite_overrides: list[str]) -> dict[str | None, list[str]]:
    """Name -> overrides of the suite's variants; one without a name where there are none.

    Args:
        suite: the group.
        suite_overrides: of the command line.

    Raises:
        UserError: a name is none, is given twice, or is another's but for signs that a folder cannot have; or a key is
            the suite's.
    """
    given = OmegaConf.to_container(suite, resolve=True).get("variants") or {}  # type: ignore[union-attr]
    for override in suite_overrides:
        _check_named_once(override)
    folders: dict[str, str] = {}
    found: dict[str | None, list[str]] = {}
    for name, overrides in given.items():
        said = f"suite.variants.{name}"
        validate.check(schema.Name, name, "suite.variants")
        folder = file_name(name)
        if folder in folders:
            raise UserError(f"{said} would have the folders of suite.variants.{folders[folder]}: give it another name")
        folders[folder] = name
        for override in overrides:
            key = override.split("=", 1)[0].lstrip("+~")
            if key in _OWN_KEYS:
                raise UserError(f"{said} sets {key}, which the suite sets for each cell: say {_OWN_KEYS[key]} instead")
            if key.split(".")[0] in ("suite", "runs_dir"):
                raise UserError(f"{said} sets {key}, which all cells share: set it outside of suite.variants")
        found[name] = [*overrides, f"variant={name}"]
    return found or {None: []}


def _methods_of(
    suite: DictConfig, methods: list[str], variants: dict[str | None, list[str]]
) -> dict[str | None, list[str]]:
    """The methods of each variant.

    Raises:
        UserError: `suite.variant_methods` names a variant that there is not.
    """
    given = OmegaConf.to_container(suite, resolve=True).get("variant_methods") or {}  # type: ignore[union-attr]
    for name in given:
        if name not in variants:
            known = [variant for variant in variants if variant is not None]
            hint = near(name, known) or (f": choose of {', '.join(known)}" if known else ": suite.variants has none")
            raise UserError(f"suite.variant_methods.{name} names no variant{hint}")
    return {variant: given.get(variant, methods) for variant in variants}


def _check_named_once(override: str) -> None:
    """Raises UserError where the command line gives a variant twice, of which Hydra would take the last."""
    key, _, value = override.lstrip("+").partition("=")
    if key != "suite.variants":
        return
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", value)
    while bare != (bare := re.sub(r"\[[^][]*\]", "", bare)):
        pass
    names = re.findall(r"[{,]\s*([^{},:]+?)\s*:", bare)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"suite.variants names {name} more than once: give each variant a name of its own")


def _composed(overrides: list[str], config_dirs: list[str], method: str, variant: str | None) -> DictConfig:
    """The configuration of a method's cells, before their places.

    Raises:
        UserError: it cannot be composed, or devices cannot share its batch.
    """
    try:
        cfg = compose.load(overrides, config_dirs)
        sections.step_shape(cfg, sections.processes(cfg))
    except UserError as error:
        if variant is None:
            raise
        raise UserError(f"suite.variants.{variant} with method={method} cannot be composed: {error}") from error
    return cfg


def _amounts(suite: DictConfig, overrides: list[str]) -> tuple[str, list[Any]]:
    """The key that says how much each cell's split labels, and its values.

    Raises:
        UserError: there are two such keys, or shots with what does not go with them.
    """
    if suite.get("shots") is None:
        return "split.percent", _axis(suite, "percents", float)
    said = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
    if "suite.percents" in said:
        raise UserError("suite.percents and suite.shots both say how many images are labelled: leave one of them out")
    if said.get("split.protocol", "shots") != "shots":
        raise UserError(
            f"suite.shots draws by split.protocol=shots, not by {said['split.protocol']}: leave one of them out"
        )
    if suite.get("reference"):
        raise UserError(
            "suite.reference=true trains on all labels, which split.protocol=shots never gives: leave it out"
        )
    return "split.shots", _axis(suite, "shots", int)


def _check_named(suite: DictConfig, config_dirs: list[str], variants: Iterable[str | None]) -> None:
    """Raises UserError where `suite.cost` or `suite.method_overrides` names a method or a variant that there is not."""
    folders = [targets.CONF_DIR, *map(Path, config_dirs)]
    known = {file.stem for folder in folders for file in (folder / "method").glob("*.yaml")} | set(suite.methods)
    both = {f"{method} {variant}" for method, variant in product(known, variants)}
    for key in ("cost", "method_overrides"):
        for name in suite.get(key) or {}:
            if name not in known | both:
                hint = near(str(name), sorted(both if " " in str(name) else known))
                hint = hint or f": choose of {', '.join(sorted(known))}"
                raise UserError(f"suite.{key}.{name} names no method{hint}")


def _check_apart(cells: list[SuiteCell]) -> None:
    """Raises UserError where a split does not read what tells two cells apart."""
    names = [cell.name for cell in cells]
    for row, name in enumerate(names):
        if name in names[:row]:
            raise UserError(
                f"the suite has the cell {name} more than once, since split.protocol={cells[row].cfg.split.protocol} "
                "does not read split.percent or split.fold: give one value in suite.percents and suite.folds, without "
                "suite.reference, or for split.protocol=ids write {percent} and {fold} in split.index_file"
            )


def _with_place(composed: DictConfig, amount: str, value: float, fold: int, seed: int) -> DictConfig:
    """A cell's configuration, as its own process will compose it, without composing it anew."""
    cfg = copy.deepcopy(composed)
    OmegaConf.update(cfg, amount, value)
    cfg.split.fold, cfg.seed = fold, seed
    checks.check_config(cfg)
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


def _link(cells: list[SuiteCell]) -> None:
    """Connects each cell to the one it starts from, and says how urgent each is."""
    by_place = {(cell.method, cell.variant, cell.percent, cell.fold, cell.seed): cell for cell in cells}
    for cell in cells:
        stage1 = OmegaConf.select(cell.cfg, "method.offline.stage1")
        given = [OmegaConf.select(cell.cfg, f"method.offline.{key}") for key in ("checkpoint", "labels")]
        if stage1 is not None and not any(given):
            cell.needs = by_place.get((stage1, cell.variant, cell.percent, cell.fold, cell.seed))
    for cell in cells:
        cell.urgency = cell.cost + max((c.cost for c in cells if c.needs is cell), default=0.0)


def state_of(cell: SuiteCell) -> str:
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
    if record.config_sha256 != config_sha256(cell.cfg):
        differing = differences(without_circumstances(record.config), identity(cell.cfg))
        shown = "; ".join(differing[:5]) or "the code's defaults"
        raise UserError(
            f"{cell.run_dir} was made with other settings ({shown}): give the same ones, set suite.name=NAME or "
            "runs_dir=DIR to start a new suite, or delete that folder"
        )
    return "ok"


def first_state(cell: SuiteCell, retry_failed: bool) -> tuple[str, str | None]:
    """A cell's state and its reason before anything is run: `standing`, or failed where that is not tried again."""
    state = state_of(cell)
    if state == "waiting" and not retry_failed and (cell.run_dir / "record.json").exists():
        record = read_record(cell.run_dir / "record.json")
        if record.status == "failed":
            return "failed", record.error
    return state, None


def write_plan(suite_dir: Path, cfg: DictConfig, cells: list[SuiteCell]) -> None:
    """suite.json: every cell with its state, so that a report can say why one is missing."""
    keys = ("name", "method", "variant", "percent", "fold", "seed", "state", "reason")
    rows = [
        {key: getattr(cell, key) for key in keys}
        | ({"percent": None, "shots": shots} if (shots := cell.cfg.split.get("shots")) is not None else {})
        | {"dataset": group_name(cell.cfg, "data"), "protocol": cell.cfg.split.protocol}
        for cell in cells
    ]
    content = {"suite": cfg.suite.name, "cells": rows}
    write_atomically(suite_dir / "suite.json", msgspec.json.format(msgspec.json.encode(content), indent=1))
