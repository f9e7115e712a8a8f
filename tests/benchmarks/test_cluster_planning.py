"""The simulation of suites on clusters, against what can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.cluster_planning import HOUR, Cluster, simulate

CALM = Cluster(preemptions=0.0, failures=0.0)


def test_without_a_loss_every_cell_costs_its_steps_its_checkpoints_and_a_start() -> None:
    cluster = replace(CALM, gpus=16, cells=5, steps=2500, every=1000, step=2.0, checkpoint=10.0, start=30.0)
    outcome = simulate(cluster)
    one = 30.0 + 2500 * 2.0 + 3 * 10.0  # the last checkpoint is that of the end
    assert outcome.allocated == pytest.approx(5 * one)
    assert outcome.makespan == pytest.approx(3 * one)  # two side by side
    assert outcome.share == pytest.approx(5000 / one)


@pytest.mark.parametrize("every", [100, 1000, 4000])
def test_failures_cost_what_the_closed_form_says(every: int) -> None:
    """Daly's model (Future Generation Computer Systems 22, 2006): the time for one interval of useful work t with
    checkpoint c, restart r and exponential failures of rate f is exp(f r) (exp(f (t + c)) - 1) / f."""
    cluster = replace(
        CALM, gpus=800, cells=100, steps=200_000, every=every, failures=1 / 16, start=60.0, checkpoint=5.0
    )
    rate, useful = 8 / 16 / HOUR, every * cluster.step
    expected = math.exp(rate * 60.0) * (math.exp(rate * (useful + 5.0)) - 1) / rate
    assert simulate(cluster, seed=3).share == pytest.approx(useful / expected, rel=0.02)


def test_a_preemption_that_is_told_loses_no_step() -> None:
    """Each costs a start, the step under way and a checkpoint, however rarely states are saved."""
    cluster = replace(CALM, gpus=800, cells=50, every=180_000, preemptions=0.5, start=60.0, checkpoint=5.0)
    outcome = simulate(cluster)
    assert outcome.preempted > 500
    ends = 50 * (60.0 + 5.0)
    assert outcome.allocated - outcome.useful == pytest.approx(ends + outcome.preempted * 65.0, rel=0.01)
    untold = simulate(replace(cluster, told=False, every=1000))
    assert untold.allocated - untold.useful > 4 * (outcome.allocated - outcome.useful)


def test_more_machines_finish_earlier_at_the_same_share() -> None:
    outcomes = [simulate(replace(Cluster(preemptions=1 / 8), gpus=gpus)) for gpus in (64, 256, 1000)]
    assert outcomes[0].makespan > 3 * outcomes[1].makespan > 6 * outcomes[2].makespan
    assert max(o.share for o in outcomes) - min(o.share for o in outcomes) < 0.01
