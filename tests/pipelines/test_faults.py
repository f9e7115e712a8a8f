"""Bad files, and files that are unusual but good."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from harness.config.step import StepShape
from harness.core.types import Batch, ImageSource, UserError, Views
from harness.data.sampling import BatchSampler
from harness.launch.local import _explain

BACKENDS = ("dali", "torchvision", "opencv")
CONFIG = {"name": "x", "views": {"labeled": {"flip": 0.5}, "test": {}}}
Damage = Callable[[Path], None]


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_size(path: Path) -> None:
    Image.new("RGB", (33, 44)).save(path)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (missing, truncated, header_only, garbage, empty, other_size, fifo)


@pytest.fixture
def copies(photos: ImageSource, tmp_path: Path) -> ImageSource:
    """The photographs, to be damaged."""
    paths = [str(shutil.copy(path, tmp_path)) for path in photos.paths]
    return replace(photos, paths=paths)


def arguments(source: ImageSource, batch: int = 5) -> dict[str, Any]:
    sampler = BatchSampler(len(source), 0, StepShape(batch, 0), seed=3)
    return {"views": Views(("labeled",)), "sampler": sampler, "labeled": source}


def take(pipeline: Any, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(pipeline.batches(start), count))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_image_is_replaced(
    backend: str, damage: Damage, copies: ImageSource, photos: ImageSource, build: Any, caplog: Any
) -> None:
    """Only the bad image's rows change, to the next image of the list; it is named, counted and warned of once."""
    bad = 4
    clean = take(build(backend, CONFIG, **arguments(photos)), 12)
    damage(Path(copies.paths[bad]))
    pipeline = build(backend, CONFIG, **arguments(copies))
    with caplog.at_level(logging.WARNING):
        damaged = take(pipeline, 12)
    replaced = 0
    for a, b in zip(clean, damaged, strict=True):
        for row, (before, after) in enumerate(zip(a.labeled_ids.tolist(), b.labeled_ids.tolist(), strict=True)):
            assert after == (before if before != 100 + bad else 100 + bad + 1)
            replaced += before != after
            if before == after:
                height, width = a.labeled["labeled"].sizes[row].tolist()
                views = [x.labeled["labeled"].images[row, :, :height, :width] for x in (a, b)]
                assert torch.equal(*views)
    assert replaced >= 2
    assert list(pipeline.bad_images) == [copies.paths[bad]]
    assert sum(copies.paths[bad] in message for message in caplog.messages) == 1
    assert pipeline.drawn == 23


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_bad_images_in_a_batch_and_resuming(backend: str, copies: ImageSource, build: Any) -> None:
    """Batches after resuming are the same, whether the bad images are known from the checkpoint or met again."""
    for number in (3, 4, 5, 11):
        truncated(Path(copies.paths[number]))
    pipeline = build(backend, CONFIG, **arguments(copies, 11))
    whole = take(pipeline, 6)
    assert len(pipeline.bad_images) == 4
    state = pipeline.state()
    for known in (True, False):
        resumed = build(backend, CONFIG, **arguments(copies, 11))
        if known:
            resumed.load_state(state)
            assert len(resumed.bad_images) == 4
            assert resumed.drawn == pipeline.drawn
        for a, b in zip(whole[3:], take(resumed, 3, start=3), strict=True):
            assert torch.equal(a.labeled_ids, b.labeled_ids)
            assert torch.equal(a.labeled["labeled"].images, b.labeled["labeled"].images)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_policy_names_the_file(backend: str, copies: ImageSource, build: Any) -> None:
    garbage(Path(copies.paths[9]))
    with pytest.raises(UserError, match=r"9\.jpg"):
        take(build(backend, CONFIG, **arguments(copies), on_bad_image="error"), 8)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", ["torchvision", "opencv"])
def test_too_little_shared_memory_is_told_before_workers_start(
    backend: str, photos: ImageSource, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 10))
    with pytest.raises(UserError, match=r"pipeline.threads=1 .* /dev/shm has 0.1 MiB.*pipeline.threads=0"):
        take(build(backend, CONFIG, **arguments(photos), threads=1), 1)
    assert len(take(build(backend, CONFIG, **arguments(photos), threads=0), 1)) == 1


@pytest.mark.timeout(60)
def test_shared_memory_that_runs_out_is_told(photos: ImageSource, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it happens in a worker, where torch raises, and the queue would print that and never deliver."""

    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"no shared memory left .*No space left.*pipeline.threads=0"):
        take(build("torchvision", CONFIG, **arguments(photos), threads=1), 1)


@pytest.mark.timeout(60)
def test_killed_worker_ends_the_iteration(photos: ImageSource, build: Any) -> None:
    """In a process of its own: torch raises the error in whatever runs when a child ends, again and again."""

    def in_a_process() -> None:
        batches = build("torchvision", CONFIG, **arguments(photos), threads=1).batches(0)
        next(batches)
        with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
            _kill_children_and_go_on(batches)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        told = _explain(OmegaConf.create({"pipeline": {"name": "torchvision"}}), None, raised.value)  # type: ignore[arg-type]
        assert told is not None
        assert told[1] == 1
        assert "a worker process of pipeline=torchvision has ended" in told[0]
        os._exit(7)  # without what torch would raise again

    process = multiprocessing.get_context("fork").Process(target=in_a_process)
    process.start()
    process.join(50)
    assert process.exitcode == 7


def _kill_children_and_go_on(batches: Iterator[Batch]) -> None:
    for child in psutil.Process().children():
        if "multiprocessing" not in " ".join(child.cmdline()):  # not the tracker of resources
            child.kill()
    list(itertools.islice(batches, 20))


@pytest.mark.timeout(60)
def test_too_many_bad_images_stop_the_run(copies: ImageSource, build: Any) -> None:
    """Nine of 23 are tolerated, ten are not; counts from before a checkpoint are taken along."""
    for number in range(9):
        garbage(Path(copies.paths[number]))
    pipeline = build("dali", CONFIG, **arguments(copies))
    take(pipeline, 8)
    assert len(pipeline.bad_images) == 9
    garbage(Path(copies.paths[20]))
    resumed = build("dali", CONFIG, **arguments(copies))
    resumed.load_state(pipeline.state())
    with pytest.raises(UserError, match="10 of 23 images"):
        take(resumed, 8, start=8)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_keeps_every_id(backend: str, copies: ImageSource, build: Any) -> None:
    missing(Path(copies.paths[2]))
    truncated(Path(copies.paths[7]))
    pipeline = build(backend, CONFIG)
    ids, blank = [], []
    for view, numbers in pipeline.images(copies):
        ids += numbers.tolist()
        blank += [int(n) for n, image in zip(numbers, view.images, strict=True) if not image.any()]
    assert sorted(ids) == copies.ids.tolist()
    assert sorted(blank) == [102, 107]
    assert len(pipeline.bad_images) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_report_bad_images_too(backend: str, copies: ImageSource, build: Any) -> None:
    garbage(Path(copies.paths[4]))
    alone = take(build(backend, CONFIG, **arguments(copies)), 6)
    pipeline = build(backend, CONFIG, **arguments(copies), threads=2)
    batches = pipeline.batches()
    for a, b in zip(alone, batches, strict=False):
        assert torch.equal(a.labeled_ids, b.labeled_ids)
        assert torch.equal(a.labeled["labeled"].images, b.labeled["labeled"].images)
    batches.close()
    assert len(pipeline.bad_images) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [truncated, header_only, garbage])
def test_the_warning_says_what_is_wrong(
    damage: Damage, copies: ImageSource, build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damage(Path(copies.paths[4]))
    with caplog.at_level(logging.WARNING):
        list(build("dali", CONFIG).images(copies))
    assert "4.jpg: cannot be decoded" in caplog.text


@pytest.mark.timeout(60)
def test_formats_are_the_same_everywhere(make_source: Any, photos: ImageSource, tmp_path: Path, build: Any) -> None:
    """PNG, grayscale, CMYK, transparency, palettes and EXIF orientation: RGB pixels as they are stored."""
    image = Image.open(photos.paths[0]).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown rotated by a quarter turn
    saved = {
        "png.png": image,
        "gray.png": image.convert("L"),
        "gray.jpg": image.convert("L"),
        "cmyk.jpg": image.convert("CMYK"),
        "rgba.png": image.convert("RGBA"),
        "palette.png": image.convert("P"),
        "exif.jpg": image,
        "progressive.jpg": image,
        "png named.jpg": image,
    }
    for name, picture in saved.items():
        options: dict[str, Any] = {"exif": turned} if name == "exif.jpg" else {}
        if name == "progressive.jpg":
            options["progressive"] = True
        picture.save(tmp_path / name, format="PNG" if "png" in name else "JPEG", **options)
    size = (image.height, image.width)
    source = make_source([tmp_path / name for name in saved], [size] * len(saved))
    views = {backend: next(build(backend, CONFIG, eval_batch=99).images(source))[0] for backend in BACKENDS}
    for row, name in enumerate(saved):
        expected = Image.open(tmp_path / name)
        if expected.mode != "CMYK":
            pixels = np.asarray(expected.convert("RGB"), dtype=np.float32)
            got = views["torchvision"].images[row, :, : size[0], : size[1]].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(got, pixels, atol=1, err_msg=name)
        for backend in ("dali", "opencv"):
            difference = (views[backend].images[row] - views["torchvision"].images[row]).abs().max()
            assert difference <= 1, f"{name}: {backend} differs by {difference}"
