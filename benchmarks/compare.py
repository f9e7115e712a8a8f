"""Runs the benchmarks, saves what they took, and compares it with the baseline of the same kind of machine.

    python benchmarks/compare.py [--write] [--bound 1.3] [--out FILE] [ARGUMENTS OF PYTEST]

Every benchmark's median is divided by that of a reference workload, measured before and after: a slower or busier
machine of the same kind slows both, and the quotient stays. A quotient that has grown by more than the bound is a
regression: it is printed, and the exit code is 1. `--write` makes the new figures the baseline. Without a baseline
nothing is run, since nothing could fail: the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BASELINES = Path(__file__).parent / "baselines"
BOUND = 1.3  # times slower than the baseline; noise of the quotient on a machine that does other things stays below


def reference_seconds() -> float:
    """CPU seconds of a fixed workload: products of matrices, passes over memory, and a loop of Python."""
    rng = np.random.default_rng(0)
    matrix, wide = rng.standard_normal((384, 384)), rng.standard_normal(4_000_000)
    seconds = []
    for _ in range(7):
        begin = time.process_time()
        for _ in range(4):
            matrix @ matrix
            np.sqrt(np.abs(wide)).sum()
        sum(k * k for k in range(400_000))
        seconds.append(time.process_time() - begin)
    return float(np.median(seconds))


def machine_kind() -> str:
    """Processor and number of cores, as a file name."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{model} {len(os.sched_getaffinity(0))} cores").strip("-").lower()


@dataclass(frozen=True)
class Change:
    """A benchmark beside its baseline."""

    name: str
    before: float | None  # quotient with the reference workload; None for a benchmark that is new
    now: float

    @property
    def times(self) -> float:
        """How many times slower it is; 1 for a new one."""
        return self.now / self.before if self.before else 1.0


def compared(baseline: Mapping[str, float], found: Mapping[str, float]) -> list[Change]:
    """Every benchmark that was run, the one that became slowest first."""
    changes = [Change(name, baseline.get(name), value) for name, value in found.items()]
    return sorted(changes, key=lambda change: -change.times)


def quotients(report: Mapping[str, Any], reference: float) -> dict[str, float]:
    """Name -> median over that of the reference workload, from pytest-benchmark's JSON."""
    return {one["fullname"]: one["stats"]["median"] / reference for one in report["benchmarks"]}


def regressions(changes: list[Change], bound: float) -> list[str]:
    """A line for each that is slower than the bound allows."""
    return [
        f"{change.name}: {change.times:.2f} times the baseline ({change.before:.4g} -> {change.now:.4g})"
        for change in changes
        if change.times > bound
    ]


def run(arguments: list[str]) -> dict[str, Any]:
    """pytest-benchmark's JSON, and the seconds of the reference workload."""
    before = reference_seconds()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", "--benchmark-only", "-q", f"--benchmark-json={file}", *arguments]
        code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
        if not file.exists() or not file.stat().st_size:
            raise SystemExit(code or 1)
        report = json.loads(file.read_bytes())
    return {"reference": (before + reference_seconds()) / 2, "code": code, "report": report}


def main(arguments: list[str] | None = None) -> int:
    """Gives the exit code: 0, 1 for a regression, 2 without a baseline, pytest's own where a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the figures the baseline of this kind of machine")
    parser.add_argument("--bound", type=float, default=BOUND, help="how many times slower is a regression")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="where the figures are saved")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="folder of the baselines")
    given, rest = parser.parse_known_args(arguments)
    baseline = given.baselines / f"{machine_kind()}.json"
    if not given.write and not baseline.exists():
        print(
            f"there is no baseline of this kind of machine ({baseline.name} in {given.baselines}): "
            "make benchmarks ARGS=--write measures one, when nothing else runs",
            file=sys.stderr,
        )
        return 2
    done = run(rest or ["benchmarks"])
    found = quotients(done["report"], done["reference"])
    figures = {"machine": machine_kind(), "reference_seconds": done["reference"], "quotients": found}
    seconds = {one["fullname"]: one["stats"]["median"] for one in done["report"]["benchmarks"]}
    given.out.write_text(json.dumps({**figures, "seconds": seconds}, indent=1) + "\n")
    if given.write:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(baseline.read_text())["quotients"] if baseline.exists() else {}
        baseline.write_text(json.dumps({**figures, "quotients": {**before, **found}}, indent=1, sort_keys=True) + "\n")
        print(f"{len(found)} figures written to {baseline}")
        return int(done["code"])
    changes = compared(json.loads(baseline.read_text())["quotients"], found)
    slower = regressions(changes, given.bound)
    new = sum(change.before is None for change in changes)
    print(
        f"{len(changes)} benchmarks, {new} of them without a baseline, {len(slower)} slower than {given.bound} times it"
    )
    for line in slower:
        print(line)
    return int(done["code"]) or int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
