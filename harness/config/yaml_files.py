"""The user's own YAML: what in it cannot be read, what would be passed over, and where in it a mistake stands.

All but names is looked at only once composing has failed, since Hydra's errors leave out the file, the line, or both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.targets import CONF_DIR
from harness.core.types import UserError

_GROUPS = (
    "data",
    "detector",
    "method",
    "method/preset",
    "pipeline",
    "launcher",
    "schedule",
    "augment",
    "preset",
    "suite",
)


def chosen(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> list[Path]:
    """Files in the user's folders that an override names, those that their defaults name, and presets of a method."""
    values = {override.partition("=")[2] for override in overrides}
    found: list[Path] = []
    for file in _files(config_dirs):
        if any(file.stem == value or (value and file.stem.startswith(f"{value}_")) for value in values):
            found.append(file)
    for file in found:  # grows while it is gone through
        found += [other for other in _neighbours(file, config_dirs) if other not in found]
    return found


def check_name(group: str, option: str, config_dirs: Sequence[str | Path]) -> None:
    """Checks that an option of the user's is not called as one of the program's own, which Hydra takes in its place.

    Raises:
        UserError: it is, and says something else or cannot be read.
    """
    if not config_dirs or group not in _GROUPS:
        return
    shipped = {file.stem: file for file in (CONF_DIR / group).glob("*.yaml")}
    for folder in config_dirs if option in shipped else ():
        own = Path(folder) / group / f"{option}.yaml"
        if not own.is_file():
            continue
        check_files([own])
        if own.read_bytes() != shipped[option].read_bytes():
            raise UserError(
                f"{own} would be passed over, since ssodbench has {group}={option} of its own: call the file "
                f"otherwise, such as my_{option}.yaml, and say {group}=my_{option}"
            )


def _files(config_dirs: Sequence[str | Path]) -> Iterator[Path]:
    for folder in config_dirs:
        for group in _GROUPS:
            yield from sorted((Path(folder) / group).glob("*.yaml"))


def _neighbours(file: Path, config_dirs: Sequence[str | Path]) -> list[Path]:
    """The user's files that a file's defaults list names."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, OSError, UnicodeDecodeError, ValueError, RecursionError):
        return []
    entries = content.get("defaults") if isinstance(content, dict) else None
    names = set()
    for entry in entries if isinstance(entries, list) else ():
        names |= {str(value) for value in entry.values()} if isinstance(entry, dict) else {str(entry)}
    return [other for other in _files(config_dirs) if other.stem in names]


def check_files(files: Sequence[Path]) -> None:
    """Reads files one by one.

    Raises:
        UserError: one cannot be read, or holds no keys; with its line.
    """
    for file in files:
        try:
            _check_file(file)
        except (yaml.MarkedYAMLError, yaml.reader.ReaderError) as error:
            raise UserError(_place(file, error)) from error
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else _undecodable(file)
            raise UserError(f"{file} cannot be read ({why}): mend the file") from error
        except (OmegaConfBaseException, RecursionError, TypeError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{file} cannot be read ({first}): mend the file") from error
    _check_circle(files)


def _check_file(file: Path) -> None:
    text = file.read_bytes().decode()  # as Hydra reads it
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        held = "a list" if isinstance(root, yaml.SequenceNode) else "nothing" if root is None else "a single value"
        line = root.start_mark.line + 1 if root is not None else 1
        raise UserError(f"{file}, line {line}: it holds {held} where keys are wanted, such as `name: mine`")
    for key, value in root.value:
        if key.tag != "tag:yaml.org,2002:str" and key.tag != "tag:yaml.org,2002:merge":
            raise UserError(f"{file}, line {key.start_mark.line + 1}: the key {key.value} is no text: put it in quotes")
        if key.value == "defaults" and not isinstance(value, yaml.SequenceNode):
            raise UserError(f"{file}, line {key.start_mark.line + 1}: defaults must be a list, such as [small]")
    OmegaConf.load(file)


def _place(file: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    why = getattr(error, "problem", None) or str(error).splitlines()[0]
    line = f", line {mark.line + 1}" if mark is not None else ""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in why)
    hint = "; indent with spaces, not tabs" if "\\t" in printable else ""
    return f"{file}{line}: {printable}{hint}: mend the file"


def _undecodable(file: Path) -> str:
    """Which line is not UTF-8."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return f"line {number} is not UTF-8 text"
    return "it is not UTF-8 text"


def _check_circle(files: Sequence[Path]) -> None:
    """Raises UserError for a file whose defaults lead back to it."""
    for file in files:
        seen: list[Path] = []
        waiting = [file]
        while waiting:
            for other in _defaults_beside(waiting.pop()):
                if other == file:
                    raise UserError(f"{file}: its defaults lead back to itself: name another file there")
                if other not in seen:
                    seen.append(other)
                    waiting.append(other)


def _defaults_beside(file: Path) -> list[Path]:
    """The files of the same folder that a file's defaults list names."""
    return [other for other in _neighbours(file, [file.parent.parent]) if other.parent == file.parent]


def located(message: str, files: Sequence[Path]) -> str:
    """A sentence about a key, with the file and line where the user wrote it, if it was in a file."""
    match = re.match(r"(?:the key )?([\w.]+)(?:\[\d+\])*(?:=| is )", message)
    key = match.group(1).split(".")[-1] if match else None
    for file in files if key else ():
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if re.search(rf"(^|[\s{{,]){re.escape(str(key))}\s*:", line.split(" #")[0]):
                return f"{message} ({file}, line {number})"
    return message
