"""Consistent-Teacher: which boxes are pseudo labels, the queue behind it, and what unlabelled images count."""

from __future__ import annotations

import pytest
import torch

from detectors.consistent_retina import ConsistentRetina, small_consistent_retina
from detectors.methods import mixture
from detectors.methods.consistent_teacher import ConsistentTeacher, expected, pushed, scores_by_class
from detectors.padded import PaddedTargets, pad
from harness.core.types import Target, UserError

EASY = {"momentum": 0.5, "ramp": False, "update": "after", "buffers": None}


def make(**options: object) -> ConsistentTeacher:
    torch.manual_seed(0)
    network = {"channels": (8, 8, 16, 16), "pyramid_channels": 16}
    detector = small_consistent_retina(num_classes=3, name="s", cache_dir=".", weights="scratch", **network)
    settings: dict = {"ema": EASY, "loss_from": 0, "queue": 6} | options
    return ConsistentTeacher(detector, 10, **settings)


def found(scores: list[list[float]], labels: list[list[int]]) -> PaddedTargets:
    """Boxes of several images by falling score."""
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 30.0]]).expand(len(row), 4) for row in scores]
    return pad([Target(b, torch.tensor(n), torch.tensor(s)) for b, n, s in zip(boxes, labels, scores, strict=True)])


def teach(method: ConsistentTeacher, labels: PaddedTargets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method.teacher, "find", lambda *_: labels)


def looped_queue(queue: list[float], fresh: list[float], room: int) -> list[float]:
    return [score for score in [*fresh, *queue] if score > 0][:room]


@pytest.mark.parametrize("seed", range(5))
def test_queue_is_what_loops_give(seed):
    """New scores in the order of the images, each image's by falling score, then the old ones; the first n stay."""
    generator = torch.Generator().manual_seed(seed)
    queue, kept = torch.zeros(3, 6), [[], [], []]
    for _ in range(6):
        scores = torch.rand(2, 5, generator=generator).sort(descending=True).values
        labels = torch.randint(1, 4, (2, 5), generator=generator)
        valid = torch.rand(2, 5, generator=generator) < 0.6
        fresh = scores_by_class(PaddedTargets(torch.zeros(2, 5, 4), labels, scores, valid), 3, 6)
        queue = pushed(queue, fresh)
        for label in range(3):
            of_class = scores[valid & (labels == label + 1)].tolist()  # images one after the other
            kept[label] = looped_queue(kept[label], of_class, 6)
            assert queue[label].tolist() == kept[label] + [0.0] * (6 - len(kept[label]))


def test_images_keep_as_many_boxes_as_their_scores_sum_up_to_and_one():
    """Sum 2.45, rounded 2: three boxes, and the fourth that is equal to the third. Sum 0.3: one box. None: none."""
    scores = torch.tensor([[0.9, 0.6, 0.4, 0.4, 0.15], [0.2, 0.1, 0, 0, 0], [0.0] * 5, [0.9, 0.9, 0.9, 0, 0]])
    kept = expected(scores, scores > 0)
    assert kept.sum(1).tolist() == [4, 1, 0, 3]  # 2.7, rounded 3, but no more than there are
    assert kept[0].tolist() == [True, True, True, True, False]


def test_only_boxes_above_the_threshold_of_their_class_are_pseudo_labels(make_batch, monkeypatch):
    """The threshold is itself a score, and scores must be above it."""
    method = make()
    method.queue[0] = torch.tensor([0.08, 0.09, 0.1, 0.85, 0.9, 0.0])
    labels = found([[0.87, 0.86, 0.8, 0.3], [0.95]], [[1, 1, 1, 2], [3]])
    teach(method, labels, monkeypatch)
    kept, mean = method.label(make_batch().unlabeled["weak"])
    (limit, *none) = mixture.thresholds(pushed(method.queue, torch.tensor([[0.87, 0.86, 0.8]] + [[0.0] * 3] * 2)))
    assert none == [0, 0]  # classes of fewer than four scores
    assert 0.8 <= float(limit) < 0.87
    assert [sorted(t.scores.tolist()) for t in kept.unpad()] == [
        sorted(torch.tensor([s for s in (0.87, 0.86, 0.8) if s > limit] + [0.3]).tolist()),
        torch.tensor([0.95]).tolist(),
    ]
    assert float(mean) == pytest.approx(3 * float(limit) / 5)


def test_without_mixtures_one_score_decides(make_batch, monkeypatch):
    method = make(mixture=False, score=0.5)
    teach(method, found([[0.9, 0.5, 0.4], []], [[1, 2, 3], []]), monkeypatch)
    kept, mean = method.label(make_batch().unlabeled["weak"])
    assert [len(t) for t in kept.unpad()] == [1, 0]
    assert float(mean) == 0.5
    assert method.observe() == {}


def test_scores_of_later_micro_batches_stand_before_those_of_earlier_ones():
    method = make()
    method.queue[1, :2] = torch.tensor([0.9, 0.8])
    lanes = torch.zeros(3, 3, 6)
    lanes[0, 1, :2] = torch.tensor([0.7, 0.6])
    lanes[2, 1, :3] = torch.tensor([0.5, 0.4, 0.3])
    method.absorb(0, {"scores": lanes})
    torch.testing.assert_close(method.queue[1], torch.tensor([0.5, 0.4, 0.3, 0.7, 0.6, 0.9]))
    assert not method.queue[0].any()


def test_forward_leaves_the_queue_as_it_is(make_batch, monkeypatch):
    """It is the state of the step's beginning on every device; what was seen goes through `observe`."""
    method = make()
    teach(method, found([[0.9, 0.8], [0.7]], [[1, 2], [1]]), monkeypatch)
    method(make_batch(), 0)
    assert not method.queue.any()
    observed = method.observe()
    assert observed["scores"][0, :3].tolist() == torch.tensor([0.9, 0.7, 0.0]).tolist()
    assert not method.observe()["scores"].any()  # told once


def test_the_queue_fills_while_the_loss_is_off(make_batch, monkeypatch):
    method = make(loss_from=0.4, lambda_u=3.0).train()
    teach(method, found([[0.9, 0.8], [0.7, 0.6]], [[1, 2], [1, 1]]), monkeypatch)
    assert method.unlabeled_from == 0
    losses, _ = method(make_batch(), 3)
    assert all(value == 0 for name, value in losses.items() if name.startswith("unlabeled_"))
    assert method.observe()["scores"].any()
    assert [method.unlabeled_weight(step) for step in (0, 3, 4, 9)] == [0, 0, 3, 3]
    assert any(value > 0 for name, value in method(make_batch(), 4)[0].items() if name.startswith("unlabeled_"))


@pytest.mark.parametrize(
    ("scores", "weight"),
    [([[0.9], [0.9], [], []], 1.0), ([[0.9], [], [], []], 0.01), ([[], [], [], []], 0.01)],
)
def test_few_labelled_images_count_little(make_batch, monkeypatch, scores, weight):
    """A hundredth, where fewer than half of the micro-batch's images have a pseudo label; half is enough."""
    method = make(mixture=False, lambda_u=1.0)
    method.student.eval()
    labels = found(scores, [[1] * len(row) for row in scores])
    teach(method, labels, monkeypatch)
    batch = make_batch(labeled_boxes=(1, 1), unlabeled_boxes=(1, 1, 1, 1))
    losses, metrics = method(batch, 0)
    strong = batch.unlabeled["strong"]
    pseudo = labels.to_view(batch.unlabeled["weak"], strong)
    whole = method.student.losses(method.student.features(strong.images), strong, pseudo, batch.unlabeled_keys)
    for name, value in whole.items():
        torch.testing.assert_close(losses[f"unlabeled_{name}"], weight * value, atol=1e-6, rtol=1e-5)
    assert whole["class"] > 0  # images without any box are background
    assert float(metrics["labelled_share"]) == pytest.approx(sum(map(bool, scores)) / 4)


def test_another_detector_is_refused_in_words(make_small):
    with pytest.raises(UserError, match=r"detector=small does not fit method .*: choose detector=consistent_retina"):
        ConsistentTeacher(make_small(), 10, ema=EASY)


def test_a_loss_that_would_never_count_is_refused():
    with pytest.raises(UserError, match=r"method.loss_from=10000 must be below schedule.steps=10"):
        make(loss_from=10_000)


def test_the_switches_are_of_the_detector_and_the_method():
    detector = make().student
    assert isinstance(detector, ConsistentRetina)
    assert detector.assignment == "adaptive"
    assert detector.head.fam3d is not None
    assert make().mixture
