"""Checks of a configuration before anything is opened: known keys, kinds and ranges of values, and combinations."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from harness.config import moved, schema, sections
from harness.config.plain import resolved
from harness.config.step import check_annealing
from harness.config.targets import CONF_DIR, NAMED, as_shipped, check_constructor, own_keys
from harness.core import validate
from harness.core.types import UserError

_CHOSEN = (*NAMED, "augment", "schedule")


def check_config(cfg: DictConfig) -> None:
    """Checks keys, values and combinations before any data is opened.

    Raises:
        UserError: naming the key and what it may be.
    """
    check_values(resolved(cfg))
    check_together(cfg)


def check_together(cfg: DictConfig) -> None:
    """Checks what values must be to each other.

    Raises:
        UserError: naming the keys.
    """
    batch, steps = sections.batch_options(cfg), sections.schedule_options(cfg).steps
    check_annealing(batch.anneal_steps, batch.ratio, steps)
    _check_interval(sections.evaluation_options(cfg).every, steps)
    _check_amount(cfg)
    sections.step_shape(cfg)
    # Without batch.micro a step may only later be found not to be shared: commands that train nothing do not mind.
    if batch.micro is not None or cfg.devices > batch.labeled + batch.unlabeled:
        sections.step_shape(cfg, sections.processes(cfg))


def check_values(plain: dict[str, Any]) -> None:
    """Checks every key and value on its own.

    Args:
        plain: the configuration as plain data, resolved.

    Raises:
        UserError: naming the key and what it may be.
    """
    _check_chosen(plain, _CHOSEN)
    validate.check(schema.Config, plain)
    for group in NAMED:
        validate.check(schema.Name, plain[group].get("name"), f"{group}.name")
    check_method(plain["method"])
    validate.check(schema.DetectorKeys, own_keys("detector", plain["detector"]), "detector")
    _check_optimizer(plain["schedule"]["optimizer"])
    for name in (*NAMED, "schedule.optimizer"):
        if not as_shipped(name, plain["cli"]["overrides"], plain["cli"]["config_dirs"]):
            check_constructor(name, _at(plain, name))
    if isinstance(plain["schedule"]["decay"], dict):
        check_constructor("schedule.decay", plain["schedule"]["decay"])
    for place, chosen in enumerate(plain["logging"]["loggers"]):
        if isinstance(chosen, dict):
            check_constructor("logging.loggers", chosen, f"logging.loggers[{place}]")
    if "small" in plain["data"]:  # after the keys of `data`, which it may refer to
        validate.check(schema.SmallOptions, plain["data"]["small"], "data.small")
    _check_policy(plain)


def _check_chosen(plain: dict[str, Any], groups: Sequence[str]) -> None:
    for group in groups:
        if not isinstance(plain.get(group), dict):
            options = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
            raise UserError(f"no {group} is chosen: say {group}=NAME, one of {', '.join(options)}")


def _at(plain: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The mapping at a dotted place."""
    found: Any = plain
    for key in place.split("."):
        found = found[key]
    return dict(found)


def _check_optimizer(options: dict[str, Any]) -> None:
    if "name" in options:
        moved.override(f"schedule.optimizer.name={options['name']}")  # says which names there are
    validate.check(schema.OptimizerOptions, own_keys("schedule.optimizer", options), "schedule.optimizer")


def check_method(method: Any) -> None:
    """Checks what describes the method, among it the policy that it takes.

    Args:
        method: the group, as plain data.

    Raises:
        UserError: naming the key and what it may be.
    """
    _check_chosen({"method": method}, ("method",))
    own = own_keys("method", method)
    validate.check(schema.MethodKeys, own, "method")
    options = own.get("offline")
    if options and options["stage1"] == own["name"]:
        name = validate.shown(own["name"])
        raise UserError(f"method.offline.stage1={name} is the method itself: name another, such as supervised")
    if options:
        _check_labels(options)


def _check_labels(options: dict[str, Any]) -> None:
    """Checks that pseudo labels of a file come with who made them, and with nobody else."""
    labels, labeller = options.get("labels"), options.get("labeller")
    if labels and not labeller:
        raise UserError("method.offline.labels needs method.offline.labeller=NAME: say who made them, for the record")
    if labeller and not labels:
        who = validate.shown(labeller)
        raise UserError(f"method.offline.labeller={who} made no labels: set method.offline.labels to their file")
    if labels and options.get("checkpoint"):
        raise UserError(
            "method.offline.labels and method.offline.checkpoint both give pseudo labels: leave one of them null"
        )


def _check_policy(plain: dict[str, Any]) -> None:
    policy = pkgutil.resolve_name("pipelines.policy:Policy").from_config(plain["augment"])
    policy.view("test")
    if plain["method"].get("offline"):
        policy.view("pseudo")


def _check_amount(cfg: DictConfig) -> None:
    """Checks that a split is drawn by one key; what a suite draws by is known of its cells alone."""
    if (cfg.get("suite") or {}).get("shots") is None:
        options = sections.split_options(cfg)
        options.chosen.check_amount(options, [override.split("=", 1)[0].lstrip("+~") for override in cfg.cli.overrides])


def _check_interval(every: float | None, steps: int) -> None:
    if every is not None and every > steps:
        raise UserError(
            f"evaluation.every={every} is larger than schedule.steps={steps}: "
            "leave it null to evaluate at the end alone"
        )
