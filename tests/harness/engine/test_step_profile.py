"""`ssodbench profile` of a training step: its stages, its ceilings, and that measuring changes nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.cli import main
from harness.config import compose
from harness.config.run import settings_of
from harness.core.distributed import World
from harness.core.stages import Recorder, StepTimes, measured
from harness.core.stopping import StopRequest
from harness.core.types import ImageSource
from harness.engine import build, gpu_meter, step_profile
from harness.engine.loop import Counters, train
from harness.engine.step_profile import open_data, stand_in_labels, timing

pytestmark = pytest.mark.timeout(300)

SMALL = [
    *("data.train_images=24", "data.val_images=2", "detector.weights=scratch", "split.percent=50", "device=cpu"),
    *("batch.labeled=4", "batch.unlabeled=4", "schedule=smoke", "logging.loggers=[]"),
]
CPU = World(0, 1, torch.device("cpu"))
OWN = {"supervised": {"ema"}, "stac": {"ema"}, "mean_teacher": {"teacher", "ema"}, "soft_teacher": {"teacher", "ema"}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _settings(cache: Path, tmp_path: Path, *overrides: str) -> Any:
    return settings_of(compose.load([*SMALL, f"cache_dir={cache}", f"run_dir={tmp_path}", *overrides]))


def _trained(settings: Any, recorder: Recorder | None) -> tuple[str, Counters]:
    """Hash of the weights after the schedule, and what the loop itself counted."""
    run = build.experiment(settings, CPU, open_data(settings))
    counters, nothing = Counters(), lambda: None
    try:
        if recorder is None:
            train(run, counters, None, StopRequest(), nothing, nothing, nothing)
        else:
            with measured(recorder):
                train(run, counters, None, StopRequest(), nothing, nothing, nothing)
    finally:
        run.pipeline.close()
    return build.weights_sha256(run.method), counters


@pytest.mark.parametrize("method", ["soft_teacher", "unbiased_teacher"])
def test_weights_are_the_same_with_and_without_measuring(cache: Path, tmp_path: Path, method: str) -> None:
    settings = _settings(cache, tmp_path, f"method={method}", "method.burn_in=2", "schedule.steps=5", "batch.micro=4")
    recorder = Recorder(CPU.device)
    assert _trained(settings, recorder)[0] == _trained(settings, None)[0]
    assert len(recorder.steps()) == 5


def test_stages_sum_to_what_the_loop_counted(cache: Path, tmp_path: Path) -> None:
    settings = _settings(cache, tmp_path, "method=soft_teacher", "method.burn_in=0", "schedule.steps=8")
    recorder = Recorder(CPU.device)
    _, counters = _trained(settings, recorder)
    found = timing(recorder.steps(), 8)
    total = sum(values["mean"] for values in found.stages_ms.values()) * found.steps / 1000
    assert total == pytest.approx(counters.train_seconds, rel=0.05)
    assert found.ms * found.steps / 1000 == pytest.approx(counters.train_seconds, rel=0.05)
    assert sum(values["share"] for values in found.stages_ms.values()) == pytest.approx(1)
    waiting = sum(found.host_ms[name] for name in ("wait", "feed", "hand-over")) * found.steps / 1000
    assert waiting == pytest.approx(counters.wait_seconds, rel=0.05, abs=0.005)


@pytest.mark.parametrize("method", OWN)
def test_a_profile_names_every_stage_of_a_method(cache: Path, tmp_path: Path, method: str) -> None:
    out, trace = tmp_path / "new" / "profile.json", tmp_path / "trace.json"
    extra = [f"profile.trace={trace}"] if method == "soft_teacher" else []
    times = ["profile.seconds=0.4", "profile.rounds=2", f"out={out}", f"method={method}"]
    assert main(["profile", *SMALL, *times, *extra, f"cache_dir={cache}"]) == 0
    found = json.loads(out.read_text())
    step = found["step"]
    common = {"wait", "feed", "hand-over", "student", "losses", "backward", "gradients", "optimizer", "rest", "forward"}
    assert set(step["stages_ms"]) == common | OWN[method]
    assert sum(values["mean"] for values in step["stages_ms"].values()) == pytest.approx(step["ms"], rel=0.05)
    assert step["images_per_s"] == pytest.approx(1000 * step["images"] / step["ms"])
    assert step["images"] == (4 if method == "supervised" else 8)
    ceilings = found["ceilings"]
    assert ceilings["free_loader"]["gain"] == pytest.approx(
        ceilings["free_loader"]["images_per_s"] / step["images_per_s"]
    )
    assert ceilings["bottleneck"] in ("loader", "model")
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    if extra:
        events = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
        assert {"step", "teacher", "student", "backward", "aten::convolution"} <= events


def test_a_slow_loader_is_the_bottleneck(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(cache, tmp_path, "method=supervised", "pipeline=torchvision", "pipeline.threads=0")

    class Slow:
        def __init__(self, pipeline: Any) -> None:
            self._pipeline, self.bad_images = pipeline, {}

        def batches(self, step: int) -> Any:
            for batch in self._pipeline.batches(step):
                time.sleep(0.3)
                yield batch

        def close(self) -> None:
            self._pipeline.close()

    made = build.pipeline
    monkeypatch.setattr(build, "pipeline", lambda *given: Slow(made(*given)))
    found = step_profile.profile_step(settings, CPU, StopRequest(), 0.5, 1)
    assert found["ceilings"]["bottleneck"] == "loader"
    assert found["step"]["stages_ms"]["wait"]["median"] > 290
    assert found["ceilings"]["free_loader"]["gain"] > 2
    assert found["ceilings"]["loader_alone"]["images_per_s"] < 4 / 0.3


def test_percentiles_are_those_of_the_steps_and_missing_stages_are_none() -> None:
    steps = [StepTimes({"a": k / 1000, **({"b": 0.01} if k % 2 else {})}, None) for k in range(1, 101)]
    found = timing(steps, 3)
    assert found.stages_ms["a"]["median"] == pytest.approx(50.5)
    assert found.stages_ms["a"]["p95"] == pytest.approx(np.percentile(np.arange(1, 101), 95))
    assert found.stages_ms["b"]["mean"] == pytest.approx(5)
    assert found.images_per_s == pytest.approx(3 * 1000 / (50.5 + 5))


def test_time_of_the_device_counts_where_there_is_one() -> None:
    found = timing([StepTimes({"a": 0.001}, {"a": 0.004, "b": 0.004})] * 2, 1)
    assert (found.clock, found.ms) == ("device", 1.0)
    assert {name: values["share"] for name, values in found.stages_ms.items()} == {"a": 0.5, "b": 0.5}


def test_boxes_that_are_lent_lie_in_the_images_that_get_them() -> None:
    boxes = np.array([[0, 0, 10, 20], [5, 5, 10, 10], [0, 0, 40, 40]], np.float32)
    ones = np.ones(3)
    labeled = ImageSource(
        ["a", "b"], np.arange(2), np.array([[20, 10], [40, 40]]), boxes, ones.astype(int), ones, np.array([0, 2, 3])
    )
    none = np.zeros((0, 4), np.float32)
    empty = np.zeros(0)
    unlabeled = ImageSource(
        ["c", "d", "e"], np.arange(3), np.array([[40, 30], [20, 20], [20, 10]]), none, empty.astype(int), empty,
        np.zeros(4, int),
    )  # fmt: skip
    lent = stand_in_labels(labeled, unlabeled)
    assert [len(lent.target(row)) for row in range(3)] == [2, 1, 2]
    assert lent.target(0).boxes.tolist() == [[0, 0, 30, 40], [15, 10, 30, 20]]
    assert lent.target(1).boxes.tolist() == [[0, 0, 20, 20]]


def test_a_detector_that_was_trained_can_be_profiled(pets_run: Path, tmp_path: Path) -> None:
    root = pets_run.parent
    command = ["profile", "data=custom", f"data.root={root}", "device=cpu", "split.percent=50", "batch.labeled=4"]
    command += ["batch.unlabeled=4", "method=mean_teacher", f"detector.start={pets_run}", f"cache_dir={root / 'cache'}"]
    command += ["detector.weights=scratch", "profile.seconds=0.2", "profile.rounds=1", f"out={tmp_path / 'p.json'}"]
    assert main(command) == 0


def test_nothing_is_measured_of_a_gpu_that_is_not_there() -> None:
    with gpu_meter.metered(torch.device("cpu")) as meter:
        pass
    assert meter.result() is None


class _Nvml:
    """A GPU that is busy by half, and takes 3 J between two looks at its counter."""

    NVMLError = ValueError
    joules = 0

    def nvmlDeviceGetUtilizationRates(self, _: object) -> Any:  # noqa: N802
        return type("Rates", (), {"gpu": 50})

    def nvmlDeviceGetMemoryInfo(self, _: object) -> Any:  # noqa: N802
        return type("Memory", (), {"used": 3 * 2**20})

    def nvmlDeviceGetTotalEnergyConsumption(self, _: object) -> int:  # noqa: N802
        self.joules += 3
        return 1000 * self.joules


def test_a_gpu_is_measured_by_its_own_counters() -> None:
    meter = gpu_meter.GpuMeter(_Nvml(), None)
    meter.look()
    meter.end()
    assert meter.result() == {"utilization": 0.5, "memory_mb": 3.0, "joules": 3.0}
