"""A detector that starts from a trained network.

`detector.start` names a finished run, whose reported network is taken, or a file that `ssodbench export` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import saved, sections
from harness.config.identity import differences
from harness.core.record import read_record
from harness.core.types import UserError
from harness.engine import build, checkpoint, trained
from harness.engine.build import Start

# Keys of `detector` that may differ from those of the run: what says how it learns, not what it is.
_FREE = ("start", "start_sha256", "backbone_lr_scale", "cache_dir", "name", "frozen_stages", "rpn", "roi")


def read(detector: Mapping[str, Any], classes: Sequence[str]) -> Start | None:
    """The weights that `detector.start` names; None where it names none.

    Args:
        detector: the group of the run that will begin with them.
        classes: the names of its classes, in order.

    Raises:
        UserError: its detector or its classes are others, its checkpoint is not that of its record, or the file cannot
            be used.
    """
    if not detector.get("start"):
        return None
    run_dir = Path(detector["start"])
    if run_dir.is_file():
        return _of_file(run_dir, detector, classes)
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


def _of_file(file: Path, detector: Mapping[str, Any], classes: Sequence[str]) -> Start:
    found = trained.read(file, str(detector.get("cache_dir") or ""), "detector.start")
    about = found.about
    own = {key: detector[key] for key in ("weights", "caffe") if key in detector}  # `Start` compares the pixels instead
    _refuse_other_detector(file, {**about.detector, **own}, detector)
    _refuse_other_classes(file, about.classes, classes)
    sha256 = build.weights_sha256(found.detector)
    words = (
        f"the {about.network} of {about.cell} ({about.step} steps, weights sha256 {sha256[:12]}), out of an exported "
        f"file, which began with: {about.pretraining}"
    )
    return Start(found.detector.state_dict(), words, str(file), sha256, found.detector.normalize)


def _refuse_other_detector(start: Path, known: Mapping[str, Any], detector: Mapping[str, Any]) -> None:
    before, now = _plain(known), _plain(detector)
    if "caffe" not in now:  # weights of a ResNet say what pixels it wants, and how it is normalised
        before.pop("weights", None)
        now.pop("weights", None)
    differing = differences(before, now)
    if differing:
        raise UserError(
            f"detector.start={start} holds another detector ({'; '.join(differing[:3])}): give this run the detector "
            "of that one, or start from another"
        )


def _plain(detector: Mapping[str, Any]) -> dict[str, Any]:
    """A detector's keys, without what may differ."""
    return {key: value for key, value in detector.items() if key not in _FREE}


def _refuse_other_classes(start: Path, before: Sequence[str] | None, now: Sequence[str]) -> None:
    """Raises UserError for classes of other names; a checkpoint that does not say them is judged by their number."""
    if before is not None and list(before) != list(now):
        raise UserError(
            f"detector.start={start} was trained on the classes {_some(before)}, and this run has {_some(now)}: "
            "start from a run with the same classes in the same order"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
