"""The study of semi-supervision on photographs: docs/photographs.md says what is asked and how.

    python benchmarks/photographs.py STAGE... --data DIR --runs DIR [--workers 2]
    python benchmarks/photographs.py STAGE... --table

A stage is a list of runs, each `ssodbench train` with the overrides of a setting. What has a record under
`results/reference/photographs-2cores/`, in this stage or another, is not run again; a run that was cut off continues.
After every run the stage's records are written anew. `--table` prints AP by setting, and the gain over the stage's
first setting with its paired interval.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from scipy import stats

from harness.core.files import write_atomically

RECORDS = Path(__file__).parent.parent / "results" / "reference" / "photographs-2cores"
DATA = ("raccoon", "bccd")
# 7 of raccoon's 105 images that remain
TUNE = ("split.percent=6.67", "split.tune=0.25", "evaluation.set=tune")
FAST = ("precision=bf16", "batch.group_by_aspect=joint")  # of all stages but `curve`, which came before
STEPS = 400  # chosen by the stage `curve`
RECIPE: tuple[str, ...] = ()  # chosen by the stage `recipe`, for every method alike
STRONG_LABELED = (
    "augment.views.labeled.color=${augment.views.strong.color}",
    "+augment.views.labeled.erase=${augment.views.strong.erase}",
)
LATE = ("method.burn_in=0.5",)
STAGE_1 = "method.offline.checkpoint="  # the supervised run of the same stage, data and fold
OTHER_PICTURES = "data.unlabeled_images="  # those of coco_tiny
# Overrides that do not change what a run gives.
PLACES = ("data.root=", "run_dir=", "logging.", "checkpointing.", STAGE_1, OTHER_PICTURES)


@dataclass(frozen=True)
class Stage:
    """Settings, each run on every dataset and fold; gains are over the first."""

    settings: dict[str, tuple[str, ...]]
    common: tuple[str, ...] = ()
    folds: tuple[int, ...] = (1, 2)
    data: tuple[str, ...] = DATA


def method(name: str, *more: str) -> tuple[str, ...]:
    """The overrides of a method and its settings."""
    return (f"method={name}", *more)


SUPERVISED = method("supervised")
BEST = method("soft_teacher", *LATE)  # chosen by the stage `tuning`, before any run on an evaluation set
STAGES = {
    "curve": Stage(
        {f"{steps} steps": method("supervised", f"schedule.steps={steps}") for steps in (200, 400, 800)},
        TUNE,
    ),
    "recipe": Stage(
        {
            "preset": SUPERVISED,
            "lr 0.0005": method("supervised", "schedule.optimizer.lr=0.0005"),
            "backbone lr 0.1": method("supervised", "detector.backbone_lr_scale=0.1"),
            "strong labelled": method("supervised", *STRONG_LABELED),
        },
        (*TUNE, *FAST, f"schedule.steps={STEPS}"),
    ),
    "tuning": Stage(
        {
            "supervised": SUPERVISED,
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
        (*TUNE, *FAST, f"schedule.steps={STEPS}", *RECIPE),
        folds=(1,),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training of a stage."""

    stage: str
    setting: str
    data: str
    fold: int

    def overrides(self) -> tuple[str, ...]:
        """What it is; of stage 1 and the other pictures only that there are some."""
        stage = STAGES[self.stage]
        return ("preset=photos", f"data={self.data}", f"split.fold={self.fold}", *stage.common, *self._own())

    def _own(self) -> tuple[str, ...]:
        return STAGES[self.stage].settings[self.setting]

    def folder(self, runs: Path) -> Path:
        """The same for the same training in another stage."""
        name = sha256(" ".join(sorted(self.overrides())).encode()).hexdigest()[:10]
        return runs / f"{self.data}-fold{self.fold}-{name}"

    def command(self, data: Path, runs: Path) -> list[str]:
        """What trains it, and continues it where it was cut off."""
        first = Run(self.stage, next(iter(STAGES[self.stage].settings)), self.data, self.fold)
        places = {STAGE_1: first.folder(runs), OTHER_PICTURES: data / "coco_tiny" / "train2017"}
        return [
            *(sys.executable, "-m", "harness.cli", "train"),
            *(f"{override}{places.get(override, '')}" for override in self.overrides()),
            *(f"data.root={data / self.data}", f"run_dir={self.folder(runs)}"),
            *("logging.loggers=[]", "checkpointing.keep=1", "checkpointing.every=200"),
        ]

    def needs_stage_1(self) -> bool:
        return STAGE_1 in self._own()


def what(overrides: Iterable[str]) -> frozenset[str]:
    """The overrides by which a training is known again."""
    return frozenset(override for override in overrides if not override.startswith(PLACES))


def runs_of(name: str) -> Iterator[Run]:
    """The runs of a stage: the first setting, then the others fold by fold, so that a cut leaves whole comparisons."""
    stage = STAGES[name]
    first, *others = stage.settings
    for settings in ([first], others):
        for fold in stage.folds:
            for data in stage.data:
                yield from (Run(name, setting, data, fold) for setting in settings)


class Records:
    """What has been run: the records of every stage, by what makes a training."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.found: dict[frozenset[str], dict[str, Any]] = {}
        for path in sorted(RECORDS.glob("*/records.jsonl")):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.found[what(shlex.split(record["command"])[2:])] = record

    def of(self, run: Run) -> dict[str, Any] | None:
        """The record of a finished run, or None."""
        return self.found.get(what(run.overrides()))

    def add(self, run: Run, folder: Path) -> dict[str, Any] | None:
        """Takes the record of a run from its folder, if it has finished, and returns it."""
        path = folder / "record.json"
        record = json.loads(path.read_text()) if path.exists() else None
        if record is None or record["status"] != "ok":
            return None
        self.found[what(run.overrides())] = record
        return dict(record)

    def write(self, stage: str, data: Path, runs: Path) -> None:
        """Writes a stage's records: the setting is the variant, and this machine's folders are left out."""
        with self.lock:
            there = [(run, record) for run in runs_of(stage) if (record := self.of(run)) is not None]
            lines = [json.dumps({**record, "variant": run.setting}, sort_keys=True) + "\n" for run, record in there]
            text = "".join(lines).replace(str(data), "DATA").replace(str(runs), "RUNS")
            (RECORDS / stage).mkdir(parents=True, exist_ok=True)
            write_atomically(RECORDS / stage / "records.jsonl", text.encode())


def train(run: Run, data: Path, runs: Path, records: Records) -> None:
    """Trains what is missing, and writes the stage's records anew."""
    folder = run.folder(runs)
    # A network that others begin with has to be there, not its record alone.
    is_start = any(other.needs_stage_1() and records.of(other) is None for other in _after(run))
    if records.of(run) is None or (is_start and not folder.exists()):
        if records.add(run, folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "output.txt").open("a") as out:
                subprocess.run(run.command(data, runs), stdout=out, stderr=out, check=False)
        record = records.add(run, folder)
        result = f"FAILED, see {folder / 'output.txt'}" if record is None else f"{record['ap']:.1f}"
        print(f"{run.stage}: {run.data} fold {run.fold}, {run.setting}: {result}", flush=True)
    records.write(run.stage, data, runs)


def _after(run: Run) -> Iterator[Run]:
    """The runs of a stage that may begin with this one."""
    first, *others = STAGES[run.stage].settings
    if run.setting == first:
        yield from (Run(run.stage, setting, run.data, run.fold) for setting in others)


def table(name: str, records: Records) -> str:
    """AP by setting and dataset; gain over the first setting over all pairs, with a 95 % interval of paired t."""
    stage = STAGES[name]
    scores: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for run in runs_of(name):
        if (record := records.of(run)) is not None:
            scores[run.setting][run.data, run.fold] = record["ap"]
    first = next(iter(stage.settings))
    lines = [
        f"| setting | {' | '.join(stage.data)} | runs | gain | 95 % |",
        "|---|" + "---:|" * (len(stage.data) + 3),
    ]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--data", type=Path, help="folder that holds raccoon, bccd and coco_tiny")
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, of one thread each")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    options = parser.parse_args()
    records = Records()
    if not options.table:
        if options.data is None or options.runs is None:
            parser.error("--data and --runs are needed, or --table")
        with ThreadPoolExecutor(options.workers) as pool:
            runs = [run for stage in options.stages for run in runs_of(stage)]
            list(pool.map(lambda run: train(run, options.data.resolve(), options.runs.resolve(), records), runs))
    for stage in options.stages:
        print(f"\n{stage}\n{table(stage, records)}")


if __name__ == "__main__":
    main()
