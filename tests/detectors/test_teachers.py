"""Unbiased Teacher, mean-teacher pseudo-labelling, and what all teachers have in common."""

from __future__ import annotations

import pytest
import torch

from detectors.detector import join_views, targets_of
from detectors.mean_teacher import MeanTeacher
from detectors.padded import pad
from detectors.soft_teacher import SoftTeacher
from detectors.supervised import Supervised
from detectors.unbiased_teacher import UnbiasedTeacher
from harness.sampling import stream_key
from harness.types import UserError

CONSTANT = {"momentum": 0.9996, "ramp": False, "update": "before", "buffers": True}
EASY = {"momentum": 0.5, "ramp": False, "update": "after", "buffers": True}


def step(method, batch, number: int, lr: float = 0.05) -> dict[str, torch.Tensor]:
    method.before_step(number)
    method.zero_grad()
    losses, _ = method(batch, number)
    sum(losses.values()).backward()
    with torch.no_grad():
        for parameter in method.trainable().parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad.clamp(-1, 1)
    method.after_step(number)
    return losses


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_soft_teachers_average_is_made_before_the_step(make_small, make_batch):
    """mu_0 = 0, mu_1 = 1/2, mu_2 = 2/3: the teacher of step t is the mean of the students that began steps 0..t."""
    ramp = {"momentum": 0.999, "ramp": True, "update": "before", "buffers": False}
    method = SoftTeacher(make_small(), 10, ema=ramp).train()
    students = []
    for number in range(3):
        students.append(state(method.student))
        step(method, make_batch(number), number)
    for name, parameter in method.teacher.named_parameters():
        mean = sum(student[name] for student in students) / 3
        torch.testing.assert_close(parameter, mean, atol=1e-6, rtol=1e-5)


def test_average_after_the_step(make_small, make_batch):
    method = Supervised(make_small(), 10, ema=EASY, reported="teacher").train()
    before = state(method.student)
    step(method, make_batch(), 0)
    for name, tensor in method.teacher.state_dict().items():
        after = method.student.state_dict()[name]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (before[name] + after) / 2, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(tensor, after)


def test_unbiased_teacher_begins_as_a_copy_at_the_end_of_the_burn_in(make_small, make_batch):
    method = UnbiasedTeacher(make_small(), 10, ema={**CONSTANT, "momentum": 0.75}, burn_in=2).train()
    for number in range(2):
        step(method, make_batch(number), number)
    student = state(method.student)
    method.before_step(2)
    for name, tensor in method.teacher.state_dict().items():
        assert torch.equal(tensor, student[name])
    step(method, make_batch(2), 2)
    later = state(method.student)
    method.before_step(3)
    for name, tensor in method.teacher.named_parameters():
        torch.testing.assert_close(tensor, 0.75 * student[name] + 0.25 * later[name], atol=1e-6, rtol=1e-5)


def test_unbiased_teacher_learns_from_both_labelled_views(make_small, make_batch):
    method = UnbiasedTeacher(make_small(roi={"batch_norm": False}), 10, ema=CONSTANT, burn_in=5)
    method.student.eval()
    batch = make_batch()
    found, _ = method(batch, 0)
    weak, strong = batch.labeled["weak"], batch.labeled["strong"]
    both = join_views([weak, strong])
    targets = pad([*weak.targets, *strong.targets])
    keys = torch.cat([batch.labeled_keys ^ stream_key("weak"), batch.labeled_keys ^ stream_key("strong")])
    expected = method.student.losses(method.student.features(both.images), both, targets, keys, focal_gamma=1.5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


def found_by_teacher(method, batch, scores: list[float], monkeypatch) -> None:
    found = pad(batch.strong.targets).to_view(batch.strong, batch.weak)
    found.scores = torch.tensor(scores).expand_as(found.scores).clone()
    monkeypatch.setattr(method.teacher, "find", lambda *_: found)


def test_box_losses_of_unbiased_teacher_are_absent(make_small, make_batch, monkeypatch):
    """Not multiplied by 0: neither the terms nor their gradients exist."""
    method = UnbiasedTeacher(make_small(), 10, ema=CONSTANT, burn_in=0).train()
    batch = make_batch(unlabeled_boxes=(3, 3), pseudo=True)
    seven = torch.tensor(0.7).item()
    method.score = seven
    found_by_teacher(method, batch, [0.8, seven, 0.2], monkeypatch)
    losses, _ = method(batch, 0)
    names = {name for name in losses if name.startswith("unlabeled")}
    assert names == {"unlabeled_rpn_class", "unlabeled_roi_class"}
    assert [len(t) for t in method.pseudo_labels["classification"]] == [1, 1]  # strictly above
    method.zero_grad()
    sum(losses[name] for name in names).backward()
    for layer in (method.student.rpn.head.bbox_pred, method.student.roi.head.boxes):
        assert all(parameter.grad is None for parameter in layer.parameters())
    assert method.student.roi.head.classes.weight.grad is not None


def test_mean_teacher_takes_all_losses_of_the_student(make_small, make_batch, monkeypatch):
    method = MeanTeacher(make_small(roi={"batch_norm": False}), 10, ema=EASY, lambda_u=3.0)
    method.student.eval()
    batch = make_batch(pseudo=True)
    found_by_teacher(method, batch, [0.95], monkeypatch)
    losses, _ = method(batch, 0)
    strong = batch.strong
    expected = method.student.losses(
        method.student.features(strong.images), strong, targets_of(strong), batch.unlabeled_keys
    )
    for name, value in expected.items():
        torch.testing.assert_close(losses[f"unlabeled_{name}"], 3 * value, atol=1e-4, rtol=1e-4)


def test_mean_teacher_is_silent_without_any_label(make_small, make_batch, monkeypatch):
    method = MeanTeacher(make_small(), 10, ema=EASY).train()
    batch = make_batch(pseudo=True)
    found_by_teacher(method, batch, [0.9 - 1e-3], monkeypatch)
    losses, _ = method(batch, 0)
    assert all(value == 0 for name, value in losses.items() if name.startswith("unlabeled"))


METHODS = {
    "unbiased_teacher": lambda d: UnbiasedTeacher(d, 10, ema=EASY, burn_in=0),
    "soft_teacher": lambda d: SoftTeacher(d, 10, ema=EASY),
    "mean_teacher": lambda d: MeanTeacher(d, 10, ema=EASY),
}


@pytest.mark.parametrize("name", METHODS)
def test_teacher_gets_no_gradient_and_no_statistics_of_its_own(make_small, make_batch, name):
    method = METHODS[name](make_small()).train()
    assert not method.teacher.training
    before = state(method.teacher)
    losses, _ = method(make_batch(), 0)
    sum(losses.values()).backward()
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())
    for key, tensor in method.teacher.state_dict().items():
        assert torch.equal(tensor, before[key])
    trained = {id(p) for p in method.trainable().parameters()}
    assert not trained & {id(p) for p in method.teacher.parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_any_number_of_pseudo_labels(make_small, make_batch, monkeypatch, name):
    """Nothing found, one box, a hundred boxes, no labelled box: finite, under the same keys."""
    keys = set()
    for labeled, unlabeled, score in (((2, 1), (3, 2), 0.0), ((2, 1), (1, 0), 0.99), ((0, 0), (100, 100), 0.99)):
        method = METHODS[name](make_small()).train()
        batch = make_batch(labeled_boxes=labeled, unlabeled_boxes=unlabeled, pseudo=True)
        found = pad(batch.strong.targets).to_view(batch.strong, batch.weak)
        found.scores = torch.full_like(found.scores, score)
        for call in ("find", "detections"):
            if hasattr(method.teacher, call):
                monkeypatch.setattr(method.teacher, call, lambda *_, found=found: found)
        losses, metrics = method(batch, 0)
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in [*losses.values(), *metrics.values()])
        assert all(torch.isfinite(p.grad).all() for p in method.student.parameters() if p.grad is not None)
        keys.add((*losses, *metrics))
        counts = [len(t) for t in method.pseudo_labels["classification"]]
        assert counts == ([0, 0] if score == 0 else list(unlabeled))
    assert len(keys) == 1


@pytest.mark.parametrize("ema", [{**EASY, "momentum": 1.5}, {**EASY, "update": "sometimes"}])
def test_wrong_averages(make_small, ema):
    with pytest.raises(UserError, match=r"method\.ema"):
        MeanTeacher(make_small(), 10, ema=ema)
