"""Configuration: Hydra's compose API and the defaults that need code; what is checked is in `config_checks`.

Never `@hydra.main`: it would scatter output folders and own our exit codes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import config_checks
from harness.types import UserError

CONF_DIR = Path(__file__).parent / "conf"

# Keys that say where and how a run is carried out, not what it computes: they may change when a run is taken up again.
_CIRCUMSTANCES = (
    "runs_dir",
    "run_dir",
    "cache_dir",
    "device",
    "devices",
    "threads",
    "logging",
    "checkpointing",
    "launcher",
    "suite",
    "data.root",
    "pipeline.threads",
    "pipeline.prefetch",
    "method.offline.checkpoint",
    "detector.cache_dir",
    "data.cache_dir",
    "out",
    "cli",
    "profile",
    "prepare",
    "check",
    "export_dir",
)
_PATH_KEY = re.compile(r"^\+*([\w.]*(root|_dir|_file|checkpoint|weights|out|annotations|images))=(.*)$", re.DOTALL)


def quote_path(override: str) -> str:
    """Quotes the value of a path-valued override, so that Hydra accepts any file name in it.

    Numbers, null, lists and what is quoted already are left to Hydra.
    """
    match = _PATH_KEY.match(override)
    if not match or re.fullmatch(r"(['\"\[{$].*|null|\d*)", match.group(3), re.DOTALL):
        return override
    key, value = override.split("=", 1)
    return f"{key}={_quote(value)}"


def _quote(value: str) -> str:
    """A string in Hydra's single quotes: backslashes count only before a quote or at the end."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m.group(1) * 2 + ("\\'" if m.group(2) else ""), value)
    return f"'{escaped}'"


def load(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> DictConfig:
    """Composes and checks the configuration of a command.

    Args:
        overrides: `key=value` and `group=option`, as on the command line.
        config_dirs: folders with the user's own YAML, laid out as `harness/conf`.

    Raises:
        UserError: for an unknown key or option, or values that cannot work.
    """
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder} is not a folder")
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"'{override}' is not of the form key=value")
    given = list(overrides)
    overrides = [quote_path(o) for o in overrides]
    if config_dirs:
        folders = ", ".join(_quote(f"file://{Path(folder).resolve()}") for folder in config_dirs)
        overrides.append(f"hydra.searchpath=[{folders}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = _compose(overrides)
        if cfg.get("augment") is None:
            cfg = _compose([*overrides, f"augment={cfg.method.augment}"])
    OmegaConf.set_struct(cfg, False)
    cfg.cli = {"overrides": list(given), "config_dirs": [str(folder) for folder in config_dirs]}
    config_checks.check(cfg)
    _fill_defaults(cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg


def stage_one(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that makes a method's pseudo labels: the same but for the method.

    What `offline.stage1_overrides` says differently counts where the command line does not say it. The split is this
    run's, whatever protocol a preset gives the other method.
    """
    kept = [o for o in cfg.cli.overrides if not re.match(r"[+~]*(method[=./@]|method$|run_dir=)", o)]
    said = {_key(override) for override in kept}
    options = cfg.method.offline
    own = [str(o) for o in options.get("stage1_overrides") or [] if _key(str(o)) not in said]
    place = [f"split.protocol={cfg.split.protocol}", f"run_dir={Path(cfg.run_dir) / 'stage1'}"]
    return load([*kept, f"method={options.stage1}", *own, *place], list(cfg.cli.config_dirs))


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("config", list(overrides))
    except MissingConfigException as error:
        raise UserError(_unknown_option(str(error))) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides)) from error
    except ValueError as error:  # Hydra's, for a group that is given a value instead of an option
        raise UserError(_no_option(overrides) or _explain(error, overrides)) from error


def _no_option(overrides: Sequence[str]) -> str | None:
    """One sentence about the first group that is given null or a number."""
    for override in overrides:
        group, _, value = override.lstrip("+~").partition("=")
        options = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
        if group and options and (value.lower() in ("null", "true", "false") or not re.match(r"[A-Za-z_\[]", value)):
            return f"{group}={value} names no option: choose one of {', '.join(options)}, or leave {group} out"
    return None


def _unknown_option(message: str) -> str:
    """One sentence from Hydra's page about a missing group option."""
    match = re.search(r"(?:Could not find|In '[^']*': Could not find) '([^']+)'", message)
    options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
    name = match.group(1) if match else message.splitlines()[0]
    group, _, option = name.rpartition("/")
    near = difflib.get_close_matches(option, options, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return (
        f"{group}={option} is not known{hint} Choose one of: {', '.join(options)}"
        if options
        else f"{name} is not known"
    )


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence from one of Hydra's or OmegaConf's exceptions."""
    message = str(error)
    first = message.strip().splitlines()[0]
    match = re.search(r"Could not override '([^']+)'", message) or re.search(r"Key '([^']+)' is not in struct", message)
    if match:
        key = match.group(1)
        near = difflib.get_close_matches(key, list(_known_keys()), 1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; `ssodbench --help` says how to list the keys"
        return f"the key {key} is not known{hint}"
    group = re.search(r"Could not find '([^']+)'", message)
    if group:
        return _unknown_option(message)
    given = getattr(error, "override", None) or next((o for o in overrides if o in message), None)
    return f"cannot read the configuration{f' ({given})' if given else ''}: {first}"


def _known_keys() -> Iterator[str]:
    """Dotted keys of the default configuration."""
    cfg = compose("config", [])

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield prefix + str(key)
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    yield from walk(OmegaConf.to_container(cfg, resolve=False), "")


def default_cache_dir() -> Path:
    """$SSODBENCH_CACHE, or `ssodbench` in the user's cache folder."""
    if os.environ.get("SSODBENCH_CACHE"):
        return Path(os.environ["SSODBENCH_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ssodbench"


def _fill_defaults(cfg: DictConfig) -> None:
    """Defaults that depend on other keys or on the machine."""
    if cfg.seed is None:
        cfg.seed = cfg.split.fold
    if cfg.cache_dir is None:
        cfg.cache_dir = str(default_cache_dir())
    if cfg.run_dir is None:
        cfg.run_dir = str(Path(cfg.runs_dir) / "train" / cell_name(cfg))


def group_name(cfg: DictConfig, group: str) -> str:
    """The name of a group's chosen option."""
    return str(cfg[group].get("name", group))


def cell_name(cfg: DictConfig) -> str:
    """A run's name: data, method, protocol, percent, fold and seed, in [A-Za-z0-9_.-] only."""
    parts = [
        group_name(cfg, "data"),
        group_name(cfg, "method"),
        f"{cfg.split.protocol}-{cfg.split.percent:g}pct-fold{cfg.split.fold}",
        f"seed{cfg.seed}",
    ]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", "_".join(parts))


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What decides a run's result: the configuration without the circumstances it is carried out under."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return without_circumstances({str(key): value for key, value in plain.items()})


def without_circumstances(plain: dict[str, Any]) -> dict[str, Any]:
    """`identity` of a configuration that is plain data already, such as a record's; changes what it is given."""
    for dotted in _CIRCUMSTANCES:
        *parents, last = dotted.split(".")
        node: Any = plain
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return plain


def config_sha256(cfg: DictConfig) -> str:
    """Hash of `identity`."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def evaluation_interval(cfg: DictConfig) -> int | None:
    """Steps between evaluations; a value below 1 is a fraction of the schedule."""
    every = cfg.evaluation.every
    if every is None:
        return None
    return max(1, round(every * cfg.schedule.steps)) if every < 1 else int(every)
