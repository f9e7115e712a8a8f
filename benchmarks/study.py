"""Runs of a protocol that was written down beforehand: what is missing is run, and every record is kept.

A study is some stages, a stage is some settings on some datasets and folds, and each of these is `ssodbench train` with
the overrides of the setting. What has a record in the study's folder, under its name in this stage or by the same
overrides in another, is not run again; a run that was cut off continues. After every run the stage's records are
written anew. `main` is the command line of a study.

A setting says every value that a preset may come to change, so that the study can be run again after it has.
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

    name: str
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

    def check(self, record: Mapping[str, Any]) -> None:
        """A record of its name may lack values that the setting says now; those it has are the same."""
        wanted, was = (dict(one.split("=", 1) for one in them) for them in (what(self.overrides()), given(record)))
        if other := sorted(key for key in wanted if was.get(key, wanted[key]) != wanted[key]):
            raise ValueError(
                f"{self.setting!r} of the stage {self.stage.name} was run with other values of {', '.join(other)};"
                " call the setting otherwise"
            )

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


def given(record: Mapping[str, Any]) -> frozenset[str]:
    """The overrides by which a record's training is known again."""
    return what(shlex.split(record["command"])[2:])


def runs_of(stage: Stage) -> Iterator[Run]:
    """The runs of a stage: the first setting, then the others fold by fold, so that a cut leaves whole comparisons."""
    first, *others = stage.settings
    for settings in ([first], others):
        for fold in stage.folds:
            for data in stage.data:
                yield from (Run(stage, setting, data, fold) for setting in settings)


@dataclass(frozen=True)
class Study:
    """Stages, where their records lie, and the folders that they need within the folder of data."""

    stages: Sequence[Stage]
    records: Path
    places: Mapping[str, str] = field(default_factory=dict)  # `KEY=` or, of a dataset, `data.root=DATA` -> folder


class Records:
    """What has been run: the records of every stage of a study, by what makes a training.

    Raises:
        ValueError: if the record of a setting's name was given other values.
    """

    def __init__(self, study: Study) -> None:
        self.folder, self.lock = study.records, Lock()
        self.known: dict[frozenset[str], dict[str, Any]] = {}
        named = {}
        for path in sorted(self.folder.glob("*/records.jsonl")):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                named[path.parent.name, record["variant"], record["dataset"], record["fold"]] = record
                self.known[given(record)] = record
        for stage in study.stages:
            for run in runs_of(stage):
                if record := named.get((stage.name, run.setting, run.data, run.fold)):
                    run.check(record)
                    self.known[what(run.overrides())] = record

    def of(self, run: Run) -> dict[str, Any] | None:
        """The record of a finished run, or None."""
        return self.known.get(what(run.overrides()))

    def take(self, run: Run, folder: Path) -> dict[str, Any] | None:
        """The record of a run out of its folder, which is kept; None if it has not finished."""
        path = folder / "record.json"
        record = json.loads(path.read_text()) if path.exists() else None
        if record is None or record["status"] != "ok":
            return None
        self.known[what(run.overrides())] = record
        return dict(record)

    def write(self, stage: Stage, shown: Mapping[Path, str]) -> None:
        """Writes a stage's records: the setting is the variant, and for this machine's folders stand words."""
        with self.lock:
            there = [(run, record) for run in runs_of(stage) if (record := self.of(run)) is not None]
            text = "".join(
                json.dumps({**record, "variant": run.setting}, sort_keys=True) + "\n" for run, record in there
            )
            for path, word in shown.items():
                text = text.replace(str(path), word)
            (self.folder / stage.name).mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / stage.name / "records.jsonl", text.encode())


def train(study: Study, run: Run, records: Records, data: Path, runs: Path) -> None:
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
        print(f"{run.stage.name}: {run.data} fold {run.fold}, {run.setting}: {result}", flush=True)
    records.write(run.stage, {runs: "RUNS", data: "DATA"})


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


def together(stages: Sequence[Stage], records: Records) -> str:
    """The records of several stages as those of one suite, a line each, for `ssodbench report`.

    They are without the names of settings, so that a method is one row over all shares of labels.
    """
    runs = {what(run.overrides()): run for stage in stages for run in runs_of(stage)}
    there = [record for run in runs.values() if (record := records.of(run)) is not None]
    return "".join(json.dumps({**record, "variant": None}, sort_keys=True) + "\n" for record in there)


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
    stages = {stage.name: stage for stage in study.stages}
    parser.add_argument("stages", nargs="+", choices=stages, metavar="STAGE", help=", ".join(stages))
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds the datasets")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, of one thread each")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    parser.add_argument(
        "--together", type=Path, help="write the stages' records to this file as one suite's, run nothing"
    )
    options = parser.parse_args()
    records = Records(study)
    if options.together is not None:
        options.together.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.together, together([stages[name] for name in options.stages], records).encode())
    elif not options.table:
        if options.runs is None:
            parser.error("--runs is needed, --table, or --together")
        folders = options.data.resolve(), options.runs.resolve()
        with ThreadPoolExecutor(options.workers) as pool:
            wanted = [run for name in options.stages for run in runs_of(stages[name])]
            list(pool.map(lambda run: train(study, run, records, *folders), wanted))
    for name in options.stages:
        print(f"\n{name}\n{table(stages[name], records)}")
