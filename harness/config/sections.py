"""The configuration's sections as small typed values: what a function needs is handed down, not the whole of it."""

from __future__ import annotations

from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

from harness.config import schema
from harness.core import validate
from harness.splits.protocols import SplitOptions

T = TypeVar("T")


def split_options(cfg: DictConfig) -> SplitOptions:
    """`split`: which images are labelled."""
    return _section(SplitOptions, cfg, "split")


def prepare_options(cfg: DictConfig) -> schema.PrepareOptions:
    """`prepare`: which splits the command describes."""
    return _section(schema.PrepareOptions, cfg, "prepare")


def evaluation_options(cfg: DictConfig) -> schema.EvaluationOptions:
    """`evaluation`: when and how networks are scored."""
    return _section(schema.EvaluationOptions, cfg, "evaluation")


def checkpointing_options(cfg: DictConfig) -> schema.CheckpointingOptions:
    """`checkpointing`: when states are saved, and which stay."""
    return _section(schema.CheckpointingOptions, cfg, "checkpointing")


def _section(kind: type[T], cfg: DictConfig, key: str) -> T:
    """A section as an object of its schema.

    Raises:
        UserError: a value does not fit.
    """
    plain = OmegaConf.to_container(cfg[key], resolve=True)
    assert isinstance(plain, dict)
    return validate.make_checked(kind, {str(name): value for name, value in plain.items()}, key)


def evaluation_interval(cfg: DictConfig) -> int | None:
    """Steps between evaluations; a value below 1 is a fraction of the schedule."""
    every = cfg.evaluation.every
    if every is None:
        return None
    return max(1, round(every * cfg.schedule.steps)) if every < 1 else int(every)
