"""Many processes train what one trains: the same images and draws, the same losses and weights within 1e-5.

Gradients are summed in another order (within a rank first, then over ranks), in float64, and rounded once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config.step import StepShape
from harness.core import distributed
from harness.core.distributed import resolve_device
from harness.core.types import UserError
from harness.data.sampling import BatchSampler
from harness.engine import checkpoint
from harness.engine.taught import KEPT_IMAGES, read_kept

pytestmark = pytest.mark.timeout(900)

SMALL = [
    "data=shapes",
    "data.train_images=40",
    "data.val_images=10",
    "detector.weights=scratch",
    "detector.pyramid_channels=32",
    "detector.roi.hidden=32",
    "detector.roi.batch=16",
    "detector.rpn.train_proposals=[50,30]",
    "detector.rpn.test_proposals=[50,30]",
    "augment=small",
    "schedule=small",
    "schedule.steps=20",
    "schedule.warmup_steps=2",
    "schedule.optimizer.name=sgd",
    "schedule.optimizer.lr=0.01",
    "schedule.clip_norm=1.0",
    "split.percent=25",
    "batch.micro=2",
    "device=cpu",
    "logging.every=1",
    "logging.loggers=[]",
]

DENSE = [override for override in SMALL if not override.startswith(("detector.roi", "detector.rpn"))]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "harness", "train"]


def _train(
    folder: Path,
    name: str,
    devices: int,
    detector: str,
    *overrides: str,
    start: Sequence[str] = ("harness.cli", "train"),
    small: Sequence[str] = SMALL,
) -> Path:
    run_dir = folder / name
    place = [f"devices={devices}", f"cache_dir={folder / 'cache'}", f"run_dir={run_dir}"]
    done = subprocess.run(
        [sys.executable, "-m", *start, detector, *small, *overrides, *place],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run_dir


def _losses(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if line["kind"] == "train"]


def _weights(run_dir: Path) -> dict[str, Any]:
    state = checkpoint.newest(run_dir)
    assert state is not None
    return state["method"]


def _assert_equivalent(one: Path, many: Path, batch_norm: bool = False) -> None:
    for expected, given in zip(_losses(one), _losses(many), strict=True):
        assert given == pytest.approx(expected, abs=1e-5, rel=1e-5)
    expected_weights, given_weights = _weights(one), _weights(many)
    if batch_norm:
        expected_weights, given_weights = _parameters(expected_weights), _parameters(given_weights)
    assert expected_weights.keys() == given_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(given_weights[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    records = [json.loads((run / "record.json").read_text()) for run in (one, many)]
    for key in ("images_labeled", "images_unlabeled", "split_sha256", "config_sha256"):
        assert records[0][key] == records[1][key]


def _parameters(weights: dict[str, Any]) -> dict[str, Any]:
    """Without BatchNorm's running statistics, which are averaged over the ranks and so differ a little."""
    return {
        key: value
        for key, value in weights.items()
        if not key.startswith("teacher.") and not re.search("running_|num_batches", key)
    }


GROUP_NORM = "detector=faster_rcnn_r18"  # what it has from scratch: no batch statistics
BATCH_NORM = "detector=small"
CASES = {
    "supervised": ["method=supervised", "batch.labeled=8", "batch.unlabeled=0"],
    # One of the four micro-batches of a step often holds images without a pseudo box.
    "soft_teacher": ["method=soft_teacher", "batch.labeled=4", "batch.unlabeled=4", "method.burn_in=0.3"],
    # After a burn-in of one step the caches of the four micro-batches are full for the last three of 12; thresholds of
    # the classes are made after three steps.
    "mixpl": [
        *("method=mixpl", "batch.labeled=4", "batch.unlabeled=4", "method.burn_in=0.05", "method.cache_size=8"),
        *("method.adaptive={images: 12, share: 1}", "method.mosaic_side=[0.4,0.6]", "schedule.steps=12"),
    ],
}


@pytest.mark.parametrize("method", ["soft_teacher", pytest.param("mixpl", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(tmp_path: Path, method: str) -> None:
    one = _train(tmp_path, "one", 1, GROUP_NORM, *CASES[method])
    two = _train(tmp_path, "two", 2, GROUP_NORM, *CASES[method])
    _assert_equivalent(one, two)
    of_one, of_two = ([image.image_id for image in read_kept(run_dir).images] for run_dir in (one, two))
    assert of_one == of_two
    assert len(of_one) == KEPT_IMAGES


@pytest.mark.slow
def test_batch_norm_differs_in_its_running_statistics_alone(tmp_path: Path) -> None:
    one = _train(tmp_path, "one", 1, BATCH_NORM, *CASES["supervised"])
    two = _train(tmp_path, "two", 1, BATCH_NORM, *CASES["supervised"], start=TORCHRUN)
    assert json.loads((two / "record.json").read_text())["world_size"] == 2
    _assert_equivalent(one, two, batch_norm=True)


@pytest.mark.slow
def test_two_processes_train_the_baseline_as_one_does(tmp_path: Path) -> None:
    one = _train(tmp_path, "one", 1, GROUP_NORM, *CASES["supervised"])
    _assert_equivalent(one, _train(tmp_path, "two", 2, GROUP_NORM, *CASES["supervised"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", list(CASES))
def test_four_processes_train_what_one_trains(tmp_path: Path, method: str) -> None:
    one = _train(tmp_path, "one", 1, GROUP_NORM, *CASES[method])
    _assert_equivalent(one, _train(tmp_path, "four", 4, GROUP_NORM, *CASES[method]))


def test_more_devices_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="devices=2, but there are 1 GPUs: lower devices, or train on device=cpu"):
        resolve_device("auto", 2)
    assert resolve_device("cpu", 2) == "cpu"
    assert resolve_device("auto", 1) == "cuda"


@pytest.mark.slow
def test_consistent_teachers_queue_is_that_of_one_process(tmp_path: Path) -> None:
    """Scores of micro-batches on two devices go into one queue, in the order of the micro-batches."""
    detector = "detector=consistent_retina"
    own = [
        "method=consistent_teacher",
        "detector.depth=18",
        "detector.pyramid_channels=64",
        "detector.anchor_sizes=[8,16,32,64,128]",
    ]
    own += ["batch.labeled=4", "batch.unlabeled=4", "method.burn_in=0.2", "method.loss_from=0.4", "schedule.steps=5"]
    own += ["method.candidate_score=0.001"]  # the first scores are 0.01
    one, two = (_train(tmp_path, name, n, detector, *own, small=DENSE) for name, n in (("one", 1), ("two", 2)))
    _assert_equivalent(one, two)
    assert (_weights(two)["queue"] > 0).any()


def test_devices_that_cannot_share_a_step_are_refused(tmp_path: Path) -> None:
    command = ["train", *SMALL, "devices=3", "batch.labeled=8", f"cache_dir={tmp_path}", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-m", "harness.cli", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "3 devices cannot share" in done.stderr
    assert "Traceback" not in done.stderr


def _start(folder: Path, *overrides: str, start: Sequence[str] = ("harness.cli", "train")) -> subprocess.Popen[str]:
    """A run of two processes in a group of its own, as a shell starts it."""
    place = ["devices=2", f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}"]
    return subprocess.Popen(
        [sys.executable, "-m", *start, BATCH_NORM, *SMALL, *CASES["supervised"], *place, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "record.json").read_text())


@pytest.mark.parametrize(
    ("number", "send", "code"),
    [pytest.param(signal.SIGTERM, os.kill, 143, marks=pytest.mark.slow), (signal.SIGINT, os.killpg, 130)],
)
def test_signals_save_and_the_same_command_continues(
    tmp_path: Path, number: int, send: Callable[[int, int], None], code: int
) -> None:
    """SIGTERM reaches the launcher alone; Ctrl-C the whole group, and the workers once more through the launcher."""
    overrides = ("schedule.steps=60", "checkpointing.every=5")
    process = _start(tmp_path, *overrides)
    while process.poll() is None and not checkpoint.checkpoints(tmp_path / "run"):
        time.sleep(0.01)
    send(process.pid, number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert errors.count("start the same command again") == 1
    assert _record(tmp_path)["status"] == "interrupted"
    state = checkpoint.newest(tmp_path / "run")
    assert state is not None
    _, errors = _start(tmp_path, *overrides).communicate(timeout=300)
    assert (_record(tmp_path)["status"], _record(tmp_path)["resumed_from"]) == ("ok", [state["step"]]), errors


FAILING = """
import os

import torch

from detectors.methods.supervised import Supervised


class Failing(Supervised):
    def forward(self, batch, step):
        if step == 3 and os.environ["RANK"] == "1":
            raise {error}
        return super().forward(batch, step)
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory')", 1, "rank 1: out of memory on cpu: lower batch.micro"),
        pytest.param(
            "__import__('harness.core.types', fromlist=['types']).UserError('50 images are bad')",
            2,
            "rank 1: 50 images are bad",
            marks=pytest.mark.slow,
        ),
        pytest.param("KeyError('a bug')", 1, "KeyError: 'a bug'", marks=pytest.mark.slow),
        pytest.param(
            "SystemExit(os.kill(os.getpid(), 9))",
            137,
            "rank 1 was ended by SIGKILL (out of memory?)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_failure_of_one_rank_is_told_and_ends_the_run(tmp_path: Path, error: str, code: int, said: str) -> None:
    (tmp_path / "failing_method.py").write_text(FAILING.format(error=error))
    process = _start(tmp_path, "method._target_=failing_method.Failing")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert said in errors
    assert ("Traceback" in errors) == ("a bug" in said)
    if code != 137:
        record = _record(tmp_path)
        assert record["status"] == "failed"
        assert said.removeprefix("rank 1: ").split(":")[0] in record["error"] or "OutOfMemoryError" in record["error"]


@pytest.mark.slow
def test_bug_that_all_ranks_meet_is_shown_once(tmp_path: Path) -> None:
    start = "    def __init__(self, *arguments, **options):\n        raise KeyError('a bug')\n"
    (tmp_path / "failing_method.py").write_text(FAILING.format(error="ValueError") + "\n" + start)
    process = _start(tmp_path, "method._target_=failing_method.Failing")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert errors.count("KeyError: 'a bug'") == 1


@pytest.mark.slow
def test_logger_that_is_missing_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError('no wandb')")
    process = _start(tmp_path, "logging.loggers=[wandb]")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert errors.count("wandb, which is not installed") == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize("ratio", ["exact", "bernoulli"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_micro_batches(world_size: int, ratio: str) -> None:
    def draws(size: int) -> list[tuple[int, int, list[int], list[int]]]:
        found = []
        for rank in range(size):
            sampler = BatchSampler(23, 57, StepShape(8, 32, 5, ratio=ratio), seed=3, unlabeled_from=2)
            stream = sampler.stream(1, rank, size)
            for _ in range(3 * sampler.micro_batches // size):
                m = next(stream)
                found.append((m.step, m.index, m.labeled.tolist(), m.unlabeled.tolist()))
        return sorted(found)

    assert draws(world_size) == draws(1)
    assert len(draws(1)) == 24
    assert np.all([len(labeled) >= 1 for _, _, labeled, _ in draws(1)])


def test_micro_batches_are_gathered_in_the_order_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number i of rank r of two is micro-batch 2 i + r."""
    parts = {rank: [{"x": torch.tensor([2 * i + rank])} for i in range(3)] for rank in range(2)}

    def all_gather(ranks: list[torch.Tensor], own: torch.Tensor) -> None:
        for rank, into in enumerate(ranks):
            into.copy_(torch.stack([part["x"] for part in parts[rank]]))
        assert torch.equal(ranks[1], own)

    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
    world = distributed.World(1, 2, torch.device("cpu"))
    assert distributed.gather_micro_batches(world, parts[1])["x"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    alone = distributed.World(0, 1, torch.device("cpu"))
    assert distributed.gather_micro_batches(alone, parts[0])["x"].flatten().tolist() == [0, 2, 4]
    assert distributed.gather_micro_batches(alone, [{}]) == {}
