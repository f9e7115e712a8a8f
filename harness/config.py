"""Configuration: Hydra's compose API, the defaults that need code, and the checks across keys.

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
    check(cfg)
    _fill_defaults(cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg


def stage_one(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that makes a method's pseudo labels: the same but for the method."""
    kept = [o for o in cfg.cli.overrides if not re.match(r"[+~]*(method[=./@]|method$|run_dir=)", o)]
    method = cfg.method.offline.stage1
    return load([*kept, f"method={method}", f"run_dir={Path(cfg.run_dir) / 'stage1'}"], list(cfg.cli.config_dirs))


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("config", list(overrides))
    except MissingConfigException as error:
        raise UserError(_unknown_option(str(error))) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, overrides)) from error


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


# key, lower bound, whether the bound itself is allowed, whole number, whether null is allowed
_NUMBERS: tuple[tuple[str, float, bool, bool, bool], ...] = (
    ("split.percent", 0, False, False, False),
    ("split.fold", 1, True, True, False),
    ("split.offset", 0, True, True, False),
    ("seed", 0, True, True, True),
    ("batch.labeled", 1, True, True, False),
    ("batch.unlabeled", 0, True, True, False),
    ("batch.micro", 1, True, True, True),
    ("evaluation.every", 0, False, False, True),
    ("evaluation.score_threshold", 0, True, False, False),
    ("evaluation.batch", 1, True, True, False),
    ("devices", 1, True, True, False),
    ("threads", 1, True, True, False),
    ("checkpointing.every", 1, True, True, False),
    ("checkpointing.keep", 1, True, True, False),
    ("checkpointing.keep_every", 1, True, True, True),
    ("logging.every", 1, True, True, False),
    ("schedule.steps", 1, True, True, False),
    ("schedule.warmup_steps", 0, True, True, False),
    ("schedule.optimizer.lr", 0, False, False, False),
    ("schedule.optimizer.weight_decay", 0, True, False, False),
    ("schedule.clip_norm", 0, False, False, True),
)
_CHOICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("device", ("auto", "cpu", "cuda")),
    ("precision", ("fp32", "bf16")),
    ("evaluation.between", ("all", "reported")),
    ("batch.ratio", ("exact", "bernoulli")),
    ("split.protocol", ("stac", "soft_teacher", "unbiased_teacher", "ids", "full")),
    ("schedule.decay", ("flat", "step", "linear", "cosine")),
    ("schedule.optimizer.name", ("sgd", "adamw")),
)


def check(cfg: DictConfig) -> None:
    """Checks values and combinations before any data is opened.

    Raises:
        UserError: naming the key and what it may be.
    """
    for key, low, inclusive, whole, optional in _NUMBERS:
        _check_number(key, OmegaConf.select(cfg, key), low, inclusive, whole, optional)
    for key, choices in _CHOICES:
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{key}={value} is not one of {', '.join(choices)}{hint}")
    if cfg.split.percent > 100:
        raise UserError(f"split.percent={cfg.split.percent} is over 100")
    batch = cfg.batch
    images = batch.labeled + batch.unlabeled
    if batch.micro is not None:
        if images % batch.micro and batch.unlabeled:
            raise UserError(
                f"batch.micro={batch.micro} does not divide batch.labeled + batch.unlabeled = {images}: "
                "choose a divisor, so that every micro-batch has the same size"
            )
        if batch.micro < 2 and batch.unlabeled:
            raise UserError("batch.micro=1 leaves no room for a labelled and an unlabelled image: give at least 2")
    if cfg.evaluation.every is not None and cfg.evaluation.every > cfg.schedule.steps:
        raise UserError(
            f"evaluation.every={cfg.evaluation.every} is larger than schedule.steps={cfg.schedule.steps}: "
            "leave it null to evaluate at the end alone"
        )


def evaluation_interval(cfg: DictConfig) -> int | None:
    """Steps between evaluations; a value below 1 is a fraction of the schedule."""
    every = cfg.evaluation.every
    if every is None:
        return None
    return max(1, round(every * cfg.schedule.steps)) if every < 1 else int(every)


def _check_number(key: str, value: Any, low: float, inclusive: bool, whole: bool, optional: bool) -> None:
    if value is None and optional:
        return
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and not isinstance(value, int)):
        raise UserError(f"{key}={value} must be {kind}{' or null' if optional else ''}")
    if value != value or value < low or (value == low and not inclusive):
        raise UserError(f"{key}={value} must be {kind} {'of at least' if inclusive else 'above'} {low:g}")
