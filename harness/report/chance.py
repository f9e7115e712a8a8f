"""Matches of a table's runs, resampled: chance in the evaluation images (`harness.report.bootstrap`), each run once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from harness.core.record import available_cores
from harness.core.types import UserError
from harness.engine.accumulate import scores
from harness.engine.analysis import MATCHES
from harness.engine.matches import Matches, read_matches
from harness.report.bootstrap import ImageInterval, Resampled, average, difference, resample
from harness.report.collect import Run
from harness.report.resample_cache import place_of, read_resampled, write_resampled
from harness.report.tables import Cell, Section

_SEED = 0
_OFF = 0.01  # AP by which matches may differ from their record: the order of equal scores


class ImageChance:
    """Resampled scores of a section's runs."""

    def __init__(self, section: Section, resamples: int, problems: list[str], cache_dir: Path | None = None) -> None:
        """Reads and resamples every run's matches; sentences about damaged ones go to `problems`.

        Args:
            section: whose runs are resampled.
            resamples: how many; 0: none, then there are no intervals.
            problems: of the report.
            cache_dir: root of the cache, in which resampled scores are kept for the next report; None: they are not.
        """
        runs = [run for run in section.runs if run.folder is not None and (run.folder / MATCHES).exists()]
        with ThreadPoolExecutor(available_cores()) as pool:  # numba's code runs beside Python's
            drawn = list(
                pool.map(lambda run: _resample(run, resamples, problems, cache_dir), runs if resamples else [])
            )
        self.of_run = {id(run): one for run, one in zip(runs, drawn, strict=False) if one is not None}

    def mean_of(self, runs: Sequence[Run]) -> Resampled | None:
        """The mean of runs, draw by draw; None where one has no matches."""
        known = [self.of_run.get(id(run)) for run in runs]
        there = [one for one in known if one is not None]
        return average(there) if there and len(there) == len(known) else None

    def difference(self, cell: Cell, level: float) -> ImageInterval | None:
        """A cell's mean difference to the baseline over its pairs, with the interval of resampled images."""
        first = self.mean_of([run for run, _ in cell.pairs])
        second = self.mean_of([run for _, run in cell.pairs])
        return difference(first, second, level=level) if first is not None and second is not None else None


def _resample(run: Run, resamples: int, problems: list[str], cache_dir: Path | None) -> Resampled | None:
    """A run's resampled scores, from the cache where they are there."""
    assert run.folder is not None
    place = None
    if cache_dir is not None:
        with suppress(OSError):  # told when the matches are read
            place = place_of(cache_dir, run.folder / MATCHES, resamples, _SEED)
    kept = read_resampled(place) if place is not None else None
    if kept is not None:
        return kept if _is_of(run, kept.point["ap"], problems) else None
    matches = matches_of(run, problems)
    if matches is None:
        return None
    made = resample(matches, resamples, _SEED)
    if place is not None:
        write_resampled(place, made)
    return made


def matches_of(run: Run, problems: list[str]) -> Matches | None:
    """A run's matches; None, with a sentence, where they are damaged or not those of its record."""
    assert run.folder is not None
    path = run.folder / MATCHES
    try:
        found = read_matches(path)
        ap = scores(found)["ap"]
    except UserError as error:
        problems.append(str(error))
        return None
    except (IndexError, ValueError) as error:  # arrays that do not fit each other
        problems.append(f"{path} is damaged ({error}): evaluate the run again to make it")
        return None
    return found if _is_of(run, ap, problems) else None


def _is_of(run: Run, ap: float | None, problems: list[str]) -> bool:
    """Whether matches that give this AP are those of a run's record; a sentence where they are not."""
    assert run.folder is not None
    known = ap is not None and not math.isnan(ap)
    if known == (run.record.ap is not None) and abs((ap if known and ap else 0.0) - (run.record.ap or 0.0)) <= _OFF:
        return True
    problems.append(
        f"{run.folder / MATCHES} is not of the evaluation in the record beside it: there is no interval from it"
    )
    return False
