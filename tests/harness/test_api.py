"""The Python API against the files of the commands, and the tour in the docs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import api
from harness.cli import main
from harness.core.types import UserError
from tests.harness.engine.conftest import pets_run  # noqa: F401  a fixture

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]


def test_a_run_is_opened_with_all_it_wrote(pets_run: Path) -> None:  # noqa: F811
    run = api.open_run(pets_run)
    record = json.loads((pets_run / "record.json").read_text())
    assert run.record.ap == record["ap"]
    assert run.config().method.name == "mean_teacher"
    own = json.loads((pets_run / "predictions.json").read_text())
    table = run.predictions()
    assert len(table) == len(own)
    assert table.iloc[3][["x", "y", "width", "height"]].tolist() == own[3]["bbox"]
    assert set(run.metrics().kind) >= {"train", "eval"}
    rows = api.records(pets_run.parent)
    assert rows.run_dir.tolist() == [str(pets_run)]
    assert rows.ap.tolist() == [record["ap"]]


def test_arrays_give_the_boxes_of_files(pets_run: Path, tmp_path: Path) -> None:  # noqa: F811
    rng, images = np.random.default_rng(1), []
    (tmp_path / "in").mkdir()
    for number, size in enumerate([(64, 64), (90, 50), (64, 64), (40, 120)]):
        images.append(rng.integers(0, 255, (*size, 3), np.uint8))
        Image.fromarray(images[-1]).save(tmp_path / "in" / f"{number}.png")
    command = ["predict", f"run_dir={pets_run}", f"images={tmp_path}/in", f"out={tmp_path}/out", "predict.score=0.02"]
    assert main([*command, "device=cpu"]) == 0
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    found = api.open_run(pets_run).network(device="cpu").detect(images, score=0.02)
    for number, boxes in enumerate(found):
        own = [row for row in rows if row["file_name"] == f"{number}.png"]
        assert len(own) == len(boxes.boxes) > 0
        assert boxes.names == [row["category_name"] for row in own]
        assert boxes.scores.tolist() == pytest.approx([row["score"] for row in own], abs=1e-5)
        corners = np.array([row["bbox"] for row in own])
        corners[:, 2:] += corners[:, :2]
        assert np.abs(corners - boxes.boxes).max() < 0.02


def test_exported_files_are_networks_too(pets_run: Path, tmp_path: Path) -> None:  # noqa: F811
    assert main(["export", f"run_dir={pets_run}", "network=student", f"out={tmp_path}/a.safetensors"]) == 0
    network = api.open_network(tmp_path / "a.safetensors", "cpu")
    assert (network.classes, network.about["network"]) == (["cat", "dog"], "student")
    assert network.detect([]) == []


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"split\.percents is not known"):
        api.load_config("split.percents=5")
    with pytest.raises(UserError, match=r"no record\.json"):
        api.records(ROOT / "docs")
    assert api.load_config(seed=7, channels_last=True, out=None).seed == 7


def test_an_array_of_another_kind_is_told(pets_run: Path) -> None:  # noqa: F811
    network = api.open_run(pets_run).network(device="cpu")
    with pytest.raises(UserError, match=r"images\[0\] must be an array \(height, width, 3\) of uint8"):
        network.detect([np.zeros((8, 8))])


def test_the_tour_runs(tmp_path: Path, cache_dir: Path) -> None:
    environment = {**os.environ, "SSODBENCH_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "docs" / "examples" / "tour.py"), "runs"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "mean_teacher: AP" in ran.stdout
    assert "boxes, the best:" in ran.stdout
