"""Mistakes around `ssodbench profile`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.engine import build
from tests.bad_input.case import Case

STEP = (
    "profile data=custom data.root={pets} device=cpu detector.weights=scratch split.percent=50 batch.labeled=4 "
    "profile.seconds=0.1 profile.rounds=1"
)


def _no_memory(monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setattr(build, "experiment", refuse)


CASES = [
    Case("profile: no seconds", f"{STEP} profile.seconds=0", ("profile.seconds", "0")),
    Case("profile: too little memory", STEP, ("memory", "batch.micro", "precision=bf16"), patch=_no_memory),
    Case("profile: no GPU", f"{STEP} device=cuda", ("device=cuda", "device=cpu")),
    Case(
        "profile: unknown sweep key",
        f"{STEP} profile.sweep={{batch.mikro:[4]}}".split(),
        ("batch.mikro", "batch.micro"),
    ),
    Case("profile: sweep without values", f"{STEP} profile.sweep={{threads:[]}}".split(), ("profile.sweep.threads",)),
    Case(
        "profile: sweep of no list",
        f"{STEP} profile.sweep={{threads:2}}".split(),
        ("profile.sweep.threads", "list"),
    ),
    Case(
        "profile: sweep value of the wrong kind",
        f"{STEP} profile.sweep={{precision:[fp8]}}".split(),
        ("precision", "bf16"),
    ),
    Case(
        "profile: sweep that cannot be shared",
        f"{STEP} profile.sweep={{batch.micro:[3]}}".split(),
        ("batch.micro=3",),
    ),
    Case(
        "profile: sweep and pipelines",
        f"{STEP} profile.pipelines=[dali] profile.sweep={{threads:[1]}}".split(),
        ("profile.pipelines", "profile.sweep"),
    ),
    Case(
        "profile: trace below a file",
        f"{STEP} profile.trace={{tmp}}/f/t.json",
        "profile.trace={tmp}/f/t.json",
        prepare=lambda folder: (folder / "f").write_text("x"),
    ),
    Case(
        "profile: method without unlabelled images",
        f"{STEP} method=mean_teacher split.protocol=full",
        "unlabelled images",
    ),
]
