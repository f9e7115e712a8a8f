"""Runs of a method that keeps images of earlier steps: taken up again, and with other hidden boxes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cli import main
from harness.config import compose
from harness.config.run import settings_of
from harness.engine import build, checkpoint
from tests.harness.engine.test_lost_pictures import command, make_data

pytestmark = pytest.mark.timeout(300)

STEPS = 8
# Two lanes of 2 + 2 images, each with a cache of 8: full after four steps.
MIXPL = [
    *("method=mixpl", "method.burn_in=0", "method.cache_size=8", "method.score=0.06", "method.erase=true"),
    *("batch.micro=4", f"schedule.steps={STEPS}", "checkpointing.every=1", "checkpointing.keep=20", "logging.every=1"),
    "method.adaptive={images: 8, share: 5}",  # thresholds that let much pass, from the second step on
]


def trained(run_dir: Path) -> dict[str, Any]:
    state = checkpoint.newest(run_dir)
    assert state is not None
    assert state["step"] == STEPS
    return state["method"]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def gates(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["metrics"]["mosaic_gate"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("pipeline", ["dali", "torchvision"])
def test_a_run_taken_up_with_half_a_cache_and_with_a_full_one_ends_the_same(tmp_path: Path, pipeline: str) -> None:
    data = make_data(tmp_path / "data")
    more = [*MIXPL, f"pipeline={pipeline}", "pipeline.threads=1"]
    assert main(command(data, tmp_path / "whole", *more)) == 0
    assert gates(tmp_path / "whole") == [0.0] * 4 + [1.0] * 4
    known = json.loads((tmp_path / "whole" / "record.json").read_text())["per_class"]["thing"]
    threshold = float(trained(tmp_path / "whole")["adaptive.thresholds"][0])
    assert known["pseudo_threshold"] == pytest.approx(100 * threshold)
    assert threshold != pytest.approx(0.06)
    for step in (2, 5):
        run_dir = shutil.copytree(tmp_path / "whole", tmp_path / f"from{step}")
        for path in run_dir.glob("checkpoints/step-*.pt"):
            if path != checkpoint.path_of(run_dir, step):
                path.unlink()
        (run_dir / "record.json").unlink()
        assert main(command(data, run_dir, *more)) == 0
        assert json.loads((run_dir / "record.json").read_text())["resumed_from"] == [step]
        assert same(trained(tmp_path / "whole"), trained(run_dir))


def test_hidden_boxes_do_not_decide_which_images_are_seen(tmp_path: Path) -> None:
    """The official loader draws an image anew if its hidden boxes leave the strong view."""
    weights, labeled = [], set()
    for name in ("one", "other"):
        data = make_data(tmp_path / name)
        if name == "other":
            content = json.loads((data / "train.json").read_text())
            for box in content["annotations"]:
                if box["image_id"] not in labeled:
                    box |= {"bbox": [0, 0, 3, 3], "area": 9}  # in the corner, which zooming cuts off
            content["annotations"] = [
                box for box in content["annotations"] if box["image_id"] in labeled or box["image_id"] % 2
            ]
            (data / "train.json").write_text(json.dumps(content))
        overrides = command(data, tmp_path / f"run-{name}", *MIXPL, "pipeline=torchvision", "pipeline.threads=0")
        labeled = set(build.data(settings_of(compose.load(overrides[1:]))).split.labeled_ids.tolist())
        assert len(labeled) == 20
        assert main(overrides) == 0
        weights.append(trained(tmp_path / f"run-{name}"))
    assert same(*weights)
