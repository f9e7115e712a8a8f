"""Checks of a configuration before anything is opened: known keys, kinds and ranges of values, and combinations."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import moved, schema, sections
from harness.config.step import StepShape, check_annealing
from harness.core import validate
from harness.core.types import UserError, Views

# What says to libraries how many threads they may have.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
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
        "detectors.methods.method:Method", ("detector", "steps"), ("name", "augment", "unlabeled", "offline")
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
_NAMED = ("data", "detector", "method", "pipeline", "launcher")
_CHOSEN = (*_NAMED, "augment", "schedule")
# What is not installed with the program itself: package -> how it is.
_EXTRAS = {
    "nvidia.dali": "pip install 'ssodbench[cu13]' (or [cu12])",
    "cv2": "pip install opencv-python-headless",
    "wandb": "pip install 'ssodbench[wandb]'",
    "mlflow": "pip install 'ssodbench[mlflow]'",
    "onnx": "pip install 'ssodbench[onnx]'",
    "onnxscript": "pip install 'ssodbench[onnx]'",
}


def check_config(cfg: DictConfig) -> None:
    """Checks keys, values and combinations before any data is opened.

    Raises:
        UserError: naming the key and what it may be.
    """
    check_values(resolved(cfg))
    check_together(cfg)


def check_together(cfg: DictConfig) -> None:
    """Checks what values must be to each other.

    Raises:
        UserError: naming the keys.
    """
    _check_batch(cfg)
    _check_schedule(cfg)


def check_values(plain: dict[str, Any]) -> None:
    """Checks every key and value on its own.

    Args:
        plain: the configuration as plain data, resolved.

    Raises:
        UserError: naming the key and what it may be.
    """
    _check_chosen(plain, _CHOSEN)
    validate.check(schema.Config, plain)
    for group in _NAMED:
        validate.check(schema.Name, plain[group].get("name"), f"{group}.name")
    _check_method(plain["method"])
    validate.check(schema.DetectorKeys, _own("detector", plain["detector"]), "detector")
    _check_optimizer(plain["schedule"]["optimizer"])
    for name in (*_NAMED, "schedule.optimizer"):
        if not _as_shipped(name, plain["cli"]["overrides"], plain["cli"]["config_dirs"]):
            _check_constructor(name, _at(plain, name))
    if isinstance(plain["schedule"]["decay"], dict):
        _check_constructor("schedule.decay", plain["schedule"]["decay"])
    for place, chosen in enumerate(plain["logging"]["loggers"]):
        if isinstance(chosen, dict):
            _check_constructor("logging.loggers", chosen, f"logging.loggers[{place}]")
    if "small" in plain["data"]:  # after the keys of `data`, which it may refer to
        validate.check(schema.SmallOptions, plain["data"]["small"], "data.small")
    _check_policy(plain)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data, every `${...}` replaced.

    Raises:
        UserError: one names a key that is missing, goes round in a circle, or cannot be read.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        raise UserError(_unresolved(cfg, error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _unresolved(cfg: DictConfig, error: Exception) -> str:
    """One sentence about the first value that cannot be resolved."""
    for key, text in _leaves(OmegaConf.to_container(cfg, resolve=False), ""):
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True)
        except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as mistake:
            why = str(mistake).strip().splitlines()[0]
            if isinstance(mistake, RecursionError) or "Recursive" in why:
                return f"{key}={validate.shown(text)} goes round in a circle: give it a value of its own"
            return f"{key}={validate.shown(text)} cannot be resolved ({why}): name a key that has a value, or give one"
    return f"a ${{...}} in the configuration cannot be resolved ({validate.shown(str(error))})"


def _leaves(node: Any, key: str) -> list[tuple[str, str]]:
    """Dotted keys of texts that hold an interpolation, or say that a value is missing."""
    if isinstance(node, str):
        return [(key, node)] if "${" in node or node == "???" else []
    if isinstance(node, dict):
        return [leaf for name, item in node.items() for leaf in _leaves(item, f"{key}.{name}" if key else str(name))]
    if isinstance(node, list):
        return [leaf for place, item in enumerate(node) for leaf in _leaves(item, f"{key}[{place}]")]
    return []


def _check_chosen(plain: dict[str, Any], groups: Sequence[str]) -> None:
    for group in groups:
        if not isinstance(plain.get(group), dict):
            options = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
            raise UserError(f"no {group} is chosen: say {group}=NAME, one of {', '.join(options)}")


def _at(plain: dict[str, Any], place: str) -> dict[str, Any]:
    """The mapping at a dotted place."""
    for key in place.split("."):
        plain = plain[key]
    return plain


def _check_optimizer(options: dict[str, Any]) -> None:
    if "name" in options:
        moved.override(f"schedule.optimizer.name={options['name']}")  # says which names there are
    validate.check(schema.OptimizerOptions, _own("schedule.optimizer", options), "schedule.optimizer")


def _own(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Of a group's values those that its constructor does not take."""
    return {key: values[key] for key in GROUPS[name].own if key in values}


def check_method(cfg: DictConfig) -> None:
    """Checks what describes the method, among it the policy that it takes.

    Raises:
        UserError: naming the key and what it may be.
    """
    plain = resolved(cfg)
    _check_chosen(plain, ("method",))
    _check_method(plain["method"])


def _check_method(method: dict[str, Any]) -> None:
    own = _own("method", method)
    validate.check(schema.MethodKeys, own, "method")
    options = own.get("offline")
    if options and options["stage1"] == own["name"]:
        raise UserError(f"method.offline.stage1={own['name']} is the method itself: name another, such as supervised")
    if options:
        _check_labels(options)


def _check_labels(options: dict[str, Any]) -> None:
    """Checks that pseudo labels of a file come with who made them, and with nobody else."""
    labels, labeller = options.get("labels"), options.get("labeller")
    if labels and not labeller:
        raise UserError("method.offline.labels needs method.offline.labeller=NAME: say who made them, for the record")
    if labeller and not labels:
        raise UserError(f"method.offline.labeller={labeller} made no labels: set method.offline.labels to their file")
    if labels and options.get("checkpoint"):
        raise UserError(
            "method.offline.labels and method.offline.checkpoint both give pseudo labels: leave one of them null"
        )


def _as_shipped(place: str, overrides: Sequence[str], config_dirs: Sequence[str]) -> bool:
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


def _check_constructor(name: str, values: dict[str, Any], key: str | None = None) -> None:
    """Checks a group's keys against the parameters of what its `_target_` names; `key` is how messages call it."""
    group = GROUPS[name]
    try:
        target = find_target(name, values, key)
    except ModuleNotFoundError:
        return  # an extra is not installed: `check_extras` says so where it is needed
    arguments = {key: value for key, value in values.items() if key not in (*group.own, "_target_")}
    validate.check_arguments(target, arguments, key or name, group.given, group.own)


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
        if isinstance(error, ModuleNotFoundError) and _is_extra(error.name):
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


def _is_extra(module: str | None) -> bool:
    return any(name.split(".")[0] == (module or "").split(".")[0] for name in _EXTRAS)


def check_extras(cfg: DictConfig, logs: bool = False, pipelines: Sequence[str] = ()) -> None:
    """Checks that what the configuration chooses is installed, before anything is built.

    Args:
        cfg: the configuration.
        logs: whether scalars will be logged.
        pipelines: the pipelines that will be opened; default: the one that is configured.

    Raises:
        UserError: saying how to install what is missing.
    """
    targets = {name: f"pipelines.{name}." for name in pipelines} or {str(cfg.pipeline.name): str(cfg.pipeline._target_)}
    for name, target in targets.items():
        check_pipeline(name, target)
    if not logs:
        return
    for chosen in cfg.logging.loggers:
        if chosen in ("wandb", "mlflow"):
            need(chosen, f"logging.loggers names {chosen}, which", "leave it out")


def check_pipeline(name: str, target: str) -> None:
    """Checks that what a pipeline needs is installed.

    Args:
        name: of the option.
        target: its `_target_`.

    Raises:
        UserError: saying how to install what is missing.
    """
    if target.startswith("pipelines.dali."):
        need("nvidia.dali", f"pipeline={name} needs NVIDIA DALI, which", "pipeline=torchvision")
    if target.startswith("pipelines.opencv."):
        need("cv2", f"pipeline={name} needs OpenCV, which", "pipeline=torchvision")


def need(module: str, said: str, otherwise: str) -> None:
    """Checks that a module of an extra is installed.

    Args:
        module: its name.
        said: what needs it, up to "which".
        otherwise: what to give instead.

    Raises:
        UserError: it is not, saying how to install it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UserError(f"{said} is not installed: {_EXTRAS[module]}, or {otherwise}")


def _check_policy(plain: dict[str, Any]) -> None:
    policy = pkgutil.resolve_name("pipelines.policy:Policy").from_config(plain["augment"])
    policy.view("test")
    if plain["method"].get("offline"):
        policy.view("pseudo")


def _check_schedule(cfg: DictConfig) -> None:
    every, steps = cfg.evaluation.every, cfg.schedule.steps
    if every is not None and every > steps:
        raise UserError(
            f"evaluation.every={every} is larger than schedule.steps={steps}: "
            "leave it null to evaluate at the end alone"
        )


def draws_unlabeled(method: Mapping[str, Any]) -> bool:
    """Whether a method draws unlabelled images, told without building it.

    By `method.unlabeled`; a class of the user's own is asked for its `views` first, since it may stand in a YAML that
    was made for another one.
    """
    declared, target = method.get("unlabeled"), str(method["_target_"])
    if declared is None or not target.startswith("detectors.methods."):
        views = _views(target)
        if views is not None:
            return bool(views.unlabeled)
    return bool(declared)


def _views(target: str) -> Views | None:
    """The views that a method's class names; None for one that chooses them when it is built."""
    try:
        return getattr(pkgutil.resolve_name(target), "views", None)
    except Exception:  # whatever the user's module raises: building the method tells it better
        return None


def step_shape(cfg: DictConfig, world: int = 1) -> StepShape:
    """How a student step is made up, shared by `world` processes.

    Raises:
        UserError: naming the keys of `batch` that do not fit together, or do not fit the method.
    """
    method = cfg.method
    return shape_of(sections.batch_options(cfg), method.get("name", "method"), draws_unlabeled(method), world)


def shape_of(batch: schema.BatchOptions, method: str, unlabeled: bool, world: int) -> StepShape:
    """`step_shape` of a method where it is known whether it draws unlabelled images."""
    if unlabeled and not batch.unlabeled:
        raise UserError(
            f"method={method} needs unlabelled images: batch.unlabeled must be at least 1, or take method=supervised"
        )
    return StepShape(
        labeled=batch.labeled,
        unlabeled=batch.unlabeled if unlabeled else 0,
        micro=batch.micro,
        world=world,
        ratio=batch.ratio,
    )


def check_devices(cfg: DictConfig) -> None:
    """Checks that the devices, on all nodes, can share a step, before a training opens or makes anything.

    Raises:
        UserError: naming the keys, where they cannot.
    """
    step_shape(cfg, processes(cfg))


def processes(cfg: DictConfig) -> int:
    """How many processes share a step, on all nodes."""
    return int(cfg.devices) * int(cfg.launcher.get("nodes") or 1)


def _check_batch(cfg: DictConfig) -> None:
    """Checks how a step is made up."""
    batch = cfg.batch
    check_annealing(int(batch.anneal_steps), batch.ratio, int(cfg.schedule.steps))
    step_shape(cfg)
    # Without batch.micro a step may only later be found not to be shared: commands that train nothing do not mind.
    if batch.micro is not None or cfg.devices > batch.labeled + batch.unlabeled:
        check_devices(cfg)
