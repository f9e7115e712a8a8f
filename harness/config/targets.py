"""What a `_target_` may name: the constructors of each group, and their keys against the parameters."""

from __future__ import annotations

import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import extras, moved
from harness.core import validate
from harness.core.types import UserError

CONF_DIR = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Group:
    """A group whose `_target_` names a constructor."""

    makes: str  # module:class of what it gives
    given: tuple[str, ...] = ()  # parameters that the program passes
    own: tuple[str, ...] = ()  # keys that the constructor does not take


# What has a `_target_`, by its place in the configuration. `logging.loggers` is a list of such.
GROUPS = {
    "data": Group("harness.data.datasets:Dataset", ("cache_dir",), ("small",)),
    "detector": Group(
        "detectors.detector:Detector",
        ("num_classes", "generated"),
        ("backbone_lr_scale", "start", "start_sha256"),
    ),
    "method": Group(
        "detectors.methods.method:Method",
        ("detector", "steps"),
        ("name", "augment", "unlabeled", "offline"),
    ),
    "pipeline": Group(
        "harness.core.types:Pipeline",
        (
            *("policy", "normalize", "views", "sampler", "labeled", "unlabeled"),
            *("known_bad", "device", "rank", "world_size", "eval_batch"),
        ),
        ("name",),
    ),
    "launcher": Group("harness.launch.launcher:Launcher", (), ("name",)),
    "schedule.optimizer": Group(
        "torch.optim:Optimizer", ("params", "lr"), ("lr", "weight_decay", "decay_norm_and_bias")
    ),
    "schedule.decay": Group("harness.engine.optim:Decay", ("steps",)),
    "logging.loggers": Group("harness.engine.loggers:Logger", ("run_dir", "title", "start_step")),
}
NAMED = ("data", "detector", "method", "pipeline", "launcher")


def own_keys(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Of a group's values those that its constructor does not take."""
    return {key: values[key] for key in GROUPS[name].own if key in values}


def as_shipped(place: str, overrides: Sequence[str], config_dirs: Sequence[str]) -> bool:
    """Whether the values at a place all come from the program's own files, which a test keeps right.

    Importing torch takes a second and much memory, which `config` and `prepare` can do without.
    """
    group = place.split(".")[0]
    options = {file.stem for file in (CONF_DIR / group).glob("*.yaml")}
    options |= {option for of, option in moved.OPTIONS if of == group}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if _touches(key, place) and not (key == group and value in options):
            return False
    return not config_dirs


def _touches(key: str, place: str) -> bool:
    """Whether an override of a key changes what is at a place: the place itself, what it is in, or what is in it."""
    parts, wanted = re.split(r"[./@]", key), place.split(".")
    return wanted[0] in parts if "@" in key else all(a == b for a, b in zip(parts, wanted, strict=False))


def check_constructor(name: str, values: dict[str, Any], key: str | None = None) -> None:
    """Checks a group's keys against the parameters of what its `_target_` names; `key` is how messages call it."""
    group = GROUPS[name]
    try:
        target = find_target(name, values, key)
    except ModuleNotFoundError:
        return  # an extra is not installed: `harness.config.extras` says so where it is needed
    arguments = {key: value for key, value in values.items() if key not in (*group.own, "_target_")}
    validate.check_arguments(
        target, arguments, key or name, group.given, group.own, lambda unknown: of_other_option(f"{name}.{unknown}")
    )


def of_other_option(key: str) -> str:
    """A sentence about a dotted key that only other options of its group have; "" where none has it."""
    group, _, rest = key.partition(".")
    if group not in NAMED:
        return ""
    line = re.compile(rf"^{re.escape(rest.partition('.')[0])}:", re.MULTILINE)
    options = [file.stem for file in sorted((CONF_DIR / group).glob("*.yaml")) if line.search(file.read_text())]
    choices = " or ".join(f"{group}={option}" for option in options)
    return f"{key} belongs to {choices}: choose that, or leave the key out" if options else ""


def find_target(name: str, values: dict[str, Any], key: str | None = None) -> Callable[..., Any]:
    """The class or function that a group's `_target_` names.

    Raises:
        UserError: there is no such thing, or it is not for this group.
        ModuleNotFoundError: it needs an extra that is not installed.
    """
    path = values.get("_target_")
    said = f"{key or name}._target_={validate.shown(path)}"
    if not isinstance(path, str) or not path:
        raise UserError(f"{said} must be the dotted name of a class or function, such as package.module.Name")
    try:
        target = pkgutil.resolve_name(path)
    except Exception as error:  # whatever the user's module raises
        if isinstance(error, ModuleNotFoundError) and extras.is_extra(error.name):
            raise
        why = validate.shown(f"{type(error).__name__}: {error}")
        raise UserError(f"{said} cannot be imported ({why}): name a class or function that Python finds") from error
    if not _makes(target, pkgutil.resolve_name(GROUPS[name].makes)):
        kind = GROUPS[name].makes.replace(":", ".")
        noun = name.split(".")[-1].removesuffix("s")
        raise UserError(f"{said} is no {noun}: it must be a {kind}, or a function that is annotated to return one")
    return target


def _makes(target: Any, kind: type) -> bool:
    """Whether it is a class of that kind, or a function whose annotation promises one."""
    if not inspect.isclass(target):
        try:
            target = typing.get_type_hints(target).get("return")
        except (NameError, TypeError, AttributeError):
            return False
    if not inspect.isclass(target) or inspect.isabstract(target):
        return False
    if getattr(kind, "_is_protocol", False):
        return all(callable(getattr(target, name, None)) for name, member in vars(kind).items() if callable(member))
    return issubclass(target, kind)
