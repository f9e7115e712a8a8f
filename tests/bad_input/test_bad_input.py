"""Every mistake ends in one sentence that names the thing, and in exit code 2 (or the one that the case states)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_input.case import Case, ids

pytestmark = pytest.mark.timeout(60)

# Every module beside this one that has CASES is a table of them.
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "CASES" in path.read_text())
TABLES = [importlib.import_module(f"tests.bad_input.{name}") for name in NAMES if name != Path(__file__).stem]
CASES = [case for table in TABLES for case in table.CASES]
IDS = [f"{table.__name__.rpartition('.')[2]}: {name}" for table in TABLES for name in ids(table.CASES)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_mistake_is_told_in_one_sentence(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


def test_table_is_as_long_as_it_is_said_to_be() -> None:
    assert len(CASES) >= 250
