"""The study of semi-supervision on photographs: docs/photographs.md says what is asked and how.

    python benchmarks/photographs.py STAGE --data DIR --runs DIR [--workers 2]
    python benchmarks/photographs.py STAGE --data DIR --runs DIR --table

A stage is a list of runs, each `ssodbench train` with the overrides of a setting. What has a finished record is not run
again, a run that was cut off continues. After every run its record is added to `results/reference/photographs-2cores/`.
`--table` prints AP by setting, and the gain over the stage's first setting with its paired interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from scipy import stats

from harness.core.files import write_atomically

RECORDS = Path(__file__).parent.parent / "results" / "reference" / "photographs-2cores"
DATA = ("raccoon", "bccd")
TUNING = ("split.percent=6.67", "split.tune=0.25", "evaluation.set=tune")  # 7 of raccoon's 105 images that remain
STEPS = 800  # chosen by the stage `curve`
RECIPE: tuple[str, ...] = ()  # chosen by the stage `recipe`, for every method alike
STRONG_LABELED = (
    "augment.views.labeled.color=${augment.views.strong.color}",
    "+augment.views.labeled.erase=${augment.views.strong.erase}",
)
LATE = ("method.burn_in=0.5",)
STAGE_1 = "method.offline.checkpoint={supervised}"  # the supervised run of the same data and fold


@dataclass(frozen=True)
class Stage:
    """Settings, each run on every dataset and fold."""

    settings: dict[str, tuple[str, ...]]
    common: tuple[str, ...] = ()
    folds: tuple[int, ...] = (1, 2)
    data: tuple[str, ...] = DATA


def method(name: str, *more: str) -> tuple[str, ...]:
    """The overrides of a method and its settings."""
    return (f"method={name}", *more)


STAGES = {
    "curve": Stage(
        {f"{steps} steps": method("supervised", f"schedule.steps={steps}") for steps in (200, 400, 800, 1600)},
        TUNING,
    ),
    "recipe": Stage(
        {
            "preset": method("supervised"),
            "lr 0.0005": method("supervised", "schedule.optimizer.lr=0.0005"),
            "backbone lr 0.1": method("supervised", "detector.backbone_lr_scale=0.1"),
            "strong labelled": method("supervised", *STRONG_LABELED),
        },
        (*TUNING, f"schedule.steps={STEPS}"),
    ),
    "tuning": Stage(
        {
            "supervised": method("supervised"),
            "stac": method("stac", STAGE_1),
            "stac lambda 1": method("stac", STAGE_1, "method.lambda_u=1"),
            "stac threshold 0.7": method("stac", STAGE_1, "method.offline.threshold=0.7"),
            "stac threshold 0.7 lambda 1": method("stac", STAGE_1, "method.offline.threshold=0.7", "method.lambda_u=1"),
            "mean_teacher": method("mean_teacher", *LATE),
            "mean_teacher lambda 1": method("mean_teacher", *LATE, "method.lambda_u=1"),
            "mean_teacher score 0.9": method("mean_teacher", *LATE, "method.score=0.9"),
            "mean_teacher ema 0.998": method("mean_teacher", *LATE, "method.ema.momentum=0.998"),
            "soft_teacher": method("soft_teacher", *LATE),
            "soft_teacher lambda 1": method("soft_teacher", *LATE, "method.lambda_u=1"),
            "soft_teacher score 0.9": method(
                "soft_teacher", *LATE, "method.class_score=0.9", "method.rpn_score=0.9", "method.box_uncertainty=0.02"
            ),
            "soft_teacher ema 0.998": method("soft_teacher", *LATE, "method.ema.momentum=0.998"),
        },
        (*TUNING, f"schedule.steps={STEPS}", *RECIPE),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training of a stage."""

    stage: str
    setting: str
    data: str
    fold: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.data}-{self.setting.replace(' ', '_')}-fold{self.fold}"

    def command(self, data: Path, folder: Path) -> list[str]:
        """What trains it, and continues it where it was cut off."""
        stage = STAGES[self.stage]
        supervised = folder.parent / Run(self.stage, "supervised", self.data, self.fold).name
        own = [
            override.format(supervised=supervised) if override == STAGE_1 else override
            for override in stage.settings[self.setting]
        ]
        return [
            *(sys.executable, "-m", "harness.cli", "train", "preset=photos"),
            *(f"data={self.data}", f"data.root={data / self.data}", f"split.fold={self.fold}", f"run_dir={folder}"),
            *("logging.loggers=[]", "checkpointing.keep=1", "checkpointing.every=200"),
            *stage.common,
            *own,
        ]


def runs_of(name: str) -> Iterator[Run]:
    """The runs of a stage: the first setting, then the others fold by fold, so that a cut leaves whole comparisons."""
    stage = STAGES[name]
    first, *others = stage.settings
    for settings in ([first], others):
        for fold in stage.folds:
            for data in stage.data:
                yield from (Run(name, setting, data, fold) for setting in settings)


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, or None."""
    path = folder / "record.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["status"] == "ok" else None


def train(run: Run, data: Path, runs: Path, lock: Lock) -> None:
    """Trains what is missing, and writes the stage's records anew."""
    folder = runs / run.stage / run.name
    if record_of(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "output.txt").open("a") as out:
            subprocess.run(run.command(data, folder), stdout=out, stderr=out, check=False)
        record = record_of(folder)
        print(f"{run.stage} {run.name}: {'FAILED' if record is None else format(record['ap'], '.1f')}", flush=True)
    with lock:
        write_records(run.stage, data, runs)


def write_records(stage: str, data: Path, runs: Path) -> None:
    """Writes a stage's records: the setting is the variant, and this machine's folders are left out."""
    lines = []
    for run in runs_of(stage):
        if (record := record_of(runs / stage / run.name)) is not None:
            line = json.dumps({**record, "variant": run.setting}, sort_keys=True)
            lines.append(line.replace(str(data), "DATA").replace(str(runs), "RUNS") + "\n")
    (RECORDS / stage).mkdir(parents=True, exist_ok=True)
    write_atomically(RECORDS / stage / "records.jsonl", "".join(lines).encode())


def table(name: str, runs: Path) -> str:
    """AP by setting and dataset; gain over the first setting over all pairs, with a 95 % interval of paired t."""
    stage = STAGES[name]
    scores: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for run in runs_of(name):
        if (record := record_of(runs / run.stage / run.name)) is not None:
            scores[run.setting][run.data, run.fold] = record["ap"]
    first = next(iter(stage.settings))
    lines = [f"| setting | {' | '.join(stage.data)} | runs | gain | 95 % |", "|---|" + "---:|" * (len(stage.data) + 3)]
    for setting in stage.settings:
        own = scores[setting]
        means = [_mean([ap for (data, _), ap in own.items() if data == wanted]) for wanted in stage.data]
        gains = [own[key] - scores[first][key] for key in own if key in scores[first]]
        lines.append(f"| {setting} | {' | '.join(means)} | {len(own)} | {_mean(gains)} | {_interval(gains)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" if values else "-"


def _interval(gains: list[float]) -> str:
    if len(gains) < 2 or not np.any(gains):
        return "-"
    half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    return f"{np.mean(gains) - half:+.1f} to {np.mean(gains) + half:+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds raccoon, bccd and coco_tiny")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, of one thread each")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    options = parser.parse_args()
    if not options.table:
        lock = Lock()
        with ThreadPoolExecutor(options.workers) as pool:
            runs = [run for stage in options.stages for run in runs_of(stage)]
            list(pool.map(lambda run: train(run, options.data.resolve(), options.runs.resolve(), lock), runs))
    for stage in options.stages:
        print(f"\n{stage}\n{table(stage, options.runs)}")


if __name__ == "__main__":
    main()
