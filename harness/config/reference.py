"""Every key of the configuration with its values and its meaning, read off the YAML files and the comments in them.

Needs neither Hydra nor torch: help has to be quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONF_DIR = Path(__file__).parents[1] / "conf"
GROUPS = ("data", "method", "detector", "augment", "pipeline", "schedule", "launcher", "preset", "suite")
_HIDDEN = ("cli", "preset_name", "defaults")  # filled by the program
# Of groups whose values a program reads rather than a person: one line each.
_WHOLE = ("augment",)


@dataclass(frozen=True)
class Entry:
    """A key as one file has it."""

    key: str  # dotted, with the group's name
    value: str  # as YAML, on one line
    meaning: str  # the comment beside or above it


def options(group: str) -> list[str]:
    """Names of a group's files."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


def default_option(group: str) -> str | None:
    """What a group is where nothing is said."""
    listed = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    value = next((entry[group] for entry in listed if isinstance(entry, dict) and group in entry), None)
    return str(value) if value is not None else None


@cache
def about(file: str) -> str:
    """The comment at the head of a file, given relative to the folder of all, as one paragraph."""
    lines = (CONF_DIR / file).read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if not line.startswith("#"):
            break
        if "@package" not in line:
            found.append(line.removeprefix("#").strip())
    return " ".join(found)


@cache
def entries(file: str) -> tuple[Entry, ...]:
    """The keys of a file, relative to the folder of all."""
    text = (CONF_DIR / file).read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        return ()
    group = Path(file).parent.as_posix()
    prefix = "" if group == "." or "@package _global_" in text else f"{group.split('/')[0]}."
    depth = 1 if group in _WHOLE else 99
    head = next(n for n, line in enumerate(text.splitlines()) if not line.startswith("#"))
    return tuple(_walk(root, prefix, text.splitlines(), head, depth))


def _walk(node: yaml.MappingNode, prefix: str, lines: list[str], head: int, depth: int) -> Iterator[Entry]:
    """Leaves below a mapping; `head` is the line at which the file's own comment has ended."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name.removeprefix(prefix) in _HIDDEN and prefix.count(".") <= 1:
            continue
        comment = _comment(lines, key, value, head)
        if isinstance(value, yaml.MappingNode) and value.value and depth > 1:
            below = list(_walk(value, f"{name}.", lines, head, depth - 1))
            yield from (entry if entry.meaning or not comment else replace(entry, meaning=comment) for entry in below)
        else:
            yield Entry(name, _shown(value), comment)


def _comment(lines: list[str], key: yaml.Node, value: yaml.Node, head: int) -> str:
    """The comment behind a key, with the lines that continue it; else the one above."""
    first = key.start_mark.line
    line, column = first, key.end_mark.column + 1
    if not _is_block(value):
        line, column = value.end_mark.line, value.end_mark.column
    behind = lines[line][column:].strip().lstrip("|>-+").strip()
    found = [behind[1:].strip()] if behind.startswith("#") else []
    if found:
        for more in lines[line + 1 :]:
            if not more.strip().startswith("#") or len(more) - len(more.lstrip()) <= key.start_mark.column:
                break
            found.append(more.strip()[1:].strip())
        return " ".join(found)
    if first and "{" not in lines[first][: key.start_mark.column]:
        above = first
        while above > head and lines[above - 1].strip().startswith("#"):
            if len(lines[above - 1]) - len(lines[above - 1].lstrip()) != key.start_mark.column:
                break
            above -= 1
        found = [text.strip()[1:].strip() for text in lines[above:first]]
    return " ".join(found)


def _is_block(value: yaml.Node) -> bool:
    """Whether a value begins below its key."""
    return value.style in ("|", ">") if isinstance(value, yaml.ScalarNode) else not value.flow_style


def _shown(node: yaml.Node) -> str:
    """A value on one line, as it would be written on the command line."""
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_shown(item) for item in node.value) + "]"
    if isinstance(node, yaml.MappingNode):
        if any(isinstance(value, yaml.MappingNode) for _, value in node.value):
            return ", ".join(str(key.value) for key, _ in node.value)
        return "{" + ", ".join(f"{key.value}: {_shown(value)}" for key, value in node.value) + "}"
    return "null" if node.value in ("", "~") else " ".join(str(node.value).split())


def general() -> dict[str, Entry]:
    """The keys outside of groups."""
    return {entry.key: entry for entry in entries("config.yaml")}


def with_presets(key: str) -> dict[str, str]:
    """What a preset sets a key to, by the preset's name, where it does."""
    found = {}
    for preset in options("preset"):
        values = {entry.key: entry.value for entry in entries(f"preset/{preset}.yaml")}
        if key in values:
            found[preset] = values[key]
    return found


def all_files() -> list[tuple[str, str]]:
    """(group, file) of every option that is documented."""
    found = [(group, f"{group}/{option}.yaml") for group in GROUPS for option in options(group)]
    return found + [("method/preset", f"method/preset/{option}.yaml") for option in options("method/preset")]


def page() -> str:
    """The reference page, in Markdown."""
    lines = [
        "# Every key",
        "",
        "Made by `make reference` out of `harness/conf` and the comments there; do not change it by hand. Later wins: "
        "`config.yaml`, the groups, the preset, the method's values for the preset, a suite, the command line.",
        "",
        "## Outside of groups",
        "",
        "| key | default | preset | meaning |",
        "|---|---|---|---|",
    ]
    for entry in general().values():
        presets = ", ".join(f"{name}: {value}" for name, value in with_presets(entry.key).items())
        lines.append(_row(f"`{entry.key}`", f"`{entry.value}`", presets, entry.meaning))
    for group in GROUPS:
        default = default_option(group)
        lines += ["", f"## {group}", "", f"`{group}=NAME`{f', by default `{default}`' if default else ''}."]
        for option in options(group):
            lines += _option(f"{group}/{option}.yaml", f"{group}={option}")
    lines += ["", "## What a method changes in a preset", ""]
    for option in options("method/preset"):
        lines += _option(f"method/preset/{option}.yaml", f"method and preset {option}")
    return "\n".join(lines) + "\n"


@cache
def _meanings() -> dict[str, str]:
    """What keys mean, by the first file that says it."""
    found: dict[str, str] = {}
    for entry in (*general().values(), *(entry for _, file in all_files() for entry in entries(file))):
        if entry.meaning:
            found.setdefault(entry.key, entry.meaning)
    return found


def meaning(entry: Entry) -> str:
    """A key's comment, or that of the same key in another file."""
    return entry.meaning or _meanings().get(entry.key, "")


def _option(file: str, title: str) -> list[str]:
    lines = ["", f"### {title}", ""]
    if said := about(file):
        lines += [_cell(said), ""]
    listed = [entry for entry in entries(file) if not entry.key.endswith(("_target_", ".name"))]
    if listed:
        lines += ["| key | value | meaning |", "|---|---|---|"]
        lines += [_row(f"`{entry.key}`", f"`{entry.value}`", meaning(entry)) for entry in listed]
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;")


def command_keys(takes: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of what a command takes; a group is one line with its options.

    Args:
        takes: keys, sections and groups, as in `harness.commands.usage`.
    """
    rows: list[tuple[str, str, str]] = []
    for known in takes:
        if known in GROUPS:
            default = default_option(known) or "null"
            rows.append((known, "the method's" if known == "augment" else default, ", ".join(options(known))))
        rows += [
            (entry.key, entry.value, entry.meaning)
            for entry in general().values()
            if entry.key == known or entry.key.startswith(f"{known}.")
        ]
    return rows
