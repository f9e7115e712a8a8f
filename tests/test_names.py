"""Names that mean one thing: no two public classes or functions of the packages share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("harness", "detectors", "pipelines")

# What may share a name, and why.
ALLOWED = {
    "train": "in the Python API, and the loop behind it",
    "Run": "in the Python API, and one in a report",
    "run": "what a command does, and the part of the program behind it",
    "warp": "an operator of DALI's graph is called as the kernel that it runs",
    "render": "the same, and a drawing of shapes",
    "normalize": "the same",
    "recolor": "the same",
    "shrink": "the same",
    "accumulate": "gradients in the loop, matches in the evaluation",
    "load": "a configuration, and the runs of a report",
    "score": "detections, and a cell of a report, whose templates use it as a filter",
    "Analysis": "of the matches of one evaluation, and of a section of a report",
    "analyse": "the same",
    "interval": "of bootstrap draws, and in words",
    "show": "a report on a terminal, and a gallery of pictures",
    "measure": "pseudo labels, and a user's own data",
    "encode": "boxes, and a trained network's file",
    "read": "a checkpoint, a trained network's file, and the run that a detector starts from",
}


def public_names() -> dict[str, list[str]]:
    """Public classes and functions at the top of a module -> the files that define them."""
    found = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    found[node.name].append(str(file.relative_to(ROOT)))
    return found


def test_no_two_public_things_share_a_name() -> None:
    shared = {name: files for name, files in public_names().items() if len(files) > 1 and name not in ALLOWED}
    assert not shared, "rename one of each, or say in ALLOWED why they share it"


def test_what_is_allowed_to_share_a_name_still_does() -> None:
    names = public_names()
    assert [name for name in ALLOWED if len(names[name]) < 2] == []
