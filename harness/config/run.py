"""A run's settings: its checked configuration, read once, as typed parts that are handed down to whoever needs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from harness.config import schema, sections
from harness.config.identity import identity, sha256_of
from harness.config.names import cell_name
from harness.config.sections import FeedOptions
from harness.splits.protocols import SplitOptions


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run is made by. The groups are plain, as `harness.config.make.make` takes them."""

    cell: str  # the run's name
    command: tuple[str, ...]  # the overrides of the command line
    preset: str
    text: str  # config.yaml
    identity: dict[str, Any]  # what decides the result
    config_sha256: str  # of the identity

    run_dir: Path
    runs_dir: Path
    cache_dir: Path

    variant: str | None  # of a suite, by its name
    seed: int
    processes: int  # on all nodes
    precision: Literal["fp32", "bf16"]
    channels_last: bool
    compile: bool

    data: dict[str, Any]
    detector: dict[str, Any]
    method: dict[str, Any]
    feed: FeedOptions
    split: SplitOptions
    batch: schema.BatchOptions
    schedule: schema.ScheduleOptions
    evaluation: schema.EvaluationOptions
    checkpointing: schema.CheckpointingOptions
    logging: schema.LoggingOptions

    stage_one: RunSettings | None  # of the run that makes its pseudo labels before training


def settings_of(cfg: DictConfig, stage_one: DictConfig | None = None) -> RunSettings:
    """The settings of a run.

    Args:
        cfg: its configuration, as composed or as the run saved it.
        stage_one: of the run that makes its pseudo labels, where it is trained with such.

    Raises:
        UserError: a value does not fit.
    """
    own = identity(cfg)
    return RunSettings(
        cell=cell_name(cfg),
        command=tuple(cfg.cli.overrides),
        preset=str(cfg.get("preset_name", "")),
        text=OmegaConf.to_yaml(cfg, resolve=True),
        identity=own,
        config_sha256=sha256_of(own),
        run_dir=Path(cfg.run_dir),
        runs_dir=Path(cfg.runs_dir),
        cache_dir=Path(cfg.cache_dir),
        variant=cfg.get("variant"),
        seed=int(cfg.seed),
        processes=sections.processes(cfg),
        precision=cfg.precision,
        channels_last=cfg.channels_last,
        compile=cfg.compile,
        data=sections.group(cfg, "data"),
        detector=sections.group(cfg, "detector"),
        method=sections.group(cfg, "method"),
        feed=sections.feed_options(cfg),
        split=sections.split_options(cfg),
        batch=sections.batch_options(cfg),
        schedule=sections.schedule_options(cfg),
        evaluation=sections.evaluation_options(cfg),
        checkpointing=sections.checkpointing_options(cfg),
        logging=sections.logging_options(cfg),
        stage_one=None if stage_one is None else settings_of(stage_one),
    )
