"""Pseudo labels kept with a run: every box accounted for, in the right place, and the run as it was before."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.cli import main
from harness.config import compose
from harness.config.run import settings_of
from harness.core.distributed import World
from harness.core.record import read_record
from harness.core.types import MicroBatch, Target, UnusableImages, UserError, View
from harness.engine import build, taught
from harness.engine.taught import KEPT_IMAGES, PSEUDO_LABELS, Labelled, keep, read_kept, sort_out

pytestmark = pytest.mark.timeout(180)

SMALL = [
    *("data=shapes", "data.train_images=40", "data.val_images=4", "detector.weights=scratch", "schedule=smoke"),
    *("schedule.steps=4", "split.percent=20", "batch.labeled=4", "batch.unlabeled=4", "device=cpu"),
]
LOW = {  # thresholds that untrained teachers reach
    "mean_teacher": ["method.score=0.06"],
    "unbiased_teacher": ["method.score=0.06", "method.burn_in=0"],
    "soft_teacher": ["method.initial_score=0.06", "method.rpn_score=0.08", "method.class_score=0.1"],
    "dense_teacher": ["detector=small_fcos", "detector.weights=scratch", "method.burn_in=0", "method.label_score=0.1"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def experiment(cache: Path, run_dir: Path, *overrides: str) -> build.Experiment:
    run_dir.mkdir(exist_ok=True)
    settings = settings_of(compose.load([*SMALL, *overrides, f"cache_dir={cache}", f"run_dir={run_dir}"]))
    made = build.experiment(settings, World(0, 1, torch.device("cpu")), build.data(settings))
    made.method.train()
    return made


def view(matrix: list[list[float]], size: tuple[int, int] = (100, 100)) -> View:
    return View(torch.zeros(1, 3, 128, 128), torch.tensor([size]), torch.tensor([matrix]))


def target(*rows: tuple[list[float], int, float]) -> Target:
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    return Target(boxes, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows]))


def test_every_box_of_the_teacher_is_taught_or_not_and_the_reason_is_right() -> None:
    weak = view([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1]])
    strong = view([[2.0, 0, -20.0], [0, 2.0, 0], [0, 0, 1]])  # twice as large, 20 px to the left
    found = target(
        ([20.0, 10, 40, 30], 1, 0.95),  # at 20, 20, 60, 60 of the strong view
        ([30.0, 30, 45, 45], 2, 0.8),
        ([0.0, 0, 8, 8], 1, 0.9),  # left of the strong view
        ([12.0, 40, 30, 48], 1, 0.3),
    )
    uses = {
        "classification": target(([20.0, 20, 60, 60], 1, 0.95), ([40.0, 60, 70, 90], 2, 0.8)),
        "regression": target(([20.0, 20, 60, 60], 1, 0.95), ([1.0, 1, 9, 9], 2, 0.99)),
    }
    kept, rejected = sort_out(Labelled(1, weak, strong, found, uses))
    assert kept.words == ["classification and regression", "classification", "regression"]
    assert kept.target.boxes.tolist() == [[20, 20, 60, 60], [40, 60, 70, 90], [1, 1, 9, 9]]
    assert rejected.words == ["outside of the strong view", "score too low"]
    assert rejected.target.scores.tolist() == pytest.approx([0.9, 0.3])
    assert rejected.target.boxes[1].tolist() == [4, 80, 40, 96]


def test_a_class_of_its_own_is_another_box() -> None:
    weak = view(np.eye(3).tolist())
    found = target(([20.0, 20, 60, 60], 1, 0.95))
    other = target(([20.0, 20, 60, 60], 2, 0.95))
    kept, rejected = sort_out(Labelled(1, weak, weak, found, {"classification": other}))
    assert kept.target.labels.tolist() == [2]
    assert rejected.target.labels.tolist() == [1]
    nothing, _ = sort_out(Labelled(1, weak, weak, found[torch.tensor([], dtype=torch.int64)], {}))
    assert len(nothing.target) == 0


def by_hash(ids: np.ndarray) -> list[int]:
    return sorted(ids.tolist(), key=lambda image: hashlib.sha256(str(image).encode()).hexdigest())


@pytest.mark.parametrize("pipeline", ["dali", "torchvision"])
@pytest.mark.parametrize("method", list(LOW))
def test_keeping_labels_leaves_everything_as_it_was(cache: Path, tmp_path: Path, method: str, pipeline: str) -> None:
    run = experiment(cache, tmp_path, f"method={method}", f"pipeline={pipeline}", *LOW[method])
    try:
        batches = run.pipeline.batches(0)
        for step in range(2):  # statistics and pipeline are under way
            run.method.before_step(step)
            run.method(next(batches), step)
            run.method.after_step(step)
        before = _everything(run)
        keep(run)
        _assert_equal(before, _everything(run))
    finally:
        run.pipeline.close()
    assert run.method.class_names == tuple(run.data.dataset.train.category_names)  # for warnings
    images = read_kept(tmp_path).images
    assert run.data.unlabeled is not None
    assert {image.image_id for image in images} == set(by_hash(run.data.unlabeled.ids)[:KEPT_IMAGES])
    boxes = [box for image in images for box in image.boxes]
    assert {box.use is None for box in boxes} == {True, False}
    assert all((box.use is None) == (box.why is not None) for box in boxes)


def _everything(run: build.Experiment) -> dict[str, Any]:
    """Weights, statistics, modes and random numbers."""
    state = {name: value.clone() for name, value in run.method.state_dict().items()}
    pipeline = run.pipeline.state()
    return {
        **state,
        **{f"drawn {number}": drawn for number, drawn in enumerate(pipeline["drawn"])},
        "bad": pipeline["bad_images"],
        "modes": [module.training for module in run.method.modules()],
        "gradients": [parameter.grad for parameter in run.method.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
        "python": random.getstate(),
        "labels": run.method.labels,
    }


def _assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def test_labels_are_those_that_the_next_step_would_learn_from(cache: Path, tmp_path: Path) -> None:
    """Mean Teacher takes every box of its teacher above the threshold that the strong view shows."""
    run = experiment(cache, tmp_path, "method=mean_teacher", *LOW["mean_teacher"], "pipeline=torchvision")
    try:
        keep(run)
        unlabelled = run.data.unlabeled
        assert unlabelled is not None
        rows = np.array([unlabelled.ids.tolist().index(image) for image in by_hash(unlabelled.ids)[:KEPT_IMAGES]])
        micro = MicroBatch(3, 0, np.array([0]), rows, np.array([0]), np.arange(len(rows)))
        batch = run.pipeline.batch_of(micro)
        run.method(batch, 3)
        (expected,) = run.method.pseudo_labels.values()
    finally:
        run.pipeline.close()
    ids = run.data.dataset.train.category_ids
    for image, row, target in zip(read_kept(tmp_path).images, rows, expected, strict=True):
        taken = [box for box in image.boxes if box.use is not None]
        assert [box.category_id for box in taken] == [
            int(ids[label - 1]) for label in target.labels[target.scores.argsort(descending=True, stable=True)].tolist()
        ]
        assert [box.score for box in taken] == pytest.approx(sorted(target.scores.tolist(), reverse=True), abs=1e-5)
        assert {box.use for box in taken} <= {"classification"}
        height, width = unlabelled.sizes[row]
        for box in image.boxes:
            x, y, w, h = box.bbox
            assert 0 <= x <= x + w <= width + 0.01
            assert 0 <= y <= y + h <= height + 0.01


def test_boxes_are_told_in_stored_pixels() -> None:
    """The teacher's come from the weak view, without the widening of a turned strong one; others from the strong."""
    weak = view([[-0.5, 0, 50.0], [0, 0.5, 0], [0, 0, 1]])  # half as large, mirrored
    turned = np.array([[0.8, -0.6, 30.0], [0.6, 0.8, -20.0], [0, 0, 1]])
    strong = view(turned.tolist(), (128, 128))
    found = target(([20.0, 10, 30, 20], 1, 0.95), ([0.0, 0, 5, 5], 2, 0.1))  # stored: 40, 20, 60, 40; 90, 0, 100, 10
    corners = np.array([[40.0, 20, 1], [60, 20, 1], [60, 40, 1], [40, 40, 1]]) @ turned.T
    hull = [*corners[:, :2].min(0), *corners[:, :2].max(0)]
    own = target((hull, 1, 0.95), ([50.0, 60, 60, 70], 1, 0.5))
    one = Labelled(1, weak, strong, found, {"box": own})
    kept, made, left = taught._boxes(one, np.array([100, 100]), np.array([7, 9]))
    assert (kept.category_id, kept.use, kept.why) == (7, "box", None)
    assert kept.bbox == pytest.approx((40, 20, 20, 20), abs=1e-3)
    corners = np.array([[50.0, 60, 1], [60, 60, 1], [60, 70, 1], [50, 70, 1]]) @ np.linalg.inv(turned).T
    low, high = corners[:, :2].min(0), corners[:, :2].max(0)
    assert made.bbox == pytest.approx((*low, *(high - low)), abs=1e-3)
    assert (left.category_id, left.use) == (9, None)
    assert left.bbox == pytest.approx((90, 0, 10, 10), abs=1e-3)


@pytest.mark.parametrize("method", ["supervised", "stac"])
def test_methods_that_label_nothing_while_they_train_keep_nothing(cache: Path, tmp_path: Path, method: str) -> None:
    run = experiment(cache, tmp_path, f"method={method}", "pipeline=torchvision")
    if run.data.unlabeled is not None:  # STAC's images come with labels
        run.data.unlabeled = run.data.unlabeled.with_targets(
            [target(([1.0, 1, 9, 9], 1, 0.9))] * len(run.data.unlabeled)
        )
    keep(run)
    run.pipeline.close()
    assert not (tmp_path / PSEUDO_LABELS).exists()


def test_pictures_that_have_gone_leave_no_trace_in_the_run(cache: Path, tmp_path: Path) -> None:
    run = experiment(cache, tmp_path, "method=mean_teacher", "pipeline=torchvision")
    source = run.data.unlabeled
    assert isinstance(source.paths, list)
    source.paths[:] = [f"{path}.gone" for path in source.paths]
    try:
        with pytest.raises(UnusableImages):
            keep(run)
        assert run.pipeline.bad_images == {}
    finally:
        run.pipeline.close()
    assert not (tmp_path / PSEUDO_LABELS).exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"step": 3, "images": [{"image_id": 1}]}', '{"step": -1, "images": []}']
)
def test_damaged_file_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / PSEUDO_LABELS).write_text(content)
    with pytest.raises(UserError, match=r"pseudo_labels.json is damaged .* delete it"):
        read_kept(tmp_path)


def test_labels_that_cannot_be_kept_cost_no_finished_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And kept ones change nothing: record and weights are the same."""

    def fail(_: build.Experiment) -> None:
        raise RuntimeError("no such kernel")

    records = []
    for name in ("kept", "failed"):
        command = ["train", *SMALL, "method=mean_teacher", "pipeline=torchvision", "logging.loggers=[]"]
        assert main([*command, f"cache_dir={cache}", f"run_dir={tmp_path / name}"]) == 0
        records.append(read_record(tmp_path / name / "record.json"))
        assert (tmp_path / name / PSEUDO_LABELS).exists() == (name == "kept")
        monkeypatch.setattr(taught, "keep", fail)
    assert "warning: no pseudo labels are kept for reports (RuntimeError: no such kernel)" in capfd.readouterr().err
    for key in ("status", "ap", "scores", "per_class", "weights_sha256", "config_sha256", "bad_images"):
        assert getattr(records[0], key) == getattr(records[1], key)


@pytest.mark.parametrize("pipeline", ["dali", "torchvision", "opencv"])
def test_batch_of_given_images_is_the_one_that_training_draws(cache: Path, tmp_path: Path, pipeline: str) -> None:
    run = experiment(cache, tmp_path, "method=mean_teacher", f"pipeline={pipeline}")
    try:
        expected, given = next(run.pipeline.batches(2)), run.pipeline.batch_of(run.sampler.draw(2))
    finally:
        run.pipeline.close()
    for part in ("labeled", "unlabeled"):
        views, made = getattr(expected, part), getattr(given, part)
        assert list(views) == list(made)
        for name, one in views.items():
            assert torch.equal(one.images, made[name].images)
            assert torch.equal(one.to_view, made[name].to_view)
        for key in ("ids", "keys"):
            assert torch.equal(getattr(expected, f"{part}_{key}"), getattr(given, f"{part}_{key}"))
