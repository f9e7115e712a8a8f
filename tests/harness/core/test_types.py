"""What the shared types do, against plain Python over lists."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.core.types import ImageSource, Target


def make_source(counts: list[int], **more: Any) -> ImageSource:
    """Images with so many boxes each, all values distinct."""
    total, images = sum(counts), len(counts)
    return ImageSource(
        paths=[f"{row}.jpg" for row in range(images)],
        ids=np.arange(100, 100 + images, dtype=np.int64),
        sizes=np.arange(2 * images, dtype=np.int64).reshape(-1, 2) + 1,
        boxes=np.arange(4 * total, dtype=np.float32).reshape(-1, 4),
        labels=np.arange(1, total + 1, dtype=np.int64),
        scores=np.linspace(0, 1, total, dtype=np.float32),
        offsets=np.cumsum([0, *counts]).astype(np.int64),
        **more,
    )


def boxes_of(source: ImageSource) -> list[list[tuple[Any, ...]]]:
    """(box, label, score) of each image."""
    rows = zip(source.boxes.tolist(), source.labels.tolist(), source.scores.tolist(), strict=True)
    flat = [(tuple(box), label, score) for box, label, score in rows]
    return [flat[a:b] for a, b in zip(source.offsets[:-1], source.offsets[1:], strict=True)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data(), st.booleans())
def test_selected_images_keep_their_boxes(counts: list[int], data: st.DataObject, annotated: bool) -> None:
    source = make_source(counts, annotated=annotated)
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=10))
    chosen = source.select(rows)
    assert chosen.paths == [source.paths[row] for row in rows]
    assert chosen.ids.tolist() == [source.ids[row] for row in rows]
    assert chosen.sizes.tolist() == [source.sizes[row].tolist() for row in rows]
    assert boxes_of(chosen) == [boxes_of(source)[row] for row in rows]
    assert chosen.annotated is annotated
    for field in fields(ImageSource):
        before, after = getattr(source, field.name), getattr(chosen, field.name)
        assert not isinstance(before, np.ndarray) or before.dtype == after.dtype


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_targets_give_back_the_boxes_that_they_came_from(counts: list[int]) -> None:
    source = make_source(counts)
    targets = [source.target(row) for row in range(len(source))]
    assert [len(target) for target in targets] == counts
    bare = make_source([0] * len(counts), annotated=False)
    again = bare.with_targets(targets)
    assert boxes_of(again) == boxes_of(source)
    assert again.annotated
    assert not bare.annotated
    assert again.offsets.dtype == np.int64


def test_no_target_at_all() -> None:
    source = make_source([2, 1]).select([]).with_targets([])
    assert (len(source), source.boxes.shape, source.offsets.tolist()) == (0, (0, 4), [0])


def test_a_target_has_the_kinds_that_methods_expect() -> None:
    target = make_source([2]).target(0)
    assert isinstance(target, Target)
    kinds = (target.boxes.dtype, target.labels.dtype, target.scores.dtype)
    assert kinds == (torch.float32, torch.int64, torch.float32)


def test_the_stored_file_is_read_as_it_is(tmp_path: Path) -> None:
    source = make_source([0, 1])
    (tmp_path / "a.jpg").write_bytes(bytes(range(256)))
    source = ImageSource(**{**vars(source), "paths": [str(tmp_path / "none.jpg"), str(tmp_path / "a.jpg")]})
    assert source.read(1).tobytes() == bytes(range(256))
    with pytest.raises(OSError, match="No such file"):
        source.read(0)
    source = ImageSource(**{**vars(source), "paths": [str(tmp_path)] * 2})
    with pytest.raises(OSError, match="directory"):
        source.read(0)


def test_the_types_are_light() -> None:
    """What only opens annotations needs neither torch nor what composes configurations."""
    heavy = ("torch", "torch.distributed", "hydra", "omegaconf", "nvidia.dali", "numba", "pandas")
    script = f"import sys, harness.core.types; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), (torch.device("cpu"), True), ("cuda:0", False)])
def test_target_waits_for_what_is_read_on_the_cpu(device: torch.device | str, waits: bool) -> None:
    asked: list[bool] = []

    class Recorder:
        def to(self, _: torch.device | str, *, non_blocking: bool) -> Recorder:
            asked.append(non_blocking)
            return self

    one: Any = Recorder()
    Target(one, one, one).to(device)
    assert asked == [not waits] * 3
