"""File names of splits: what stands for the share and the fold, and which share a name itself gives."""

from __future__ import annotations

import re
from pathlib import Path

SPLIT_NAME = re.compile(r"\.(\d+)@([\d.]+?)(-unlabeled)?$")


def index_path(pattern: str, percent: float, fold: int) -> Path:
    """A file name in which {percent} and {fold} stand for the split's; other braces are left alone."""
    return Path(pattern.replace("{percent}", f"{percent:g}").replace("{fold}", str(fold))).expanduser()


def names_percent(pattern: str) -> bool:
    """Whether a file name says which percentage it is made for: by {percent}, or as Soft Teacher's files do."""
    return "{percent}" in pattern or bool(SPLIT_NAME.search(Path(pattern).stem))
