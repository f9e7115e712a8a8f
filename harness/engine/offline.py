"""Pseudo labels made before training: for methods whose configuration has `offline`, such as STAC.

The unlabelled source's boxes are replaced by what a detector of stage 1 finds, so that pipelines and the loop treat
them as annotations. Stage 1 is the run of another method on the same split: given, found, or trained here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from detectors.detector import Detector
from detectors.methods.method import Method
from detectors.methods.pseudo_labels import label_offline, offline_quality
from harness.config.run import RunSettings
from harness.config.sections import FeedOptions
from harness.core import distributed
from harness.core.record import read_record
from harness.core.stopping import Interrupted, StopRequest
from harness.core.types import ImageSource, UserError
from harness.engine import build, checkpoint, foreign_labels
from harness.engine.build import Data
from harness.engine.label_file import LABELS, decode_label_file, read_label_file, write_label_file

logger = logging.getLogger(__name__)

T = TypeVar("T")
Train = Callable[[RunSettings, distributed.World, StopRequest], int]

_STAGE_ONE = (
    "stage1",
    "stage1_overrides",
    "checkpoint",
    "labels",
    "labeller",
)  # keys of `offline` that say who labels, not how


@dataclass
class Extra:
    """What a run needed beyond its own schedule, and how good its pseudo labels are."""

    steps: int = 0
    quality: dict[str, float] = field(default_factory=dict)
    by_class: np.ndarray | None = None  # (C, 3), see `detectors.methods.pseudo_labels.count_by_class`
    stage_one: str | None = None  # what made its pseudo labels: the sha256 of a configuration, checkpoint or file
    labeller: str | None = None  # who made those of a file


def label(
    settings: RunSettings, data: Data, world: distributed.World, stop: StopRequest, train: Train
) -> tuple[Data, Extra]:
    """Replaces the unlabelled source by one with pseudo labels, if the method wants that.

    Labels are kept in the run folder, with what they were made by, so that a run that is taken up again uses the same,
    and another one makes its own.

    Args:
        settings, data, world, stop: of the run.
        train: trains stage 1, which is a run like any other, where there is none yet.

    Raises:
        UserError: stage 1 is not finished, does not fit, or found nothing; or the run began with other labels.
    """
    options, stage_one = settings.method.get("offline"), settings.stage_one
    if options is None or data.unlabeled is None:
        return data, Extra()
    path, given, foreign = settings.run_dir / LABELS, options.get("checkpoint"), options.get("labels")
    made_by = _made_by(options, stage_one.config_sha256 if stage_one else "", data)
    if not distributed.from_main(world, lambda: _are_there(path, made_by)):
        distributed.from_main(world, lambda: _refuse_other_labels(settings.run_dir, made_by))
        if foreign:
            distributed.from_main(world, lambda: write_label_file(path, _foreign(options, data), made_by, 0))
        else:
            assert stage_one is not None
            file = _stage_one_checkpoint(given, settings.runs_dir, stage_one, world, stop, train)
            state = _labeller_state(file, data)
            torch.manual_seed(settings.seed)
            with stop.at_once():
                network = build.detector(stage_one.detector, stage_one.cache_dir, len(data.dataset.train.category_ids))
            trained = build.method(stage_one.method, network, stage_one.schedule.steps).to(world.device)
            labeller = _labeller(trained, state, file)
            source = _label_with(labeller, settings.feed, _thresholds(options), data, world, stop)
            if not len(source):
                raise UserError(
                    f"stage 1 found no box above method.offline.score_threshold in any of the {len(data.unlabeled)} "
                    "unlabelled images: train it longer, or keep images without a box by "
                    "method.offline.drop_empty=false"
                )
            distributed.from_main(world, lambda: write_label_file(path, source, made_by, int(state["step"])))
    source, found = read_label_file(path, data.unlabeled, len(data.dataset.train.category_ids))
    extra = Extra(found.steps, stage_one=found.made_by["stage 1"])
    if data.hidden is not None:
        classes = len(data.dataset.train.category_ids)
        extra.quality, extra.by_class = offline_quality(source, data.hidden, classes)
    extra.labeller = options.get("labeller")
    return dataclasses.replace(data, unlabeled=source), extra


def _thresholds(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _STAGE_ONE}


def _foreign(options: Mapping[str, Any], data: Data) -> ImageSource:
    """The unlabelled images with the boxes of a file."""
    assert data.unlabeled is not None
    usable = _without(data.unlabeled, data.bad_images)
    kept = {key: value for key, value in _thresholds(options).items() if key != "float16"}
    return foreign_labels.read_labels(Path(options["labels"]), usable, data.dataset.train.category_ids, **kept)


def _made_by(options: Mapping[str, Any], stage_one: str, data: Data) -> dict[str, str | None]:
    """What pseudo labels depend on; a given stage 1 that is gone by now is None.

    Args:
        options: the keys of `method.offline`.
        stage_one: hash of the configuration of the run that is stage 1, where none is given and no file of labels.
        data: of the run.
    """
    thresholds = dict(options)
    given, foreign = thresholds.pop("checkpoint", None), thresholds.pop("labels", None)
    if thresholds.get("labeller") is None:
        thresholds.pop("labeller", None)  # labels of before have no such key
    stage: str | None = stage_one
    if given is not None or foreign is not None:
        try:
            file = Path(str(foreign)) if foreign is not None else checkpoint.find(Path(str(given)))
            stage = hashlib.sha256(file.read_bytes()).hexdigest()
        except (UserError, OSError):
            stage = None
    return {
        "options": json.dumps(thresholds, sort_keys=True),
        "split": data.split.sha256,
        "dataset": data.dataset.train.sha256,
        "stage 1": stage,
    }


def _are_there(path: Path, made_by: dict[str, str | None]) -> bool:
    """Whether the labels of `path` are whole and were made by the same; damaged ones are named, to be made again."""
    if not path.exists():
        return False
    try:
        known = decode_label_file(path).made_by
    except UserError as error:
        logger.warning("%s; they are made again", error)
        return False
    return all(value is None or known.get(key) == value for key, value in made_by.items())


def _refuse_other_labels(run_dir: Path, made_by: dict[str, str | None]) -> None:
    """Raises UserError where training has begun, and not with labels of this stage 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever continues from the checkpoint names those that are passed over
        begun = checkpoint.newest(run_dir)
    if begun is not None and begun["identity"].get("stage 1") != made_by["stage 1"]:
        raise UserError(
            f"the run in {run_dir} began with pseudo labels of another stage 1: give the same "
            "method.offline.checkpoint or method.offline.labels to continue it, or another run_dir=DIR"
        )


def _stage_one_checkpoint(
    given: str | None, runs_dir: Path, stage_one: RunSettings, world: distributed.World, stop: StopRequest, train: Train
) -> Path:
    """Of the run that is given, of one that was trained by the same command before, or of one trained here."""
    if given is not None:
        return _finished(checkpoint.find(Path(given)))
    before = runs_dir / "train" / stage_one.cell
    if distributed.from_main(world, lambda: _is_run_of(before, stage_one.config_sha256)):
        return checkpoint.find(before)
    train(stage_one, world, stop)
    return checkpoint.find(stage_one.run_dir)


def _is_run_of(run_dir: Path, config_sha256: str) -> bool:
    """Whether a finished run of this configuration, with a checkpoint, is there."""
    path = run_dir / "record.json"
    if not path.exists() or not checkpoint.checkpoints(run_dir):
        return False
    record = read_record(path)
    return record.status == "ok" and record.config_sha256 == config_sha256


def _finished(file: Path) -> Path:
    """The checkpoint, unless it lies in the folder of a run that is not finished."""
    path = file.parent.parent / "record.json"
    if path.exists() and (status := read_record(path).status) != "ok":
        raise UserError(
            f"the stage 1 run in {path.parent} is not finished (status {status}): finish it first, by the command that "
            "started it, or name another method.offline.checkpoint"
        )
    return file


def _labeller_state(file: Path, data: Data) -> dict[str, Any]:
    """The state of stage 1.

    Raises:
        UserError: it was trained on other data.
    """
    state = checkpoint.read(file)
    known = {"split": data.split.sha256, "dataset": data.dataset.train.sha256}
    for what, expected in known.items():
        if state["identity"].get(what) != expected:
            raise UserError(
                f"the stage 1 checkpoint {file} was trained on another {what}: "
                "set method.offline.checkpoint to a supervised run of the same split, or leave it null to train one"
            )
    return state


def _labeller(trained: Method, state: Mapping[str, Any], file: Path) -> Detector:
    """The network that stage 1 reports, with its weights.

    Raises:
        UserError: the state is of another detector.
    """
    try:
        trained.load_state_dict(state["method"])
    except RuntimeError as error:
        raise UserError(
            f"the stage 1 checkpoint {file} holds another detector: train stage 1 with the same one"
        ) from error
    return trained.networks()[trained.reported]


def _label_with(
    labeller: Detector,
    feed: FeedOptions,
    thresholds: Mapping[str, Any],
    data: Data,
    world: distributed.World,
    stop: StopRequest,
) -> ImageSource:
    """Runs stage 1's network over the unlabelled images, over all ranks.

    Raises:
        Interrupted: on every rank, if `stop` was asked on one of them; it is looked at before each batch.
    """
    pipeline = build.pipeline(feed, world, labeller.normalize)
    assert data.unlabeled is not None
    try:
        usable = _without(data.unlabeled, data.bad_images)
        batches = _until_asked(pipeline.images(usable, "pseudo"), stop)
        own = label_offline(labeller, batches, usable, **thresholds)
    finally:
        pipeline.close()
    parts = distributed.gather(world, (own, stop.signal_number))
    signal_number = max(number for _, number in parts)
    if signal_number:
        raise Interrupted(signal_number)
    return _merge([part for part, _ in parts], data.unlabeled)


def _until_asked(batches: Iterator[T], stop: StopRequest) -> Iterator[T]:
    """The batches up to a request to stop."""
    for batch in batches:
        if stop.signal_number:
            return
        yield batch


def _without(unlabeled: ImageSource, bad: Mapping[str, str]) -> ImageSource:
    """Unlabelled images but for bad ones: nothing is found in them."""
    return unlabeled.select([row for row, path in enumerate(unlabeled.paths) if path not in bad]) if bad else unlabeled


def _merge(parts: list[ImageSource], unlabeled: ImageSource) -> ImageSource:
    """The labels that all ranks made, in the order of the unlabelled images, whoever made which."""
    where = {int(image_id): (part, row) for part in parts for row, image_id in enumerate(part.ids)}
    rows = [row for row, image_id in enumerate(unlabeled.ids) if int(image_id) in where]
    found = [where[int(unlabeled.ids[row])] for row in rows]
    return unlabeled.select(rows).with_targets([part.target(row) for part, row in found])
