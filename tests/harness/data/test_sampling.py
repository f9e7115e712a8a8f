"""The random numbers against the published generator, and the batch sampler against counting."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.step import StepShape
from harness.core.draws import image_keys, stream_key, torch_normal, torch_uniform, uniform
from harness.core.types import UserError
from harness.data.sampling import BatchSampler

MASK = (1 << 64) - 1


def splitmix(state: int) -> tuple[int, int]:
    """One step of SplitMix64 in Python integers: (new state, output)."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def test_splitmix_known_values() -> None:
    """The first numbers of seed 1234567, as its authors' code gives them."""
    state, outputs = 1234567, []
    for _ in range(3):
        state, output = splitmix(state)
        outputs.append(output)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_is_splitmix() -> None:
    key = int(image_keys(3, 5, [2])[0]) & MASK
    z = key ^ stream_key("flip")
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    state = z ^ (z >> 31)
    expected = []
    for _ in range(4):
        state, output = splitmix(state)
        expected.append((output >> 11) * 2.0**-53)
    np.testing.assert_array_equal(uniform(image_keys(3, 5, [2]), 4, "flip")[0], expected)


@given(st.integers(-(2**40), 2**40), st.integers(0, 10**7))
@settings(max_examples=30, deadline=None)
def test_torch_gives_the_same_bits(seed: int, step: int) -> None:
    keys = image_keys(seed, step, np.arange(5))
    ours = uniform(keys, 7, "x")
    theirs = torch_uniform(torch.from_numpy(keys), 7, "x").numpy()
    np.testing.assert_array_equal(theirs, np.floor(ours * 2**24) / 2**24)


def test_numbers_are_uniform_and_streams_independent() -> None:
    keys = image_keys(0, 0, np.arange(20000))
    a, b = uniform(keys, 2, "a"), uniform(keys, 2, "b")
    assert abs(a.mean() - 0.5) < 0.005
    assert abs(a.var() - 1 / 12) < 0.002
    together = np.corrcoef(np.concatenate([a, b], axis=1).T)
    assert np.abs(together - np.eye(4)).max() < 0.03
    normal = torch_normal(torch.from_numpy(keys), 2, "n")
    assert abs(float(normal.mean())) < 0.02
    assert abs(float(normal.std()) - 1) < 0.02


def make(
    num_labeled: int,
    num_unlabeled: int,
    labeled: int,
    unlabeled: int,
    micro: int | None = None,
    ratio: str = "exact",
    **options: Any,
) -> BatchSampler:
    """A sampler from plain numbers."""
    return BatchSampler(num_labeled, num_unlabeled, StepShape(labeled, unlabeled, micro, ratio=ratio), **options)


def walk(sampler: BatchSampler, steps: int) -> tuple[list[int], list[int]]:
    labeled: list[int] = []
    unlabeled: list[int] = []
    for step, micro in itertools.product(range(steps), range(sampler.micro_batches)):
        drawn = sampler.draw(step, micro)
        labeled += drawn.labeled.tolist()
        unlabeled += drawn.unlabeled.tolist()
    return labeled, unlabeled


@pytest.mark.parametrize("ratio", ["exact", "bernoulli"])
@pytest.mark.parametrize("unlabeled_from", [0, 3])
def test_every_epoch_visits_every_image_once(ratio: str, unlabeled_from: int) -> None:
    sampler = make(7, 31, 4, 16, micro=5, seed=1, ratio=ratio, unlabeled_from=unlabeled_from)
    labeled, unlabeled = walk(sampler, 40)
    for drawn, count in ((labeled, 7), (unlabeled, 31)):
        epochs = [drawn[i : i + count] for i in range(0, len(drawn) - count, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_draw_is_a_pure_function(data: st.DataObject) -> None:
    ratio = data.draw(st.sampled_from(["exact", "bernoulli"]))
    arguments = {"micro": 4, "seed": data.draw(st.integers(0, 99)), "ratio": ratio, "unlabeled_from": 2}
    fresh, used = (make(5, 50, 8, 8, **arguments) for _ in range(2))
    walk(used, 6)
    step = data.draw(st.integers(0, 3000))
    for micro in range(4):
        a, b = fresh.draw(step, micro), used.draw(step, micro)
        np.testing.assert_array_equal(a.labeled, b.labeled)
        np.testing.assert_array_equal(a.unlabeled, b.unlabeled)
        np.testing.assert_array_equal(a.labeled_slots, b.labeled_slots)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_world_size_does_not_change_what_is_drawn(world_size: int) -> None:
    sampler = make(9, 40, 8, 12, micro=5, seed=2, ratio="bernoulli")
    ranks = [list(itertools.islice(sampler.stream(3, r, world_size), 8 // world_size)) for r in range(world_size)]
    drawn = {(m.step, m.index): m for rank in ranks for m in rank}
    assert sorted(drawn) == [(step, micro) for step in (3, 4) for micro in range(4)]
    for (step, micro), got in drawn.items():
        np.testing.assert_array_equal(got.unlabeled, sampler.draw(step, micro).unlabeled)


def test_bernoulli_counts_match_soft_teacher() -> None:
    """Five images, labelled with chance 1/5 and clamped to 1..4: 1.327 labelled on average."""
    sampler = make(1000, 1000, 8, 32, micro=5, seed=0, ratio="bernoulli")
    counts = [len(sampler.draw(step, micro).labeled) for step in range(500) for micro in range(8)]
    assert min(counts) == 1
    assert max(counts) <= 4
    expected = 1 + 0.8**5 - 0.2**5
    assert abs(np.mean(counts) - expected) < 4 * np.std(counts) / np.sqrt(len(counts))


def test_exact_counts_slots_and_burn_in() -> None:
    sampler = make(10, 10, 8, 32, micro=5, unlabeled_from=2)
    early, late = sampler.draw(1, 3), sampler.draw(2, 3)
    assert (len(early.labeled), len(early.unlabeled)) == (1, 0)
    assert (len(late.labeled), len(late.unlabeled)) == (1, 4)
    assert late.labeled_slots.tolist() == [15]
    assert late.unlabeled_slots.tolist() == [16, 17, 18, 19]
    assert late.unlabeled.tolist() == make(10, 10, 8, 32, micro=5).draw(0, 3).unlabeled.tolist()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_unlabeled": 0}, "batch.unlabeled"),
        ({"num_labeled": 0}, "batch.labeled"),
        ({"labeled": 0, "unlabeled_from": 3}, "batch.labeled=0"),
        ({"group": "both"}, "batch.group_by_aspect=both"),
    ],
)
def test_impossible_numbers_are_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        make(**{"num_labeled": 5, "num_unlabeled": 5, "labeled": 4, "unlabeled": 4, **arguments})


def test_uneven_world_size_is_named() -> None:
    with pytest.raises(UserError, match="3 devices cannot share"):
        next(make(5, 5, 4, 4, micro=2).stream(0, 0, 3))


def test_annealing_lowers_the_labelled_share_over_the_last_steps():
    options = {
        "num_labeled": 50,
        "num_unlabeled": 500,
        "labeled": 20,
        "unlabeled": 20,
        "micro": 8,
        "ratio": "bernoulli",
    }
    plain, annealed = make(**options), make(**options, anneal_steps=200, steps=400)
    labeled = np.array([annealed.images(step)[0] for step in range(400)])
    assert [plain.images(step) for step in range(200)] == [annealed.images(step) for step in range(200)]
    assert labeled[200:].reshape(4, 50).mean(1) == pytest.approx([17.5, 12.8, 8.6, 5.6], abs=1.5)  # 1 of 8 always stays
    assert labeled[-1] == 5
    with pytest.raises(UserError, match="anneal_steps"):
        make(**{**options, "ratio": "exact"}, anneal_steps=5, steps=10)
    with pytest.raises(UserError, match="anneal_steps"):
        make(**options, anneal_steps=20, steps=10)


LANDSCAPE = (np.arange(40) % 3 > 0, np.arange(300) % 4 > 0)  # 26 of 40 and 225 of 300


def grouped(group: str | None, landscape: tuple[np.ndarray, np.ndarray] = LANDSCAPE, **options: Any) -> BatchSampler:
    arguments = {"labeled": 8, "unlabeled": 16, "micro": 6, "seed": 3, **options}
    return make(len(landscape[0]), len(landscape[1]), group=group, landscape=landscape, **arguments)


@pytest.mark.parametrize("ratio", ["exact", "bernoulli"])
@pytest.mark.parametrize("group", ["joint", "separate"])
@pytest.mark.parametrize("unlabeled_from", [0, 3])
def test_grouped_micro_batches_have_one_aspect(ratio: str, group: str, unlabeled_from: int) -> None:
    """Each list's images of a micro-batch are alike; jointly also those of the two lists; separately not always."""
    sampler, agree = grouped(group, ratio=ratio, unlabeled_from=unlabeled_from), []
    for step, micro in itertools.product(range(2, 60), range(4)):
        drawn = sampler.draw(step, micro)
        kinds = [set(LANDSCAPE[0][drawn.labeled].tolist()), set(LANDSCAPE[1][drawn.unlabeled].tolist())]
        assert len(kinds[0]) == 1
        assert len(kinds[1]) == int(step >= unlabeled_from)
        agree.append(kinds[0] == kinds[1] or not kinds[1])
    assert all(agree) == (group == "joint")


@pytest.mark.parametrize("ratio", ["exact", "bernoulli"])
@pytest.mark.parametrize("group", ["joint", "separate"])
def test_grouped_images_come_once_in_every_epoch_of_their_group(ratio: str, group: str) -> None:
    for drawn, flags in zip(walk(grouped(group, ratio=ratio), 120), LANDSCAPE, strict=True):
        for kind in (False, True):
            own, members = [i for i in drawn if flags[i] == kind], np.flatnonzero(flags == kind).tolist()
            epochs = [own[i : i + len(members)] for i in range(0, len(own) - len(members) + 1, len(members))]
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 1
            assert all(sorted(epoch) == members for epoch in epochs)


@pytest.mark.parametrize(("group", "shares"), [("joint", (251 / 340, 251 / 340)), ("separate", (26 / 40, 225 / 300))])
def test_groups_have_their_shares_of_every_block(group: str, shares: tuple[float, float]) -> None:
    """Of 64 successive micro-batches, as many as the group's share of both lists, or of its own, to one."""
    sampler = grouped(group)
    kinds = []
    for step, micro in itertools.product(range(96), range(4)):
        drawn = sampler.draw(step, micro)
        kinds.append([LANDSCAPE[0][drawn.labeled[0]], LANDSCAPE[1][drawn.unlabeled[0]]])
    blocks = np.array(kinds).reshape(6, 64, 2).sum(1)
    assert (np.abs(blocks - 64 * np.array(shares)) < 1).all()
    patterns = {tuple(block) for block in np.array(kinds)[:, 1].reshape(6, 64).tolist()}
    assert len(patterns) == 6


@pytest.mark.parametrize("group", ["joint", "separate"])
def test_a_list_without_a_group_gives_images_of_the_other(group: str) -> None:
    portrait = (np.zeros(5, bool), np.arange(30) % 2 > 0)
    labeled, unlabeled = walk(grouped(group, portrait), 60)
    assert set(labeled) == set(range(5))
    assert set(unlabeled) == set(range(30))
    assert max(np.bincount(labeled)) - min(np.bincount(labeled)) <= 1


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_grouped_draw_is_a_pure_function(data: st.DataObject) -> None:
    options = {
        "ratio": data.draw(st.sampled_from(["exact", "bernoulli"])),
        "seed": data.draw(st.integers(0, 99)),
        "unlabeled_from": data.draw(st.sampled_from([0, 2, 1500])),
    }
    group = data.draw(st.sampled_from(["joint", "separate"]))
    fresh, used = grouped(group, **options), grouped(group, **options)
    walk(used, 6)
    step = data.draw(st.integers(0, 3000))
    used.draw(step // 2)
    for micro in range(4):
        a, b = fresh.draw(step, micro), used.draw(step, micro)
        np.testing.assert_array_equal(a.labeled, b.labeled)
        np.testing.assert_array_equal(a.unlabeled, b.unlabeled)
        np.testing.assert_array_equal(a.unlabeled_slots, b.unlabeled_slots)


def test_grouped_starts_follow_from_counting_every_step_before() -> None:
    """Across chunks: the draws of a group, one after the other, are its walk without a gap or a repetition."""
    sampler = grouped("joint", ratio="bernoulli", unlabeled_from=1000)
    seen = {(part, kind): 0 for part in range(2) for kind in (False, True)}
    orders = {(part, kind): grouped("joint")._walks[part] for part, kind in seen}  # the same seed, whatever the ratio
    for step in range(1100):
        for micro in range(4):
            drawn = sampler.draw(step, micro)
            for part, positions in enumerate((drawn.labeled, drawn.unlabeled)):
                if not len(positions):
                    continue
                kind = bool(LANDSCAPE[part][positions[0]])
                expected = orders[part, kind](int(kind), seen[part, kind], len(positions))
                np.testing.assert_array_equal(positions, expected)
                seen[part, kind] += len(positions)


def test_ungrouped_draws_are_those_of_before() -> None:
    """Vectors of the sampler as it was before it could group."""
    drawn = make(9, 40, 8, 12, micro=5, seed=2, ratio="bernoulli", unlabeled_from=7).draw(1030, 2)
    assert (drawn.labeled.tolist(), drawn.unlabeled.tolist()) == ([1], [22, 4, 9, 37])
    drawn = make(9, 40, 8, 12, micro=5, seed=2).draw(1030, 2)
    assert (drawn.labeled.tolist(), drawn.unlabeled.tolist()) == ([6, 8], [2, 14, 5])
