"""Places in the schedule: by steps and by fractions, and what is neither."""

from __future__ import annotations

import pytest

from harness.core.steps import SomeStepsOrPart, StepsOrPart, in_steps
from harness.core.types import UserError
from harness.core.validate import check


@pytest.mark.parametrize(
    ("place", "found"), [(0, 0), (0.5, 300), (0.001, 1), (1, 1), (7, 7), (5e3, 5000), (0.9999, 600)]
)
def test_steps_and_fractions(place: float, found: int) -> None:
    check(StepsOrPart, place, "key")
    assert in_steps(place, 600) == found


@pytest.mark.parametrize("place", [1.0, 1.5, 300.25, -1, -0.5, True, None, "0.5", float("nan"), 2e9])
def test_neither(place: object) -> None:
    with pytest.raises(UserError, match=r"key=.* must be a whole number of steps, or below 1 a fraction"):
        check(StepsOrPart, place, "key")


def test_none_at_all() -> None:
    check(StepsOrPart, 0, "key")
    with pytest.raises(UserError, match="key=0 must be a whole number of steps above 0"):
        check(SomeStepsOrPart, 0, "key")
