"""What every method promises the training loop, over every method and detector that is declared."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

import harness
from detectors.detector import Detector
from detectors.methods.method import Method
from harness.config.make import make
from harness.config.targets import GROUPS
from harness.core.types import UserError

CONF = Path(harness.__file__).parent / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
FAMILIES = ("small", "faster_rcnn", "retinanet", "fcos", "consistent_retina")
STEPS = 5
TWO_STAGE_ONLY = {"soft_teacher", "unbiased_teacher"}
DENSE_ONLY = {"dense_teacher", "arsl"}
OWN = {  # the families of methods that do not train every detector, the CPU preset's first
    **dict.fromkeys(TWO_STAGE_ONLY, ("small", "faster_rcnn")),
    **dict.fromkeys(DENSE_ONLY, ("small_fcos_iou", "fcos_iou")),
    "consistent_teacher": ("small_consistent_retina", "consistent_retina"),
}


def load(group: str, name: str) -> DictConfig:
    config = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    base = config.pop("defaults", ["_self_"])[0]
    return config if base == "_self_" else OmegaConf.merge(load(group, base), config)


def usual(method: str, small: bool = True) -> str:
    """A detector that the method trains: of the CPU preset, or without batch statistics."""
    return OWN.get(method, FAMILIES)[0 if small else 1]


def make_detector(name: str) -> Detector:
    return copy.deepcopy(built_detector(name))


@functools.cache
def built_detector(name: str) -> Detector:
    torch.manual_seed(0)
    options = {"weights": "scratch", "cache_dir": "."}
    if name == "small":
        options |= {"channels": [8, 8, 16, 16], "pyramid_channels": 16, "roi": {"hidden": 32}}
    elif name.startswith("small_"):
        options |= {"channels": [8, 8, 16, 16], "pyramid_channels": 16}
    else:
        options |= {"pyramid_channels": 32, "depth": 18}
    if name == "faster_rcnn":
        options |= {
            "roi": {"hidden": 32, "batch": 32},
            "rpn": {"train_proposals": [50, 50], "test_proposals": [50, 50]},
        }
    if "anchor_sizes" in load("detector", name) and not name.startswith("small"):
        options |= {"anchor_sizes": [8, 16, 32, 64, 128]}
    root = OmegaConf.create({"cache_dir": ".", "detector": OmegaConf.merge(load("detector", name), options)})
    detector = make("detector", root.detector, num_classes=3)
    for key, parameter in detector.named_parameters():  # scores above the thresholds, so that labels exist
        if key.endswith(("head.classes.weight", "cls_logits.weight")):
            torch.nn.init.normal_(parameter, std=1.0)
    return detector


def make_method(name: str, detector: Detector, preset: str = "paper", **changes: object) -> Method:
    config = load("method", name)
    if preset == "small":
        config = OmegaConf.merge(config, load("method/preset", f"{name}_small"))
    options = {k: v for k, v in OmegaConf.to_container(config).items() if k not in GROUPS["method"].own}
    for key in ("burn_in", "loss_from"):
        if key in options:
            options[key] = 0
    method = get_method(options.pop("_target_"))(detector=detector, steps=STEPS, **{**options, **changes})
    assert isinstance(method, Method)
    return method


def train_step(method: Method, optimizer: torch.optim.Optimizer, batch, step: int):
    method.before_step(step)
    optimizer.zero_grad()
    losses, metrics = method(batch, step)
    sum(losses.values()).backward()
    optimizer.step()
    method.after_step(step)
    return losses, metrics


def optimizer_of(method: Method) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in method.trainable().parameters() if p.requires_grad], lr=1e-3)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def pairs():
    for method in METHODS:
        for detector in OWN.get(method, FAMILIES):
            yield method, detector


@pytest.mark.parametrize(("name", "family"), list(pairs()))
def test_two_steps(make_batch, name, family):
    preset = "small" if family.startswith("small") else "paper"
    method = make_method(name, make_detector(family), preset).train()
    optimizer = optimizer_of(method)
    with_gradient, keys = set(), set()
    several = family in ("small", "fcos", "small_fcos_iou", "fcos_iou") or family.endswith("consistent_retina")
    boxes = {} if several else {"labeled_boxes": (2,), "unlabeled_boxes": (3,)}
    batches = [make_batch(seed, pseudo=name == "stac", **boxes) for seed in range(2)]
    losses, metrics = train_step(method, optimizer, batches[0], 0)
    with_gradient |= {key for key, p in method.trainable().named_parameters() if p.grad is not None}
    keys.add((*losses, "|", *metrics))

    saved, saved_optimizer = copy.deepcopy(method.state_dict()), copy.deepcopy(optimizer.state_dict())
    losses, metrics = train_step(method, optimizer, batches[1], 1)
    with_gradient |= {key for key, p in method.trainable().named_parameters() if p.grad is not None}
    keys.add((*losses, "|", *metrics))

    for values in (losses, metrics):
        for key, value in values.items():
            assert value.shape == (), key
            assert torch.isfinite(value), key
    assert not any(value.requires_grad for value in metrics.values())
    assert len(keys) == 1
    assert with_gradient == {key for key, p in method.trainable().named_parameters() if p.requires_grad}

    again = make_method(name, make_detector(family), preset).train()
    again.load_state_dict(saved)
    other = optimizer_of(again)
    other.load_state_dict(saved_optimizer)
    assert same(again.state_dict(), saved)
    repeated, _ = train_step(again, other, batches[1], 1)
    assert same(losses, repeated)
    assert same(method.state_dict(), again.state_dict())
    assert same(optimizer.state_dict()["state"][0], other.state_dict()["state"][0])

    assert method.reported in method.networks()
    assert set(method.networks()) <= {"student", "teacher"}
    for labels in method.pseudo_labels.values():
        assert len(labels) == len(batches[1].unlabeled_ids)
        assert all(not target.boxes.requires_grad for target in labels)


@pytest.mark.parametrize("name", METHODS)
def test_before_there_are_unlabelled_images(make_batch, name):
    """Up to `unlabeled_from` a batch has none, and the keys stay."""
    changes = {"burn_in": 0.4} if name not in ("supervised", "stac") else {}
    method = make_method(name, make_detector(usual(name)), "small", **changes).train()
    batch = make_batch(pseudo=True)
    if method.unlabeled_from:
        assert method.unlabeled_from == 2
        early = make_batch()
        early.unlabeled, early.unlabeled_ids = {}, early.unlabeled_ids[:0]
        early.unlabeled_keys = early.unlabeled_keys[:0]
        before = method(early, 1)
        assert method.pseudo_labels == {}
        after = method(batch, 2)
        for one, two in zip(before, after, strict=True):
            assert one.keys() == two.keys()
    else:
        assert name in ("supervised", "stac")


@pytest.mark.parametrize("name", sorted(TWO_STAGE_ONLY))
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_pairs_that_do_not_fit(name, family):
    with pytest.raises(UserError, match=f"detector={family}_r18 does not fit"):
        make_method(name, make_detector(family))


@pytest.mark.parametrize("name", sorted(DENSE_ONLY))
@pytest.mark.parametrize("family", ["small", "retinanet"])
def test_dense_methods_name_the_detectors_that_they_train(name, family):
    with pytest.raises(UserError, match=r"does not fit method .*: choose detector=fcos_iou or fcos, .* small_fcos"):
        make_method(name, make_detector(family))


@pytest.mark.parametrize("family", ["small", "retinanet"])
def test_consistent_teacher_names_its_detector(family):
    with pytest.raises(UserError, match=r"does not fit method .*: choose detector=consistent_retina, .* small_consis"):
        make_method("consistent_teacher", make_detector(family))


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_gives_the_same_bits(make_batch, name):
    results = []
    for _ in range(2):
        method = make_method(name, make_detector(usual(name)), "small").train()
        optimizer = optimizer_of(method)
        for step in range(2):
            train_step(method, optimizer, make_batch(step, pseudo=True), step)
        results.append(method.state_dict())
    assert same(*results)


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("supervised", "stac")])
def test_hidden_truth_cannot_reach_a_loss(make_batch, name):
    """Boxes on unlabelled views are ignored: replaced by noise, every gradient and weight keeps its bits.

    (STAC is told by those views what a finished detector found; see test_pseudo_labels for what that may look at.)
    """
    results = []
    for noise in (None, 0, 1):
        method = make_method(name, make_detector(usual(name)), "small").train()
        optimizer = optimizer_of(method)
        history = []
        for step in range(2):
            batch = make_batch(step)
            if noise is not None:
                truth = make_batch(100 * noise + step + 7, pseudo=True).unlabeled["strong"].targets
                for view in batch.unlabeled.values():
                    view.targets = truth
            losses, metrics = train_step(method, optimizer, batch, step)
            history += [*losses.values(), *metrics.values()]
            history += [p.grad.clone() for p in method.trainable().parameters()]
        results.append([*history, *method.state_dict().values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", ["paper", "small"])
def test_every_key_of_the_configuration_is_an_option(name, preset):
    method = make_method(name, make_detector(usual(name)), preset)
    assert method.views.labeled
    config = load("method", name)
    assert config.name == name
    assert {"augment", "reported", "ema"} <= set(config)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_autocast(make_batch, name):
    """Boxes and losses stay float32."""
    method = make_method(name, make_detector(usual(name)), "small").train()
    batch = make_batch(pseudo=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = method(batch, 0)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    for labels in method.pseudo_labels.values():
        assert all(target.boxes.dtype == torch.float32 for target in labels)


def example_method(detector: Detector) -> Method:
    """The method that the documentation adds."""
    page = (Path(__file__).parents[2] / "docs" / "add_a_method.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    module = types.ModuleType("flex_teacher")
    exec(compile(code, "flex_teacher.py", "exec"), module.__dict__)
    return module.FlexTeacher(detector, STEPS, ema={"momentum": 0.9, "ramp": True}, burn_in=0)


def made(name: str) -> Method:
    """On a detector without batch statistics, which differ between devices by nature."""
    detector = make_detector(usual(name, small=False))
    return (example_method(detector) if name == "the example" else make_method(name, detector, "small")).train()


def step_on(devices: list[Method], batches: list, step: int) -> None:
    """A student step whose micro-batches are dealt out to devices as the loop does: number i to device i % n.

    As there, gradients are summed in float64 and rounded once.
    """
    trained = [[p for p in method.trainable().parameters() if p.requires_grad] for method in devices]
    for method in devices:
        method.before_step(step)
    observed, sums = [], [torch.zeros_like(p, dtype=torch.float64) for p in trained[0]]
    for lane, batch in enumerate(batches):
        number = lane % len(devices)
        losses, _ = devices[number](dataclasses.replace(batch, lane=lane), step)
        observed.append(devices[number].observe())
        total = sum(losses.values()) / len(batches)
        for into, gradient in zip(sums, torch.autograd.grad(total, trained[number], allow_unused=True), strict=True):
            into += 0 if gradient is None else gradient
    gathered = {name: torch.stack([part[name] for part in observed]) for name in observed[0]}
    for method, parameters in zip(devices, trained, strict=True):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter -= (0.01 * gradient).to(parameter.dtype)
        if gathered:
            method.absorb(step, gathered)
        method.after_step(step)


def own_state(method: Method) -> dict:
    """What a method gathered itself: its buffers, without those of its networks."""
    networks = tuple(f"{name}." for name in ("student", "teacher"))
    return {key: value for key, value in method.named_buffers() if not key.startswith(networks)}


@pytest.mark.parametrize("name", [*METHODS, "the example"])
def test_gathered_state_is_the_same_on_one_device_and_on_two(make_batch, name):
    one, two = [made(name)], [made(name), made(name)]
    before = copy.deepcopy(own_state(one[0]))
    for step in range(2):
        batches = [make_batch(10 * step + number, pseudo=True) for number in range(4)]
        for devices in (one, two):
            step_on(devices, batches, step)
    for method in two:
        assert own_state(method).keys() == own_state(one[0]).keys()
        for key, value in own_state(method).items():
            # Scores as they are, not means of many, show how weights differ by rounding after a step.
            near = 1e-5 if name == "consistent_teacher" else 1e-6
            torch.testing.assert_close(value, own_state(one[0])[key], atol=near, rtol=near)
    assert own_state(two[0]).keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(own_state(two[0]).values(), own_state(two[1]).values(), strict=True))
    for key in {"the example": ["progress"], "consistent_teacher": ["queue"]}.get(name, []):
        assert not torch.equal(before[key], own_state(one[0])[key])


@pytest.mark.parametrize("name", [*METHODS, "the example"])
def test_gathered_state_survives_a_resume(make_batch, name):
    """Saved after a step and loaded into a new method, the next step gives the same bits."""
    batches = [[make_batch(10 * step + number, pseudo=True) for number in range(2)] for step in range(2)]
    whole = made(name)
    step_on([whole], batches[0], 0)
    resumed = made(name)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for step, lane in resumed.missing():
        resumed.remember(dataclasses.replace(batches[step][lane], lane=lane), step)
    for method in (whole, resumed):
        step_on([method], batches[1], 1)
    assert same(whole.state_dict(), resumed.state_dict())
