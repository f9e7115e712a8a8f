"""What every pipeline promises, checked on each of them."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from harness.core.types import Batch, ImageSource, Normalize, UserError, Views
from pipelines.cached import CachedPipeline
from pipelines.policy import Policy

BACKENDS = ("dali", "torchvision", "opencv")
Build = Callable[..., Any]

_RESIZE = {"short": 64, "max": 999}
_COLOR = [{"one_of": {"identity": None, "brightness": [0.5, 1.5]}}]
_ERASE = [{"count": [1, 2], "ratio": [0, 0.3]}]
# Graphs with many operations take a second to build; what each operation does is tested elsewhere.
LIGHT = {
    "name": "light",
    "antialias": True,
    "views": {
        "labeled": {"resize": _RESIZE, "flip": 0.5, "zoom": [0.7, 1.3], "color": _COLOR},
        "weak": {"resize": _RESIZE, "flip": 0.5},
        "strong": {"resize": _RESIZE, "flip": 0.5, "color": _COLOR, "erase": _ERASE},
        "test": {"resize": _RESIZE},
    },
}


def take(pipeline: Any, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(pipeline.batches(start), count))


def same(a: Batch, b: Batch) -> None:
    """Bit for bit."""
    assert torch.equal(a.labeled_ids, b.labeled_ids)
    assert torch.equal(a.unlabeled_ids, b.unlabeled_ids)
    assert torch.equal(a.labeled_keys, b.labeled_keys)
    assert torch.equal(a.unlabeled_keys, b.unlabeled_keys)
    for part in ("labeled", "unlabeled"):
        ours, theirs = getattr(a, part), getattr(b, part)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name].images, theirs[name].images)
            assert torch.equal(ours[name].to_view, theirs[name].to_view)
            assert torch.equal(ours[name].sizes, theirs[name].sizes)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(backend: str, training: Any, build: Build, photos: ImageSource) -> None:
    for batch in take(build(backend, LIGHT, **training(3, 5)), 4):
        assert list(batch.labeled) == ["labeled"]
        assert list(batch.unlabeled) == ["weak", "strong"]
        assert batch.images_seen == 8
        assert len(set(batch.labeled_keys.tolist() + batch.unlabeled_keys.tolist())) == 8
        for views, ids in ((batch.labeled, batch.labeled_ids), (batch.unlabeled, batch.unlabeled_ids)):
            for view in views.values():
                count, channels, height, width = view.images.shape
                assert (count, channels) == (len(ids), 3)
                assert view.images.dtype == torch.float32
                assert height % 32 == width % 32 == 0
                assert (view.sizes <= torch.tensor([height, width])).all()
                assert height - view.sizes[:, 0].max() < 32
                stored = torch.from_numpy(photos.sizes[ids.numpy() - 100])
                short = 64 * stored / stored.amin(1, keepdim=True)
                assert (view.sizes - short).abs().max() <= 0.5
        assert batch.labeled["labeled"].targets is not None
        assert batch.unlabeled["weak"].targets is None
        for target, size in zip(batch.labeled["labeled"].targets, batch.labeled["labeled"].sizes, strict=True):
            assert (target.boxes >= 0).all()
            assert (target.boxes[:, 2:] <= size.flip(0)).all()
            assert (target.scores == 1).all()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weak_and_strong_are_the_same_image(
    backend: str, training: Any, build: Build, photos: ImageSource
) -> None:
    """Without geometry both views show the stored image of the row's id."""
    views = {"labeled": {}, "weak": {}, "strong": {"color": [{"one_of": {"brightness": {"values": [0.5]}}}]}}
    pipeline = build(backend, {"name": "x", "views": views}, **training(2, 6))
    stored = {
        int(i): v.images[0]
        for v, ids in build(backend, {"name": "x", "views": views}, eval_batch=1).images(photos, "weak")
        for i in ids
    }
    for batch in take(pipeline, 3):
        for row, number in enumerate(batch.unlabeled_ids.tolist()):
            height, width = batch.unlabeled["weak"].sizes[row].tolist()
            expected = stored[number][:, :height, :width]
            assert torch.equal(batch.unlabeled["weak"].images[row, :, :height, :width], expected)
            assert (batch.unlabeled["strong"].images[row, :, :height, :width] - expected / 2).abs().max() <= 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", ["exact", "bernoulli"])
def test_resuming_gives_the_same_batches(backend: str, ratio: str, training: Any, build: Build) -> None:
    arguments = training(4, 8, micro=3, ratio=ratio, unlabeled_from=2)
    whole = take(build(backend, LIGHT, **arguments), 20)
    assert not len(whole[7].unlabeled_ids)
    assert not whole[7].unlabeled
    assert len(whole[8].unlabeled_ids)
    resumed = take(build(backend, LIGHT, **arguments), 8, start=3)
    for a, b in zip(whole[12:], resumed, strict=True):
        same(a, b)


@pytest.mark.timeout(120)
def test_threads_and_prefetching_do_not_change_pixels(policy_config: Any, training: Any, build: Build) -> None:
    first, *others = (
        take(build("dali", policy_config("soft_teacher"), **training(2, 2), **options), 5)
        for options in ({}, {"threads": 2}, {"prefetch": 4})
    )
    for other in others:
        for a, b in zip(first, other, strict=True):
            same(a, b)


def test_dali_needs_a_thread(policy_config: Any, build: Build) -> None:
    with pytest.raises(UserError, match="threads must be at least 1"):
        build("dali", policy_config("small"), threads=0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["torchvision", "opencv"])
def test_workers_do_not_change_pixels(backend: str, training: Any, build: Build) -> None:
    alone = take(build(backend, LIGHT, **training()), 4)
    pipeline = build(backend, LIGHT, **training(), threads=2)
    batches = pipeline.batches()
    for a in alone:
        same(a, next(batches))
    batches.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_share_the_micro_batches(backend: str, training: Any, build: Build) -> None:
    arguments = training(4, 8, micro=3)
    whole = take(build(backend, LIGHT, **arguments), 8)
    for rank in range(2):
        for a, b in zip(
            whole[rank::2],
            take(build(backend, LIGHT, **arguments, rank=rank, world_size=2), 4),
            strict=True,
        ):
            same(a, b)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("world_size", "batch"), [(1, 1), (1, 8), (1, 64), (2, 5), (3, 4), (30, 2)])
def test_evaluation_sees_every_image_once(
    backend: str, world_size: int, batch: int, photos: ImageSource, build: Build
) -> None:
    config = {"name": "x", "views": {"test": {"resize": {"short": 32}}}}
    seen: list[int] = []
    for rank in range(world_size):
        pipeline = build(backend, config, rank=rank, world_size=world_size, eval_batch=batch)
        for view, ids in pipeline.images(photos):
            assert 0 < len(ids) <= batch
            assert len(view) == len(ids)
            seen += ids.tolist()
        pipeline.close()
    assert sorted(seen) == photos.ids.tolist()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_shows_the_same_whatever_the_batch(backend: str, photos: ImageSource, build: Build) -> None:
    """An image's view has the size and pixels that it has alone, padding included, also where ranks share images."""
    config = {"name": "x", "views": {"test": {"resize": {"short": 70, "max": 100}}}}
    alone = {int(ids): view.images[0] for view, ids in build(backend, config, eval_batch=1).images(photos)}
    assert len({image.shape for image in alone.values()}) > 3
    for rank in range(2):
        batches = list(build(backend, config, eval_batch=8, rank=rank, world_size=2).images(photos))
        assert max(len(ids) for _, ids in batches) > 1
        for view, ids in batches:
            for image, number in zip(view.images, ids.tolist(), strict=True):
                assert torch.equal(image, alone[number])


@pytest.mark.timeout(60)
def test_evaluation_of_images_of_one_size_keeps_their_order(photos: ImageSource, build: Build) -> None:
    config = {"name": "x", "views": {"test": {"resize": {"short": 32, "max": 32}}}}  # one canvas for all
    batches = [ids.tolist() for _, ids in build("dali", config, eval_batch=5).images(photos)]
    assert batches == [photos.ids[start : start + 5].tolist() for start in range(0, 23, 5)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_beside_training(backend: str, training: Any, build: Build, photos: ImageSource) -> None:
    """Evaluating in the middle of training does not disturb it, and an evaluation can be left early."""
    expected = take(build(backend, LIGHT, **training()), 6)
    pipeline = build(backend, LIGHT, **training())
    batches = pipeline.batches()
    for number, a in enumerate(expected):
        same(a, next(batches))
        evaluation = pipeline.images(photos)
        first, _ = next(evaluation)
        if number % 2:
            assert sum(len(ids) for _, ids in evaluation) == len(photos) - len(first)
        else:
            evaluation.close()
    again, _ = next(pipeline.images(photos))
    assert torch.equal(first.images, again.images)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_normalization_and_channel_order(backend: str, photos: ImageSource, build: Build, whole: Any) -> None:
    config = {"name": "x", "views": {"test": {}}}
    raw, _ = whole(build(backend, config), photos)
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 5.0)
    view, _ = whole(build(backend, config, Normalize(mean, std, bgr=True)), photos)
    expected = ((raw.images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).flip(1)
    for got, wanted, (height, width) in zip(view.images, expected, view.sizes.tolist(), strict=True):
        torch.testing.assert_close(got[:, :height, :width], wanted[:, :height, :width], atol=1e-4, rtol=1e-4)


@pytest.mark.timeout(60)
def test_pseudo_labels_become_targets(training: Any, photos: ImageSource, build: Build) -> None:
    arguments = training(2, 4)
    arguments["unlabeled"] = photos
    (batch,) = take(build("dali", LIGHT, **arguments), 1)
    assert batch.unlabeled["strong"].targets is not None
    assert len(batch.unlabeled["strong"].targets) == 4


@pytest.mark.timeout(60)
def test_cached_batches_come_again(training: Any, build: Build, photos: ImageSource) -> None:
    batches = take(CachedPipeline(build("dali", LIGHT, **training()), 3), 7)
    for number, batch in enumerate(batches):
        assert batch is batches[number % 3]
    for a, b in zip(batches[:3], take(build("dali", LIGHT, **training()), 3), strict=True):
        same(a, b)
    cached = CachedPipeline(build("dali", LIGHT))
    assert sum(len(ids) for _, ids in cached.images(photos)) == len(photos)
    cached.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_render_gives_what_training_drew(backend: str, training: Any, build: Build, photos: ImageSource) -> None:
    pipeline = build(backend, LIGHT, **training())
    (batch,) = take(pipeline, 1)
    view = pipeline.render(photos, "labeled", batch.labeled_ids.numpy() - 100, batch.labeled_keys.numpy())
    assert torch.equal(view.images, batch.labeled["labeled"].images)
    assert view.targets is not None


@pytest.mark.timeout(60)
def test_unknown_view_is_named(training: Any, build: Build) -> None:
    with pytest.raises(UserError, match="no view 'strong'"):
        build("dali", {"name": "x", "views": {"labeled": {}}}, **training(views=Views(("labeled",), ("strong",))))


@pytest.mark.timeout(280)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cycles", [20, pytest.param(180, marks=pytest.mark.slow)])
def test_closing_frees_threads_and_memory(
    backend: str, cycles: int, training: Any, photos: ImageSource, build: Build
) -> None:
    """Cycles of opening, training, evaluating and closing, after 20 that warm up."""
    config = {"name": "x", "views": {"labeled": {"flip": 0.5}, "test": {"resize": {"short": 32}}}}
    process = psutil.Process()
    policy = Policy.from_config(config)
    arguments = training(2, 0, Views(("labeled",)))
    del arguments["unlabeled"]

    def cycle() -> None:
        pipeline = build(backend, config, **arguments)
        batches = pipeline.batches()
        next(batches)
        next(pipeline.images(photos))
        pipeline.close()

    for _ in range(20):
        cycle()
    gc.collect()
    threads, memory = process.num_threads(), process.memory_info().rss
    for _ in range(cycles):
        cycle()
    gc.collect()
    assert policy.views
    assert process.num_threads() <= threads + 2
    assert threading.active_count() < 20
    assert process.memory_info().rss - memory < 60e6
    assert np.isfinite(memory)
