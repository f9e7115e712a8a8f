"""Every mistake ends in one sentence that names the thing, and in exit code 2 (or the one that the case states)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.bad_input import images, values
from tests.bad_input.case import Case, ids

pytestmark = pytest.mark.timeout(60)

TABLES = [images, values]
CASES = [case for table in TABLES for case in table.CASES]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_mistake_is_told_in_one_sentence(case: Case, check: Callable[[Case], None]) -> None:
    check(case)
