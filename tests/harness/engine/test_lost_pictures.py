"""Pictures that go bad, away or are given back while a run is under way: it goes on, and loses nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detectors.methods.method import Method
from detectors.methods.soft_teacher import SoftTeacher
from detectors.methods.supervised import Supervised
from harness.cli import main
from harness.core.types import Batch
from harness.engine import checkpoint

pytestmark = pytest.mark.timeout(300)

COUNT = 40


def make_data(root: Path) -> Path:
    """COCO annotations of 40 training and 4 evaluation pictures of 64 px, each with one box."""
    rng = np.random.default_rng(0)
    for part, count in (("train", COUNT), ("val", 4)):
        (root / part).mkdir(parents=True)
        images, boxes = [], []
        for number in range(1, count + 1):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(root / part / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
            box = {"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 24, 30], "area": 720}
            boxes.append({**box, "iscrowd": 0})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
        (root / f"{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


def command(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        "train", "data=custom", f"data.root={data}", "detector.weights=scratch", "schedule=smoke", "schedule.steps=10",
        "split.percent=50", "batch.labeled=4", "batch.unlabeled=4", "evaluation.every=null", "device=cpu",
        "logging.loggers=[]", f"cache_dir={data.parent / 'cache'}", f"run_dir={run_dir}", *overrides,
    ]  # fmt: skip


def record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "record.json").read_text())


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[list[int]]]]:
    """at(method, step, what): `what` happens in the first forward of a step; gives the labelled ids of all forwards."""

    def watch(method: type[Method], step: int, what: Callable[[], Any]) -> list[list[int]]:
        forward, seen, done = method.forward, [], []

        def watched(self: Any, batch: Batch, now: int) -> Any:
            seen.append(batch.labeled_ids.tolist())
            if now == step and not done:
                done.append(what())
            return forward(self, batch, now)

        monkeypatch.setattr(method, "forward", watched)
        return seen

    yield watch
    monkeypatch.undo()


def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_pictures_may_go_bad_and_come_back_between_two_starts(
    data: Path, tmp_path: Path, at: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bad at the first start: 3. At the second: 5 (empty), 9 (gone), and 3 again whole."""
    seen = at(Supervised, -1, stop)
    assert main(command(data, tmp_path / "whole")) == 0
    undisturbed, third = list(seen), (data / "train" / "3.png").read_bytes()
    (data / "train" / "3.png").write_bytes(b"")
    seen = at(Supervised, 4, stop)
    assert main(command(data, tmp_path / "run")) == 143
    first = list(seen)
    (data / "train" / "3.png").write_bytes(third)
    (data / "train" / "5.png").write_bytes(b"")
    (data / "train" / "9.png").unlink()
    seen.clear()
    assert main(command(data, tmp_path / "run")) == 0
    assert "continuing from step 5" in capfd.readouterr().err
    result = record(tmp_path / "run")
    assert (result["status"], result["bad_images"]) == ("ok", 2)
    assert result["labeled_images"] == record(tmp_path / "whole")["labeled_images"] == 20
    for before, now, bad in ((undisturbed[:5], first, {3}), (undisturbed[5:], seen, {5, 9})):
        for a, b in zip(chain(*before), chain(*now), strict=True):
            assert (b == a) == (a not in bad)
            assert b not in bad


@pytest.mark.parametrize(
    ("pipeline", "method", "micro"),
    [("dali", Supervised, "null"), ("dali", SoftTeacher, "4"), ("torchvision", SoftTeacher, "4")],
)
def test_a_folder_that_goes_away_costs_no_step(
    data: Path, tmp_path: Path, at: Any, capfd: pytest.CaptureFixture[str], pipeline: str, method: Any, micro: str
) -> None:
    """Also in the middle of a step: with torchvision the second micro-batch of step 4 is missing."""
    name = {Supervised: "supervised", SoftTeacher: "soft_teacher"}[method]
    options = (f"method={name}", f"batch.micro={micro}", f"pipeline={pipeline}", "schedule.steps=16")
    assert main(command(data, tmp_path / "whole", *options)) == 0
    away = data / "elsewhere"
    at(method, 4, lambda: (data / "train").rename(away))
    capfd.readouterr()
    assert main(command(data, tmp_path / "run", *options)) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ssodbench:")]
    assert len(told) == 1
    assert "images" in told[0]
    assert "start the same command again" in told[0]
    state = checkpoint.newest(tmp_path / "run")
    assert state is not None
    assert f"after step {state['step']} is saved" in told[0]
    assert 4 <= state["step"] <= 10
    assert state["pipeline"]["bad_images"] == {}
    if pipeline == "torchvision" and micro == "4":
        assert state["step"] == 4
    assert record(tmp_path / "run")["status"] == "failed"
    away.rename(data / "train")
    assert main(command(data, tmp_path / "run", *options)) == 0
    results = [record(tmp_path / run) for run in ("whole", "run")]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[1]["resumed_from"] == [state["step"]]
    assert results[1]["bad_images"] == 0


def test_error_policy_stops_an_evaluation_and_saves(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half a PNG, whose header is whole."""
    path = data / "val" / "2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    options = ("pipeline.on_bad_image=error", "evaluation.every=6")
    assert main(command(data, tmp_path / "run", *options)) == 2
    told = capfd.readouterr().err
    assert f"{path}: cannot be decoded; repair it" in told
    assert "the state after step 6 is saved" in told
    path.write_bytes(whole)
    assert main(command(data, tmp_path / "run", *options)) == 0
    path.write_bytes(whole[: len(whole) // 2])
    evaluate = ["evaluate", f"run_dir={tmp_path / 'run'}", "device=cpu", f"cache_dir={tmp_path / 'cache'}"]
    assert main(evaluate) == 0
    assert main([*evaluate, "pipeline.on_bad_image=error"]) == 2
    assert f"{path}: cannot be decoded" in capfd.readouterr().err


def test_another_number_of_threads_is_told_and_recorded(
    data: Path, tmp_path: Path, at: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    at(Supervised, 4, stop)
    try:
        assert main(command(data, tmp_path / "run", "threads=1", "schedule.steps=6")) == 143
        assert record(tmp_path / "run")["environment"]["threads"] == 1
        assert main(command(data, tmp_path / "run", "threads=2", "schedule.steps=6")) == 0
    finally:
        torch.set_num_threads(before)
    assert "was computed with threads=1 and goes on with threads=2" in capfd.readouterr().err
    assert record(tmp_path / "run")["environment"]["threads"] == [1, 2]
