"""Runs of a protocol that was written down beforehand: what is missing is run, and every record is kept.

A study is some stages, a stage is some settings on some datasets and folds, and each of these is `ssodbench train` with
the overrides of the setting. What has a record in the study's folder, in this stage or another, is not run again; a run
that was cut off continues. After every run the stage's records are written anew. `main` is the command line of a study.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from scipy import stats

from harness.core.files import write_atomically

STAGE_1 = "method.offline.checkpoint="  # the network of the stage's first setting on the same data and fold
# Overrides that do not change what a run gives: where its files lie, and how often it says or saves something.
PLACES = ("data.root=", "run_dir=", "logging.", "checkpointing.", STAGE_1, "data.unlabeled_images=")


@dataclass(frozen=True)
class Stage:
    """Settings, each run on every dataset and fold; gains are over the first, or over that of `baselines`."""

    settings: Mapping[str, tuple[str, ...]]
    common: tuple[str, ...] = ()
    folds: tuple[int, ...] = (1, 2)
    data: tuple[str, ...] = ("shapes",)
    baselines: Mapping[str, str] = field(default_factory=dict)  # setting -> the setting that it is compared with

    def baseline(self, setting: str) -> str:
        """The setting that this one is compared with."""
        return self.baselines.get(setting, next(iter(self.settings)))


@dataclass(frozen=True)
class Run:
    """One training of a stage."""

    stage: Stage
    setting: str
    data: str
    fold: int

    def overrides(self) -> tuple[str, ...]:
        """What it is; of places only that there are some."""
        own = self.stage.settings[self.setting]
        return (f"data={self.data}", f"split.fold={self.fold}", *self.stage.common, *own)

    def first(self) -> Run:
        """That of the stage's first setting on the same data and fold."""
        return Run(self.stage, next(iter(self.stage.settings)), self.data, self.fold)

    def folder(self, runs: Path) -> Path:
        """The same for the same training in another stage."""
        name = sha256(" ".join(sorted(self.overrides())).encode()).hexdigest()[:10]
        return runs / f"{self.data}-fold{self.fold}-{name}"

    def command(self, runs: Path, places: Mapping[str, Path]) -> list[str]:
        """What trains it, and continues it where it was cut off."""
        places = {**places, STAGE_1: self.first().folder(runs)}
        root = places.get(f"data.root={self.data}")
        return [
            *(sys.executable, "-m", "harness.cli", "train"),
            *(f"{override}{places.get(override, '')}" for override in self.overrides()),
            *([] if root is None else [f"data.root={root}"]),
            *(f"run_dir={self.folder(runs)}", "logging.loggers=[]"),
            *("checkpointing.keep=1", "checkpointing.every=200"),
        ]


def what(overrides: Iterable[str]) -> frozenset[str]:
    """The overrides by which a training is known again."""
    return frozenset(override for override in overrides if not override.startswith(PLACES))


def runs_of(stage: Stage) -> Iterator[Run]:
    """The runs of a stage: the first setting, then the others fold by fold, so that a cut leaves whole comparisons."""
    first, *others = stage.settings
    for settings in ([first], others):
        for fold in stage.folds:
            for data in stage.data:
                yield from (Run(stage, setting, data, fold) for setting in settings)


class Records:
    """What has been run: the records of every stage of a study, by what makes a training.

    Args:
        folder: has a folder for each stage, with `records.jsonl`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, Lock()
        self.found: dict[frozenset[str], dict[str, Any]] = {}
        for path in sorted(folder.glob("*/records.jsonl")):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.found[what(shlex.split(record["command"])[2:])] = record

    def of(self, run: Run) -> dict[str, Any] | None:
        """The record of a finished run, or None."""
        return self.found.get(what(run.overrides()))

    def take(self, run: Run, folder: Path) -> dict[str, Any] | None:
        """The record of a run out of its folder, which is kept; None if it has not finished."""
        path = folder / "record.json"
        record = json.loads(path.read_text()) if path.exists() else None
        if record is None or record["status"] != "ok":
            return None
        self.found[what(run.overrides())] = record
        return dict(record)

    def write(self, name: str, stage: Stage, shown: Mapping[Path, str]) -> None:
        """Writes a stage's records: the setting is the variant, and for this machine's folders stand words."""
        with self.lock:
            there = [(run, record) for run in runs_of(stage) if (record := self.of(run)) is not None]
            text = "".join(
                json.dumps({**record, "variant": run.setting}, sort_keys=True) + "\n" for run, record in there
            )
            for path, word in shown.items():
                text = text.replace(str(path), word)
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name / "records.jsonl", text.encode())


@dataclass(frozen=True)
class Study:
    """Stages by name, where their records lie, and the folders that they need within the folder of data."""

    stages: Mapping[str, Stage]
    records: Path
    places: Mapping[str, str] = field(default_factory=dict)  # `KEY=` or, of a dataset, `data.root=DATA` -> folder


def train(study: Study, name: str, run: Run, records: Records, data: Path, runs: Path) -> None:
    """Trains what is missing, and writes the stage's records anew."""
    folder = run.folder(runs)
    # A network that others begin with has to be there, not its record alone.
    begins = run == run.first() and any(
        STAGE_1 in own and records.of(Run(run.stage, setting, run.data, run.fold)) is None
        for setting, own in run.stage.settings.items()
    )
    if records.of(run) is None or (begins and not folder.exists()):
        if records.take(run, folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            places = {key: data / place for key, place in study.places.items()}
            with (folder / "output.txt").open("a") as out:
                subprocess.run(run.command(runs, places), stdout=out, stderr=out, check=False)
        record = records.take(run, folder)
        result = f"FAILED, see {folder / 'output.txt'}" if record is None else f"{record['ap']:.1f}"
        print(f"{name}: {run.data} fold {run.fold}, {run.setting}: {result}", flush=True)
    records.write(name, run.stage, {runs: "RUNS", data: "DATA"})


def table(stage: Stage, records: Records) -> str:
    """AP by setting and dataset; the gain over its baseline over all pairs, with a 95 % interval of paired t."""
    scores: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for run in runs_of(stage):
        if (record := records.of(run)) is not None:
            scores[run.setting][run.data, run.fold] = record["ap"]
    lines = [
        f"| setting | {' | '.join(stage.data)} | runs | gain | 95 % |",
        "|---|" + "---:|" * (len(stage.data) + 3),
    ]
    for setting in stage.settings:
        own, other = scores[setting], scores[stage.baseline(setting)]
        means = [_mean([ap for (data, _), ap in own.items() if data == wanted]) for wanted in stage.data]
        gains = [own[key] - other[key] for key in own if key in other]
        lines.append(f"| {setting} | {' | '.join(means)} | {len(own)} | {_mean(gains)} | {interval(gains)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f}" if values else "-"


def interval(gains: Sequence[float]) -> str:
    """The interval of paired t at 95 %, in words; `-` where there is none."""
    if len(gains) < 2 or not np.any(gains):
        return "-"
    half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    return f"{np.mean(gains) - half:+.1f} to {np.mean(gains) + half:+.1f}"


def main(study: Study, about: str | None) -> None:
    """The command line of a study.

    Args:
        study: its protocol.
        about: what `--help` says.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=study.stages, metavar="STAGE", help=", ".join(study.stages))
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds the datasets")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, of one thread each")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    options = parser.parse_args()
    records = Records(study.records)
    if not options.table:
        if options.runs is None:
            parser.error("--runs is needed, or --table")
        folders = options.data.resolve(), options.runs.resolve()
        with ThreadPoolExecutor(options.workers) as pool:
            wanted = [(name, run) for name in options.stages for run in runs_of(study.stages[name])]
            list(pool.map(lambda one: train(study, *one, records, *folders), wanted))
    for name in options.stages:
        print(f"\n{name}\n{table(study.stages[name], records)}")
