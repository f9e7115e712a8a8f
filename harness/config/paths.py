"""The keys that name files and folders: quoted for Hydra, `~` expanded, and where each of them leads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from harness.core import files

_ENDS = r"root|_dir|init\.dir|_file|checkpoint|weights|\bout|model|annotations|images|labels|logs"
_SLURM = (
    "exclude|nodelist|constraint|gres|time|container|mail|mail_type"  # whose values are Slurm's: node[3-5], 2-00:00
)
_PATH_KEY = re.compile(rf"^\+*([\w.]*({_ENDS})|detector\.start|launcher\.({_SLURM}))=(.*)$", re.DOTALL)
_PATH_NAME = re.compile(r"(^|_)(root|dir|file|checkpoint|weights|out|model|annotations|images|labels|logs)$|^start$")


def quote_path(override: str) -> str:
    """Quotes the value of an override that is a path, or Slurm's own, so that Hydra accepts any character in it.

    Numbers, null, lists and what is quoted already are left to Hydra.
    """
    match = _PATH_KEY.match(override)
    if not match or re.fullmatch(r"(['\"\[{$].*|null|\d*)", match.group(4), re.DOTALL):
        return override
    key, value = override.split("=", 1)
    return f"{key}={quote(value)}"


def quote(value: str) -> str:
    """A string in Hydra's single quotes: backslashes count only before a quote or at the end."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m.group(1) * 2 + ("\\'" if m.group(2) else ""), value)
    return f"'{escaped}'"


def default_cache_dir() -> Path:
    """$SSODBENCH_CACHE, or `ssodbench` in the user's cache folder."""
    if own := os.environ.get("SSODBENCH_CACHE"):
        return Path(files.home_path(own, "SSODBENCH_CACHE"))
    base = os.environ.get("XDG_CACHE_HOME") or files.home_path("~/.cache", "cache_dir")
    return Path(base) / "ssodbench"


def places(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> path, of every key that names one."""
    found = {key: value for node, name, key in _path_nodes(cfg) if isinstance(value := node[name], str) and value}
    root = found.get("data.root", "")
    return {key: os.path.join(root, path) if key.startswith("data.") else path for key, path in found.items()}


def expand_home(cfg: DictConfig) -> None:
    """`~` in every key that names a path, wherever it was written; the shell does so in few places."""
    for node, name, key in _path_nodes(cfg):
        value = node[name]
        if isinstance(value, str) and (path := files.home_path(value, key)) != value:
            node[name] = path


def _path_nodes(node: DictConfig, prefix: str = "") -> Iterator[tuple[DictConfig, str, str]]:
    """(node, its key, the dotted key) of every key that names a path; those of `cli` are the command line as given."""
    for name in map(str, node):
        if prefix + name == "cli" or OmegaConf.is_missing(node, name):
            continue
        if _PATH_NAME.search(name):
            yield node, name, prefix + name
        elif not OmegaConf.is_interpolation(node, name) and isinstance(node[name], DictConfig):
            yield from _path_nodes(node[name], f"{prefix}{name}.")
