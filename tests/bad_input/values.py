"""Mistakes on the command line: values of the wrong type or size, keys that are not known."""

from __future__ import annotations

from tests.bad_input.case import Case

TRAIN = "train data=custom data.root={pets} device=cpu schedule=smoke detector.weights=scratch run_dir={tmp}/run"

CASES = [
    Case("unknown method", f"{TRAIN} method=nonsense", "nonsense"),
    Case("share of nothing", f"{TRAIN} split.percent=0", "split.percent"),
]
