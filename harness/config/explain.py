"""Hydra's and OmegaConf's errors as one sentence about what the user wrote."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from harness.config import moved
from harness.config.targets import CONF_DIR, of_other_option
from harness.core import validate

# What of a run a suite varies, and by which key.
_SUITE_AXES = {
    "method": "suite.methods",
    "split.percent": "suite.percents",
    "split.fold": "suite.folds",
    "split.shots": "suite.shots",
    "seed": "suite.seeds",
}

_OF_OVERRIDES = ("suite.variants", "suite.method_overrides")  # keys whose values are overrides


def override_key(override: str) -> str:
    """The dotted key that an override gives, without the signs before it."""
    return override.split("=", 1)[0].lstrip("+~")


def explained(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence about what Hydra could not compose."""
    return _several(overrides) or _no_option(overrides) or _unquoted(overrides) or _about(error, overrides)


def _several(overrides: Sequence[str]) -> str | None:
    """One sentence about the first key that is given several values, `key=a,b`."""
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            continue
        if parsed.is_sweep_override():
            key, value = override_key(override), override.split("=", 1)[1]
            axis = _SUITE_AXES.get(key)
            remedy = (
                f"for several, say `ssodbench suite suite=quick {axis}=[{value}]`"
                if axis
                else f"a list is written [{value}], a text with a comma in quotes"
            )
            return f"{key}={value} gives several values where a run takes one: {remedy}"
    return None


def _no_option(overrides: Sequence[str]) -> str | None:
    """One sentence about the first group that is given null, a number or keys instead of an option."""
    for override in overrides:
        group, _, value = override.lstrip("+~").partition("=")
        options = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
        if (
            group
            and options
            and (value.lower() in ("null", "true", "false", "") or not re.match(r"[A-Za-z_'\"]", value))
        ):
            said = f"{group}={validate.shown(value)}"
            return f"{said} names no option: choose one of {', '.join(options)}, or leave {group} out"
    return None


def _unquoted(overrides: Sequence[str]) -> str | None:
    """One sentence about overrides within a suite's key that Hydra cannot read without quotes."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+").startswith(_OF_OVERRIDES) and "=" in value:
            try:
                OverridesParser.create().parse_override(override)
            except HydraException:
                return (
                    f"{validate.shown(override)} cannot be read: put each override in quotes, such as "
                    f"'{key}={{NAME: [\"schedule.steps=300\"]}}'"
                )
    return None


def unknown_option(message: str) -> str:
    """One sentence from Hydra's page about a missing group option."""
    match = re.search(r"Could not (?:find|load) '([^']+)'", message)
    options = re.findall(r"^\t(\w\S*)$", message, re.MULTILINE)
    options = [option for option in options if "=" not in option]
    name = match.group(1) if match else message.splitlines()[0]
    group, _, option = name.partition("/")
    if group == "method" and option.startswith("preset/"):
        group, option = "method/preset", option.removeprefix("preset/")
    options = [name for name in options if (group, name) not in moved.OPTIONS]
    options = options or sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
    near = validate.near(option, options).removeprefix("; ")
    said = f"{group}={validate.shown(option)} is not known{f' ({near})' if near else ''}"
    return f"{said}: choose one of {', '.join(options)}" if options else said


def _about(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence from one of Hydra's or OmegaConf's exceptions."""
    message = _message(error)
    match = re.search(r"Could not override '([^']+)'", message) or re.search(r"Key '([^']+)' is not in struct", message)
    if match:
        if elsewhere := of_other_option(match.group(1)):
            return elsewhere
        if match.group(1).startswith("suite.") and "suite" not in map(override_key, overrides):
            return f"{match.group(1)} is a key of a suite: choose one too, such as suite=quick, or leave the key out"
        hint = validate.near(match.group(1), _known_keys()) or "; `ssodbench --help` says how to list the keys"
        return f"the key {match.group(1)} is not known{hint}"
    if "Could not find '" in message:
        return unknown_option(message)
    if message.startswith("Error merging override") and (given := next((o for o in overrides if o in message), None)):
        group = override_key(given)
        return f"{validate.shown(given)} stands where there are keys: write {group}={{KEY: VALUE}}, or give one of them"
    given = getattr(error, "override", None) or next((o for o in overrides if o in message), None)
    first = next((line for line in message.splitlines() if line.strip()), type(error).__name__)
    said = f" ({validate.shown(str(given))})" if given else ""
    return f"cannot read the configuration{said}: {validate.shown(first)}"


def _message(error: BaseException) -> str:
    """Its own, or that of what it was raised for: some of Hydra's have none."""
    while not str(error).strip() and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error).strip()


@functools.cache
def _known_keys() -> tuple[str, ...]:
    """Dotted keys of the default configuration."""
    cfg = compose("config", [])

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield prefix + str(key)
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return tuple(walk(OmegaConf.to_container(cfg, resolve=False), ""))
