from __future__ import annotations

import pytest
import torch
from torch import nn

from detectors.methods import ema
from detectors.methods.method import Ema
from detectors.methods.supervised import Supervised


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net(torch.randn(8, 3))
    return net


def test_ramp_is_the_papers():
    # min(limit, 1 - 1 / (t + 1)): 0, 1/2, 2/3, 3/4, and the limit from t = 999 on.
    expected = [0.0, 0.5, 2 / 3, 0.75]
    assert [ema.ramp(step, 0.999) for step in range(4)] == pytest.approx(expected, abs=1e-6)
    assert ema.ramp(998, 0.999) < 0.999
    assert ema.ramp(999, 0.999) == pytest.approx(0.999, abs=1e-12)
    assert ema.ramp(5000, 0.999) == 0.999


def test_ramp_with_a_gamma_and_an_interval():
    """mmdetection's MeanTeacherHook as MixPL sets it: every 3rd step, the student's share is max(2e-4, 4 / (4 + t))."""
    hook = Ema(momentum=1 - 2e-4, ramp=True, gamma=4.0, interval=3)
    assert [hook.momentum_at(step) is None for step in range(7)] == [False, True, True, False, True, True, False]
    for step in (0, 3, 6, 300, 19_995, 19_998, 60_000):
        assert hook.momentum_at(step) == pytest.approx(1 - max(2e-4, 4 / (4 + step)), abs=1e-12)


def test_interval_leaves_the_teacher_alone_in_between(make_small):
    method = Supervised(make_small(), 10, ema={"momentum": 0.5, "interval": 2}, reported="teacher").train()
    changed = []
    for step in range(5):
        before = {name: p.clone() for name, p in method.teacher.named_parameters()}
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(1.0)
        method.before_step(step)
        method.after_step(step)
        changed.append(any(not torch.equal(p, before[name]) for name, p in method.teacher.named_parameters()))
    assert changed == [True, False, True, False, True]


def test_ramped_average_is_the_plain_mean_of_all_students():
    teacher, students = network(0), [network(seed) for seed in range(1, 6)]
    for step, student in enumerate(students):
        ema.update(teacher, student, ema.ramp(step, 0.999))
    for name, parameter in teacher.named_parameters():
        mean = sum(dict(s.named_parameters())[name] for s in students) / len(students)
        torch.testing.assert_close(parameter, mean, atol=1e-6, rtol=1e-6)


def test_update_against_plain_arithmetic():
    teacher, student = network(0), network(1)
    expected = {}
    for name, tensor in teacher.state_dict().items():
        other = student.state_dict()[name]
        expected[name] = 0.9 * tensor + 0.1 * other if tensor.is_floating_point() else other.clone()
    ema.update(teacher, student, 0.9)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
        if not tensor.is_floating_point():
            assert torch.equal(tensor, expected[name])


def test_buffers_can_be_left_alone():
    teacher, student = network(0), network(1)
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    ema.update(teacher, student, 0.5, buffers=False)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, before[name])


def test_copy_gives_the_same_bits():
    teacher, student = network(0), network(1)
    ema.copy(teacher, student)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name])


def test_momentum_close_to_one_is_not_lost():
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        teacher.weight.fill_(1.0)
        student.weight.fill_(2.0)
    ema.update(teacher, student, 0.9996)
    assert teacher.weight.item() == pytest.approx(1.0004, abs=1e-6)


def test_other_networks_are_refused():
    with pytest.raises(AssertionError):
        ema.update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)
