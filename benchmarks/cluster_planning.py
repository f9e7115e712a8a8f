"""How much of the time that a cluster gives a suite trains: a simulation of discrete events, to choose settings by.

A suite of cells is worked off by so many GPUs. A cell loses its machine to a pre-emption, of which it is told in time
to save, or to a failure, of which it is not. It goes back into the queue, starts again, and continues where it was
saved.

`python -m benchmarks.cluster_planning` prints the tables of docs/clusters.md. What is measured and what is assumed is
said beside each field of `Cluster`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

HOUR = 3600.0


@dataclass(frozen=True)
class Cluster:
    """What a suite meets. Times in seconds, rates per hour.

    Args:
        gpus: of the cluster.
        gpus_per_cell: of each run.
        cells: of the suite.
        steps: of each run; the papers' schedule.
        step: time of one; assumed, of the order of a ResNet-50 step on 8 GPUs.
        checkpoint: time to write one; measured for ResNet-50 with teacher and AdamW, 632 MB (docs/training.md).
        every: steps between checkpoints.
        start: from the job's start to its first steps; 12 s on the Slurm of the tests (two jobs on two cores), and
            more than doubled here for a dataset of COCO's size.
        requeue: from `scontrol requeue` until the job may start again: Slurm waits for credentials to expire (measured
            11 s with AuthInfo=cred_expire=10; 120 s is Slurm's default).
        preemptions: per cell and hour, each for `taken`; assumed.
        told: whether a pre-emption is told in time to save, as Slurm's grace time does; spot machines may not.
        failures: per GPU and hour; 419 interruptions of 16,384 GPUs in 54 days were reported for Llama 3 (arXiv
            2407.21783, section 3.3.4).
        taken: how long whoever is more urgent keeps the machine.
        repair: how long a failed node is missing.
    """

    gpus: int = 64
    gpus_per_cell: int = 8
    cells: int = 300
    steps: int = 180_000
    step: float = 0.5
    checkpoint: float = 0.85
    every: int = 1000
    start: float = 30.0
    requeue: float = 120.0
    preemptions: float = 0.0
    told: bool = True
    failures: float = 419 / (54 * 24 * 16_384)
    taken: float = 2 * HOUR
    repair: float = 12 * HOUR


@dataclass
class Outcome:
    """What a suite has cost."""

    useful: float = 0.0  # seconds of steps that count, over all cells
    allocated: float = 0.0  # seconds for which cells held their machines
    makespan: float = 0.0  # seconds until the last cell was done
    preempted: int = 0
    failed: int = 0

    @property
    def share(self) -> float:
        """Useful work over allocated time, 0 to 1."""
        return self.useful / self.allocated


def simulate(cluster: Cluster, seed: int = 0) -> Outcome:
    """A suite from its submission to its last cell."""
    rng = np.random.default_rng(seed)
    outcome, order = Outcome(), itertools.count()
    waiting = deque([cluster.steps] * cluster.cells)  # steps that each cell has still to do
    free = cluster.gpus // cluster.gpus_per_cell
    # (when, tie, whether machines come back, steps left of a cell that comes back into the queue, or 0)
    events: list[tuple[float, int, bool, int]] = []
    now = 0.0
    while True:
        while free and waiting:
            free -= 1
            left, held, why = _hold(cluster, waiting.popleft(), rng)
            outcome.allocated += held
            outcome.preempted += why == "preempted"
            outcome.failed += why == "failed"
            away = {"done": 0.0, "preempted": cluster.taken, "failed": cluster.repair}[why]
            heapq.heappush(events, (now + held + away, next(order), True, 0))
            if left:
                heapq.heappush(events, (now + held + cluster.requeue, next(order), False, left))
            else:
                outcome.makespan = max(outcome.makespan, now + held)
        if not events or (not waiting and all(came and not left for _, _, came, left in events)):
            break
        now, _, came, left = heapq.heappop(events)
        free += came
        if left:
            waiting.append(left)
    outcome.useful = cluster.cells * cluster.steps * cluster.step
    return outcome


def _hold(cluster: Cluster, left: int, rng: np.random.Generator) -> tuple[int, float, str]:
    """A cell from the start of its job until it is done or loses its machine.

    Returns:
        Steps that are left then, seconds for which it held the machine, and why it ended.
    """
    preempted = _draw(cluster.preemptions, rng)
    failed = _draw(cluster.failures * cluster.gpus_per_cell, rng)
    saves = math.ceil(left / cluster.every)
    done = cluster.start + left * cluster.step + saves * cluster.checkpoint
    if done <= min(preempted, failed):
        return 0, done, "done"
    end = min(preempted, failed)
    block = cluster.every * cluster.step + cluster.checkpoint
    blocks, rest = divmod(max(0.0, end - cluster.start), block)
    saved = int(blocks) * cluster.every
    if failed <= preempted or not cluster.told:
        return left - saved, end, "failed" if failed <= preempted else "preempted"
    under_way = min(cluster.every, math.ceil(rest / cluster.step))  # the step is finished, and the state saved
    return max(1, left - saved - under_way), end + cluster.step + cluster.checkpoint, "preempted"


def _draw(rate: float, rng: np.random.Generator) -> float:
    """Seconds until an event of so many per hour."""
    return float(rng.exponential(HOUR / rate)) if rate else math.inf


SCENES = {
    "failures alone": Cluster(),
    "a pre-emption every 8 h, told": Cluster(preemptions=1 / 8),
    "a pre-emption every hour, told": Cluster(preemptions=1.0),
    "a spot machine goes every 8 h, untold": Cluster(preemptions=1 / 8, told=False),
    "a spot machine goes every hour, untold": Cluster(preemptions=1.0, told=False),
}
INTERVALS = (100, 300, 1000, 3000, 10_000)
SIZES = (8, 64, 256, 1000)


def main() -> None:
    """Prints both tables as Markdown."""
    print("| 64 GPUs, checkpointing.every = | " + " | ".join(f"{every:,}" for every in INTERVALS) + " |")
    print("|---|" + "---|" * len(INTERVALS))
    for name, cluster in SCENES.items():
        shares = [simulate(replace(cluster, every=every)).share for every in INTERVALS]
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    print()
    print("| checkpointing.every = 1,000, GPUs = | " + " | ".join(f"{gpus:,}" for gpus in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name, cluster in SCENES.items():
        outcomes = [simulate(replace(cluster, gpus=gpus)) for gpus in SIZES]
        cells = [f"{100 * o.share:.1f} %, {o.makespan / 24 / HOUR:,.1f} days" for o in outcomes]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
