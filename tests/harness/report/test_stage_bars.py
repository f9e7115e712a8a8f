"""Stacked bars of profiles: their order and their widths, and how a report finds them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.report import stage_bars

STAGES = {name: {"mean": 2.0} for name in ("rest", "backward", "own", "wait")}
PROFILE = {"what": {"method": "m", "detector": "d", "device": "cpu"}, "step": {"stages_ms": STAGES}}


def test_stages_stand_in_the_order_of_a_step() -> None:
    assert stage_bars.ordered(STAGES) == ["wait", "own", "backward", "rest"]


def test_widths_are_proportional() -> None:
    drawn = stage_bars.svg({"a": {"wait": 1.0, "backward": 3.0}})
    patches = re.findall(r'<path d="M ([\d.]+) [\d.]+ \n?L ([\d.]+) [^"]*"[^>]*clip-path', drawn)
    widths = [abs(float(b) - float(a)) for a, b in patches]
    assert any(3 * first == pytest.approx(second, rel=1e-3) for first in widths for second in widths)


def test_a_report_finds_profiles_and_tells_of_what_is_none(tmp_path: Path) -> None:
    problems: list[str] = []
    assert stage_bars.read(tmp_path, problems) == {}
    for name in ("profile.json", "profile_2.json"):
        (tmp_path / name).write_text(json.dumps(PROFILE))
    (tmp_path / "profile_bad.json").write_text("[1]")
    found = stage_bars.read(tmp_path, problems)
    assert list(found) == ["m, d, cpu", "m, d, cpu (profile_2)"]
    assert found["m, d, cpu"]["wait"] == 2.0
    assert len(problems) == 1
    assert "profile_bad.json is no profile" in problems[0]
