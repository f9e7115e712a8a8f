"""The worked example of the documentation, run as it stands there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method
from omegaconf import OmegaConf

from detectors.methods.method import Method
from detectors.padded import pad

PAGE = Path(__file__).parents[3] / "docs" / "add_a_method.md"


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return found[0]


@pytest.fixture
def make_method(monkeypatch, make_small):
    module = types.ModuleType("flex_teacher")
    monkeypatch.setitem(sys.modules, "flex_teacher", module)
    exec(compile(block("python"), "flex_teacher.py", "exec"), module.__dict__)
    config = OmegaConf.to_container(OmegaConf.create(block("yaml")))
    options = {key: value for key, value in config.items() if key not in ("_target_", "name", "augment")}

    def make(**changes: object) -> Method:
        return get_method(config["_target_"])(detector=make_small(), steps=5, **{**options, **changes})

    return make


def test_the_example_fits_on_a_screen_and_a_half():
    assert 40 <= len(block("python").splitlines()) <= 90


def test_the_example_trains(make_method, make_batch):
    method = make_method().train()
    assert method.unlabeled_from == 2
    optimizer = torch.optim.SGD(method.trainable().parameters(), lr=0.01)
    keys, with_gradient = set(), set()
    for step in range(4):
        method.before_step(step)
        optimizer.zero_grad()
        losses, metrics = method(make_batch(step), step)
        sum(losses.values()).backward()
        optimizer.step()
        method.after_step(step)
        keys.add((*losses, *metrics))
        assert all(torch.isfinite(value) for value in [*losses.values(), *metrics.values()])
        with_gradient |= {name for name, p in method.student.named_parameters() if p.grad is not None}
    assert len(keys) == 1
    assert with_gradient == {name for name, _ in method.student.named_parameters()}
    assert method.reported in method.networks()
    restored = make_method()
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.progress, method.progress)


def test_its_thresholds(make_method, make_batch, monkeypatch):
    """score * progress / best progress: 0.7 for the best class, 0.35 for one that is half as far."""
    method = make_method(memory=1.0 - 1e-9).eval()
    method.progress.copy_(torch.tensor([0.8, 0.4, 0.8]))
    batch = make_batch(unlabeled_boxes=(4, 4), pseudo=True)
    found = pad(batch.unlabeled["strong"].targets).to_view(batch.unlabeled["strong"], batch.unlabeled["weak"])
    found.labels = torch.tensor([1, 2, 3, 2]).repeat(2, 1)
    found.scores = torch.tensor([0.6, 0.4, 0.75, 0.3]).repeat(2, 1)
    monkeypatch.setattr(method.teacher, "find", lambda *_, **__: found)
    for target in method.label(batch.unlabeled["weak"], batch.unlabeled["strong"]).unpad():
        assert target.scores.tolist() == pytest.approx([0.4, 0.75])
