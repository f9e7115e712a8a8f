"""`ssodbench evaluate`: scores a run's networks again, for instance at another score threshold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from harness import build, checkpoint, config, dist, readback
from harness.escape import literal
from harness.evaluate import METRICS, evaluate
from harness.record import read_record, write_atomically
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
    trained = _trained_with(run_dir)
    trained.evaluation, trained.cache_dir = cfg.evaluation, cfg.cache_dir
    world = dist.join(dist.resolve_device(cfg.device, 1))
    torch.set_num_threads(int(cfg.threads))
    opened = build.dataset(trained)
    method = build.method(trained, build.detector(trained, len(opened.train.category_ids))).to(world.device)
    file = checkpoint.find(run_dir)
    try:
        method.load_state_dict(checkpoint.read(file, world.device)["method"])
    except RuntimeError as error:
        raise UserError(checkpoint.misfit(file, error)) from error
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
    console = Console()
    title = literal(f"{file}, scores above {threshold:g}", console.encoding)
    table = Table(title=title, title_justify="left")
    for heading in ("network", *METRICS):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, metrics in scores.items():
        shown = [f"{metrics[m]:.1f}" if metrics[m] is not None else "-" for m in METRICS]
        table.add_row(name + (" (reported)" if name == method.reported else ""), *shown)
    console.print(table)
    _write(out, {"score_threshold": threshold, "networks": scores})
    return 0


def _trained_with(run_dir: Path) -> DictConfig:
    """config.yaml of a run, which must say what its record says.

    Raises:
        UserError: one of the two is damaged, or they differ.
    """
    trained, path = readback.read_config(run_dir), run_dir / "record.json"
    if path.exists() and (recorded := read_record(path).config):
        differing = config.differences(config.without_circumstances(recorded), config.identity(trained))
        if differing:
            raise UserError(
                f"{run_dir / 'config.yaml'} does not say what the run's record says ({'; '.join(differing[:3])}): put "
                "the file back as the run wrote it"
            )
    return trained


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
