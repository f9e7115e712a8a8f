"""Pseudo labels made before training: for methods whose configuration has `offline`, such as STAC.

The unlabelled source's boxes are replaced by what a detector of stage 1 finds, so that pipelines and the loop treat
them as annotations. Stage 1 is the run of another method on the same split: given, found, or trained here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from detectors.detector import Detector
from detectors.pseudo_labels import label_offline, offline_quality
from harness import build, checkpoint, config, dist
from harness.build import Data
from harness.record import read_record
from harness.train import StopRequest
from harness.types import ImageSource, UserError

_STAGE_ONE = ("stage1", "stage1_overrides", "checkpoint")  # keys of `offline` that say who labels, not how


@dataclass
class Extra:
    """What a run needed beyond its own schedule, and how good its pseudo labels are."""

    steps: int = 0
    quality: dict[str, float] = field(default_factory=dict)


def label(cfg: DictConfig, data: Data, world: dist.World, stop: StopRequest) -> tuple[Data, Extra]:
    """Replaces the unlabelled source by one with pseudo labels, if the method wants that.

    Labels are kept in the run folder, with what they were made by, so that a run that is taken up again uses the same,
    and another one makes its own.

    Raises:
        UserError: stage 1 is not finished, does not fit, or found nothing; or the run began with other labels.
    """
    options = cfg.method.get("offline")
    if options is None or data.unlabeled is None:
        return data, Extra()
    path = Path(cfg.run_dir) / "pseudo_labels.npz"
    stage_one = config.stage_one(cfg)
    made_by = _made_by(cfg, stage_one, data)
    if not dist.from_main(world, lambda: _are_there(path, made_by)):
        if checkpoint.checkpoints(Path(cfg.run_dir)):
            raise UserError(
                f"the run in {cfg.run_dir} began with pseudo labels of another stage 1: give the same "
                "method.offline.checkpoint to continue it, or another run_dir=DIR"
            )
        file = _stage_one_checkpoint(cfg, stage_one, world, stop)
        source, steps = _label_with(cfg, stage_one, data, file, world)
        if not len(source):
            raise UserError(
                f"stage 1 found no box above method.offline.score_threshold in any of the {len(data.unlabeled)} "
                "unlabelled images: train it longer, or keep images without a box by method.offline.drop_empty=false"
            )
        dist.from_main(world, lambda: _write(path, source, made_by, steps))
    source, steps = _read(path, data.unlabeled)
    measured = offline_quality(source, data.hidden) if data.hidden is not None else {}
    return dataclasses.replace(data, unlabeled=source), Extra(steps, measured)


def _made_by(cfg: DictConfig, stage_one: DictConfig, data: Data) -> dict[str, str | None]:
    """What pseudo labels depend on; a given stage 1 that is gone by now is None."""
    thresholds = OmegaConf.to_container(cfg.method.offline, resolve=True)
    assert isinstance(thresholds, dict)
    given = thresholds.pop("checkpoint", None)
    stage: str | None = config.config_sha256(stage_one)
    if given is not None:
        try:
            stage = hashlib.sha256(checkpoint.find(Path(str(given))).read_bytes()).hexdigest()
        except UserError:
            stage = None
    return {
        "options": json.dumps(thresholds, sort_keys=True),
        "split": data.split.sha256,
        "dataset": data.dataset.train.sha256,
        "stage 1": stage,
    }


def _are_there(path: Path, made_by: dict[str, str | None]) -> bool:
    """Whether the labels of `path` are whole and were made by the same."""
    try:
        with np.load(path) as arrays:
            known = json.loads(str(arrays["made_by"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return all(value is None or known.get(key) == value for key, value in made_by.items())


def _stage_one_checkpoint(cfg: DictConfig, stage_one: DictConfig, world: dist.World, stop: StopRequest) -> Path:
    """Of the run that is given, of one that was trained by the same command before, or of one trained here."""
    given = cfg.method.offline.get("checkpoint")
    if given is not None:
        return _finished(checkpoint.find(Path(given)))
    before = Path(cfg.runs_dir) / "train" / config.cell_name(stage_one)
    if dist.from_main(world, lambda: _is_run_of(before, stage_one)):
        return checkpoint.find(before)
    from harness.run import train_to_record  # stage 1 is a run like any other

    train_to_record(stage_one, world, stop)
    return checkpoint.find(Path(stage_one.run_dir))


def _is_run_of(run_dir: Path, cfg: DictConfig) -> bool:
    """Whether a finished run of this configuration, with a checkpoint, is there."""
    path = run_dir / "record.json"
    if not path.exists() or not checkpoint.checkpoints(run_dir):
        return False
    record = read_record(path)
    return record.status == "ok" and record.config_sha256 == config.config_sha256(cfg)


def _finished(file: Path) -> Path:
    """The checkpoint, unless it lies in the folder of a run that is not finished."""
    path = file.parent.parent / "record.json"
    if path.exists() and (status := read_record(path).status) != "ok":
        raise UserError(
            f"the stage 1 run in {path.parent} is not finished (status {status}): finish it first, by the command that "
            "started it, or name another method.offline.checkpoint"
        )
    return file


def _label_with(
    cfg: DictConfig, stage_one: DictConfig, data: Data, file: Path, world: dist.World
) -> tuple[ImageSource, int]:
    """Runs stage 1's reported network over the unlabelled images, over all ranks; also gives its steps."""
    state = checkpoint.read(file)
    known = {"split": data.split.sha256, "dataset": data.dataset.train.sha256}
    for what, expected in known.items():
        if state["identity"][what] != expected:
            raise UserError(
                f"the stage 1 checkpoint {file} was trained on another {what}: "
                "set method.offline.checkpoint to a supervised run of the same split, or leave it null to train one"
            )
    torch.manual_seed(int(cfg.seed))
    network = build.detector(stage_one, len(data.dataset.train.category_ids))
    trained = build.method(stage_one, network).to(world.device)
    try:
        trained.load_state_dict(state["method"])
    except RuntimeError as error:
        raise UserError(
            f"the stage 1 checkpoint {file} holds another detector: train stage 1 with the same one"
        ) from error
    reported: Detector = trained.networks()[trained.reported]
    pipeline = build.pipeline(cfg, world, reported.normalize)
    assert data.unlabeled is not None
    options = OmegaConf.to_container(cfg.method.offline, resolve=True)
    assert isinstance(options, dict)
    thresholds = {str(k): v for k, v in options.items() if k not in _STAGE_ONE}
    try:
        usable = _without(data.unlabeled, data.bad_images)
        own = label_offline(reported, pipeline.eval(usable, "pseudo"), usable, **thresholds)
    finally:
        pipeline.close()
    return _merge(dist.gather(world, own), data.unlabeled), int(state["step"])


def _without(unlabeled: ImageSource, bad: Mapping[str, str]) -> ImageSource:
    """Unlabelled images but for bad ones: nothing is found in them."""
    if not bad:
        return unlabeled
    rows = [row for row, path in enumerate(unlabeled.paths) if path not in bad]
    return dataclasses.replace(
        unlabeled,
        paths=[unlabeled.paths[row] for row in rows],
        ids=unlabeled.ids[rows],
        sizes=unlabeled.sizes[rows],
        offsets=unlabeled.offsets[: len(rows) + 1],  # all 0
    )


def _merge(parts: list[ImageSource], unlabeled: ImageSource) -> ImageSource:
    """The labels that all ranks made, in the order of the unlabelled images, whoever made which."""
    where = {int(image_id): (part, row) for part in parts for row, image_id in enumerate(part.ids)}
    rows = [row for row, image_id in enumerate(unlabeled.ids) if int(image_id) in where]
    found = [where[int(unlabeled.ids[row])] for row in rows]
    boxes = [part.rows(row) for part, row in found]
    return ImageSource(
        paths=[unlabeled.paths[row] for row in rows],
        ids=unlabeled.ids[rows],
        sizes=unlabeled.sizes[rows],
        boxes=np.concatenate(
            [np.zeros((0, 4), np.float32), *(p.boxes[b] for (p, _), b in zip(found, boxes, strict=True))]
        ),
        labels=np.concatenate([np.zeros(0, np.int64), *(p.labels[b] for (p, _), b in zip(found, boxes, strict=True))]),
        scores=np.concatenate(
            [np.zeros(0, np.float32), *(p.scores[b] for (p, _), b in zip(found, boxes, strict=True))]
        ),
        offsets=np.cumsum([0, *(b.stop - b.start for b in boxes)]).astype(np.int64),
    )


def _write(path: Path, source: ImageSource, made_by: dict[str, str | None], steps: int) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        ids=source.ids,
        boxes=source.boxes,
        labels=source.labels,
        scores=source.scores,
        offsets=source.offsets,
        made_by=json.dumps(made_by),
        steps=steps,
    )
    temporary.replace(path)


def _read(path: Path, unlabeled: ImageSource) -> tuple[ImageSource, int]:
    """The unlabelled images that have pseudo labels, with them; and the steps of stage 1."""
    with np.load(path) as arrays:
        rows = {int(image_id): row for row, image_id in enumerate(unlabeled.ids.tolist())}
        chosen = np.array([rows[int(i)] for i in arrays["ids"].tolist()], dtype=np.int64)
        source = ImageSource(
            paths=[unlabeled.paths[i] for i in chosen],
            ids=unlabeled.ids[chosen],
            sizes=unlabeled.sizes[chosen],
            boxes=arrays["boxes"],
            labels=arrays["labels"],
            scores=arrays["scores"],
            offsets=arrays["offsets"],
        )
        return source, int(arrays["steps"])
