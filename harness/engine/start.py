"""A detector that starts from a finished run: `detector.start` names its folder, and its reported network is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import saved, sections
from harness.config.identity import differences
from harness.core.record import read_record
from harness.core.types import UserError
from harness.engine import checkpoint
from harness.engine.build import Start

# Keys of `detector` that may differ from those of the run: what says how it learns, not what it is.
_FREE = ("start", "start_sha256", "backbone_lr_scale", "cache_dir", "name", "frozen_stages", "rpn", "roi")


def read(detector: Mapping[str, Any], classes: Sequence[str]) -> Start | None:
    """The weights that `detector.start` names; None where it names none.

    Args:
        detector: the group of the run that will begin with them.
        classes: the names of its classes, in order.

    Raises:
        UserError: the run's detector or its classes are others, or its checkpoint is not that of its record.
    """
    if not detector.get("start"):
        return None
    run_dir = Path(detector["start"])
    record = read_record(run_dir / "record.json")
    _refuse_other_detector(run_dir, sections.group(saved.read_config(run_dir), "detector"), detector)
    file = checkpoint.find(run_dir)
    state = checkpoint.read(file)
    _refuse_other_classes(run_dir, state.get("classes"), classes)
    prefix = f"{record.reported_network}."
    weights = {name.removeprefix(prefix): v for name, v in state["method"].items() if name.startswith(prefix)}
    words = (
        f"the {record.reported_network} of the finished run {record.cell} ({record.steps} steps, weights sha256 "
        f"{str(record.weights_sha256)[:12]}), which began with: {record.pretraining}"
    )
    return Start(weights, words, str(file), str(detector["start_sha256"]))


def _refuse_other_detector(run_dir: Path, trained: Mapping[str, Any], detector: Mapping[str, Any]) -> None:
    before, now = _plain(trained), _plain(detector)
    if "caffe" not in now:  # weights of a ResNet say what pixels it wants, and how it is normalised
        before.pop("weights", None)
        now.pop("weights", None)
    differing = differences(before, now)
    if differing:
        raise UserError(
            f"detector.start={run_dir} holds another detector ({'; '.join(differing[:3])}): give this run the detector "
            "of that one, or start from another run"
        )


def _plain(detector: Mapping[str, Any]) -> dict[str, Any]:
    """A detector's keys, without what may differ."""
    return {key: value for key, value in detector.items() if key not in _FREE}


def _refuse_other_classes(run_dir: Path, before: Sequence[str] | None, now: Sequence[str]) -> None:
    """Raises UserError for classes of other names; a checkpoint that does not say them is judged by their number."""
    if before is not None and list(before) != list(now):
        raise UserError(
            f"detector.start={run_dir} was trained on the classes {_some(before)}, and this run has {_some(now)}: "
            "start from a run with the same classes in the same order"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
