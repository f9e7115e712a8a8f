"""Configuration to objects: the only place that calls `hydra.utils.instantiate`."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from detectors.detector import Detector
from detectors.method import Method
from harness import config_checks, prepare
from harness.datasets import Dataset
from harness.dist import World
from harness.optim import build_optimizer
from harness.sampling import BatchSampler
from harness.types import ImageSource, Normalize, Pipeline, Split, UserError, Views
from pipelines.policy import Policy

# Keys that describe a group to people or to other groups, and that its class does not take.
_DESCRIPTIVE = ("name", "augment", "offline", "small")


def _make(options: DictConfig, what: str, drop: tuple[str, ...] = (), **runtime: Any) -> Any:
    """Instantiates a group; what the user can mend comes out as one sentence."""
    plain = OmegaConf.to_container(options, resolve=True)
    assert isinstance(plain, dict)
    kept = {str(key): value for key, value in plain.items() if key not in drop}
    try:
        # Partial, since Hydra would turn dataclasses among the arguments into dictionaries.
        construct = instantiate({**kept, "_partial_": True}, _convert_="all")
        inspect.signature(construct).bind(**runtime)
    except (HydraException, TypeError) as error:
        raise UserError(f"{what} cannot be built from its configuration: {error}") from error
    return construct(**runtime)


def dataset(cfg: DictConfig) -> Dataset:
    """Opens the dataset, generating or caching it first where that is needed."""
    return _make(cfg.data, f"data={cfg.data.name}", ("small",), cache_dir=Path(cfg.cache_dir))


def detector(cfg: DictConfig, num_classes: int) -> Detector:
    """A detector with its first weights."""
    return _make(cfg.detector, f"detector={cfg.detector.name}", num_classes=num_classes)


def method(cfg: DictConfig, network: Detector) -> Method:
    """A method around a detector."""
    return _make(cfg.method, f"method={cfg.method.name}", _DESCRIPTIVE, detector=network, steps=cfg.schedule.steps)


def policy(cfg: DictConfig) -> Policy:
    """The augmentation policy."""
    options = OmegaConf.to_container(cfg.augment, resolve=True)
    assert isinstance(options, dict)
    return Policy.from_config({str(key): value for key, value in options.items()})


def pipeline(
    cfg: DictConfig,
    world: World,
    normalize: Normalize,
    views: Views | None = None,
    sampler: BatchSampler | None = None,
    labeled: ImageSource | None = None,
    unlabeled: ImageSource | None = None,
    known_bad: Mapping[str, str] | None = None,
) -> Pipeline:
    """A pipeline: for training with all arguments, for evaluation without the last five."""
    return _make(
        cfg.pipeline,
        f"pipeline={cfg.pipeline.name}",
        ("name",),
        policy=policy(cfg),
        normalize=normalize,
        views=views,
        sampler=sampler,
        labeled=labeled,
        unlabeled=unlabeled,
        device=str(world.device),
        rank=world.rank,
        world_size=world.size,
        eval_batch=cfg.evaluation.batch,
        known_bad=known_bad,
    )


def sampler(
    cfg: DictConfig,
    views: Views,
    unlabeled_from: int,
    labeled: ImageSource,
    unlabeled: ImageSource | None,
    world: World,
) -> BatchSampler:
    """Which images each step draws.

    Raises:
        UserError: when the method needs unlabelled images that are not there, or the batch does not divide.
    """
    images = int(cfg.batch.unlabeled) if views.unlabeled else 0
    if views.unlabeled and not unlabeled:
        raise UserError(
            f"method={cfg.method.name} needs unlabelled images and split.percent={cfg.split.percent:g} leaves none: "
            "lower split.percent, or take method=supervised"
        )
    if views.unlabeled and not images:
        raise UserError(f"method={cfg.method.name} needs unlabelled images: batch.unlabeled must be at least 1")
    total, micro = int(cfg.batch.labeled) + images, cfg.batch.micro
    if micro is not None and total % micro:
        raise UserError(f"batch.micro={micro} does not divide the {total} images of a step: choose a divisor")
    drawn = BatchSampler(
        num_labeled=len(labeled),
        num_unlabeled=len(unlabeled) if unlabeled is not None and images else 0,
        labeled=int(cfg.batch.labeled),
        unlabeled=images,
        micro=micro,
        seed=int(cfg.seed),
        ratio=cfg.batch.ratio,
        anneal_steps=int(cfg.batch.get("anneal_steps", 0)),
        steps=int(cfg.schedule.steps),
        unlabeled_from=unlabeled_from,
        group=cfg.batch.get("group_by_aspect"),
        landscape=(_landscape(labeled), _landscape(unlabeled if images else None)),
    )
    if drawn.micro_batches % world.size:
        raise UserError(
            f"devices={world.size} cannot share the {drawn.micro_batches} micro-batches of a step evenly: "
            f"set batch.micro so that their number ({total} images / batch.micro) is a multiple of devices"
        )
    return drawn


def _landscape(source: ImageSource | None) -> np.ndarray:
    """(N,) bool: images that are wider than high, as mmdetection and detectron2 group them."""
    return np.zeros(0, dtype=bool) if source is None else source.sizes[:, 1] > source.sizes[:, 0]


@dataclass
class Data:
    """A dataset and its split, opened and checked."""

    dataset: Dataset
    split: Split
    policy: prepare.Policy
    labeled: ImageSource
    unlabeled: ImageSource | None  # without boxes, or with the pseudo labels that were made offline
    hidden: ImageSource | None  # ground truth of the unlabelled images, to measure pseudo labels; no method sees it
    val: ImageSource
    bad_images: dict[str, str] = field(default_factory=dict)  # file -> reason, as the check before training found them


@dataclass
class Experiment:
    """Everything that a run is made of."""

    cfg: DictConfig
    world: World
    data: Data
    method: Method
    optimizer: torch.optim.Optimizer
    sampler: BatchSampler
    pipeline: Pipeline


def data(cfg: DictConfig) -> Data:
    """Opens, splits and checks the data, before anything expensive.

    Raises:
        UserError: the devices cannot share a step, or what `harness.prepare` finds fatal.
    """
    config_checks.check_devices(cfg)
    opened = dataset(cfg)
    split = prepare.resolve_split(opened, cfg.split)
    checks = prepare.check(opened, unlabeled=prepare.needs_unlabeled(cfg.split))
    bad = prepare.bad_files(opened, checks)
    if bad and cfg.pipeline.on_bad_image == "error":
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"{path} is {reason}; repair it or take it off the annotations, or set pipeline.on_bad_image=skip"
        )
    # Bad pictures stay in their lists, so that what a step draws does not depend on which are bad at the moment.
    labeled, unlabeled = prepare.sources(opened, split, cfg.split)
    hidden = None
    if unlabeled is not None:
        index = prepare.unlabeled_index(opened, split)
        hidden = index.source(unlabeled.ids) if len(index.boxes) else None
    val = opened.val.source()
    return Data(opened, split, prepare.policy(cfg.split), labeled, unlabeled, hidden, val, bad)


def experiment(cfg: DictConfig, world: World, data: Data) -> Experiment:
    """Builds what a run is made of; weights and draws depend on the seed alone."""
    torch.manual_seed(int(cfg.seed))
    network = detector(cfg, len(data.dataset.train.category_ids))
    trained = method(cfg, network).to(world.device)
    if cfg.channels_last:
        trained = trained.to(memory_format=torch.channels_last)
    if cfg.compile:
        for part in trained.networks().values():
            part.backbone.compile()
    drawn = sampler(cfg, trained.views, trained.unlabeled_from, data.labeled, data.unlabeled, world)
    lists = (data.labeled, data.unlabeled, data.bad_images)
    feed = pipeline(cfg, world, network.normalize, trained.views, drawn, *lists)
    optimizer = build_optimizer(trained.trainable(), cfg.schedule.optimizer)
    return Experiment(cfg, world, data, trained, optimizer, drawn, feed)


def prepare_caches(cfg: DictConfig) -> None:
    """Makes what all runs share: the dataset, and the backbone's first weights."""
    opened = dataset(cfg)
    detector(cfg, len(opened.train.category_ids))


def weights_sha256(network: torch.nn.Module) -> str:
    """Hash of a network's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().contiguous().numpy()).tobytes())
    return digest.hexdigest()
