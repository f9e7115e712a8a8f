"""The training step under several settings, in alternating rounds: `ssodbench profile 'profile.sweep={KEY: [...]}'`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from harness.config.run import RunSettings
from harness.core.distributed import World
from harness.core.stages import StepTimes
from harness.core.stopping import StopRequest
from harness.core.types import UserError
from harness.engine.profile import ratio
from harness.engine.step_profile import build_run, measure, open_data, timing

SWEPT = (
    "batch.micro",
    "pipeline.threads",
    "pipeline.prefetch",
    "precision",
    "channels_last",
    "compile",
    "threads",
)  # keys that may be swept
CHANGES_RESULT = ("batch.micro", "precision", "channels_last", "compile")
MOST = 24  # combinations


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, as key -> value.

    Raises:
        UserError: a key that is not swept, no values, or too many combinations.
    """
    for key, values in sweep.items():
        if key not in SWEPT:
            raise UserError(f"profile.sweep names {key!r}, which is none of {', '.join(SWEPT)}")
        if not values:
            raise UserError(f"profile.sweep.{key}=[] has no value: give at least one, or leave the key out")
    found = [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    if len(found) > MOST:
        raise UserError(f"profile.sweep makes {len(found)} combinations: give fewer values, for at most {MOST}")
    return found


def text_of(value: Any) -> str:
    """A value as the command line takes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def line_of(chosen: Mapping[str, Any]) -> str:
    """Settings as they are pasted into a command."""
    return " ".join(f"{key}={text_of(value)}" for key, value in chosen.items())


def sweep(
    variants: Sequence[tuple[dict[str, Any], RunSettings]],
    world: World,
    stop: StopRequest,
    seconds: float,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures the step of each variant in turns, the order reversed from round to round.

    Every turn builds its variant anew, so that one is in memory at a time.

    Args:
        variants: what is set, and the settings of the whole run.
        world: this process.
        stop: requests to stop.
        seconds: for each variant in all.
        rounds: turns of each.
        say: tells a person how it goes.

    Returns:
        `variants`: of each what is set, images_per_s, ms, stages_ms, rounds (images/s of each), and best_over_it, how
        many times faster the best one is, with its interval. `recommendation`: the best one's settings as a line.
        `same_speed`: lines of those whose interval does not exclude that they are as fast. `changes_result`: the keys
        that change what is computed.
    """
    data = open_data(variants[0][1])
    steps: list[list[StepTimes]] = [[] for _ in variants]
    rates: list[list[float]] = [[] for _ in variants]
    images = 0
    for turn in range(rounds):
        order = range(len(variants))
        for number in order if turn % 2 == 0 else reversed(order):
            chosen, settings = variants[number]
            run = build_run(settings, world, data)
            first = run.method.unlabeled_from
            images = sum(run.sampler.images(first))
            with closing(run.pipeline):
                found, _ = measure(run, stop, seconds / rounds, first)
            steps[number] += found
            rates[number].append(timing(found, images).images_per_s)
            say(f"round {turn + 1}/{rounds}  {line_of(chosen)}  {rates[number][-1]:.1f} images/s")
    best = max(range(len(variants)), key=lambda number: timing(steps[number], images).images_per_s)
    rows: list[dict[str, Any]] = []
    for number, (chosen, _) in enumerate(variants):
        times = timing(steps[number], images)
        own = {} if number == best else {"best_over_it": ratio(rates[best], rates[number])}
        row = {"settings": chosen, "images_per_s": times.images_per_s, "ms": times.ms, "stages_ms": times.stages_ms}
        rows.append({**row, "rounds": rates[number], **own})
    alike = [line_of(row["settings"]) for row in rows if "best_over_it" in row and not _slower(row["best_over_it"])]
    return {
        "variants": rows,
        "recommendation": line_of(variants[best][0]),
        "same_speed": alike,
        "changes_result": [key for key in CHANGES_RESULT if key in variants[0][0]],
    }


def _slower(best_over_it: Mapping[str, float | None]) -> bool:
    """Whether the interval excludes that a variant is as fast as the best one."""
    low = best_over_it["low"]
    return low is not None and low > 1
