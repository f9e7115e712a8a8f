"""Configuration to the objects that a run is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from detectors.detector import Detector
from detectors.methods.method import Method
from detectors.weights import Generated
from harness.config import checks as config_checks
from harness.config import sections
from harness.config.make import make
from harness.config.names import cell_name
from harness.core.distributed import World
from harness.core.types import ImageSource, Normalize, Pipeline, Split, UserError, Views
from harness.data import prepare
from harness.data.datasets import Dataset
from harness.data.sampling import BatchSampler
from harness.engine import pretrain
from harness.engine.optim import build_optimizer
from harness.splits.protocols import ImagePolicy, SplitOptions
from pipelines.policy import Policy


def dataset(cfg: DictConfig) -> Dataset:
    """Opens the dataset, generating or caching it first where that is needed."""
    return make("data", cfg.data, cache_dir=Path(cfg.cache_dir))


def detector(cfg: DictConfig, num_classes: int) -> Detector:
    """A detector with its first weights."""
    made: dict[str, Any] = {}
    if cfg.detector.get("weights") == "generated":
        recipe = pretrain.Recipe(channels=tuple(cfg.detector.channels))
        state = pretrain.backbone_weights(Path(cfg.cache_dir), recipe)
        made["generated"] = Generated(state, pretrain.description(recipe))
    network: Detector = make("detector", cfg.detector, num_classes=num_classes, **made)
    network.backbone_lr_scale = float(cfg.detector.get("backbone_lr_scale") or 1.0)
    return network


def method(cfg: DictConfig, network: Detector) -> Method:
    """A method around a detector.

    Raises:
        UserError: it cannot be built, or draws other images than its configuration says.
    """
    made: Method = make("method", cfg.method, detector=network, steps=cfg.schedule.steps)
    draws = bool(made.views.unlabeled)
    if cfg.method.get("unlabeled") is not None and draws != config_checks.draws_unlabeled(cfg):
        what = "draws unlabelled images" if draws else "draws no unlabelled images"
        raise UserError(
            f"method={cfg.method.get('name', 'method')} {what}, and its configuration says otherwise: "
            f"set method.unlabeled={str(draws).lower()}"
        )
    return made


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
    config_checks.check_extras(cfg)
    made: Pipeline = make(
        "pipeline",
        cfg.pipeline,
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
    return made


def refuse_no_unlabeled(method: str, options: SplitOptions) -> NoReturn:
    """Raises UserError: a method that needs unlabelled images has none in this split."""
    remedy = "lower split.percent" if options.chosen.draws else "add images that are not labelled"
    raise UserError(
        f"method={method} needs unlabelled images and {options.said} leaves none: {remedy}, or take method=supervised"
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
        UserError: the method needs unlabelled images that are not there, or a step cannot be divided or shared.
    """
    shape = config_checks.shape_of(cfg, bool(views.unlabeled), world.size)
    if views.unlabeled and not unlabeled:
        refuse_no_unlabeled(str(cfg.method.name), sections.split_options(cfg))
    drawn_from = unlabeled if views.unlabeled else None
    return BatchSampler(
        len(labeled),
        0 if drawn_from is None else len(drawn_from),
        shape,
        seed=int(cfg.seed),
        anneal_steps=int(cfg.batch.get("anneal_steps", 0)),
        steps=int(cfg.schedule.steps),
        unlabeled_from=unlabeled_from,
        group=cfg.batch.get("group_by_aspect"),
        landscape=(_landscape(labeled), _landscape(drawn_from)),
    )


def _landscape(source: ImageSource | None) -> np.ndarray:
    """(N,) bool: images that are wider than high, as mmdetection and detectron2 group them."""
    return np.zeros(0, dtype=bool) if source is None else source.sizes[:, 1] > source.sizes[:, 0]


@dataclass
class Data:
    """A dataset and its split, opened and checked."""

    dataset: Dataset
    split: Split
    policy: ImagePolicy
    labeled: ImageSource
    unlabeled: ImageSource | None  # without boxes, or with the pseudo labels that were made offline
    hidden: ImageSource | None  # ground truth of unlabelled images, as far as it is known; no method sees it
    val: ImageSource
    bad_images: dict[str, str] = field(default_factory=dict)  # file -> reason, as the check before training found them
    warnings: tuple[str, ...] = ()  # what was found that does not keep a run from being trained


@dataclass(frozen=True)
class Start:
    """Weights of a trained network that a detector starts from."""

    state: dict[str, torch.Tensor]
    words: str  # for records
    place: str  # the file that they are from
    sha256: str  # of the network with these weights

    def load_into(self, network: Detector) -> None:
        """Gives a detector the weights.

        Raises:
            UserError: they do not fit, or are not those that the record of their run tells of.
        """
        try:
            network.load_state_dict(self.state)
        except RuntimeError as error:
            what = " ".join(str(error).split())[:300]
            raise UserError(
                f"detector.start: the weights in {self.place} do not fit this detector ({what}): give this run the "
                "detector and the number of classes of that one, or start from another run"
            ) from error
        if weights_sha256(network) != self.sha256:
            raise UserError(
                f"detector.start: the weights in {self.place} are not those of the run's record.json: put the files "
                "back as one run wrote them, or start from another run"
            )
        network.pretraining = self.words


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
        UserError: the devices cannot share a step, or what `harness.data.prepare` finds fatal.
    """
    config_checks.check_devices(cfg)
    opened = dataset(cfg)
    options = sections.split_options(cfg)
    split = prepare.resolve_split(opened, options)
    needs_unlabeled = opened.reads_unlabeled(options.chosen)
    checks = prepare.require_usable(opened, unlabeled=needs_unlabeled)
    bad = prepare.bad_files(opened, checks)
    if bad and cfg.pipeline.on_bad_image == "error":
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"{path} is {reason}; repair it or take it off the annotations, or set pipeline.on_bad_image=skip"
        )
    # Bad pictures stay in their lists, so that what a step draws does not depend on which are bad at the moment.
    labeled, unlabeled = prepare.sources(opened, split, options)
    hidden = None if unlabeled is None else prepare.known_truth(opened, split, options, unlabeled)
    warnings = prepare.found_in_files(prepare.parts(opened, needs_unlabeled), checks)
    warnings += prepare.about_split(opened, split, options, labeled)
    val = opened.val.source()
    return Data(opened, split, options.policy, labeled, unlabeled, hidden, val, bad, tuple(warnings))


def experiment(cfg: DictConfig, world: World, data: Data, start: Start | None = None) -> Experiment:
    """Builds what a run is made of; weights and draws depend on the seed, and on `start`, alone."""
    torch.manual_seed(int(cfg.seed))
    network = detector(cfg, len(data.dataset.train.category_ids))
    if start is not None:
        start.load_into(network)
    trained = method(cfg, network).to(world.device)
    if cfg.channels_last:
        trained = trained.to(memory_format=torch.channels_last)
    if cfg.compile:
        for part in trained.networks().values():
            part.backbone.compile()
    drawn = sampler(cfg, trained.views, trained.unlabeled_from, data.labeled, data.unlabeled, world)
    lists = (data.labeled, data.unlabeled, data.bad_images)
    feed = pipeline(cfg, world, network.normalize, trained.views, drawn, *lists)
    optimizer = build_optimizer(trained.trainable(), cfg.schedule.optimizer, trained.parameter_groups())
    return Experiment(cfg, world, data, trained, optimizer, drawn, feed)


def prepare_caches(cfgs: Sequence[DictConfig]) -> None:
    """Makes what all runs share, the datasets and the backbone's first weights, and looks at the data of each.

    Raises:
        UserError: as `data` would in one of the runs.
    """
    opened: dict[str, Dataset] = {}
    for cfg in cfgs:
        key = OmegaConf.to_yaml(cfg.data, resolve=True)
        if key not in opened:
            opened[key] = dataset(cfg)
        check_split(cfg, opened[key])
    unlabeled = any(sections.split_options(cfg).chosen.takes_unlabeled_part for cfg in cfgs)
    for one in opened.values():
        prepare.require_usable(one, unlabeled=unlabeled or one.adds_pictures)
    detector(cfgs[0], len(next(iter(opened.values())).train.category_ids))


def check_split(cfg: DictConfig, opened: Dataset) -> None:
    """Checks, without looking at pictures, that a run would find its images in a dataset.

    Raises:
        UserError: naming the cell of the run; there is no such split, or no unlabelled image for the method.
    """
    try:
        options = sections.split_options(cfg)
        _, unlabeled = prepare.sources(opened, prepare.resolve_split(opened, options), options)
        if config_checks.draws_unlabeled(cfg) and not unlabeled:
            refuse_no_unlabeled(str(cfg.method.name), options)
    except UserError as error:
        raise UserError(
            f"the cell {cell_name(cfg)} cannot be run: {error}; suite.methods, suite.percents and suite.folds "
            "say which cells there are"
        ) from error


def weights_sha256(network: torch.nn.Module) -> str:
    """Hash of a network's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().contiguous().numpy()).tobytes())
    return digest.hexdigest()
