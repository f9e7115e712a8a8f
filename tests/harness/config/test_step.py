"""The shape of a step: against a restatement by counting, and the same answer wherever it is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from harness.config import compose, sections, step
from harness.config.identity import identity
from harness.config.run import settings_of
from harness.config.step import StepShape
from harness.core.distributed import World
from harness.core.types import UserError, Views
from harness.data.sampling import BatchSampler
from harness.engine import build
from harness.launch import local


def dealt(labeled: int, unlabeled: int, micro: int | None, world: int, ratio: str) -> list[list[int]] | None:
    """Sizes of the micro-batches of each process, dealt image by image; None where it does not come out."""
    images = list(range(labeled + unlabeled))
    size = len(images) if micro is None else micro
    if labeled < 0 or unlabeled < 0 or not images or size < 1:
        return None
    piles = [images[start : start + size] for start in range(0, len(images), size)]
    if any(len(pile) != size for pile in piles):
        return None
    if labeled and unlabeled:
        if size == 1:
            return None
        if ratio == "exact" and min(labeled, unlabeled) < len(piles):
            return None
    hands: list[list[int]] = [[] for _ in range(world)]
    for number, pile in enumerate(piles):
        hands[number % world].append(len(pile))
    return hands if len({len(hand) for hand in hands}) == 1 else None


@settings(deadline=None, max_examples=400)
@given(
    st.integers(-1, 24),
    st.integers(-1, 24),
    st.one_of(st.none(), st.integers(0, 12)),
    st.integers(1, 6),
    st.sampled_from(["exact", "bernoulli"]),
)
def test_shapes_are_those_that_can_be_dealt(labeled: int, unlabeled: int, micro: int | None, world: int, ratio: str):
    hands = dealt(labeled, unlabeled, micro, world, ratio)
    if hands is None:
        with pytest.raises(UserError, match=r"batch\.(labeled|unlabeled|micro)=|devices") as caught:
            StepShape(labeled, unlabeled, micro, world, ratio)
        assert "\n" not in str(caught.value)
        return
    shape = StepShape(labeled, unlabeled, micro, world, ratio)
    assert shape.images == labeled + unlabeled == sum(map(sum, hands))
    assert {size for hand in hands for size in hand} == {shape.micro_images}
    assert shape.micro_batches == sum(map(len, hands))
    assert {len(hand) for hand in hands} == {shape.micro_batches_per_device}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(0, 12), st.one_of(st.none(), st.integers(1, 8)), st.sampled_from([1, 2, 3]))
def test_a_shape_that_is_allowed_can_be_drawn(labeled: int, unlabeled: int, micro: int | None, world: int) -> None:
    """Every process gets as many micro-batches as the shape says, of its size, and in exact ratio of both kinds."""
    if dealt(labeled, unlabeled, micro, world, "exact") is None:
        return
    shape = StepShape(labeled, unlabeled, micro, world)
    sampler = BatchSampler(5, 7, shape, seed=1)
    for rank in range(world):
        stream = sampler.stream(0, rank, world)
        drawn = [next(stream) for _ in range(shape.micro_batches_per_device + 1)]
        assert [m.step for m in drawn] == [0] * shape.micro_batches_per_device + [1]
        assert all(len(m.labeled) + len(m.unlabeled) == shape.micro_images for m in drawn)
        assert all(len(m.labeled) and bool(len(m.unlabeled)) == bool(unlabeled) for m in drawn)


def _answers(cfg: DictConfig) -> list[str]:
    """What each of those who ask says of a step: its size, or the sentence."""
    views = Views(("labeled",), ("weak",)) if cfg.method.name != "supervised" else Views(("labeled",))
    source: Any = SimpleNamespace(sizes=torch.ones(3, 2).numpy())
    source = type("Images", (), {"sizes": source.sizes, "__len__": lambda _: 3})()
    world = World(0, int(cfg.devices), torch.device("cpu"))

    def built() -> str:
        run = settings_of(cfg)
        shape = step.shape_of(run.batch, run.method["name"], bool(views.unlabeled), world.size)
        pools = (source, source if views.unlabeled else None)
        return str(build.sampler(shape, run.batch, 1, 6, 0, *pools).micro)

    def told_by_the_launcher() -> str:
        told = local._explain(cfg, world, torch.OutOfMemoryError())
        assert told is not None
        found = re.search(r"batch\.micro \(now (\d+)\)", told[0])
        return found.group(1) if found else told[0]

    def checked() -> str:
        sections.step_shape(cfg, sections.processes(cfg))
        return str(sections.step_shape(cfg, int(cfg.devices)).micro_images)

    answers = []
    for ask in (checked, built, told_by_the_launcher):
        try:
            answers.append(ask())
        except UserError as error:
            answers.append(str(error))
    return answers


@pytest.mark.parametrize(
    ("given", "micro"),
    [
        (["method=supervised"], "16"),  # the 16 unlabelled images that batch.unlabeled names are not drawn
        (["method=supervised", "batch.micro=4"], "4"),
        (["method=soft_teacher"], "32"),
        (["method=soft_teacher", "batch.micro=8", "devices=4"], "8"),
        (["method=soft_teacher", "preset=paper", "devices=8"], "5"),
    ],
)
def test_everybody_says_the_same_of_a_step(given: list[str], micro: str) -> None:
    assert _answers(compose.load(given)) == [micro] * 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro": 5}, "batch.micro=5 does not divide the 32 images of a step"),
        ({"micro": 1}, "batch.micro=1 leaves no room"),
        ({"labeled": 1, "unlabeled": 7, "micro": 2}, "batch.labeled=1 leaves some of the 4 micro-batches"),
        ({"labeled": 7, "unlabeled": 1, "micro": 2}, "batch.unlabeled=1 leaves some of the 4 micro-batches"),
        ({"unlabeled": 0}, "method=soft_teacher needs unlabelled images"),
    ],
)
def test_everybody_refuses_the_same_steps(changes: dict[str, int], said: str) -> None:
    cfg = compose.load(["method=soft_teacher"])
    refused = OmegaConf.merge(cfg, {"batch": changes})
    assert isinstance(refused, DictConfig)
    answers = _answers(refused)
    assert len(set(answers)) == 1
    assert said in answers[0]
    with pytest.raises(UserError, match=re.escape(said)):
        compose.load(["method=soft_teacher", *(f"batch.{key}={value}" for key, value in changes.items())])


def test_nodes_count_as_the_processes_of_a_step_do() -> None:
    """On two nodes of four devices a step is shared by eight processes, which the job would find out in the queue."""
    job = ["launcher=slurm", "launcher.nodes=2", "devices=4", "batch.labeled=16"]
    compose.load([*job, "batch.micro=2"])
    with pytest.raises(UserError, match=r"8 devices cannot share the 16 images .*batch\.micro=4 makes 4 micro-batches"):
        compose.load([*job, "batch.micro=4"])


@pytest.mark.parametrize(
    "method",
    ["supervised", "stac", "soft_teacher", "mean_teacher", "mixpl", "unbiased_teacher", "dense_teacher", "arsl"],
)
def test_shipped_methods_say_what_they_draw(method: str) -> None:
    """The YAML agrees with the views of the method that is built, and is no part of a run's identity."""
    detector = "small_fcos_iou" if method in ("dense_teacher", "arsl") else "small"
    cfg = compose.load([f"method={method}", f"detector={detector}", "detector.weights=scratch"])
    network = build.detector(cfg.detector, Path(cfg.cache_dir), 3)
    built = build.method(cfg.method, network, cfg.schedule.steps)
    assert cfg.method.unlabeled == bool(built.views.unlabeled) == step.draws_unlabeled(cfg.method)
    assert "unlabeled" not in identity(cfg)["method"]
    without = OmegaConf.to_container(cfg.method, resolve=True)
    assert isinstance(without, dict)
    del without["unlabeled"]  # as configurations that were saved before have it
    if hasattr(type(built), "views"):  # those that choose them when they are built are not asked
        assert step.draws_unlabeled(without) == bool(built.views.unlabeled)
    assert build.method(without, network, cfg.schedule.steps).views == built.views


def test_a_method_that_draws_otherwise_than_it_says_is_refused() -> None:
    cfg = compose.load(["method=supervised", "detector.weights=scratch", "method.unlabeled=true"])
    with pytest.raises(UserError, match=r"method=supervised draws no unlabelled images.*method\.unlabeled=false"):
        build.method(cfg.method, build.detector(cfg.detector, Path(cfg.cache_dir), 3), cfg.schedule.steps)
