"""The program from Python: configure, train, open runs, detect in arrays, run suites, read records as a table.

    from harness import api

    cfg = api.load_config("method=mean_teacher", "split.percent=5", run_dir="runs/a")
    run = api.train(cfg)                      # or continue it: an interrupted run goes on where it stopped
    print(run.record.ap, run.metrics().tail())
    boxes = run.network().detect([image])     # (height, width, 3) uint8 RGB arrays
    table = api.records("runs")               # one row for each run

What a user got wrong raises `harness.core.types.UserError`, whose text is one sentence; a run that ends without a
result raises `harness.core.types.RunError`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from PIL import Image

from harness.config import compose, paths, saved
from harness.config.extras import check_extras
from harness.core import distributed
from harness.core.record import read_record
from harness.core.types import RunError, RunRecord, UserError
from harness.engine import predict, trained
from harness.engine.evaluate import detect_all
from harness.launch import launcher
from harness.suite import suite

__all__ = ["Boxes", "Network", "Run", "load_config", "open_network", "open_run", "records", "run_suite", "train"]


def load_config(
    *overrides: str, config_dirs: Sequence[str | Path] = (), **keys: str | float | bool | Path | None
) -> DictConfig:
    """A checked configuration.

    Args:
        overrides: `key=value` and `group=option`, as on the command line.
        config_dirs: folders with YAML files of your own.
        keys: keys without a dot, such as `run_dir="runs/a"`.

    Raises:
        UserError: a key is not known, or a value cannot work.
    """
    return compose.load([*overrides, *(f"{key}={_written(value)}" for key, value in keys.items())], config_dirs)


def _written(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not isinstance(value, str) else value


def train(cfg: DictConfig) -> Run:
    """Trains a run, or continues it, and gives it back; one that has ended is only opened.

    Raises:
        UserError: a mistake in the configuration or the data.
        RunError: the run ended without a result; its record says why.
    """
    check_extras(cfg, logs=True)
    code = launcher.train(cfg)
    if code:
        raise RunError(f"the run in {cfg.run_dir} ended with exit code {code}: see its output and record.json")
    return open_run(cfg.run_dir)


def run_suite(cfg: DictConfig) -> pd.DataFrame:
    """Runs what is missing of a suite and writes its report; gives the records of all its cells.

    Raises:
        UserError: no suite was chosen, or it cannot be run.
        RunError: a cell has no result.
    """
    code = suite.run(cfg)
    if code:
        raise RunError(f"the suite {cfg.suite.name} ended with exit code {code}: see its output")
    return records(Path(cfg.runs_dir) / cfg.suite.name)


def open_run(run_dir: str | Path) -> Run:
    """A run, by its folder.

    Raises:
        UserError: there is no record that can be read.
    """
    folder = Path(run_dir)
    return Run(folder, read_record(folder / "record.json"))


def records(runs_dir: str | Path) -> pd.DataFrame:
    """The records of all runs below a folder, a row each: its folder in `run_dir`, then `RunRecord`'s keys.

    Keys that hold more than one value, such as `config` and `environment`, keep their dictionaries and lists.

    Raises:
        UserError: a record cannot be read, or there is none.
    """
    paths = sorted(Path(runs_dir).rglob("record.json"))
    if not paths:
        raise UserError(f"there is no record.json in {runs_dir} or below it: give the folder of finished runs")
    return pd.DataFrame([{"run_dir": str(path.parent), **_plain(read_record(path))} for path in paths])


def _plain(record: RunRecord) -> dict[str, Any]:
    plain = msgspec.to_builtins(record)
    assert isinstance(plain, dict)
    return plain


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    folder: Path
    record: RunRecord

    def metrics(self) -> pd.DataFrame:
        """What was logged while it trained: one row for each step that was logged, evaluation, or quality of labels.

        `kind` tells them apart: `train`, `eval`, `pseudo`. Nested values have dotted columns.
        """
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return pd.json_normalize([json.loads(line) for line in lines])

    def predictions(self) -> pd.DataFrame:
        """The reported network's boxes on the evaluation images: image_id, category_id, x, y, width, height, score."""
        rows = json.loads((self.folder / "predictions.json").read_text())
        boxes = [(row["image_id"], row["category_id"], *row["bbox"], row["score"]) for row in rows]
        return pd.DataFrame(boxes, columns=["image_id", "category_id", "x", "y", "width", "height", "score"])

    def config(self) -> DictConfig:
        """The configuration it was trained with."""
        return saved.read_config(self.folder)

    def network(self, name: str | None = None, device: str = "auto") -> Network:
        """A network of its newest checkpoint.

        Args:
            name: `student` or `teacher`; None: the one that the run reports.
            device: auto, cpu or cuda.

        Raises:
            UserError: there is no such network, or no checkpoint.
        """
        cache_dir = str(paths.default_cache_dir())
        return Network(trained.of_run(self.folder, name, cache_dir), distributed.resolve_device(device, 1))


def open_network(file: str | Path, device: str = "auto") -> Network:
    """A network out of a file that `ssodbench export` wrote.

    Raises:
        UserError: the file cannot be used.
    """
    found = trained.read(Path(file), str(paths.default_cache_dir()))
    return Network(found, distributed.resolve_device(device, 1))


@dataclass(frozen=True)
class Boxes:
    """What was found in one image, best first."""

    boxes: np.ndarray  # (N, 4) float32 xyxy, pixels of the image, continuous
    labels: np.ndarray  # (N,) int64 in 1..C
    scores: np.ndarray  # (N,) float32 in 0..1
    names: list[str]  # of the N classes


class Network:
    """A trained network, ready to be used.

    Args:
        found: the network.
        device: cpu or cuda.
    """

    def __init__(self, found: trained.Trained, device: str) -> None:
        self._found, self._world = found, distributed.join(device)
        self.module = found.detector.to(self._world.device).eval()  # a torch module, see `detectors.detector.Detector`

    @property
    def classes(self) -> list[str]:
        """Names of the classes 1..C."""
        return list(self._found.about.classes)

    @property
    def about(self) -> Mapping[str, Any]:
        """What the network is and where it comes from: the keys of `harness.engine.trained.Description`."""
        plain = msgspec.to_builtins(self._found.about)
        assert isinstance(plain, dict)
        return plain

    def detect(self, images: Sequence[np.ndarray], score: float = 0.5, pipeline: str | None = None) -> list[Boxes]:
        """Finds boxes in images, in exactly the way of `ssodbench predict`.

        Args:
            images: (height, width, 3) uint8 RGB, of any sizes.
            score: boxes with at most this score are left out.
            pipeline: dali, torchvision or opencv; None: that of the run, or the default.

        Raises:
            UserError: an array is no such image.
        """
        for number, image in enumerate(images):
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UserError(f"images[{number}] must be an array (height, width, 3) of uint8, RGB")
        if not images:
            return []
        cfg = compose.load([f"pipeline={pipeline}"] if pipeline else [])
        with tempfile.TemporaryDirectory(prefix="ssodbench-") as folder:
            # Pipelines decode files: PNG keeps every pixel.
            for number, image in enumerate(images):
                Image.fromarray(image).save(Path(folder) / f"{number:09}.png", compress_level=1)
            source, _ = predict.source_of(predict.find_pictures(folder), 1, predict.Found())
            feed = self._found.pipeline(cfg, self._world)
            try:
                with torch.no_grad():
                    found = dict(detect_all(self.module, feed.images(source), score))
            finally:
                feed.close()
        return [self._boxes(found[number + 1]) for number in range(len(images))]

    def _boxes(self, target: Any) -> Boxes:
        labels = target.labels.numpy()
        names = [self._found.about.classes[label - 1] for label in labels.tolist()]
        return Boxes(target.boxes.numpy(), labels, target.scores.numpy(), names)
