"""The configuration that a run saved as config.yaml, read back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Struct
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import moved
from harness.core.readback import content_of, convert, damaged, reason, require_shallow
from harness.core.validate import Limits


class _Group(Struct):
    target: str = msgspec.field(name="_target_")
    name: str


class _Data(_Group):
    root: str | None = None


class _Pipeline(_Group):
    threads: Annotated[int, Limits(ge=0, le=4096)] | None = None
    prefetch: Annotated[int, Limits(ge=0, le=4096)] | None = None


class _RunConfig(Struct):
    """The keys that every config.yaml of a run has; others depend on the chosen options."""

    data: _Data
    detector: _Group
    method: _Group
    pipeline: _Pipeline
    augment: dict[str, Any]
    schedule: dict[str, Any]
    split: dict[str, Any]
    batch: dict[str, Any]
    evaluation: dict[str, Any]


def read_config(run_dir: Path) -> DictConfig:
    """config.yaml of a run.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    path = run_dir / "config.yaml"
    remedy = "put the file back as the run wrote it, or start anew in another run_dir=DIR"
    content = content_of(path, "set run_dir to the folder of a run")
    try:
        cfg = OmegaConf.load(io.StringIO(content.decode()))
        plain = OmegaConf.to_container(cfg, resolve=True)
        require_shallow(path, plain, remedy)
        convert(plain, _RunConfig)
    except yaml.YAMLError as error:
        raise damaged(path, f"it is not valid YAML, {error}", remedy) from error
    except (OmegaConfBaseException, OSError, ValueError, RecursionError) as error:  # OSError: neither keys nor a list
        raise damaged(path, reason(error), remedy) from error
    assert isinstance(cfg, DictConfig)
    moved.current(cfg)
    return cfg
