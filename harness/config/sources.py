"""Which file, or the command line, each value of a configuration comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from harness.config import moved
from harness.config.paths import quote_path
from harness.config.targets import CONF_DIR

# Later wins; each is looked into before those that stand ahead of it here.
_ORDER = (
    "data",
    "detector",
    "method",
    "pipeline",
    "launcher",
    "schedule",
    "augment",
    "preset",
    "method/preset",
    "suite",
)
COMMAND_LINE, PROGRAM = "the command line", "filled by the program"


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no mapping, in order."""
    for name, value in node.items():
        dotted = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict) and value:
            yield from leaves(value, dotted)
        else:
            yield dotted, value


def sources_of(cfg: DictConfig) -> dict[str, str]:
    """Where the value of each dotted key comes from, in words.

    Args:
        cfg: as `harness.config.compose.load` gives it.
    """
    folders = [Path(os.path.realpath(folder)) for folder in cfg.cli.config_dirs]
    files = _files(cfg, folders)
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    given = {override.lstrip("+~").split("=", 1)[0] for override in cfg.cli.overrides}
    return {key: _source(key, value, given, files) for key, value in leaves(plain) if not key.startswith("cli.")}


def _source(key: str, value: Any, given: set[str], files: list[tuple[str, dict[str, Any]]]) -> str:
    parts = key.split(".")
    if any(".".join(parts[:n]) in given for n in range(1, len(parts) + 1)) and parts[0] not in _chosen(given, key):
        return COMMAND_LINE
    for name, values in reversed(files):
        if key in values:
            written = values[key]
            if isinstance(written, str) and "${" in written:
                return f"{name}, {written}"
            if written == value or isinstance(value, list):
                return name
            return f"{PROGRAM} ({name}: {_text(written)})"
    return PROGRAM


def _chosen(given: set[str], key: str) -> set[str]:
    """The groups of which the command line names an option rather than this key."""
    return {name for name in given if name in _ORDER and name != key}


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _files(cfg: DictConfig, folders: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(name, its leaves by dotted key) of every file that a configuration is made of; later ones win."""
    found = [("config.yaml", _leaves_of(CONF_DIR / "config.yaml", ""))]
    choices = _choices(cfg, folders)
    for group in _ORDER:
        option = choices.get(group) or (str(cfg.method.augment) if group == "augment" else None)
        if option:
            found += _option(group, option, folders)
    return found


def _option(group: str, option: str, folders: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """A group's file, after those of the same group that it builds upon."""
    for folder in (*folders, CONF_DIR):
        path = folder / group / f"{option}.yaml"
        if path.is_file():
            name = f"{group}/{option}.yaml" if folder == CONF_DIR else str(path)
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            bases = [base for base in content.get("defaults", []) if isinstance(base, str) and base != "_self_"]
            package = "" if "@package _global_" in path.read_text(encoding="utf-8") else f"{group.split('/')[0]}"
            below = [one for base in bases for one in _option(group, base, folders)]
            return [*below, (name, _leaves_of(path, package))]
    return []


def _leaves_of(path: Path, package: str) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    content.pop("defaults", None)
    return dict(leaves(content, package))


def _choices(cfg: DictConfig, folders: list[Path]) -> Mapping[str, str | None]:
    """The option of every group."""
    overrides = [quote_path(moved.override(override)) for override in cfg.cli.overrides]
    overrides = [override for override in overrides if not override.lstrip("+~").startswith("augment.")]
    if folders:
        places = ", ".join(f"'file://{folder}'" for folder in folders)
        overrides.append(f"hydra.searchpath=[{places}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = hydra_compose("config", overrides, return_hydra_config=True)
    return dict(composed.hydra.runtime.choices)
