"""A place in the schedule: a whole number of steps, or below 1 a fraction of the schedule."""

from __future__ import annotations

from typing import Annotated

from harness.core.validate import Limits

_PART = "or below 1 a fraction of the schedule"
StepsOrPart = Annotated[float, Limits(ge=0, le=1e9, whole_from=1, words=f"a whole number of steps, {_PART}")]
SomeStepsOrPart = Annotated[
    float, Limits(gt=0, le=1e9, whole_from=1, words=f"a whole number of steps above 0, {_PART}")
]


def in_steps(place: float, steps: int) -> int:
    """The place as a number of steps.

    Args:
        place: steps, or below 1 a fraction of the schedule.
        steps: length of the schedule.
    """
    return round(place * steps) if place < 1 else int(place)
