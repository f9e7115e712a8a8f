"""Configuration: Hydra's compose API and the defaults that need code; what is checked is in `config_checks`.

Never `@hydra.main`: it would scatter output folders and own our exit codes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from harness.config import checks, layouts, split_names, yaml_files
from harness.core import files, moved, validate
from harness.core.escape import file_name
from harness.core.types import UserError

CONF_DIR = checks.CONF_DIR

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
    "model",
    "network",
    "images",
    "predict",
    "format",
    "export",
    "view",
    "init",
    "cli",
    "profile",
    "prepare",
    "check",
    "export_dir",
)
# Keys that came after runs had been made: null is what those did, so that such runs keep their identity. Those of the
# detector only in torchvision's style; in the others null now means something else than it did.
_ADDED = (
    "batch.group_by_aspect",
    "detector.rpn.low_quality_iou",
    "detector.rpn.low_quality_of",
    "detector.rpn.candidates",
)
# What of a run a suite varies, and by which key.
_SUITE_AXES = {
    "method": "suite.methods",
    "split.percent": "suite.percents",
    "split.fold": "suite.folds",
    "seed": "suite.seeds",
}
_PATH_KEY = re.compile(
    r"^\+*([\w.]*(root|_dir|init\.dir|_file|checkpoint|weights|out|model|annotations|images|logs))=(.*)$", re.DOTALL
)
_PATH_NAME = re.compile(r"(^|_)(root|dir|file|checkpoint|weights|out|model|annotations|images|logs)$")


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
    cfg = _load(overrides, [files.home_path(str(folder), "--config-dir") for folder in config_dirs])
    if cfg.method.get("offline") is not None:
        _check_stage_one(cfg)
    return cfg


def _load(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> DictConfig:
    """`load` of this configuration alone, not of the stage that it may begin with."""
    _check_given(overrides, config_dirs)
    layouts.check_option(overrides, config_dirs)
    given = list(overrides)
    overrides = [quote_path(o) for o in overrides]
    if config_dirs:
        folders = ", ".join(_quote(f"file://{os.path.realpath(folder)}") for folder in config_dirs)
        overrides.append(f"hydra.searchpath=[{folders}]")
    try:
        cfg = _composed(overrides)
        cfg.cli = {"overrides": list(given), "config_dirs": [str(folder) for folder in config_dirs]}
        if cfg.cache_dir is None:
            cfg.cache_dir = str(default_cache_dir())
        checks.check_values(checks.resolved(cfg))
        _cap_intervals(cfg)
        checks.check_together(cfg)
    except UserError as error:
        own = yaml_files.chosen(given, config_dirs)
        yaml_files.check(own)  # what cannot be read explains more
        raise UserError(yaml_files.located(str(error), own)) from error
    _fill_defaults(cfg)
    _expand_home(cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg


def _check_given(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> None:
    for folder in config_dirs:
        if not str(folder) or not Path(folder).is_dir():
            why = files.trouble(folder) if str(folder) else ""
            raise UserError(
                f"--config-dir {folder or chr(39) * 2} is not a folder{f' ({why})' if why else ''}: "
                "give one with YAML files"
            )
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            hint = f": say run_dir={override}" if Path(override).exists() or "/" in override else ""
            raise UserError(f"'{override}' is not of the form key=value{hint}")


def _composed(overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of the files and the command line; with the method's policy where none is chosen."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        # The policy that `augment.KEY` changes may be the method's, which is known only then.
        own = [override for override in overrides if re.match(r"[+~]*augment\.", override)]
        cfg = _compose([override for override in overrides if override not in own])
        if cfg.get("augment") is not None:
            cfg = _compose(overrides) if own else cfg
        else:
            checks.check_method(cfg)
            cfg = _compose([*overrides, f"augment={_quote(str(cfg.method.augment))}"])
    OmegaConf.set_struct(cfg, False)
    moved.current(cfg)
    return cfg


def _cap_intervals(cfg: DictConfig) -> None:
    """A preset's interval is at most the schedule's length, unless the command line gives it."""
    given = any(_key(override) in ("evaluation", "evaluation.every") for override in cfg.cli.overrides)
    if not given and cfg.evaluation.every is not None:
        cfg.evaluation.every = min(cfg.evaluation.every, cfg.schedule.steps)


def _check_stage_one(cfg: DictConfig) -> None:
    """Composes stage 1, so that mistakes in it are told before data is opened."""
    said = f"method.offline.stage1={cfg.method.offline.stage1}"
    try:
        stage = _load(*_stage_one_arguments(cfg))
    except UserError as error:
        raise UserError(f"{said} with method.offline.stage1_overrides cannot be composed: {error}") from error
    if stage.method.get("offline") is not None:
        raise UserError(
            f"{said} needs pseudo labels itself: name a method that trains on labelled images, such as supervised"
        )


def stage_one(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that makes a method's pseudo labels: the same but for the method.

    What `offline.stage1_overrides` says differently counts where the command line does not say it. The split is this
    run's, whatever protocol a preset gives the other method.
    """
    return load(*_stage_one_arguments(cfg))


def _stage_one_arguments(cfg: DictConfig) -> tuple[list[str], list[str]]:
    kept = [o for o in cfg.cli.overrides if not re.match(r"[+~]*(method[=./@]|method$|run_dir=)", o)]
    said = {_key(override) for override in kept}
    options = cfg.method.offline
    own = [str(o) for o in options.get("stage1_overrides") or [] if _key(str(o)) not in said]
    place = [f"split.protocol={cfg.split.protocol}", f"run_dir={Path(cfg.run_dir) / 'stage1'}"]
    return [*kept, f"method={options.stage1}", *own, *place], list(cfg.cli.config_dirs)


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("config", list(overrides))
    except MissingConfigException as error:
        raise UserError(_unknown_option(str(error))) from error
    except Exception as error:  # of many kinds, none of them documented, and all about what the user wrote
        raise UserError(_several(overrides) or _no_option(overrides) or _explain(error, overrides)) from error


def _several(overrides: Sequence[str]) -> str | None:
    """One sentence about the first key that is given several values, `key=a,b`."""
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            continue
        if parsed.is_sweep_override():
            key, value = _key(override), override.split("=", 1)[1]
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


def _unknown_option(message: str) -> str:
    """One sentence from Hydra's page about a missing group option."""
    match = re.search(r"Could not (?:find|load) '([^']+)'", message)
    options = re.findall(r"^\t(\w\S*)$", message, re.MULTILINE)
    options = [option for option in options if "=" not in option]
    name = match.group(1) if match else message.splitlines()[0]
    group, _, option = name.partition("/")
    if group == "method" and option.startswith("preset/"):
        group, option = "method/preset", option.removeprefix("preset/")
    options = options or sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
    near = validate.near(option, options).removeprefix("; ")
    said = f"{group}={validate.shown(option)} is not known{f' ({near})' if near else ''}"
    return f"{said}: choose one of {', '.join(options)}" if options else said


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence from one of Hydra's or OmegaConf's exceptions."""
    message = _message(error)
    match = re.search(r"Could not override '([^']+)'", message) or re.search(r"Key '([^']+)' is not in struct", message)
    if match:
        hint = validate.near(match.group(1), _known_keys()) or "; `ssodbench --help` says how to list the keys"
        return f"the key {match.group(1)} is not known{hint}"
    if "Could not find '" in message:
        return _unknown_option(message)
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


def default_cache_dir() -> Path:
    """$SSODBENCH_CACHE, or `ssodbench` in the user's cache folder."""
    if own := os.environ.get("SSODBENCH_CACHE"):
        return Path(files.home_path(own, "SSODBENCH_CACHE"))
    base = os.environ.get("XDG_CACHE_HOME") or files.home_path("~/.cache", "cache_dir")
    return Path(base) / "ssodbench"


def _fill_defaults(cfg: DictConfig) -> None:
    """Defaults that depend on other keys or on the machine."""
    if cfg.seed is None:
        cfg.seed = cfg.split.fold
    if cfg.cache_dir is None:
        cfg.cache_dir = str(default_cache_dir())
    if cfg.run_dir is None:
        cfg.run_dir = str(Path(cfg.runs_dir) / "train" / cell_name(cfg))


def places(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> path, of every key that names one."""
    found = {key: value for node, name, key in _path_nodes(cfg) if isinstance(value := node[name], str) and value}
    root = found.get("data.root", "")
    return {key: os.path.join(root, path) if key.startswith("data.") else path for key, path in found.items()}


def _expand_home(cfg: DictConfig) -> None:
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


def group_name(cfg: DictConfig, group: str) -> str:
    """The name of a group's chosen option."""
    return str(cfg[group].get("name", group))


def cell_name(cfg: DictConfig) -> str:
    """A run's name: data, method, split and seed, in [A-Za-z0-9_.-] only."""
    parts = [group_name(cfg, "data"), group_name(cfg, "method"), _split_name(cfg.split), f"seed{cfg.seed}"]
    return file_name("_".join(parts))


def _split_name(split: DictConfig) -> str:
    """Protocol, percent and fold; where the protocol reads neither, it alone, with the name of the list it reads."""
    if split.protocol in ("annotated", "full"):
        return str(split.protocol)
    file = str(split.index_file or "")
    if split.protocol == "ids" and not split_names.names_percent(file):
        return f"ids-{split_names.index_path(file, split.percent, split.fold).stem}"
    return f"{split.protocol}-{split.percent:g}pct-fold{split.fold}"


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What decides a run's result: the configuration without the circumstances it is carried out under."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return without_circumstances({str(key): value for key, value in plain.items()})


def without_circumstances(plain: dict[str, Any]) -> dict[str, Any]:
    """`identity` of a configuration that is plain data already, such as a record's; changes what it is given."""
    for dotted in _CIRCUMSTANCES:
        _remove(plain, dotted)
    moved.first(plain)
    style = (plain.get("detector") or {}).get("style")
    for dotted in _ADDED if style == "torchvision" else _ADDED[:1]:
        _remove(plain, dotted, where_null=True)
    return plain


def _remove(plain: dict[str, Any], dotted: str, where_null: bool = False) -> None:
    """Takes a dotted key out of nested dictionaries, if it is there (and null)."""
    *parents, last = dotted.split(".")
    node: Any = plain
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict) and (not where_null or node.get(last) is None):
        node.pop(last, None)


def is_circumstance(key: str) -> bool:
    """Whether a dotted key, or the group that it is in, is left out of `identity`."""
    return any(key == known or key.startswith(f"{known}.") for known in _CIRCUMSTANCES)


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
