"""What a configuration must hold, before anything is opened: known keys, kinds, ranges, and what fits together."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import schema
from harness.core import validate
from harness.core.types import UserError

CONF_DIR = Path(__file__).parents[1] / "conf"


@dataclass(frozen=True)
class Group:
    """A group whose `_target_` names a constructor."""

    makes: str  # module:class of what it gives
    given: tuple[str, ...] = ()  # parameters that the program passes
    own: tuple[str, ...] = ()  # keys that the constructor does not take


GROUPS = {
    "data": Group("harness.data.datasets:Dataset", ("cache_dir",), ("small",)),
    "detector": Group("detectors.detector:Detector", ("num_classes", "generated")),
    "method": Group("detectors.methods.method:Method", ("detector", "steps"), ("name", "augment", "offline")),
    "pipeline": Group(
        "harness.core.types:Pipeline",
        (
            *("policy", "normalize", "views", "sampler", "labeled", "unlabeled"),
            *("known_bad", "device", "rank", "world_size", "eval_batch"),
        ),
        ("name",),
    ),
}
_CHOSEN = (*GROUPS, "augment", "schedule", "launcher")
# What is not installed with the program itself: package -> how it is.
_EXTRAS = {
    "nvidia.dali": "pip install 'ssodbench[cu13]' (or [cu12])",
    "cv2": "pip install opencv-python-headless",
    "wandb": "pip install 'ssodbench[wandb]'",
    "mlflow": "pip install 'ssodbench[mlflow]'",
    "onnx": "pip install 'ssodbench[onnx]'",
    "onnxscript": "pip install 'ssodbench[onnx]'",
    "submitit": "pip install 'ssodbench[slurm]'",
}


def check(cfg: DictConfig) -> None:
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
    _check_launcher(plain["launcher"])
    for group in GROUPS:
        validate.check(schema.Name, plain[group].get("name"), f"{group}.name")
    _check_method(plain["method"])
    for name in GROUPS:
        if not _as_shipped(name, plain["cli"]["overrides"], plain["cli"]["config_dirs"]):
            _check_constructor(name, plain[name])
    if "small" in plain["data"]:  # after the keys of `data`, which it may refer to
        validate.check(schema.Small, plain["data"]["small"], "data.small")
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


def _check_launcher(launcher: dict[str, Any]) -> None:
    validate.check(schema.Slurm if launcher.get("name") == "slurm" else schema.Launcher, launcher, "launcher")


def check_method(cfg: DictConfig) -> None:
    """Checks what describes the method, among it the policy that it takes.

    Raises:
        UserError: naming the key and what it may be.
    """
    plain = resolved(cfg)
    _check_chosen(plain, ("method",))
    _check_method(plain["method"])


def _check_method(method: dict[str, Any]) -> None:
    own = {key: method[key] for key in GROUPS["method"].own if key in method}
    validate.check(schema.MethodKeys, own, "method")
    options = own.get("offline")
    if options and options["stage1"] == own["name"]:
        raise UserError(f"method.offline.stage1={own['name']} is the method itself: name another, such as supervised")


def _as_shipped(group: str, overrides: Sequence[str], config_dirs: Sequence[str]) -> bool:
    """Whether a group's values all come from the program's own files, which a test keeps right.

    Importing torch takes a second and much memory, which `config` and `prepare` can do without.
    """
    options = {file.stem for file in (CONF_DIR / group).glob("*.yaml")}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if group in re.split(r"[./@]", key) and not (key == group and value in options):
            return False
    return not config_dirs


def _check_constructor(name: str, values: dict[str, Any]) -> None:
    """Checks a group's keys against the parameters of what its `_target_` names."""
    group = GROUPS[name]
    try:
        target = find_target(name, values)
    except ModuleNotFoundError:
        return  # an extra is not installed: `check_extras` says so where it is needed
    arguments = {key: value for key, value in values.items() if key not in (*group.own, "_target_")}
    validate.check_arguments(target, arguments, name, group.given)


def find_target(name: str, values: dict[str, Any]) -> Callable[..., Any]:
    """What a group's `_target_` names.

    Raises:
        UserError: there is no such thing, or it is not for this group.
        ModuleNotFoundError: it needs an extra that is not installed.
    """
    path = values.get("_target_")
    said = f"{name}._target_={validate.shown(path)}"
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
        raise UserError(f"{said} is no {name}: it must be a {kind}, or a function that is annotated to return one")
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
        logs: whether scalars will be logged and the launcher used.
        pipelines: the pipelines that will be opened; default: the one that is configured.

    Raises:
        UserError: saying how to install what is missing.
    """
    targets = {name: f"pipelines.{name}." for name in pipelines} or {str(cfg.pipeline.name): str(cfg.pipeline._target_)}
    for name, target in targets.items():
        if target.startswith("pipelines.dali."):
            need("nvidia.dali", f"pipeline={name} needs NVIDIA DALI, which", "pipeline=torchvision")
        if target.startswith("pipelines.opencv."):
            need("cv2", f"pipeline={name} needs OpenCV, which", "pipeline=torchvision")
    if not logs:
        return
    for name in cfg.logging.loggers:
        if name != "tensorboard":
            need(name, f"logging.loggers names {name}, which", "leave it out")
    if cfg.launcher.name == "slurm":
        need("submitit", "launcher=slurm needs submitit, which", "launcher=local")


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


def draws_unlabeled(cfg: DictConfig) -> bool:
    """Whether the method draws unlabelled images, told without building it.

    By the weight of their losses, `method.lambda_u`, or else by the views that its class names.
    """
    if cfg.method.get("lambda_u") is not None:
        return True
    try:
        views = getattr(pkgutil.resolve_name(str(cfg.method._target_)), "views", None)
    except Exception:  # whatever the user's module raises: building the method tells it better
        return False
    return bool(views is not None and views.unlabeled)


def images_per_step(cfg: DictConfig) -> int:
    """Images of a student step over all devices."""
    return int(cfg.batch.labeled) + (int(cfg.batch.unlabeled) if draws_unlabeled(cfg) else 0)


def check_devices(cfg: DictConfig) -> None:
    """Checks that the devices can share a step, before a training opens or makes anything.

    Raises:
        UserError: naming the keys, where they cannot.
    """
    if cfg.devices == 1:
        return
    images = images_per_step(cfg)
    number = images // (cfg.batch.micro or images)
    if number % cfg.devices:
        raise UserError(
            f"devices={cfg.devices} cannot share the {images} images of a step evenly, batch.micro="
            f"{validate.shown(cfg.batch.micro)} makes {number} micro-batch{'es' if number > 1 else ''} of them: "
            "set it so that their number is a multiple of devices, or lower devices"
        )


def _check_batch(cfg: DictConfig) -> None:
    """Checks how a step is made up; asks the method only where it matters, since importing it takes time."""
    batch = cfg.batch
    if batch.anneal_steps and (batch.ratio != "bernoulli" or batch.anneal_steps > cfg.schedule.steps):
        raise UserError(
            f"batch.anneal_steps={batch.anneal_steps} needs batch.ratio=bernoulli and schedule.steps "
            f"(now {cfg.schedule.steps}) of at least as many: set these, or leave it 0"
        )
    if not batch.unlabeled and draws_unlabeled(cfg):
        raise UserError(
            f"method={cfg.method.get('name', 'method')} needs unlabelled images: batch.unlabeled must be at least 1, "
            "or take method=supervised"
        )
    if batch.micro is not None:
        _check_micro(cfg)
    # Without batch.micro a step may only later be found not to be shared: commands that train nothing do not mind.
    if batch.micro is not None or cfg.devices > batch.labeled + batch.unlabeled:
        check_devices(cfg)


def _check_micro(cfg: DictConfig) -> None:
    images, micro = images_per_step(cfg), int(cfg.batch.micro)
    if images % micro:
        raise UserError(
            f"batch.micro={micro} does not divide the {images} images of a step: choose a divisor, so that every "
            "micro-batch has the same size"
        )
    if micro < 2 and images > cfg.batch.labeled:
        raise UserError("batch.micro=1 leaves no room for a labelled and an unlabelled image: give at least 2")
