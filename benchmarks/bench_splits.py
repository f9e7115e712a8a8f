"""Opening, splitting and exporting a dataset of COCO's size, each opening in a process of its own.

    python -m pytest benchmarks/bench_splits.py --benchmark-only

The lines before the table give wall and processor seconds of the opening alone and the process's peak memory; the
table's times include starting Python.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.coco_scale import BOXES, IMAGES, write_annotations
from harness.data import prepare, split_files
from harness.data.datasets import CocoIndex, Dataset, coco_index
from harness.splits.protocols import Candidates, SplitOptions, labeled_count

PERCENTS, FOLDS = (1, 2, 5, 10), (1, 2, 3, 4, 5)

# What a fresh process runs. VmHWM is its own peak; getrusage would count that of the process that started it.
MEASURE = """
import json, re, sys, time
from pathlib import Path
{setup}
begin = time.perf_counter(), time.process_time()
{statement}
seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps([*seconds, peak]))
"""
OPEN = (
    "from harness.data.datasets import coco_index",
    "index = coco_index(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[2]))\nassert len(index.boxes)",
)
# How Soft Teacher's and mmdetection's scripts do it: everything into dictionaries, the chosen ones out again.
AS_DICTIONARIES = (
    "import numpy as np",
    """
content = json.load(open(sys.argv[1]))
np.random.seed(1)
count = len(content["images"])
chosen = set(np.random.choice(count, count // 10, replace=False).tolist())
for name, wanted in (("labeled", True), ("unlabeled", False)):
    images = [image for row, image in enumerate(content["images"]) if (row in chosen) == wanted]
    ids = {image["id"] for image in images}
    rows = [row for row in content["annotations"] if row["image_id"] in ids]
    with open(f"{sys.argv[2]}/{name}.json", "w") as file:
        json.dump({**content, "images": images, "annotations": rows}, file)
""",
)


Figures = dict[str, list[list[float]]]


def fresh(code: tuple[str, str], *arguments: Path) -> list[float]:
    """Wall seconds and processor seconds of the statement, and peak memory in MB, in a new process."""
    script = MEASURE.format(setup=code[0], statement=code[1])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return [float(v) for v in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)]


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_annotations(tmp_path_factory.mktemp("scale") / "instances_train2017.json")
    time.sleep(3)  # older than a clock tick, as any dataset is
    return path


@pytest.fixture(scope="module")
def index(annotations: Path) -> CocoIndex:
    return coco_index(annotations, annotations.parent, annotations.parent / "cache")


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    found: Figures = {}
    yield found
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for name, rounds in found.items():
            wall, processor, peak = np.median(rounds, 0)
            print(f"\n{name}: {wall:.2f} s ({processor:.2f} s of processor), peak {peak:,.0f} MB")


def test_first_open(benchmark: Any, annotations: Path, figures: Figures) -> None:
    """At most 4 s and 1 GB."""
    cache = annotations.parent / "cache of the first opening"

    def run() -> None:
        figures.setdefault("first open", []).append(fresh(OPEN, annotations, cache))

    benchmark.pedantic(run, setup=lambda: shutil.rmtree(cache, ignore_errors=True), rounds=3)
    assert max(peak for *_, peak in figures["first open"]) < 1000


def test_cached_open(benchmark: Any, annotations: Path, index: CocoIndex, figures: Figures) -> None:
    """At most 0.5 s and 300 MB."""
    assert len(index.boxes) == BOXES

    def run() -> None:
        figures.setdefault("cached open", []).append(fresh(OPEN, annotations, annotations.parent / "cache"))

    benchmark.pedantic(run, rounds=5)
    assert max(peak for *_, peak in figures["cached open"]) < 300


def options(protocol: str, percent: float = 10, fold: int = 1) -> SplitOptions:
    return SplitOptions(
        protocol=protocol, percent=percent, fold=fold, offset=0, index_file=None, empty_images=None, crowd_boxes=None,
        min_side=None,
    )  # fmt: skip


def test_sixty_splits(benchmark: Any, index: CocoIndex) -> None:
    """3 protocols x 4 percentages x 5 folds, at most 10 s together."""
    images = Candidates(index.image_ids, index.annotated(), index.boxed())
    nonempty = index.image_ids[images.boxed]
    rng = np.random.default_rng(0)
    table = {
        str(float(p)): {
            str(f): rng.permutation(len(nonempty))[: labeled_count(len(nonempty), p)].tolist() for f in FOLDS
        }
        for p in PERCENTS
    }

    def run() -> set[str]:
        found = set()
        for percent, fold in product(PERCENTS, FOLDS):
            for protocol in ("stac", "soft_teacher", "unbiased_teacher"):
                wanted = options(protocol, percent, fold)
                found.add(wanted.chosen.split(images, wanted, table).sha256)
        return found

    assert len(benchmark.pedantic(run, rounds=3)) == 60


def test_resolve_and_sources(benchmark: Any, index: CocoIndex) -> None:
    """What a run does after opening its dataset."""
    dataset = Dataset("scale", index, index)
    wanted = options("soft_teacher")

    def run() -> int:
        labeled, unlabeled = prepare.sources(dataset, prepare.resolve_split(dataset, wanted), wanted)
        assert unlabeled is not None
        return len(labeled) + len(unlabeled)

    assert benchmark.pedantic(run, rounds=3) > 0.98 * IMAGES


def test_export(benchmark: Any, index: CocoIndex, tmp_path: Path) -> None:
    """Both files of one split, without polygons."""
    dataset = Dataset("scale", index, index)
    split = prepare.resolve_split(dataset, options("soft_teacher"))
    labeled, _ = benchmark.pedantic(lambda: split_files.export_all(dataset, [split], tmp_path), rounds=2)
    assert labeled.name == "instances_train2017.1@10.json"


def test_files_as_the_original_scripts_write_them(
    benchmark: Any, annotations: Path, tmp_path: Path, figures: Figures
) -> None:
    """Both files of one split, through dictionaries: what 20 splits cost twenty times over."""

    def run() -> None:
        figures.setdefault("one split through dictionaries", []).append(fresh(AS_DICTIONARIES, annotations, tmp_path))

    benchmark.pedantic(run, rounds=1)
