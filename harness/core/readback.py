"""Files that earlier commands wrote, read back by schema: what does not fit is named in one sentence, never guessed.

Records have their own reader in `harness.core.record`, configurations in `harness.config.saved`, checkpoints in
`harness.engine.checkpoint`, pseudo labels in `harness.engine.offline`.

msgspec checks kinds, and `harness.core.validate` what its `Limits` say of them.
"""

from __future__ import annotations

import csv
import functools
import io
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from harness.core import validate
from harness.core.errors import UserError
from harness.core.escape import plain
from harness.core.files import read_bytes
from harness.core.validate import Limits

T = TypeVar("T")
DEEPEST = 50  # levels of nesting in what is read back; a configuration has less than ten

Count = Annotated[int, Limits(ge=0, le=2**53)]
Number = Annotated[float, Limits(ge=-3.5e38, le=3.5e38)]  # float32's range, what a loss can be
Share = Annotated[float, Limits(ge=0, le=1)]
Percent = Annotated[float, Limits(ge=0, le=100)]


class PlannedCell(Struct):
    """A cell in suite.json."""

    name: str
    method: str
    percent: Percent | None
    fold: Count
    seed: Annotated[int, Limits(ge=0, le=2**63 - 1)]
    state: str
    reason: str | None
    dataset: str
    protocol: str
    variant: str | None = None
    shots: Count | None = None


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
    steps: Annotated[int, Limits(ge=1, le=2**53)]
    loss: Number | None = None
    images_per_s: Number | None = None
    data_wait: Share | None = None
    eta: Number | None = None  # seconds


_Status = Literal["read", "recalled", "third_party"]
_Decimal = Annotated[str, Limits(pattern=r"^[0-9]+(\.[0-9]+)?$")]


class _Published(Struct):
    """A line of published.csv; every value is a text."""

    method: str
    percent: Literal["1", "2", "5", "10", "full"]
    ap: _Decimal
    ap_status: _Status
    ap_std: Annotated[str, Limits(pattern=r"^([0-9]+(\.[0-9]+)?)?$")]
    std_status: _Status | Literal[""]
    protocol: str
    network: str
    score_threshold: str
    images_per_step: str
    folds: str
    backbone: str
    source: str
    note: str


def damaged(path: Path, reason: str, remedy: str) -> UserError:
    """The sentence about a file that does not hold what it should."""
    return UserError(f"{path} is damaged ({plain(reason)[:300]}): {remedy}")


def reason(error: Exception) -> str:
    """msgspec's message with the key first: "cells[3].seed: Expected `int`, got `str`"."""
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


def decode_json(path: Path, content: bytes, kind: type[T], remedy: str) -> T:
    """JSON by schema.

    Raises:
        UserError: it is not valid JSON, or does not fit.
    """
    try:
        return convert(msgspec.json.decode(content), kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise damaged(path, f"it is not valid JSON, {error}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, reason(error), remedy) from error


def convert(value: Any, kind: type[T]) -> T:
    """Plain data as an object of its schema.

    Raises:
        ValueError: it does not fit, or is nested too deeply.
    """
    try:
        made = msgspec.convert(value, kind)
        _require_limits(made, "")
    except (msgspec.ValidationError, RecursionError, UserError) as error:
        raise ValueError(reason(error)) from error
    return made


def _require_limits(value: Any, key: str) -> None:
    """Raises UserError where a field of a Struct, or of those in it, is not what its `Limits` allow."""
    if isinstance(value, list):
        for place, item in enumerate(value):
            _require_limits(item, f"{key}[{place}]")
    elif isinstance(value, Struct):
        for name, kind in _kinds(type(value)).items():
            part, where = getattr(value, name), f"{key}.{name}".removeprefix(".")
            if _is_limited(kind):
                validate.check(kind, part, where)
            else:
                _require_limits(part, where)


@functools.cache
def _kinds(struct: type[Struct]) -> dict[str, Any]:
    """The annotations of a Struct's fields."""
    return typing.get_type_hints(struct, include_extras=True)


def _is_limited(kind: Any) -> bool:
    return typing.get_origin(kind) is Annotated or any(map(_is_limited, typing.get_args(kind)))


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
    return decode_json(path, content_of(path, remedy), Plan, remedy)


def metrics_line(line: bytes) -> Line:
    """A line of metrics.jsonl.

    Raises:
        ValueError: it does not fit, or is torn.
    """
    try:
        found = _LINES.decode(line)
        _require_limits(found, "")
    except (msgspec.MsgspecError, RecursionError, UserError) as error:
        raise ValueError(reason(error)) from error
    return found


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
        convert(rows, list[_Published])
    except (csv.Error, ValueError) as error:
        raise damaged(path, reason(error), remedy) from error
    return rows


def read_progress(run_dir: Path) -> Progress | None:
    """progress.json of a run; None while there is none that can be read, since the next second brings another."""
    try:
        return convert(msgspec.json.decode(read_bytes(run_dir / "progress.json")), Progress)
    except (OSError, ValueError, RecursionError):
        return None


def tail(log: Path, lines: int) -> str:
    """The last lines of a log that are not empty."""
    try:
        text = read_bytes(log)[-20_000:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])
