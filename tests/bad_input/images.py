"""Pictures that cannot be used, and what decides which pictures a run sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.bad_input.case import Case
from tests.bad_input.conftest import make_pets

START = "detector.weights=scratch device=cpu schedule=smoke run_dir={tmp}/run"
TRAIN = f"train data=custom data.root={{tmp}}/own {START}"
STRICT = f"{TRAIN} split.percent=50 pipeline.on_bad_image=error"


def _spoilt(file: str, content: bytes | None) -> Callable[[Path], None]:
    """A copy of the dataset in which a file has other content, or is missing."""

    def prepare(folder: Path) -> None:
        make_pets(folder / "own")
        path = folder / "own" / file
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return prepare


def _without_pictures(folder: Path) -> None:
    make_pets(folder / "own")
    for path in (folder / "own" / "train").iterdir():
        path.unlink()


CASES = [
    Case(
        "an empty picture is an error",
        STRICT,
        ("train/003.jpg is empty", "on_bad_image=skip"),
        _spoilt("train/003.jpg", b""),
    ),
    Case(
        "a text as a picture is an error",
        STRICT,
        ("train/003.jpg is not an image", "repair"),
        _spoilt("train/003.jpg", b"no"),
    ),
    Case(
        "a missing picture is an error", STRICT, ("train/003.jpg is missing", "repair"), _spoilt("train/003.jpg", None)
    ),
    Case(
        "an evaluation picture is empty", TRAIN, ("002.jpg (empty)", "put the files there"), _spoilt("val/002.jpg", b"")
    ),
    Case("no picture at all", TRAIN, ("16 of the 16 train pictures", "001.jpg (missing)"), _without_pictures),
    Case("unknown policy for bad pictures", f"train {START} pipeline.on_bad_image=warn", ("on_bad_image=warn", "skip")),
    Case(
        "unknown grouping",
        f"train {START} batch.group_by_aspect=both",
        ("batch.group_by_aspect=both", "joint", "separate"),
    ),
    Case(
        "Unbiased Teacher's paper without its index file",
        f"train data=custom data.root={{pets}} method=unbiased_teacher preset=paper {START} evaluation.every=null",
        ("split.index_file", "COCO_supervision.txt", "facebookresearch/unbiased-teacher"),
    ),
    Case(
        "a suite of several protocols",
        "suite suite=quick preset=paper runs_dir={tmp}/runs",
        ("supervised soft_teacher, stac stac", "split.protocol=NAME"),
    ),
]
