"""What a configuration must hold, found before anything is opened: kinds, ranges, choices, and what fits together."""

from __future__ import annotations

import difflib
import math
import pkgutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from harness.types import UserError

_CONF = Path(__file__).parent / "conf"

# key, lower bound, whether the bound itself is allowed, whole number, whether null is allowed
_NUMBERS: tuple[tuple[str, float, bool, bool, bool], ...] = (
    ("split.percent", 0, False, False, False),
    ("split.fold", 1, True, True, False),
    ("split.offset", 0, True, True, False),
    ("split.min_side", 0, True, True, True),
    ("seed", 0, True, True, True),
    ("batch.labeled", 1, True, True, False),
    ("batch.unlabeled", 0, True, True, False),
    ("batch.micro", 1, True, True, True),
    ("batch.anneal_steps", 0, True, True, False),
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
    ("schedule.warmup_factor", 0, True, False, False),
    ("schedule.decay_start", 0, True, False, False),
    ("schedule.decay_factor", 0, True, False, False),
    ("schedule.optimizer.lr", 0, False, False, False),
    ("schedule.optimizer.weight_decay", 0, True, False, False),
    ("schedule.optimizer.momentum", 0, True, False, True),
    ("schedule.clip_norm", 0, False, False, True),
    ("method.lambda_u", 0, True, False, True),
    ("method.burn_in", 0, True, False, True),
    ("method.ema.momentum", 0, True, False, True),
    ("suite.jobs", 1, True, True, True),
)
# Upper bounds, themselves allowed.
_MOST: dict[str, float] = {
    "split.percent": 100,
    "split.fold": 10,
    "split.offset": 2**32 - 11,  # fold + offset seeds NumPy's legacy generator, which takes 32 bits
    "seed": 2**63 - 1,
    "evaluation.score_threshold": 1,
    "schedule.decay_start": 1,
    "schedule.optimizer.momentum": 1,
    "method.ema.momentum": 1,
}
# key, whether it may be null or absent
_BOOLEANS: tuple[tuple[str, bool], ...] = (
    ("compile", False),
    ("channels_last", False),
    ("schedule.optimizer.decay_norm_and_bias", False),
    ("method.joint_forward", True),
    ("method.ema.ramp", True),
    ("method.ema.buffers", True),
    ("suite.reference", True),
)
# key, whether it may be null or absent
_PATHS: tuple[tuple[str, bool], ...] = (
    ("runs_dir", False),
    ("run_dir", True),
    ("cache_dir", True),
    ("out", True),
    ("export_dir", True),
    ("data.root", True),
)
_LOGGERS = ("tensorboard", "wandb", "mlflow")
_CHOICES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("device", ("auto", "cpu", "cuda")),
    ("precision", ("fp32", "bf16")),
    ("evaluation.between", ("all", "reported")),
    ("batch.ratio", ("exact", "bernoulli")),
    ("batch.group_by_aspect", (None, "joint", "separate")),
    ("split.protocol", ("stac", "soft_teacher", "unbiased_teacher", "ids", "full")),
    ("split.empty_images", (None, "keep", "drop", "drop_unannotated")),
    ("split.crowd_boxes", (None, "keep", "drop")),
    ("check", ("quick", "headers", "full")),
    ("schedule.decay", ("flat", "step", "linear", "cosine")),
    ("schedule.optimizer.name", ("sgd", "adamw")),
)


def check(cfg: DictConfig) -> None:
    """Checks values and combinations before any data is opened.

    Raises:
        UserError: naming the key and what it may be.
    """
    _check_groups(cfg)
    for key, low, inclusive, whole, optional in _NUMBERS:
        _check_number(key, OmegaConf.select(cfg, key), low, inclusive, whole, optional)
    for key, choices in _CHOICES:
        _check_choice(key, OmegaConf.select(cfg, key), choices)
    for key, optional in _BOOLEANS:
        _check_boolean(key, OmegaConf.select(cfg, key), optional)
    for key, optional in _PATHS:
        _check_path(key, OmegaConf.select(cfg, key), optional)
    _check_lists(cfg)
    _check_batch(cfg)
    if cfg.evaluation.every is not None and cfg.evaluation.every > cfg.schedule.steps:
        raise UserError(
            f"evaluation.every={cfg.evaluation.every} is larger than schedule.steps={cfg.schedule.steps}: "
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
            f"{_shown(cfg.batch.micro)} makes {number} micro-batch{'es' if number > 1 else ''} of them: set it so that "
            "their number is a multiple of devices, or lower devices"
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


def _check_groups(cfg: DictConfig) -> None:
    for group in ("data", "detector", "method", "augment", "pipeline", "schedule", "launcher"):
        if not isinstance(cfg.get(group), DictConfig):
            options = sorted(file.stem for file in (_CONF / group).glob("*.yaml"))
            raise UserError(f"no {group} is chosen: say {group}=NAME, one of {', '.join(options)}")
    ema = cfg.method.get("ema")
    if ema is not None and not isinstance(ema, DictConfig):
        raise UserError(f"method.ema={ema} must be null or keys such as method.ema.momentum=0.999")
    name = OmegaConf.select(cfg, "suite.name")
    if cfg.get("suite") is not None and (not isinstance(name, str) or not name):
        raise UserError(f"suite.name={_shown(name)} must be a name: it is the suite's folder under runs_dir")


def _check_lists(cfg: DictConfig) -> None:
    milestones, loggers = cfg.schedule.get("milestones"), cfg.logging.loggers
    if not isinstance(milestones, ListConfig) or not all(_is_number(m) and m > 0 for m in milestones):
        raise UserError(
            f"schedule.milestones={_shown(milestones)} must be a list of steps, or of fractions of the schedule: give "
            "for instance [120000,160000], or [] for none"
        )
    if not isinstance(loggers, ListConfig) or not all(name in _LOGGERS for name in loggers):
        raise UserError(f"logging.loggers={_shown(loggers)} must be a list of some of {', '.join(_LOGGERS)}, or []")


def _check_choice(key: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value in choices:
        return
    names = [choice for choice in choices if choice is not None]
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{key}={_shown(value)} is not one of {', '.join(map(_shown, choices))}{hint}")


def _check_boolean(key: str, value: Any, optional: bool) -> None:
    if not isinstance(value, bool) and not (value is None and optional):
        raise UserError(f"{key}={_shown(value)} must be true or false")


def _check_path(key: str, value: Any, optional: bool) -> None:
    if not (isinstance(value, str | Path) and str(value)) and not (value is None and optional):
        raise UserError(f"{key}={_shown(value)} must be a path, written ./NAME where it looks like a number")


def _shown(value: Any) -> str:
    """As the user would write it."""
    return "null" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and (
        isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    )


def _check_number(key: str, value: Any, low: float, inclusive: bool, whole: bool, optional: bool) -> None:
    if value is None and optional:
        return
    kind = "a whole number" if whole else "a number"
    if not _is_number(value) or (whole and not isinstance(value, int)):
        raise UserError(f"{key}={_shown(value)} must be {kind}{' or null' if optional else ''}")
    if value < low or (value == low and not inclusive):
        raise UserError(f"{key}={value} must be {kind} {'of at least' if inclusive else 'above'} {low:g}")
    if key in _MOST and value > _MOST[key]:
        raise UserError(f"{key}={value} must be {kind} of at most {_MOST[key]}")
