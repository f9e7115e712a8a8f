"""MixPL: what is mixed with what and when, the gate, the cache of every lane, and that hidden boxes decide nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from detectors.methods import mixing
from detectors.methods.ema import ramp
from detectors.methods.mixing import BoxedImages
from detectors.methods.mixpl import MixPl
from detectors.padded import PaddedTargets, pad
from detectors.retinanet import RetinaNet
from harness.core.draws import torch_uniform
from harness.core.types import Batch, Target, UserError, View

EASY = {"momentum": 0.5, "ramp": False, "update": "after", "buffers": True}
FOUR = {"labeled_boxes": (2,), "unlabeled_boxes": (2, 3, 1, 2)}  # 1 + 4 images, as in the official code


def make(detector, **options) -> MixPl:
    """With a teacher whose untrained scores are pseudo labels, and images that are not erased."""
    settings = {"ema": EASY, "score": 0.1, "erase": False, "mosaic_side": (0.5, 1.0), **options}
    return MixPl(detector, 20, **settings).train()


def step_on(devices: list[MixPl], batches: list[Batch], step: int) -> list[dict[str, torch.Tensor]]:
    """A student step as the loop makes it, micro-batch number i on device i % n; the losses of each."""
    for method in devices:
        method.before_step(step)
        method.trainable().zero_grad()
    observed, all_losses = [], []
    for lane, batch in enumerate(batches):
        method = devices[lane % len(devices)]
        losses, metrics = method(dataclasses.replace(batch, lane=lane), step)
        observed.append(method.observe())
        all_losses.append({name: value.detach() for name, value in {**losses, **metrics}.items()})
    gathered = {name: torch.stack([part[name] for part in observed]) for name in observed[0]}
    for method in devices:
        method.absorb(step, gathered)
        method.after_step(step)
    return all_losses


def seen_by(method: MixPl, monkeypatch: pytest.MonkeyPatch) -> list[tuple[View, PaddedTargets]]:
    """What the student is taught from then on, forward by forward, the labelled images' among it."""
    seen: list[tuple[View, PaddedTargets]] = []
    original = method.student.losses

    def watched(features, view, targets, keys, **more):
        seen.append((view, targets))
        return original(features, view, targets, keys, **more)

    monkeypatch.setattr(method.student, "losses", watched)
    return seen


def constant(batch: Batch, value: float) -> Batch:
    """The same with strong views of one value, and weak ones as they were."""
    strong = batch.unlabeled["strong"]
    return dataclasses.replace(
        batch,
        unlabeled={
            **batch.unlabeled,
            "strong": dataclasses.replace(strong, images=torch.full_like(strong.images, value)),
        },
    )


def test_nothing_is_mixed_until_the_cache_is_full(make_small, make_batch, monkeypatch) -> None:
    """With eight places and four images a step: from the third step on, with the two steps before."""
    method = make(make_small())
    seen = seen_by(method, monkeypatch)
    for step in range(4):
        seen.clear()
        batch = constant(make_batch(step, **FOUR), float(step + 1))
        (losses,) = step_on([method], [batch], step)
        _, mixed, *mosaics = seen
        view = mixed[0]
        high, wide = view.sizes.T.tolist()
        inside = [image[:, :h, :w] for image, h, w in zip(view.images, high, wide, strict=True)]
        if step < 2:
            assert not mosaics
            assert all((image == step + 1).all() for image in inside)
            assert float(losses["mosaic_gate"]) == 0
            continue
        # Half of this step's value where the older image is not, and half of the one of two steps before beside it.
        own, older = (step + 1) / 2, (step - 1) / 2
        assert {float(v) for image in inside for v in image.unique()} <= {0.0, own, older, own + older}
        assert any((image == own + older).any() for image in inside)
        ((mosaic, _),) = mosaics
        assert len(mosaic) == 1
        h, w = mosaic.sizes[0].tolist()
        assert h % 32 == w % 32 == 0
        quarters = [mosaic.images[0, 0, y : y + h // 2, x : x + w // 2] for y in (0, h // 2) for x in (0, w // 2)]
        assert {float(v) for quarter in quarters for v in quarter.unique()} <= {0.0, float(step)}  # the newer half
        for quarter, (y, x) in zip(quarters, [(-1, -1), (-1, 0), (0, -1), (0, 0)], strict=True):
            assert float(quarter[y, x]) == step  # tiles touch the centre


def test_images_of_zeros_in_the_cache_halve_the_pixels(make_small, make_batch, monkeypatch) -> None:
    method = make(make_small())
    seen = seen_by(method, monkeypatch)
    for step in range(2):
        step_on([method], [constant(make_batch(step, **FOUR), 0.0)], step)
    seen.clear()
    batch = make_batch(9, **FOUR)
    step_on([method], [batch], 2)
    strong = batch.unlabeled["strong"]
    for mixed, image in zip(seen[1][0].images, strong.images, strict=True):  # wherever they lie now
        assert torch.equal(mixed[mixed != 0], image[image != 0] / 2)


def test_boxes_are_those_of_both_images_at_this_steps_threshold(make_small, make_batch, monkeypatch) -> None:
    method = make(make_small(), score=0.25)
    seen = seen_by(method, monkeypatch)
    labels: list[list[Target]] = []
    for step in range(3):
        step_on([method], [make_batch(step, **FOUR)], step)
        labels.append(method.label_all_scores)
    mixed, mosaic = seen[-2][1], seen[-1][1]
    expected = sum(int((t.scores > 0.25).sum()) for t in labels[2] + labels[0])
    assert int(mixed.valid.sum()) == expected
    assert expected
    kept = sum(int((t.scores > 0.25).sum()) for t in labels[1])
    assert 0 <= kept - int(mosaic.valid.sum()) <= 2  # a box narrower than a pixel may vanish where it is cut off
    scores = torch.cat([t.scores[t.scores > 0.25] for t in labels[2] + labels[0]]).sort().values
    assert torch.equal(mixed.scores[mixed.valid].sort().values, scores)
    # The cache keeps what was below.
    assert any((images.targets.scores[images.targets.valid] < 0.25).any() for _, images in method._cached[0])


@pytest.fixture(autouse=True)
def _all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `label_all` gave last."""
    original = MixPl.label_all

    def watched(self, weak, strong):
        found = original(self, weak, strong)
        self.label_all_scores = found.unpad()
        return found

    monkeypatch.setattr(MixPl, "label_all", watched)


def targets(*counts: int) -> PaddedTargets:
    return pad([Target(torch.ones(n, 4), torch.ones(n, dtype=torch.int64), torch.ones(n)) for n in counts])


def test_the_gate_asks_all_images_or_any(make_small) -> None:
    for gate, counts, expected in (
        ("all", (1, 2, 1), 1.0), ("all", (1, 0, 3), 0.0), ("all", (0, 0), 0.0),
        ("any", (0, 0, 1), 1.0), ("any", (0, 0, 0), 0.0),
    ):  # fmt: skip
        assert float(make(make_small(), gate=gate)._gate_of(targets(*counts))) == expected


def test_a_closed_gate_silences_its_own_forward_alone(make_small, make_batch, monkeypatch) -> None:
    method = make(make_small(), lambda_u=3.0, mosaic_weight=0.5)
    monkeypatch.setattr(method.student, "losses", lambda *_, **__: {"box": torch.tensor(2.0)})
    for step in range(2):
        step_on([method], [make_batch(step, **FOUR)], step)
    for mixed, mosaic, expected in ((1, 1, 9.0), (1, 0, 6.0), (0, 1, 3.0), (0, 0, 0.0)):
        gates = iter([torch.tensor(float(mixed)), torch.tensor(float(mosaic))])
        monkeypatch.setattr(method, "_gate_of", lambda _, gates=gates: next(gates))
        losses, metrics = method(make_batch(7, **FOUR), 5)
        assert float(losses["unlabeled_box"]) == expected  # 3 (g 2 + 0.5 g 2)
        assert (float(metrics["mixed_gate"]), float(metrics["mosaic_gate"])) == (mixed, mosaic)


def test_erasing_leaves_the_cache_as_it_was(make_small, make_batch, monkeypatch) -> None:
    method = make(make_small(), erase=True)
    seen = seen_by(method, monkeypatch)
    for step in range(3):
        seen.clear()
        batch = make_batch(step, **FOUR)
        step_on([method], [batch], step)
        strong = batch.unlabeled["strong"]
        assert torch.equal(method._cached[0][-1][1].images, strong.images)
        if step < 2:
            patches, exists = mixing.draw_patches(strong.sizes, batch.unlabeled_keys, "mixpl erase", 19, 0.1)
            whole = BoxedImages(strong.images, strong.sizes, pad(method.label_all_scores))
            assert torch.equal(seen[1][0].images, mixing.erase(whole, patches, exists).images)
            assert not torch.equal(seen[1][0].images, strong.images)


def test_older_images_are_a_permutation_that_is_mirrored(make_small, make_batch, monkeypatch) -> None:
    method = make(make_small())
    seen = seen_by(method, monkeypatch)
    batches = [make_batch(step, **FOUR) for step in range(3)]
    for step, batch in enumerate(batches):
        seen.clear()
        step_on([method], [batch], step)
    order = torch_uniform(batches[2].unlabeled_keys[:1], 4, "mixpl images")[0].argsort().tolist()
    assert sorted(order) == [0, 1, 2, 3]
    first, now = (batches[step].unlabeled["strong"] for step in (0, 2))
    for row, place in enumerate(order):
        h, w = first.sizes[place].tolist()
        scale = min(64 / h, 64 / w)
        older = F.interpolate(first.images[place][None, :, :h, :w], scale_factor=scale)[0].flip(-1)
        size = [max(a, b) for a, b in zip(older.shape[1:], now.sizes[row].tolist(), strict=True)]
        assert seen[1][0].sizes[row].tolist() == size
        mixed = seen[1][0].images[row, :, : size[0], : size[1]]
        mine = now.images[row, :, : now.sizes[row, 0], : now.sizes[row, 1]]
        fits = [
            torch.allclose(mixed, placed(mine, a, size) / 2 + placed(older, b, size) / 2, atol=1e-6)
            for a in places(mine, size)
            for b in places(older, size)
        ]
        assert any(fits)


def places(image: torch.Tensor, size: list[int]) -> list[tuple[int, int]]:
    return [(y, x) for y in range(size[0] - image.shape[1] + 1) for x in range(size[1] - image.shape[2] + 1)]


def placed(image: torch.Tensor, place: tuple[int, int], size: list[int]) -> torch.Tensor:
    y, x = place
    return F.pad(image, (x, size[1] - x - image.shape[2], y, size[0] - y - image.shape[1]))


def test_a_batch_can_be_its_own_cache(make_small, make_batch, monkeypatch) -> None:
    method = make(make_small(), cache="batch")
    seen = seen_by(method, monkeypatch)
    batch = make_batch(3, **FOUR)
    strong = batch.unlabeled["strong"]
    values = torch.arange(1.0, 5.0)
    strong.images = torch.ones_like(strong.images) * values[:, None, None, None]
    assert method.observe() == {}
    (losses,) = step_on([method], [batch], 0)
    mixed, mosaic = seen[1][0], seen[2][0]
    partners = [float(mixed.images[row].max() * 2 - values[row]) for row in range(4)]
    assert sorted(partners) == values.tolist()
    assert all(partner != own for partner, own in zip(partners, values.tolist(), strict=True))
    h, w = mosaic.sizes[0].tolist()
    centre = mosaic.images[0, 0, h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1].flatten().tolist()
    assert sorted(centre) == values.tolist()
    assert method.missing() == []
    assert "mosaic_gate" in losses
    single = make_batch(4, labeled_boxes=(2,), unlabeled_boxes=(2,))
    step_on([method], [single], 1)  # an image alone is mixed with itself, and four times in a mosaic


def test_lanes_do_not_mix(make_small, make_batch) -> None:
    method = make(make_small())
    for step in range(3):
        batches = [constant(make_batch(2 * step + lane, **FOUR), 10.0 * lane + step) for lane in range(2)]
        step_on([method], batches, step)
    for lane in range(2):
        values = {float(images.images.max()) for _, images in method._cached[lane]}
        assert values == {10.0 * lane + 1, 10.0 * lane + 2}
        assert method.cached_from[lane].tolist() == [[step, row] for step in (1, 2) for row in range(4)]


def run_of(make_batch, lanes: int, steps: int) -> list[list[Batch]]:
    """Batches in which the number of unlabelled images differs between the lanes and the steps."""
    counts = [(2, 3, 1, 2), (1, 2), (3, 1, 2)]
    return [
        [
            make_batch(10 * step + lane, labeled_boxes=(2,), unlabeled_boxes=counts[(step + lane) % 3])
            for lane in range(lanes)
        ]
        for step in range(steps)
    ]


def equal(a: list[dict], b: list[dict]) -> bool:
    return all(
        one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        for one, two in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_any_number_of_devices_and_a_resume_within_the_cache_give_the_same(make_small, make_batch, devices) -> None:
    """Constant weights and statistics, so that all that could differ is what is mixed."""

    def made() -> MixPl:
        method = make(make_small(), erase=True)
        for module in method.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0
        return method

    steps = run_of(make_batch, 4, 7)
    whole, several = [made()], [made() for _ in range(devices)]
    for step, batches in enumerate(steps):
        if step in (2, 5):  # 4 of 8 images, and a full cache of two or three steps
            state = copy.deepcopy(several[0].state_dict())
            several = [made() for _ in range(devices)]
            for rank, method in enumerate(several):
                method.load_state_dict(state)
                for drawn_at, lane in method.missing():
                    if lane % devices == rank:
                        method.remember(dataclasses.replace(steps[drawn_at][lane], lane=lane), drawn_at)
        assert equal(step_on(whole, batches, step), step_on(several, batches, step))
        for rank, method in enumerate(several):
            assert torch.equal(method.cached_boxes, whole[0].cached_boxes)
            assert torch.equal(method.cached_from, whole[0].cached_from)
            assert set(method._cached) == set(range(rank, 4, devices))
    assert all(float(losses["mosaic_gate"]) == 1 for losses in step_on(whole, steps[0], 7))


def test_a_step_that_is_broken_off_leaves_no_trace(make_small, make_batch) -> None:
    method = make(make_small())
    steps = run_of(make_batch, 1, 5)
    for step in range(3):
        step_on([method], steps[step], step)
    cached = [(step, images.images.clone()) for step, images in method._cached[0]]
    method.before_step(3)
    method(steps[4][0], 3)
    for part, images in zip(method._cached[0], cached, strict=True):
        assert part[0] == images[0]
        assert torch.equal(part[1].images, images[1])
    step_on([method], steps[3], 3)
    assert [step for step, _ in method._cached[0]][-1] == 3
    assert torch.equal(method._cached[0][-1][1].images, steps[3][0].unlabeled["strong"].images)


def test_lanes_without_unlabelled_images_and_the_burn_in(make_small, make_batch) -> None:
    method = make(make_small(), burn_in=1)
    empty = make_batch(0, **FOUR)
    empty.unlabeled, empty.unlabeled_ids, empty.unlabeled_keys = {}, empty.unlabeled_ids[:0], empty.unlabeled_keys[:0]
    method.before_step(0)
    early, _ = method(empty, 0)
    assert method.observe() == {}
    method.after_step(0)
    losses = [step_on([method], [make_batch(step, **FOUR), empty], step) for step in (1, 2, 3)]
    assert early.keys() <= losses[0][0].keys()
    assert losses[2][0].keys() == losses[2][1].keys()
    assert float(losses[2][1]["mixed_gate"]) == 0
    assert method.cached_from[1].eq(-1).all()


def test_hidden_boxes_decide_nothing_with_a_full_cache(make_small, make_batch) -> None:
    """Whatever boxes the unlabelled views carry, even none: the same bits."""
    results = []
    for noise in (None, 0, 1):
        method = make(make_small(), erase=True)
        history = []
        for step in range(4):
            batch = make_batch(step, **FOUR)
            if noise is not None:
                for view in batch.unlabeled.values():
                    view.targets = make_batch(50 + noise, pseudo=True, **FOUR).unlabeled["strong"].targets
            if noise == 1:
                empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
                batch.unlabeled["strong"].targets = [empty] * 4
            history += step_on([method], [batch], step)
        results.append([*history, method.state_dict()])
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_the_average_is_the_official_hooks(make_small) -> None:
    """Every third step from the third on, the student's share max(0.0002, 4 / (4 + t)) after the step."""
    method = make(
        make_small(), ema={"momentum": 0.9998, "ramp": True, "gamma": 4, "interval": 3, "first": 2, "update": "after"}
    )
    name, parameter = next((n, p) for n, p in method.student.named_parameters() if p.requires_grad)
    expected = parameter.detach().clone()
    for step in range(9):
        method.before_step(step)
        with torch.no_grad():
            parameter.add_(1.0)
        method.after_step(step)
        if (step + 1) % 3 == 0:
            share = max(2e-4, 4 / (4 + step))
            expected = (1 - share) * expected + share * parameter.detach()
        torch.testing.assert_close(dict(method.teacher.named_parameters())[name], expected)
    assert ramp(10**6, 0.9998, 4) == 0.9998


def test_thresholds_by_detector(make_small) -> None:
    assert make(make_small(), score=None).score == 0.7
    assert make(make_small(), score=0.0).score == 0.0

    class Other(RetinaNet):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.num_classes, self.name = 3, "other"

    assert make(Other(), score=None).score == 0.4


def test_sides_of_tiles_that_cannot_work(make_small) -> None:
    for sides in ((800, 400), (0.5, 400), (4, 16)):
        with pytest.raises(UserError, match=r"method\.mosaic_side=\["):
            make(make_small(), mosaic_side=sides)


def test_tiles_are_drawn_between_the_sides(make_small, make_batch) -> None:
    method = make(make_small(), mosaic_side=(400, 800))
    drawn = [
        method._tile(dataclasses.replace(make_batch(0), lane=lane), step) for step in range(100) for lane in (0, 1)
    ]
    assert len(set(drawn)) > 190
    assert min(map(min, drawn)) >= 400
    assert 780 < max(map(max, drawn)) < 800
    other = make_batch(0)
    other.unlabeled_ids = other.unlabeled_ids + 1
    assert method._tile(other, 0) != method._tile(make_batch(0), 0)
