"""What a mistake of a user looks like: a command, what is wrong around it, and what the answer must name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Case:
    """One mistake.

    In `command` and `names` `{tmp}` stands for an empty folder of the case's own, which is also its working folder,
    and `{pets}` for a healthy dataset in COCO's format: train.json and val.json beside the picture folders train and
    val, 16 and 4 pictures of 64 px, the classes cat and dog. `{pets}` is read only; `prepare` may copy it.
    """

    name: str
    command: str | list[str]  # split at spaces where it is a text
    names: str | tuple[str, ...]  # what the sentence must contain: the key, file or image, and the remedy
    prepare: Callable[[Path], Any] | None = None  # gets the case's folder
    patch: Callable[[pytest.MonkeyPatch, Path], Any] | None = None  # injects what the machine would refuse
    code: int = 2


def ids(cases: list[Case]) -> list[str]:
    """The names of the cases, each of which may appear once."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return names
