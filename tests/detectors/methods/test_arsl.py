"""ARSL against its formulas in plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from detectors.detector import targets_of
from detectors.methods.arsl import Arsl
from detectors.one_stage import DenseOutput
from detectors.padded import PaddedTargets
from harness.core.types import UserError
from tests.detectors.methods.dense_cells import EMA, bce, giou_loss, make_fcos, sigmoid, unlabelled, without_values

HEIGHTS = (8, 4, 2)  # cells of the levels of a picture of 32 px
STRIDES = (4, 8, 16)


def make_method(**options: object) -> Arsl:
    """A teacher that has other weights than the student."""
    method = Arsl(make_fcos(), 10, **{"burn_in": 0, "rise": None, "ema": EMA, **options})
    method.teacher.load_state_dict(make_fcos(1).state_dict())
    return method


def plain_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def cells() -> list[tuple[int, float, float, int]]:
    """Level, point and stride of every cell."""
    return [
        (level, (x + 0.5) * stride, (y + 0.5) * stride, stride)
        for level, (height, stride) in enumerate(zip(HEIGHTS, STRIDES, strict=True))
        for y in range(height)
        for x in range(height)
    ]


def random_output(method: Arsl, seed: int, sure: float) -> DenseOutput:
    """What a teacher might say of two pictures of 32 px with two things each, more or less surely."""
    generator = torch.Generator().manual_seed(seed)
    anchors, level_sizes = method.student.anchors([torch.zeros(1, 1, n, n) for n in HEIGHTS], (32, 32))
    count = len(anchors)
    logits = torch.randn(2, count, 3, generator=generator) - 3.0
    deltas = torch.rand(2, count, 4, generator=generator)
    quality = torch.randn(2, count, generator=generator)
    things = torch.tensor([[2.0, 3, 20, 22], [14.0, 12, 31, 30]])
    for image in range(2):
        for row, (_, x, y, stride) in enumerate(cells()):
            for label, (x1, y1, x2, y2) in enumerate(things.tolist()):
                if x1 < x < x2 and y1 < y < y2:
                    noise = torch.rand(4, generator=generator) * 2
                    sides = torch.tensor([x - x1, y - y1, x2 - x, y2 - y]) + noise
                    deltas[image, row] = sides / stride
                    logits[image, row, label] = sure * torch.rand(1, generator=generator)
    return DenseOutput(logits, deltas, quality, anchors, level_sizes)


def sorted_in_loops(output: DenseOutput, image: int) -> dict:
    """Scores, positives and hard cells of an image as the paper's code finds them."""
    u = [sigmoid(x) for x in output.quality[image].double().tolist()]
    scores = [[sigmoid(x) * q for x in row] for row, q in zip(output.logits[image].double().tolist(), u, strict=True)]
    v = [max(row) for row in scores]
    candidates = [x for x in v if x >= 0.1]
    positive, hard, threshold = [], [], 0.0
    if candidates:
        spread = statistics.stdev(candidates) if len(candidates) > 1 else 0.0
        threshold = min(0.4, statistics.fmean(candidates) + spread)
        positive = [i for i, x in enumerate(v) if x >= threshold]
        hard = [i for i, x in enumerate(v) if 0.1 <= x < threshold]
    if not positive:
        positive = sorted(range(len(v)), key=lambda i: -v[i])[:10]
    return {"u": u, "scores": scores, "v": v, "positive": positive, "hard": hard, "threshold": threshold}


def mined_in_loops(found: dict, boxes: list[list[float]]) -> dict[int, list[float]]:
    """The box that each hard cell learns that belongs to positives."""
    learnt = {}
    label = [row.index(max(row)) for row in found["scores"]]
    places = cells()
    for h in found["hard"]:
        level, x, y, _ = places[h]
        mates = [
            p
            for p in found["positive"]
            if label[p] == label[h]
            and abs(places[p][0] - level) <= 1
            and plain_iou(boxes[h], boxes[p]) >= 0.6
            and boxes[p][0] < x < boxes[p][2]
            and boxes[p][1] < y < boxes[p][3]
        ]
        if mates:
            total = sum(found["v"][p] for p in mates)
            learnt[h] = [sum(found["v"][p] * boxes[p][side] for p in mates) / total for side in range(4)]
    return learnt


def boxes_of(method: Arsl, output: DenseOutput, image: int) -> list[list[float]]:
    return method.student.decode(output.deltas, output.anchors)[image].double().tolist()


SURE = {"many sure cells": 4.0, "some": 1.0, "few": -1.0, "none": -9.0}


@pytest.mark.parametrize("sure", SURE)
@pytest.mark.parametrize("seed", range(3))
def test_cells_are_sorted_by_each_image_of_its_own(sure, seed):
    method = make_method()
    output = random_output(method, seed, SURE[sure])
    sorted_cells = method.sort(output)
    for image in range(2):
        expected = sorted_in_loops(output, image)
        assert sorted_cells.positive[image].nonzero()[:, 0].tolist() == sorted(expected["positive"])
        assert sorted_cells.hard[image].nonzero()[:, 0].tolist() == expected["hard"]
        assert sorted_cells.thresholds[image].item() == pytest.approx(expected["threshold"], abs=1e-6)


def told(*scores: float) -> DenseOutput:
    """An image whose cells have these joint scores of class 1, the rest next to nothing."""
    logits = torch.full((1, 84, 3), -20.0)
    logits[0, : len(scores), 0] = torch.tensor(scores).logit()
    return DenseOutput(logits, torch.ones(1, 84, 4), torch.full((1, 84), 20.0), torch.zeros(84, 4), [64, 16, 4])


@pytest.mark.parametrize(
    ("scores", "positive", "hard", "threshold"),
    [
        ((), 10, 0, 0.0),  # nobody is a candidate: the ten best
        ((0.3,), 1, 0, 0.3),  # one candidate has no deviation
        ((0.9,), 1, 0, 0.4),
        ((0.2, 0.3), 10, 2, 0.25 + 0.005**0.5),  # none reaches the threshold: both are hard and among the ten best
        ((0.5, 0.45, 0.11, 0.12), 2, 2, 0.4),
        ((0.09, 0.2, 0.2, 0.2, 0.2, 0.35), 1, 4, 0.23 + 0.0045**0.5),
    ],
)
def test_thresholds_by_hand(scores, positive, hard, threshold):
    found = make_method().sort(told(*scores))
    assert (int(found.positive.sum()), int(found.hard.sum())) == (positive, hard)
    assert found.thresholds.item() == pytest.approx(threshold, abs=1e-5)


@pytest.mark.parametrize("sure", SURE)
@pytest.mark.parametrize("seed", range(3))
def test_hard_cells_learn_the_boxes_that_they_belong_to(sure, seed):
    method = make_method()
    output = random_output(method, seed, SURE[sure])
    boxes, joined = method.mine(output, method.sort(output))
    for image in range(2):
        before = boxes_of(method, output, image)
        expected = mined_in_loops(sorted_in_loops(output, image), before)
        assert joined[image].nonzero()[:, 0].tolist() == sorted(expected)
        for row, box in enumerate(before):
            assert boxes[image, row].tolist() == pytest.approx(expected.get(row, box), abs=1e-4)


def test_there_is_something_to_mine():
    """The cases above are no empty ones: sure and hard cells, and hard ones with and without a mate."""
    method = make_method()
    counts = []
    for seed in range(3):
        output = random_output(method, seed, SURE["some"])
        sorted_cells = method.sort(output)
        counts.append((int(sorted_cells.hard.sum()), int(method.mine(output, sorted_cells)[1].sum())))
    assert all(0 < mined < hard for hard, mined in counts)


def test_at_most_so_many_are_compared():
    """With room for all of them nothing changes; with room for one, the best hard cell and the best positive."""
    output = random_output(make_method(), 0, SURE["some"])
    everything = make_method().mine(output, make_method().sort(output))[1]
    for mined in (84, 1000):
        assert torch.equal(make_method(mined=mined).mine(output, make_method().sort(output))[1], everything)
    assert int(make_method(mined=1).mine(output, make_method().sort(output))[1].sum()) <= 2


@pytest.mark.parametrize("sure", SURE)
def test_unlabelled_losses_in_plain_loops(sure):
    method = make_method()
    teacher, student = random_output(method, 0, SURE[sure]), random_output(method, 9, 1.0)
    targets, metrics = method.dense_targets(teacher)
    found = method.student.loss(student, targets, method.class_loss)

    class_sum = class_weight = box_sum = box_weight = iou_sum = 0.0
    learning = mined_count = positives = 0
    for image in range(2):
        part, boxes = sorted_in_loops(teacher, image), boxes_of(method, teacher, image)
        own = boxes_of(method, student, image)
        mined = mined_in_loops(part, boxes)
        u = [sigmoid(x) for x in student.quality[image].double().tolist()]
        for row, logits in enumerate(student.logits[image].double().tolist()):
            scores, v = part["scores"][row], part["v"][row]
            wanted = [0.0] * 3
            if row in part["hard"]:  # whether it is one of the ten best or not
                wanted = scores
            elif row in part["positive"]:
                wanted[scores.index(v)] = v
            for logit, q in zip(logits, wanted, strict=True):
                c = sigmoid(logit) * u[row]
                class_sum += (1.0 if q > 0 else 0.75) * (c - q) ** 2 * bce(c, q)
            class_weight += v if row in part["positive"] else 0.0
            if row in part["positive"] or row in mined:
                box_sum += v * giou_loss(own[row], mined.get(row, boxes[row]))
                box_weight += v
                iou_sum += bce(u[row], part["u"][row])
                learning += 1
        mined_count += len(mined)
        positives += len(part["positive"])
    assert found["class"].item() == pytest.approx(class_sum / class_weight, rel=1e-4)
    assert found["box"].item() == pytest.approx(box_sum / box_weight, rel=1e-4)
    assert found["iou"].item() == pytest.approx(iou_sum / learning, rel=1e-4)
    assert metrics["mined_cells"].item() == mined_count / 2
    assert metrics["pseudo_cells"].item() == positives / 2


def test_weights_of_the_unlabelled_losses(make_batch):
    """2, 2 and 0.5, all of them times lambda_u."""
    method, batch = make_method(lambda_u=3.0).train(), make_batch()
    losses = unlabelled(method(batch, 0)[0])
    weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
    with torch.no_grad():
        taught = method.teacher.output(method.teacher.features(weak.images), weak)
        output = method.student.output(method.student.features(strong.images), strong)
    expected = method.student.loss(output, method.dense_targets(taught)[0], method.class_loss)
    for name, own, weight in (("class", "class", 2.0), ("box", "box", 2.0), ("quality", "iou", 0.5)):
        assert losses[name].item() == pytest.approx(3 * weight * expected[own].item(), rel=1e-5)


@pytest.mark.parametrize("boxes", [(3, 1), (0, 2)])
def test_labelled_losses_in_plain_loops(make_batch, boxes):
    """A positive's class wants the IoU of its prediction; its box counts by its centerness."""
    method = make_method()
    student, view = method.student, make_batch(labeled_boxes=boxes).labeled["labeled"]
    features = student.features(view.images)
    truth = targets_of(view)
    found = method.labeled_losses(features, view, truth, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        output = student.output(features, view)
        index, positive = student.assign(output.anchors, output.level_sizes, truth)
        predicted = student.decode(output.deltas, output.anchors)
        centers = student.centers(output.anchors).tolist()
    class_sum = box_sum = near_sum = iou_sum = 0.0
    for image in range(2):
        for row, logits in enumerate(output.logits[image].double().tolist()):
            u, wanted = sigmoid(output.quality[image, row].item()), [0.0] * 3
            if positive[image, row]:
                box, own = view.targets[image].boxes[index[image, row]].tolist(), predicted[image, row].tolist()
                y = plain_iou(own, box)
                wanted[int(view.targets[image].labels[index[image, row]]) - 1] = y
                left, top = centers[row][0] - box[0], centers[row][1] - box[1]
                right, bottom = box[2] - centers[row][0], box[3] - centers[row][1]
                near = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
                box_sum, near_sum = box_sum + near * giou_loss(own, box), near_sum + near
                iou_sum += bce(u, y)
            for logit, y in zip(logits, wanted, strict=True):
                c = sigmoid(logit) * u
                class_sum += (1.0 if y > 0 else 0.75) * (c - y) ** 2 * bce(c, y)
    count = int(positive.sum())
    assert count > 3
    assert found["class"].item() == pytest.approx(class_sum / count, rel=1e-4)
    assert found["box"].item() == pytest.approx(box_sum / near_sum, rel=1e-4)
    assert found["iou"].item() == pytest.approx(0.5 * iou_sum / count, rel=1e-4)


def test_no_labelled_box_is_no_trouble(make_batch):
    method = make_method().train()
    losses, _ = method(make_batch(labeled_boxes=(0, 0)), 0)
    sum(losses.values()).backward()
    assert losses["box"] == losses["iou"] == 0
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters() if p.grad is not None)


def test_class_loss_of_labelled_images_reaches_the_quality(make_batch):
    """The joint score teaches both branches; the IoU that it wants is a constant."""
    method = make_method().train()
    view = make_batch().labeled["labeled"]
    truth: PaddedTargets = targets_of(view)
    found = method.labeled_losses(method.student.features(view.images), view, truth, torch.zeros(2, dtype=torch.int64))
    found["class"].backward()
    head = method.student.regression_head
    assert head.bbox_ctrness.weight.grad.abs().sum() > 0
    assert head.bbox_reg.weight.grad is None or head.bbox_reg.weight.grad.abs().sum() == 0


def test_weight_rises_over_2000_steps():
    method = Arsl(make_fcos(), 90_000, ema=EMA, burn_in=9000)
    weights = [method.unlabeled_weight(t) for t in (0, 9000, 9500, 10_000, 11_000, 80_000)]
    assert weights == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert method.teacher_from == 9000


def test_a_detector_that_tells_centerness():
    with pytest.raises(UserError, match=r"method=arsl .* set detector\.quality=iou, or take detector=fcos_iou"):
        Arsl(make_fcos(quality="centerness"), 10, ema=EMA, burn_in=0)


def test_nothing_waits_for_the_device():
    method = make_method()
    output = without_values(random_output(method, 0, 1.0))
    with torch.no_grad():
        targets, metrics = method.dense_targets(output)
    losses = method.student.loss(output, targets, method.class_loss)
    sum(losses.values()).backward()
    assert {value.shape for value in [*losses.values(), *metrics.values()]} == {()}
