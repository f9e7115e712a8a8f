"""`ssodbench evaluate`: scores a run's networks again, for instance at another score threshold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from detectors.detector import Detector
from harness.commands import usage
from harness.config import saved, sections
from harness.config.identity import differences, identity, is_circumstance
from harness.config.names import group_name
from harness.core import distributed
from harness.core.console import STDERR, Console
from harness.core.escape import literal
from harness.core.files import require_writable, trouble, write_atomically
from harness.core.types import Pipeline, UserError
from harness.data.datasets import Dataset
from harness.data.ground_truth import from_index
from harness.engine import build, checkpoint, trained
from harness.engine.analysis import MATCHES, Analysis, analyse
from harness.engine.evaluate import METRICS, evaluate
from harness.engine.matches import write_matches
from harness.engine.trained import refuse_other_run

# What `evaluate` takes beside the keys that find the run; a group stands for its keys too.
_USED = (
    "run_dir", "runs_dir", "out", "cache_dir", "device", "threads", "data", "pipeline",
    "evaluation.score_threshold", "evaluation.batch",
)  # fmt: skip


def run(cfg: DictConfig) -> int:
    """Scores the newest checkpoint of `run_dir` with this command's `evaluation` settings; prints and writes a table.

    The detector and the method are those of the run; so is the dataset, unless `data` is given, whose evaluation images
    are then scored. Metrics go to `out`, by default `run_dir/evaluation_THRESHOLD.json`. A run without matches.npz,
    which a report needs for intervals, gets one, if it is scored on its own images at its own threshold.

    Raises:
        UserError: there is no run in `run_dir`, the checkpoint is of another one, the classes of `data` are not those
            of the run, a key is given that cannot be used, or `out` cannot be written.
    """
    if cfg.model:
        return _of_file(cfg)
    run_dir = Path(cfg.run_dir)
    if why := trouble(run_dir / "config.yaml"):
        raise UserError(f"there is no run in {run_dir} (config.yaml: {why}): set run_dir to the folder of a run")
    given = _given(cfg)
    other = "run_dir" in given and "data" in given
    threshold = float(cfg.evaluation.score_threshold)
    out = Path(cfg.out) if cfg.out else run_dir / _file_name(cfg, other, threshold)
    require_writable(out, "out")
    own = saved.read_config(run_dir)
    _refuse_unused(cfg, given, own)
    file = checkpoint.find(run_dir)
    world = distributed.join(distributed.resolve_device(cfg.device, 1))
    state = checkpoint.read(file, world.device)
    refuse_other_run(run_dir, file, state["identity"], own)
    torch.set_num_threads(int(cfg.threads))
    opened, classes = _open(cfg, own, other, state)
    recorded_threshold = float(own.evaluation.score_threshold)
    own.evaluation = cfg.evaluation
    if "pipeline" in given:
        own.pipeline = cfg.pipeline
    own.pipeline.on_bad_image = cfg.pipeline.on_bad_image
    detector = build.detector(sections.group(own, "detector"), Path(own.cache_dir), len(classes))
    method = build.method(sections.group(own, "method"), detector, own.schedule.steps).to(world.device)
    try:
        method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise UserError(checkpoint.misfit(file, error)) from error
    pipeline = build.pipeline(sections.feed_options(own), world, method.networks()[method.reported].normalize)
    scores, analyses = _scores(method.networks(), pipeline, opened, threshold, world)
    if not other and not (run_dir / MATCHES).exists() and threshold == recorded_threshold:
        write_matches(run_dir / MATCHES, analyses[method.reported].matches)
    _tell(scores, method.reported, opened, threshold, out, f"{file}{f' on data={opened.name}' if other else ''}")
    return 0


def _of_file(cfg: DictConfig) -> int:
    """The same for the one network of an exported file, on the evaluation images of `data`."""
    usage.require_network("evaluate", _given(cfg))
    for key in sorted(_given(cfg).difference(_USED, ("model", "network"))):
        raise UserError(f"evaluate does not use {key} with model=FILE: leave it out")
    threshold = float(cfg.evaluation.score_threshold)
    out = Path(cfg.out) if cfg.out else Path(cfg.model).parent / _file_name(cfg, True, threshold)
    require_writable(out, "out")
    world = distributed.join(distributed.resolve_device(cfg.device, 1))
    torch.set_num_threads(int(cfg.threads))
    network = trained.open_trained(cfg, world.device)
    opened = build.divided_dataset(cfg)
    _require_classes(opened, network.about.classes)
    name = network.about.network
    scores, _ = _scores({name: network.detector}, network.pipeline(cfg, world), opened, threshold, world)
    _tell(scores, name, opened, threshold, out, f"{cfg.model} on data={opened.name}")
    return 0


def _scores(
    networks: Mapping[str, Detector], feed: Pipeline, opened: Dataset, threshold: float, world: distributed.World
) -> tuple[dict[str, dict[str, float | None]], dict[str, Analysis]]:
    """Metrics of each network on the evaluation images, and what else its detections tell; closes the pipeline."""
    val = opened.val
    try:
        evaluations = {
            name: evaluate(network, feed, val.source(), val.coco_ground_truth(), val.category_ids, threshold, world)
            for name, network in networks.items()
        }
    finally:
        feed.close()
    truth = from_index(val)
    analyses = {name: analyse(rows, truth, opened.voc_ap) for name, (_, rows) in evaluations.items()}
    return {name: analyses[name].scores | metrics for name, (metrics, _) in evaluations.items()}, analyses


def _tell(
    scores: dict[str, dict[str, float | None]], reported: str, opened: Dataset, threshold: float, out: Path, what: str
) -> None:
    """Writes the scores to `out` and prints them, and where they are."""
    content = {"score_threshold": threshold, "data": opened.name, "val_sha256": opened.val.sha256, "networks": scores}
    write_atomically(out, msgspec.json.format(msgspec.json.encode(content)))
    console = Console()
    console.print(_table(literal(f"{what}, scores above {threshold:g}", console.encoding), scores, reported))
    console.say(f"written to {out}")


def _given(cfg: DictConfig) -> set[str]:
    """The keys of the command line; of those of a group that `evaluate` takes, the group."""
    keys = {str(override).split("=", 1)[0].lstrip("+~") for override in cfg.cli.overrides}
    return {key.split(".")[0] if key.split(".")[0] in _USED else key for key in keys}


def _refuse_unused(cfg: DictConfig, given: set[str], own: DictConfig) -> None:
    """Refuses keys that would change nothing.

    Without `run_dir` keys such as `method` and `split.percent` find the run, as they name it for `train`: they must
    then be the run's own.

    Raises:
        UserError: naming the key, or how the run differs.
    """
    finds = "run_dir" not in given
    for key in sorted(given.difference(_USED)):
        if not finds or is_circumstance(key):
            raise UserError(
                f"evaluate does not use {key}: leave it out; besides run_dir it takes {', '.join(_USED[2:])}"
            )
    if not finds:
        return
    before, now = identity(own), identity(cfg)
    for plain in (before, now):
        plain.pop("pipeline", None)
        for key in ("score_threshold", "batch"):
            plain["evaluation"].pop(key, None)
    differing = differences(before, now)
    if differing:
        raise UserError(
            f"the run in {cfg.run_dir} was trained with other settings ({'; '.join(differing[:5])}), which evaluate "
            f"does not change: name it by run_dir={cfg.run_dir} alone, or give the settings of the run that you mean"
        )


def _open(cfg: DictConfig, own: DictConfig, other: bool, state: dict[str, Any]) -> tuple[Dataset, list[str]]:
    """The dataset to score on, and the classes of the run, which are its classes too."""
    own.cache_dir = cfg.cache_dir
    names = state.get("classes")  # checkpoints of before do not say
    cache_dir = Path(cfg.cache_dir)
    classes = list(names or build.dataset(sections.group(own, "data"), cache_dir).train.category_names)
    opened = build.divided_dataset(cfg if other else own)
    _require_classes(opened, classes)
    if not other and opened.val.sha256 != state["identity"]["evaluation set"]:
        STDERR.say(f"the evaluation images of data={opened.name} have changed since the run was trained")
    return opened, classes


def _require_classes(opened: Dataset, classes: list[str]) -> None:
    """Raises UserError where a dataset's classes are not those of a network."""
    found = list(opened.val.category_names)
    if found != classes:
        raise UserError(
            f"data={opened.name} has the classes {_some(found)}, and the run was trained on {_some(classes)}: evaluate "
            "on data with the same classes in the same order"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _file_name(cfg: DictConfig, other: bool, threshold: float) -> str:
    data = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{group_name(cfg, 'data')}_") if other else ""
    return f"evaluation_{data}{threshold:g}.json"


def _table(title: Text, scores: dict[str, dict[str, float | None]], reported: str) -> Table:
    table = Table(title=title, title_justify="left")
    keys = [key for key in (*METRICS, "voc07_ap50", "voc_ap50") if key in scores[reported]]
    for heading in ("network", *keys):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, metrics in scores.items():
        shown = ["-" if (value := metrics[m]) is None else f"{value:.1f}" for m in keys]
        table.add_row(name + (" (reported)" if name == reported else ""), *shown)
    return table
