"""Configuration to the objects that a run is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from omegaconf import DictConfig

from detectors.detector import Detector
from detectors.methods.method import Method
from detectors.timm_backbones import TimmBackbone
from detectors.weights import Generated
from harness.config import extras, schema, sections
from harness.config.make import make
from harness.config.names import cell_name
from harness.config.run import RunSettings
from harness.config.sections import FeedOptions
from harness.config.step import StepShape, draws_unlabeled, shape_of
from harness.core import validate
from harness.core.distributed import World
from harness.core.types import ImageSource, Normalize, Pipeline, Split, UserError, Views
from harness.data import prepare
from harness.data.datasets import Dataset
from harness.data.sampling import BatchSampler
from harness.data.set_apart import set_apart
from harness.engine import pretrain
from harness.engine.optim import build_optimizer
from harness.splits.protocols import ImagePolicy, SplitOptions
from pipelines.policy import Policy


def dataset(options: Mapping[str, Any], cache_dir: Path) -> Dataset:
    """Opens the dataset of the group `data`, generating or caching it first where that is needed."""
    return make("data", options, cache_dir=cache_dir)


def divided_dataset(cfg: DictConfig) -> Dataset:
    """The dataset of a run: opened, and with the images set apart that `split.holdout` and `split.tune` take out."""
    opened = dataset(sections.group(cfg, "data"), Path(cfg.cache_dir))
    return set_apart(opened, sections.split_options(cfg), sections.evaluation_options(cfg).set)


def detector(options: Mapping[str, Any], cache_dir: Path, num_classes: int) -> Detector:
    """The detector of the group `detector` with its first weights."""
    made: dict[str, Any] = {}
    if options.get("weights") == "generated" and options.get("backbone") is None:
        recipe = pretrain.Recipe(channels=tuple(options["channels"]))
        state = pretrain.backbone_weights(cache_dir, recipe)
        made["generated"] = Generated(state, pretrain.description(recipe))
    network: Detector = make("detector", options, num_classes=num_classes, **made)
    network.backbone_lr_scale = float(options.get("backbone_lr_scale") or 1.0)
    return network


def method(options: Mapping[str, Any], network: Detector, steps: int) -> Method:
    """The method of the group `method` around a detector, for a schedule of so many steps.

    Raises:
        UserError: it cannot be built, or draws other images than its configuration says.
    """
    made: Method = make("method", options, detector=network, steps=steps)
    draws = bool(made.views.unlabeled)
    if options.get("unlabeled") is not None and draws != draws_unlabeled(options):
        what = "draws unlabelled images" if draws else "draws no unlabelled images"
        raise UserError(
            f"method={options.get('name', 'method')} {what}, and its configuration says otherwise: "
            f"set method.unlabeled={str(draws).lower()}"
        )
    return made


def pipeline(
    options: FeedOptions,
    world: World,
    normalize: Normalize,
    views: Views | None = None,
    sampler: BatchSampler | None = None,
    labeled: ImageSource | None = None,
    unlabeled: ImageSource | None = None,
    known_bad: Mapping[str, str] | None = None,
) -> Pipeline:
    """A pipeline: for training with all arguments, for evaluation without the last five."""
    extras.check_pipeline(str(options.pipeline.get("name")), str(options.pipeline["_target_"]))
    made: Pipeline = make(
        "pipeline",
        options.pipeline,
        policy=Policy.from_config(options.augment),
        normalize=normalize,
        views=views,
        sampler=sampler,
        labeled=labeled,
        unlabeled=unlabeled,
        device=str(world.device),
        rank=world.rank,
        world_size=world.size,
        eval_batch=options.eval_batch,
        known_bad=known_bad,
    )
    return made


def refuse_no_unlabeled(method: str, options: SplitOptions) -> NoReturn:
    """Raises UserError: a method that needs unlabelled images has none in this split."""
    remedy = f"lower split.{options.chosen.amount}" if options.chosen.draws else "add images that are not labelled"
    raise UserError(
        f"method={method} needs unlabelled images and {options.said} leaves none: {remedy}, or take method=supervised"
    )


def sampler(
    shape: StepShape,
    batch: schema.BatchOptions,
    seed: int,
    steps: int,
    unlabeled_from: int,
    labeled: ImageSource,
    unlabeled: ImageSource | None,
) -> BatchSampler:
    """Which images each step draws.

    Args:
        shape: of a step.
        batch: the keys of `batch`.
        seed: of the draws.
        steps: length of the schedule.
        unlabeled_from: the first step that draws unlabelled images.
        labeled: labelled images.
        unlabeled: unlabelled images; None for a method that draws none.
    """
    return BatchSampler(
        len(labeled),
        0 if unlabeled is None else len(unlabeled),
        shape,
        seed=seed,
        anneal_steps=batch.anneal_steps,
        steps=steps,
        unlabeled_from=unlabeled_from,
        group=batch.group_by_aspect,
        landscape=(_landscape(labeled), _landscape(unlabeled)),
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
    normalize: Normalize | None = None  # how it wants its pixels, where the configuration does not tell

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
        if self.normalize is not None and network.normalize != self.normalize:
            raise UserError(
                f"detector.start: the network in {self.place} wants {self.normalize}, and this detector "
                f"{network.normalize}: set detector.caffe as its run had it, or start from another"
            )
        network.pretraining = self.words


@dataclass
class Experiment:
    """Everything that a run is made of."""

    settings: RunSettings
    world: World
    data: Data
    method: Method
    optimizer: torch.optim.Optimizer
    sampler: BatchSampler
    pipeline: Pipeline


def data(settings: RunSettings) -> Data:
    """Opens, splits and checks the data, before anything expensive.

    Raises:
        UserError: the devices cannot share a step, or what `harness.data.prepare` finds fatal.
    """
    name = str(settings.method["name"])
    shape_of(settings.batch, name, draws_unlabeled(settings.method), settings.processes)
    opened = set_apart(dataset(settings.data, settings.cache_dir), settings.split, settings.evaluation.set)
    return split_data(opened, settings.split, settings.feed.pipeline["on_bad_image"])


def split_data(opened: Dataset, options: SplitOptions, on_bad_image: str) -> Data:
    """Splits and checks a dataset.

    Args:
        opened: the dataset.
        options: which of its images are labelled.
        on_bad_image: "error" or "skip".

    Raises:
        UserError: what `harness.data.prepare` finds fatal, and with "error" a picture that cannot be read.
    """
    split = prepare.resolve_split(opened, options)
    needs_unlabeled = opened.reads_unlabeled(options.chosen)
    checks = prepare.require_usable(opened, unlabeled=needs_unlabeled)
    bad = prepare.bad_files(opened, checks)
    if bad and on_bad_image == "error":
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"{path} is {reason}; repair it or take it off the annotations, or set pipeline.on_bad_image=skip"
        )
    # Bad pictures stay in their lists, so that what a step draws does not depend on which are bad at the moment.
    labeled, unlabeled = prepare.sources(opened, split, options)
    hidden = None if unlabeled is None else prepare.known_truth(opened, split, options, unlabeled)
    warnings = prepare.found_in_files(prepare.parts(opened, needs_unlabeled), checks)
    warnings += prepare.about_split(opened, split, options, labeled) + prepare.about_evaluation(opened)
    val = opened.val.source()
    return Data(opened, split, options.policy, labeled, unlabeled, hidden, val, bad, tuple(warnings))


def experiment(settings: RunSettings, world: World, data: Data, start: Start | None = None) -> Experiment:
    """Builds what a run is made of; weights and draws depend on the seed, and on `start`, alone.

    Raises:
        UserError: the method needs unlabelled images that are not there, or a step cannot be divided or shared.
    """
    torch.manual_seed(settings.seed)
    schedule = settings.schedule
    network = detector(settings.detector, settings.cache_dir, len(data.dataset.train.category_ids))
    _require_large_enough(network, settings.feed.augment)
    if start is not None:
        start.load_into(network)
    trained = method(settings.method, network, schedule.steps).to(world.device)
    _require_aligned(str(settings.method["name"]), trained.aligned_views, settings.feed.augment)
    trained.class_names = tuple(data.dataset.train.category_names)
    boxes = np.bincount(data.labeled.labels, minlength=len(trained.class_names) + 1)[1:]
    trained.expect(len(data.labeled), boxes.tolist())
    if settings.channels_last:
        trained = trained.to(memory_format=torch.channels_last)
    if settings.compile:
        for part in trained.networks().values():
            part.backbone.compile()
    draws = bool(trained.views.unlabeled)
    shape = shape_of(settings.batch, str(settings.method["name"]), draws, world.size)
    if draws and not data.unlabeled:
        refuse_no_unlabeled(str(settings.method["name"]), settings.split)
    pools = (data.labeled, data.unlabeled if draws else None)
    drawn = sampler(shape, settings.batch, settings.seed, schedule.steps, trained.unlabeled_from, *pools)
    lists = (data.labeled, data.unlabeled, data.bad_images)
    feed = pipeline(settings.feed, world, network.normalize, trained.views, drawn, *lists)
    optimizer = build_optimizer(trained.trainable(), schedule.optimizer, trained.parameter_groups())
    return Experiment(settings, world, data, trained, optimizer, drawn, feed)


def _require_aligned(method: str, views: Sequence[str], augment: Mapping[str, Any]) -> None:
    """Refuses a policy whose views do not show the same pixels in the same places, for methods that compare cells.

    Raises:
        UserError: naming the views.
    """
    policy = Policy.from_config(augment)
    if views and not policy.aligned(views):
        first, *others = views
        raise UserError(
            f"method={method} compares cells of the views {' and '.join(views)}, and augment={policy.name} gives each "
            f"its own geometry: take the method's own policy, or set augment.views.{others[0]}.geometry_of={first} "
            "with the same resize, flip and zoom and no affine operation"
        )


def _require_large_enough(network: Detector, augment: Mapping[str, Any]) -> None:
    """Refuses a policy that makes pictures smaller than a cell of the coarsest map of one of timm's networks.

    Raises:
        UserError: naming the view.
    """
    body = getattr(network.backbone, "body", None)
    if not isinstance(body, TimmBackbone):
        return
    stride = max(network.backbone.strides)  # type: ignore[arg-type]
    for name, view in augment["views"].items():
        short = (view.get("resize") or {}).get("short")
        sides = short if isinstance(short, list) else [short]
        if any(side is not None and side < stride for side in sides):
            raise UserError(
                f"augment.views.{name}.resize.short={validate.shown(short)} is smaller than the stride of {stride} px "
                f"of the coarsest map of {network.name}: give larger pictures (data.small.short_side with preset=small "
                "and photos)"
            )


def prepare_caches(cfgs: Sequence[DictConfig]) -> None:
    """Makes what all runs share, the datasets and the backbone's first weights, and looks at the data of each.

    Raises:
        UserError: as `data` would in one of the runs.
    """
    opened: dict[str, Dataset] = {}
    for cfg in cfgs:
        split = sections.split_options(cfg)
        apart = [cfg.split.get("holdout"), cfg.split.get("tune")]
        key = json.dumps([sections.group(cfg, "data"), sections.group(cfg, "split") if any(apart) else None])
        if key not in opened:
            opened[key] = divided_dataset(cfg)
        check_split(cell_name(cfg), sections.group(cfg, "method"), split, opened[key])
    unlabeled = any(sections.split_options(cfg).chosen.takes_unlabeled_part for cfg in cfgs)
    for one in opened.values():
        prepare.require_usable(one, unlabeled=unlabeled or one.adds_pictures)
    classes = len(next(iter(opened.values())).train.category_ids)
    detector(sections.group(cfgs[0], "detector"), Path(cfgs[0].cache_dir), classes)


def check_split(cell: str, method: Mapping[str, Any], options: SplitOptions, opened: Dataset) -> None:
    """Checks, without looking at pictures, that a run would find its images in a dataset.

    Args:
        cell: name of the run.
        method: the group.
        options: which images are labelled.
        opened: the dataset.

    Raises:
        UserError: naming the cell of the run; there is no such split, or no unlabelled image for the method.
    """
    try:
        _, unlabeled = prepare.sources(opened, prepare.resolve_split(opened, options), options)
        if draws_unlabeled(method) and not unlabeled:
            refuse_no_unlabeled(str(method["name"]), options)
    except UserError as error:
        axis = "suite.shots" if options.chosen.amount == "shots" else "suite.percents"
        raise UserError(
            f"the cell {cell} cannot be run: {error}; suite.methods, {axis} and suite.folds say which cells there are"
        ) from error


def weights_sha256(network: torch.nn.Module) -> str:
    """Hash of a network's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().contiguous().numpy()).tobytes())
    return digest.hexdigest()
