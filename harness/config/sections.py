"""The configuration's sections as small typed values: what a function needs is handed down, not the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from harness.config import schema
from harness.config.step import StepShape, draws_unlabeled, shape_of
from harness.core import validate
from harness.core.steps import in_steps
from harness.splits.protocols import SplitOptions

T = TypeVar("T")

# Keys that came after runs had saved their configuration, and what those did.
_ADDED: dict[str, dict[str, Any]] = {
    "batch": {"anneal_steps": 0, "group_by_aspect": None},
    "evaluation": {"between": "all", "scorer": "quick"},
}


@dataclass(frozen=True)
class FeedOptions:
    """How pictures reach a network."""

    pipeline: dict[str, Any]  # the group
    augment: dict[str, Any]  # the policy
    eval_batch: int  # images of a batch in evaluation


def group(cfg: DictConfig, key: str) -> dict[str, Any]:
    """A group as plain data, every `${...}` replaced."""
    plain = OmegaConf.to_container(cfg[key], resolve=True)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def feed_options(cfg: DictConfig) -> FeedOptions:
    """`pipeline`, `augment` and `evaluation.batch`: how pictures reach a network."""
    return FeedOptions(group(cfg, "pipeline"), group(cfg, "augment"), int(cfg.evaluation.batch))


def split_options(cfg: DictConfig) -> SplitOptions:
    """`split`: which images are labelled."""
    return _section(SplitOptions, cfg, "split")


def batch_options(cfg: DictConfig) -> schema.BatchOptions:
    """`batch`: how a student step is made up."""
    return _section(schema.BatchOptions, cfg, "batch")


def schedule_options(cfg: DictConfig) -> schema.ScheduleOptions:
    """`schedule`: steps, optimiser and learning rate."""
    return _section(schema.ScheduleOptions, cfg, "schedule")


def logging_options(cfg: DictConfig) -> schema.LoggingOptions:
    """`logging`: how often lines are written, and where else scalars go."""
    return _section(schema.LoggingOptions, cfg, "logging")


def prepare_options(cfg: DictConfig) -> schema.PrepareOptions:
    """`prepare`: which splits the command describes."""
    return _section(schema.PrepareOptions, cfg, "prepare")


def evaluation_options(cfg: DictConfig) -> schema.EvaluationOptions:
    """`evaluation`: when and how networks are scored."""
    return _section(schema.EvaluationOptions, cfg, "evaluation")


def checkpointing_options(cfg: DictConfig) -> schema.CheckpointingOptions:
    """`checkpointing`: when states are saved, and which stay."""
    return _section(schema.CheckpointingOptions, cfg, "checkpointing")


def processes(cfg: DictConfig) -> int:
    """How many processes share a step, on all nodes."""
    return int(cfg.devices) * int(cfg.launcher.get("nodes") or 1)


def step_shape(cfg: DictConfig, world: int = 1) -> StepShape:
    """How a student step is made up, shared by `world` processes.

    Raises:
        UserError: naming the keys of `batch` that do not fit together, or do not fit the method.
    """
    method = group(cfg, "method")
    return shape_of(batch_options(cfg), str(method.get("name", "method")), draws_unlabeled(method), world)


def _section(kind: type[T], cfg: DictConfig, key: str) -> T:
    """A section as an object of its schema.

    Raises:
        UserError: a value does not fit.
    """
    return validate.make_checked(kind, {**_ADDED.get(key, {}), **group(cfg, key)}, key)


def evaluation_interval(every: float | None, steps: int) -> int | None:
    """Steps between evaluations; an `evaluation.every` below 1 is a fraction of the schedule's steps."""
    if every is None:
        return None
    return max(1, in_steps(every, steps))
