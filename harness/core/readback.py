"""Files that earlier commands wrote, read back by schema: what does not fit is named in one sentence, never guessed.

Records have their own reader in `harness.core.record`, checkpoints in `harness.engine.checkpoint`, pseudo labels in
`harness.engine.offline`.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Meta, Struct
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.core import moved
from harness.core.escape import plain
from harness.core.files import read_bytes
from harness.core.types import UserError

T = TypeVar("T")
DEEPEST = 50  # levels of nesting in what is read back; a configuration has less than ten

Count = Annotated[int, Meta(ge=0, le=2**53)]
Number = Annotated[float, Meta(ge=-3.5e38, le=3.5e38)]  # float32's range, what a loss can be
Share = Annotated[float, Meta(ge=0, le=1)]
Percent = Annotated[float, Meta(ge=0, le=100)]


class PlannedCell(Struct):
    """A cell in suite.json."""

    name: str
    method: str
    percent: Percent | None
    fold: Count
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    state: str
    reason: str | None
    dataset: str
    protocol: str


class Plan(Struct):
    """suite.json: what a suite planned, and how it stood when it was last written."""

    suite: str
    cells: list[PlannedCell]


class TrainLine(Struct, tag_field="kind", tag="train"):
    """A line of metrics.jsonl about a step."""

    step: Count
    loss: Number | None  # null where it was not finite


class EvalLine(Struct, tag_field="kind", tag="eval"):
    """A line of metrics.jsonl about an evaluation."""

    step: Count
    network: str
    metrics: dict[str, Number | None]


class PseudoLine(Struct, tag_field="kind", tag="pseudo"):
    """A line of metrics.jsonl about the quality of pseudo labels."""

    step: Count
    quality: dict[str, dict[str, Number | None]]  # threshold set -> measure -> value


Line = TrainLine | EvalLine | PseudoLine
_LINES = msgspec.json.Decoder(Line)


@dataclass
class Metrics:
    """metrics.jsonl of a run."""

    lines: list[Line]
    problem: str | None = None  # one sentence about lines that do not fit


class Progress(Struct):
    """progress.json: how far a running cell is."""

    step: Count
    steps: Annotated[int, Meta(ge=1, le=2**53)]
    loss: Number | None = None
    images_per_s: Number | None = None
    data_wait: Share | None = None
    eta: Number | None = None  # seconds


_Status = Literal["read", "recalled", "third_party"]
_Decimal = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?$")]


class _Published(Struct):
    """A line of published.csv; every value is a text."""

    method: str
    percent: Literal["1", "2", "5", "10", "full"]
    ap: _Decimal
    ap_status: _Status
    ap_std: Annotated[str, Meta(pattern=r"^([0-9]+(\.[0-9]+)?)?$")]
    std_status: _Status | Literal[""]
    protocol: str
    network: str
    score_threshold: str
    images_per_step: str
    folds: str
    backbone: str
    source: str
    note: str


class _Group(Struct):
    target: str = msgspec.field(name="_target_")
    name: str


class _Data(_Group):
    root: str | None = None


class _Pipeline(_Group):
    threads: Annotated[int, Meta(ge=0, le=4096)] | None = None
    prefetch: Annotated[int, Meta(ge=0, le=4096)] | None = None


class _RunConfig(Struct):
    """What every config.yaml of a run has; the rest is the groups' own."""

    data: _Data
    detector: _Group
    method: _Group
    pipeline: _Pipeline
    augment: dict[str, Any]
    schedule: dict[str, Any]
    split: dict[str, Any]
    batch: dict[str, Any]
    evaluation: dict[str, Any]


def damaged(path: Path, reason: str, remedy: str) -> UserError:
    """The sentence about a file that does not hold what it should."""
    return UserError(f"{path} is damaged ({plain(reason)[:300]}): {remedy}")


def reason(error: Exception) -> str:
    """What does not fit, the key first: "cells[3].seed: Expected `int`, got `str`"."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    match = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", str(error), re.DOTALL)
    return f"{match[2]}: {match[1]}" if match and match[2] else str(error)


def content_of(path: Path, remedy: str) -> bytes:
    """The content of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def decode(path: Path, content: bytes, kind: type[T], remedy: str) -> T:
    """JSON by schema.

    Raises:
        UserError: it is not valid JSON, or does not fit.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise damaged(path, reason(error), remedy) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise damaged(path, f"it is not valid JSON, {error}", remedy) from error
    except RecursionError as error:
        raise damaged(path, reason(error), remedy) from error


def require_shallow(path: Path, value: Any, remedy: str) -> None:
    """Raises UserError where plain data is nested so deeply that nothing recursive could work on it."""
    level = [value]
    for _ in range(DEEPEST):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
    if level:
        raise damaged(path, f"it is nested more than {DEEPEST} levels deep", remedy)


def _children(node: dict[Any, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node


def read_plan(path: Path) -> Plan:
    """suite.json.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    remedy = "the cells that left no record are not listed; start the suite again to write it anew"
    return decode(path, content_of(path, remedy), Plan, remedy)


def metrics_line(line: bytes) -> Line:
    """A line of metrics.jsonl.

    Raises:
        ValueError: it does not fit, or is torn.
    """
    try:
        return _LINES.decode(line)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(reason(error)) from error


def read_metrics(folder: Path) -> Metrics:
    """metrics.jsonl of a run; the torn line that a killed run may leave at the end is passed over in silence."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return Metrics([])
    remedy = "the curves are drawn without it"
    try:
        *whole, _torn = content_of(path, remedy).split(b"\n")
    except UserError as error:
        return Metrics([], str(error))
    lines: list[Line] = []
    bad: list[str] = []
    for number, line in enumerate(whole, 1):
        try:
            lines.append(metrics_line(line))
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if not bad:
        return Metrics(lines)
    count = f"{len(bad)} of {len(whole)} lines do not fit, first {bad[0]}"
    return Metrics(lines, str(damaged(path, count, "the curves are drawn without them")))


def read_published(path: Path) -> list[dict[str, str]]:
    """published.csv, a dict per line.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    remedy = "the report is without published numbers; install ssodbench anew"
    try:
        rows = list(csv.DictReader(io.StringIO(content_of(path, remedy).decode()), strict=True))
        if not rows:
            raise ValueError("it has no line")
        msgspec.convert(rows, list[_Published])
    except (csv.Error, ValueError) as error:
        raise damaged(path, reason(error), remedy) from error
    return rows


def read_progress(run_dir: Path) -> Progress | None:
    """progress.json of a run; None while there is none that can be read, since the next second brings another."""
    try:
        return msgspec.json.decode(read_bytes(run_dir / "progress.json"), type=Progress)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None


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
        plain_data = OmegaConf.to_container(cfg, resolve=True)
        require_shallow(path, plain_data, remedy)
        msgspec.convert(plain_data, _RunConfig)
    except yaml.YAMLError as error:
        raise damaged(path, f"it is not valid YAML, {error}", remedy) from error
    except (OmegaConfBaseException, OSError, ValueError, RecursionError) as error:  # OSError: neither keys nor a list
        raise damaged(path, reason(error), remedy) from error
    assert isinstance(cfg, DictConfig)
    moved.current(cfg)
    return cfg
