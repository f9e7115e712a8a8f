"""`ssodbench evaluate`: scores a run's networks again, for instance at another score threshold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from harness import build, checkpoint, dist
from harness.evaluate import METRICS, evaluate
from harness.record import write_atomically
from harness.types import UserError


def run(cfg: DictConfig) -> int:
    """Scores the newest checkpoint of `run_dir` with this command's `evaluation` settings; prints and writes a table.

    The dataset, the detector and the method are those of the run. Metrics go to `out`, by default
    `run_dir/evaluation_THRESHOLD.json`.

    Raises:
        UserError: when there is no run in `run_dir`, or `out` cannot be written.
    """
    run_dir = Path(cfg.run_dir)
    path = run_dir / "config.yaml"
    if not path.exists():
        raise UserError(f"there is no run in {run_dir}: set run_dir to the folder of a run")
    threshold = float(cfg.evaluation.score_threshold)
    out = Path(cfg.out).expanduser() if cfg.out else run_dir / f"evaluation_{threshold:g}.json"
    _check_writable(out)
    trained = OmegaConf.load(path)
    assert isinstance(trained, DictConfig)
    trained.evaluation, trained.cache_dir = cfg.evaluation, cfg.cache_dir
    trained.pipeline.on_bad_image = cfg.pipeline.on_bad_image
    world = dist.join(dist.resolve_device(cfg.device, 1))
    torch.set_num_threads(int(cfg.threads))
    opened = build.dataset(trained)
    method = build.method(trained, build.detector(trained, len(opened.train.category_ids))).to(world.device)
    file = checkpoint.find(run_dir)
    method.load_state_dict(checkpoint.read(file, world.device)["method"])
    reported = method.networks()[method.reported]
    pipeline = build.pipeline(trained, world, reported.normalize)
    try:
        scores = {
            name: evaluate(
                network,
                pipeline,
                opened.val.source(),
                opened.val.coco_ground_truth(),
                opened.val.category_ids,
                threshold,
                world,
            )[0]
            for name, network in method.networks().items()
        }
    finally:
        pipeline.close()
    table = Table(title=f"{file}, scores above {threshold:g}", title_justify="left")
    for heading in ("network", *METRICS):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, metrics in scores.items():
        shown = [f"{metrics[m]:.1f}" if metrics[m] is not None else "-" for m in METRICS]
        table.add_row(name + (" (reported)" if name == method.reported else ""), *shown)
    Console().print(table)
    _write(out, {"score_threshold": threshold, "networks": scores})
    return 0


def _write(out: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(out, msgspec.json.format(msgspec.json.encode(content)))
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): set out=FILE to a file that can be written") from error


def _check_writable(out: Path) -> None:
    """Raises UserError, before anything is scored, where the result could not be written; makes no folder yet."""
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give a file name, such as out={out / 'evaluation.json'}")
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"out={out} cannot be written, {existing} is no folder that can be: set out=FILE elsewhere")
