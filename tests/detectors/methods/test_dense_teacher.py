"""Dense Teacher against its formulas in plain loops, and what all dense methods have in common."""

from __future__ import annotations

import copy

import pytest
import torch

from detectors.detector import join_views
from detectors.fcos import Fcos
from detectors.methods.dense import on_canvas_of
from detectors.methods.dense_teacher import DenseTeacher
from harness.core.types import Batch, UserError, View
from tests.detectors.methods.dense_cells import EMA, bce, giou_loss, make_fcos, sigmoid, unlabelled, without_values


def make_method(steps: int = 10, **options: object) -> DenseTeacher:
    """A teacher that has other weights than the student."""
    options = {"burn_in": 0, "rise": None, "joint_forward": False, "ema": EMA, **options}
    method = DenseTeacher(make_fcos(), steps, **options)
    method.teacher.load_state_dict(make_fcos(1).state_dict())
    return method


def cells_of(detector: Fcos, view: View) -> list[dict]:
    """What every cell says, one after the other, all images of the view."""
    with torch.no_grad():
        output = detector.output(detector.features(view.images), view)
        boxes = detector.decode(output.deltas, output.anchors)
    rows = zip(
        output.logits.flatten(0, 1).double().tolist(),
        output.quality.flatten().double().tolist(),
        boxes.flatten(0, 1).double().tolist(),
        strict=True,
    )
    return [
        {"p": [sigmoid(x) for x in logits], "quality": sigmoid(quality), "box": box} for logits, quality, box in rows
    ]


def unlabelled_in_loops(teacher: list[dict], student: list[dict], share: float) -> dict[str, float]:
    """The three losses of the paper's code, and the cells that it takes for the foreground."""
    order = sorted(range(len(teacher)), key=lambda i: -max(teacher[i]["p"]))[: int(share * len(teacher))]
    total, found = sum(max(teacher[i]["p"]) for i in order), {"class": 0.0, "box": 0.0, "quality": 0.0}
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        for p, q in zip(s["p"], t["p"], strict=True):
            wanted = q if i in order else 0.0
            found["class"] += (p - wanted) ** 2 * bce(p, wanted) / total
        if i in order:
            found["box"] += giou_loss(s["box"], t["box"]) / len(order)
            found["quality"] += bce(s["quality"], t["quality"]) / len(order)
    return {**found, "cells": len(order)}


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_unlabelled_losses_in_plain_loops(make_batch, share):
    method = make_method(share=share, class_weight=4.0, box_weight=2.0, quality_weight=3.0, lambda_u=0.5).train()
    batch = make_batch()
    losses, metrics = method(batch, 0)
    weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
    teacher = cells_of(method.teacher, weak)
    expected = unlabelled_in_loops(teacher, cells_of(method.student, strong), share)
    found = unlabelled(losses)
    for name, weight in (("class", 4.0), ("box", 2.0), ("quality", 3.0)):
        assert found[name].item() == pytest.approx(0.5 * weight * expected[name], rel=1e-4), name
    best = sorted((max(cell["p"]) for cell in teacher), reverse=True)[: expected["cells"]]
    assert metrics["pseudo_probability"].item() == pytest.approx(sum(best) / len(best), rel=1e-5)


def test_labelled_losses_are_those_of_both_views_at_once(make_batch):
    method = make_method(burn_in=5).train()
    batch = make_batch()
    found, _ = method(batch, 0)
    joined, truth, keys = method.labeled_part(batch)
    assert [len(target) for target in truth.unpad()] == [2, 1, 2, 1]
    expected = method.student.losses(method.student.features(joined.images), joined, truth, keys)
    assert {name: found[name] for name in expected} == expected
    assert all(value == 0 for value in unlabelled(found).values())


def test_share_counts_cells_of_the_whole_micro_batch(make_batch):
    """336 cells of 2 images: 6 of 672, wherever they are, and at least one."""
    for share, count in ((0.01, 6), (0.5, 336), (0.001, 1)):
        method, weak = make_method(share=share), make_batch().unlabeled["weak"]
        with torch.no_grad():
            output = method.teacher.output(method.teacher.features(weak.images), weak)
        targets, _ = method.dense_targets(output)
        assert targets.boxes.weights.sum() == count == targets.boxes.count == targets.quality.count
        assert (targets.classes.values.amax(-1) > 0).sum() == count


def test_order_of_images_does_not_matter(make_batch):
    method, batch = make_method().train(), make_batch()
    swapped = copy.copy(batch)
    swapped.unlabeled = {name: view.rows(torch.tensor([1, 0])) for name, view in batch.unlabeled.items()}
    one, two = (unlabelled(method(part, 0)[0]) for part in (batch, swapped))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-5, atol=1e-6)


def alike(batch: Batch) -> Batch:
    """The strong view is the weak one."""
    batch.unlabeled = {"weak": batch.unlabeled["weak"], "strong": batch.unlabeled["weak"]}
    return batch


def test_a_student_that_says_what_its_teacher_says_learns_no_box(make_batch):
    """And no quality; its classes lose what the cells outside of the foreground say."""
    method = make_method().train()
    method.student.eval()  # statistics of BatchNorm as the teacher has them
    torch.nn.init.constant_(method.student.regression_head.bbox_reg.bias, 5.0)  # no empty boxes
    method.teacher.load_state_dict(method.student.state_dict())
    losses = unlabelled(method(alike(make_batch()), 0)[0])
    assert losses["box"].item() == pytest.approx(0, abs=1e-4)
    (losses["box"] + losses["quality"]).backward()
    for name, parameter in method.student.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() < 1e-5, name


def test_weight_rises_over_as_many_steps_as_the_burn_in_took():
    """(t - b) / b from b to 2b, with b = 5000 of 180,000 steps."""
    method = DenseTeacher(make_fcos(), 180_000, ema=EMA)
    weights = [method.unlabeled_weight(t) for t in (0, 5000, 5001, 7500, 9999, 10_000, 10_001, 170_000)]
    assert weights == pytest.approx([0, 0, 0.0002, 0.5, 0.9998, 1, 1, 1])


def test_teacher_begins_before_the_burn_in_ends(make_batch):
    """A copy of the student that two steps made; then 0.9 of itself and 0.1 of each later student."""
    method = make_method(burn_in=4, average_from=2).train()
    students = []
    for number in range(4):
        method.before_step(number)
        students.append({name: p.detach().clone() for name, p in method.student.named_parameters()})
        method.zero_grad()
        sum(method(make_batch(number), number)[0].values()).backward()
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter -= 0.05 * (0 if parameter.grad is None else parameter.grad.clamp(-1, 1))
        method.after_step(number)
        if number == 1:  # what happens to it until then is forgotten
            method.teacher.load_state_dict(make_fcos(7).state_dict())
    last = dict(method.student.named_parameters())
    for name, parameter in method.teacher.named_parameters():
        expected = 0.9 * (0.9 * students[2][name] + 0.1 * students[3][name]) + 0.1 * last[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("given", "first"), [(0, 0), (0.25, 5), (3, 3), (3001, 8)])
def test_teacher_begins_at_the_latest_when_it_teaches(given, first):
    assert make_method(20, burn_in=0.4, average_from=given).teacher_from == first


def test_labels_are_looked_for_when_somebody_asks(make_batch, monkeypatch):
    """They are what the teacher finds above the score in the weak view, in pixels of the strong one."""
    method, batch = make_method(label_score=0.55).train(), make_batch()
    calls, detections = [], method.teacher.detections
    monkeypatch.setattr(method.teacher, "detections", lambda *given: calls.append(1) or detections(*given))
    method(batch, 0)
    assert not calls
    weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
    expected = method.teacher.find(method.teacher.features(weak.images), weak, 0.55).to_view(weak, strong).unpad()
    calls.clear()
    for _ in range(2):
        for one, two in zip(method.pseudo_labels["dense"], expected, strict=True):
            assert len(one)
            assert torch.equal(one.boxes, two.boxes)
            assert torch.equal(one.scores, two.scores)
    assert len(calls) == 1
    method.labels = {}
    assert method.pseudo_labels == {}


def test_views_are_brought_to_one_canvas(make_batch):
    """Labelled pictures of 96 px, unlabelled ones of 64 px in one forward: both networks see 96 px."""
    method = make_method(joint_forward=True).train()
    method.student.eval()
    batch = make_batch()
    batch.labeled = make_batch(size=96).labeled
    losses = unlabelled(method(batch, 0)[0])
    weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
    canvas = join_views([batch.labeled["weak"], strong]).rows(torch.tensor([2, 3]))
    padded = on_canvas_of(weak, canvas)
    assert padded.images.shape == (2, 3, 96, 96)
    assert torch.equal(padded.images[..., :64, :64], weak.images)
    assert padded.images[..., 64:, :].abs().sum() == padded.images[..., 64:].abs().sum() == 0
    expected = unlabelled_in_loops(cells_of(method.teacher, padded), cells_of(method.student, canvas), 0.01)
    assert losses["box"].item() == pytest.approx(expected["box"], rel=1e-4)


def test_no_sure_cell_is_no_trouble(make_batch):
    method = make_method().train()
    with torch.no_grad():
        method.teacher.classification_head.cls_logits.bias.fill_(-30.0)
        method.teacher.classification_head.cls_logits.weight.zero_()
    losses, _ = method(make_batch(labeled_boxes=(0, 0)), 0)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters() if p.grad is not None)


def test_doubts_are_about_the_loss_and_the_teacher_not_about_boxes():
    method = make_method(2000)
    metrics = {"labeled_loss": torch.tensor(1.0), "labeled_boxes": torch.tensor(3.0)}
    assert [method.doubts(range(20 * line, 20 * line + 20), metrics) for line in range(8)] == [[]] * 8
    method.scored(0, "teacher", 40.0)
    method.scored(100, "teacher", 20.0)
    (doubt,) = method.doubts(range(100, 120), metrics)
    assert "raise method.burn_in, or lower method.lambda_u" in doubt


def test_centerness_serves_as_well(make_batch):
    method = DenseTeacher(make_fcos(quality=None, scales=None), 10, ema=EMA, burn_in=0, rise=None).train()
    losses, _ = method(make_batch(), 0)
    assert set(losses) == {"class", "box", "centerness", "unlabeled_class", "unlabeled_box", "unlabeled_quality"}


def test_no_labelled_view():
    with pytest.raises(UserError, match=r"method\.labeled_views"):
        make_method(labeled_views=[])


def test_nothing_waits_for_the_device(make_batch):
    method, view = make_method(), make_batch().unlabeled["weak"]
    output = without_values(method.teacher.output(method.teacher.features(view.images), view))
    with torch.no_grad():
        targets, metrics = method.dense_targets(output)
    losses = method.student.loss(output, targets, method.class_loss)
    sum(losses.values()).backward()
    assert {value.shape for value in [*losses.values(), *metrics.values()]} == {()}
