"""The configuration of a command: Hydra's compose API, and the defaults that need code.

Never `@hydra.main`: it would scatter output folders and own our exit codes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict

from harness.config import checks, explain, layouts, moved, names, paths, targets, yaml_files
from harness.config.plain import resolved
from harness.core import files
from harness.core.types import UserError

# Mappings whose keys are the user's: Hydra would take new ones only where there is none yet.
_OPEN = ("suite.method_overrides", "suite.variants", "suite.variant_methods", "suite.cost")
# Detectors whose YAML says their name as it is.
_SMALL = ("small", "small_retinanet", "small_fcos", "small_fcos_iou", "small_consistent_retina")


def load(overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> DictConfig:
    """Composes and checks the configuration of a command.

    Args:
        overrides: `key=value` and `group=option`, as on the command line.
        config_dirs: folders with the user's own YAML, laid out as `harness/conf`.

    Raises:
        UserError: for an unknown key or option, or values that cannot work.
    """
    cfg = _load(overrides, [files.home_path(str(folder), "--config-dir") for folder in config_dirs])
    if _has_stage_one(cfg):
        _check_stage_one(cfg)
    return cfg


def _load(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> DictConfig:
    """`load` of this configuration alone, not of the stage that it may begin with."""
    _check_given(overrides, config_dirs)
    layouts.check_option(overrides, config_dirs)
    given = list(overrides)
    overrides = [paths.quote_path(moved.override(o)) for o in overrides]
    if any(explain.override_key(o) == "suite" for o in overrides):
        overrides = list(map(_opened, overrides))
    if config_dirs:
        folders = ", ".join(paths.quote(f"file://{os.path.realpath(folder)}") for folder in config_dirs)
        overrides.append(f"hydra.searchpath=[{folders}]")
    try:
        cfg = _composed(overrides)
        cfg.cli = {"overrides": list(map(_verbatim, given)), "config_dirs": [str(folder) for folder in config_dirs]}
        if cfg.cache_dir is None:
            cfg.cache_dir = str(paths.default_cache_dir())
        checks.check_values(resolved(cfg))
        yaml_files.check_name("augment", cfg.augment.name, config_dirs)  # the method or the preset may have chosen it
        _cap_intervals(cfg)
        checks.check_together(cfg)
    except UserError as error:
        own = yaml_files.chosen(given, config_dirs)
        yaml_files.check_files(own)  # what cannot be read explains more
        raise UserError(yaml_files.located(str(error), own)) from error
    _fill_defaults(cfg)
    paths.expand_home(cfg)
    if cfg.detector.get("start"):
        cfg.detector.start_sha256 = _start_sha256(Path(cfg.detector.start))
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
            hint = (
                f": say run_dir={override}, or runs_dir={override} for the records of several runs"
                if Path(override).exists() or "/" in override
                else ""
            )
            raise UserError(f"'{override}' is not of the form key=value{hint}")
        yaml_files.check_name(explain.override_key(override), override.partition("=")[2], config_dirs)


def _opened(override: str) -> str:
    """An override of such a mapping as one that may add to it."""
    within = explain.override_key(override).startswith(tuple(f"{key}." for key in _OPEN))
    plain = override[:1] not in ("+", "~")
    return f"++{override}" if plain and (within or explain.override_key(override) in _OPEN) else override


def _verbatim(text: str) -> str:
    """What OmegaConf gives back as this text: an interpolation stays one, for whoever is told to compose the same."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def _know_old_options() -> None:
    """Lets Hydra find options under the names that they had: on the command line, in presets, suites, and the user's
    own files."""
    for (group, name), (option, keys) in moved.OPTIONS.items():
        ConfigStore.instance().store(name, {"defaults": [option, "_self_"], **keys}, group=group)


def _composed(overrides: Sequence[str]) -> DictConfig:
    """The files and the command line composed by Hydra, with the method's policy where none is chosen."""
    GlobalHydra.instance().clear()
    _know_old_options()
    with initialize_config_dir(str(targets.CONF_DIR), version_base="1.3"):
        # The policy that `augment.KEY` changes may be the method's, which is known only then.
        own = [override for override in overrides if re.match(r"[+~]*augment\.", override)]
        cfg = _compose([override for override in overrides if override not in own])
        if cfg.get("augment") is not None:
            cfg = _compose(overrides) if own else cfg
        else:
            checks.check_method(resolved(cfg).get("method"))
            cfg = _with_policy(cfg, overrides)
    OmegaConf.set_struct(cfg, False)
    resolved(cfg)  # tells of values that cannot be looked at
    moved.current(cfg)
    return cfg


def _with_policy(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration with the method's policy, which is read from its file where nothing can change what is in it:
    to compose everything once more takes as long as the first time.

    Args:
        cfg: without a policy.
        overrides: all that are given.
    """
    name = str(cfg.method.augment)
    shipped = {path.stem: path for path in (targets.CONF_DIR / "augment").glob("*.yaml")}
    changed = any(re.match(r"[+~]*augment(\.|=|$)", override) for override in overrides)
    policy = OmegaConf.load(shipped[name]) if name in shipped and not changed else None
    if policy is None or "defaults" in policy:
        return _compose([*overrides, f"augment={paths.quote(name)}"])
    with open_dict(cfg):
        cfg.augment = policy
    return cfg


def _cap_intervals(cfg: DictConfig) -> None:
    """A preset's interval is at most the schedule's length, unless the command line gives it."""
    given = any(explain.override_key(override) in ("evaluation", "evaluation.every") for override in cfg.cli.overrides)
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


def stage_one(cfg: DictConfig) -> DictConfig | None:
    """The configuration of the run that makes a method's pseudo labels: the same but for the method; None without such.

    What `offline.stage1_overrides` says differently counts where the command line does not say it. The split is this
    run's, whatever protocol a preset gives the other method.
    """
    return load(*_stage_one_arguments(cfg)) if _has_stage_one(cfg) else None


def _has_stage_one(cfg: DictConfig) -> bool:
    """Whether another method makes the pseudo labels, not a file."""
    options = cfg.method.get("offline")
    return options is not None and options.get("labels") is None


def _stage_one_arguments(cfg: DictConfig) -> tuple[list[str], list[str]]:
    kept = [o for o in cfg.cli.overrides if not re.match(r"[+~]*(method[=./@]|method$|run_dir=)", o)]
    said = {explain.override_key(override) for override in kept}
    options = cfg.method.offline
    own = [str(o) for o in options.get("stage1_overrides") or [] if explain.override_key(str(o)) not in said]
    place = [f"split.protocol={cfg.split.protocol}", f"run_dir={Path(cfg.run_dir) / 'stage1'}"]
    return [*kept, f"method={options.stage1}", *own, *place], list(cfg.cli.config_dirs)


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("config", list(overrides))
    except MissingConfigException as error:
        raise UserError(explain.unknown_option(str(error))) from error
    except Exception as error:  # of many kinds, none of them documented, and all about what the user wrote
        raise UserError(explain.explained(error, overrides)) from error


def _fill_defaults(cfg: DictConfig) -> None:
    """Defaults that depend on other keys or on the machine."""
    _name_backbone(cfg)
    if cfg.seed is None:
        cfg.seed = cfg.split.fold
    if cfg.cache_dir is None:
        cfg.cache_dir = str(paths.default_cache_dir())
    if cfg.run_dir is None:
        cfg.run_dir = str(Path(cfg.runs_dir) / "train" / names.cell_name(cfg))


def _name_backbone(cfg: DictConfig) -> None:
    """A detector on one of timm's networks is called by it, where nobody has said a name."""
    backbone = cfg.detector.get("backbone")
    if backbone and (OmegaConf.is_interpolation(cfg.detector, "name") or cfg.detector.name in _SMALL):
        family = str(cfg.detector.name).removesuffix(f"_r{cfg.detector.get('depth')}")
        cfg.detector.name = f"{family}_{str(backbone).removeprefix('timm:')}"


def _start_sha256(start: Path) -> str:
    """By what a run knows the network that it starts from: `weights_sha256` of the one that a finished run reports, or
    the hash of an exported file.

    Raises:
        UserError: there is no finished run, and no file that can be read.
    """
    if start.is_file():
        try:
            return hashlib.sha256(files.read_bytes(start)).hexdigest()
        except OSError as error:
            raise UserError(f"detector.start={start} cannot be read ({error.strerror}): give another file") from error
    from harness.core.record import read_record  # it imports torch

    path = start / "record.json"
    if why := files.trouble(path):
        raise UserError(
            f"detector.start={start} holds no run (record.json: {why}): name the folder of a finished one, or a file "
            "that export wrote"
        )
    record = read_record(path)
    if record.status != "ok" or not record.weights_sha256:
        raise UserError(
            f"detector.start={start} is not finished (status {record.status}): finish it first, by the command that "
            "started it, or name another run"
        )
    return record.weights_sha256
