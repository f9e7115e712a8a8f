"""Unbiased Teacher, mean-teacher pseudo-labelling, and what all teachers have in common."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method
from omegaconf import OmegaConf
from torchvision.ops import FrozenBatchNorm2d

import harness
from detectors.detector import join_views, targets_of
from detectors.methods.mean_teacher import MeanTeacher
from detectors.methods.pseudo_labels import label_offline
from detectors.methods.soft_teacher import SoftTeacher
from detectors.methods.supervised import Supervised
from detectors.methods.unbiased_teacher import UnbiasedTeacher
from detectors.padded import PaddedTargets, pad
from harness.config.targets import GROUPS
from harness.core.draws import stream_key
from harness.core.types import Target, UserError

CONF = Path(harness.__file__).parent / "conf" / "method"
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
    ramp = {"momentum": 0.999, "ramp": True, "update": "before", "buffers": None}
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
    found = pad(batch.unlabeled["strong"].targets).to_view(batch.unlabeled["strong"], batch.unlabeled["weak"])
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
    strong = batch.unlabeled["strong"]
    expected = method.student.losses(
        method.student.features(strong.images), strong, targets_of(strong), batch.unlabeled_keys
    )
    for name, value in expected.items():
        torch.testing.assert_close(losses[f"unlabeled_{name}"], 3 * value, atol=1e-4, rtol=1e-4)


def test_weight_of_the_unlabelled_losses_rises(make_small, make_batch, monkeypatch):
    """From 0 at the end of the burn-in (step 2) over 4 steps; hand-worked."""
    method = MeanTeacher(make_small(roi={"batch_norm": False}), 10, ema=EASY, lambda_u=8.0, burn_in=2, rise=0.4)
    method.student.eval()
    assert [method.unlabeled_weight(step) for step in range(8)] == [0, 0, 0, 2, 4, 6, 8, 8]
    batch = make_batch(pseudo=True)
    found_by_teacher(method, batch, [0.95], monkeypatch)
    half, whole = method(batch, 4)[0], method(batch, 9)[0]
    for name in half:
        torch.testing.assert_close(half[name] * (2 if name.startswith("unlabeled") else 1), whole[name])


@pytest.mark.parametrize(
    ("steps", "pseudo", "warned"),
    [((100, 120), 0.0, False), ((120, 140), 0.2, True), ((121, 141), 0.2, False), ((101, 121), 0.2, True),
     ((120, 140), 0.3, False)],
)  # fmt: skip
def test_teacher_that_knows_too_little_at_the_end_of_burn_in_is_warned_of_once(make_small, steps, pseudo, warned):
    """3 boxes per labelled image, 120 steps of burn-in."""
    method = MeanTeacher(make_small(), 200, ema=EASY, burn_in=120)
    metrics = {"pseudo_boxes": torch.tensor(pseudo), "labeled_boxes": torch.tensor(3.0)}
    doubts = method.doubts(range(*steps), metrics)
    assert [("lengthen method.burn_in" in doubt) for doubt in doubts] == [True] * warned


def watched(make_small, **options) -> MeanTeacher:
    return MeanTeacher(make_small(), 2000, ema=EASY, **{"burn_in": 0, **options})


def told(method, lines, boxes=1.0, loss=1.0):
    """The warnings at each of some log lines, every 20 steps."""
    metrics = {"pseudo_boxes": boxes, "labeled_boxes": 3.0, "labeled_loss": loss}
    metrics = {name: torch.tensor(value) for name, value in metrics.items()}
    return [method.doubts(range(20 * line + 1, 20 * line + 21), metrics) for line in lines]


def counts(found):
    return [len(doubts) for doubts in found]


def test_no_pseudo_labels_for_some_time_is_told_once_per_spell(make_small):
    method = watched(make_small)
    found = told(method, range(8), boxes=0.0)
    assert counts(found) == [0, 0, 0, 0, 1, 0, 0, 0]
    assert "no pseudo labels" in found[4][0]
    assert "method.score" in found[4][0]
    assert counts(told(method, [8, 9], boxes=0.5)) == [0, 0]
    assert counts(told(method, range(10, 16), boxes=0.0)) == [0, 0, 0, 0, 1, 0]  # another spell


def test_burn_in_without_pseudo_labels_is_no_doubt(make_small):
    assert counts(told(watched(make_small, burn_in=1000), range(10), boxes=0.0)) == [0] * 10


def test_teacher_below_its_score_at_the_end_of_burn_in(make_small):
    """AP 10, 30 (end of burn-in at step 100), 26, 40: 27 is nine tenths of 30."""
    method = watched(make_small, burn_in=100)
    seen = []
    for steps, ap in ((50, 10.0), (100, 30.0), (200, 28.0), (300, 26.0), (400, 26.5), (500, 40.0), (600, 5.0)):
        method.scored(steps, "student", 0.0)
        method.scored(steps, "teacher", ap)
        seen += told(method, [steps // 20])
    assert counts(seen) == [0, 0, 0, 1, 0, 0, 1]
    assert "AP 26.0, and had 30.0" in seen[3][0]
    assert "method.lambda_u" in seen[3][0]


def test_student_that_diverges(make_small):
    """Window means of five lines: 2 at first, down to 0.5, and up to 2 again with the fourth line of 2.5."""
    method = watched(make_small)
    assert counts(told(method, range(5), loss=2.0)) == [0] * 5
    assert counts(told(method, range(5, 15), loss=0.5)) == [0] * 10
    found = told(method, range(15, 21), loss=2.5)
    assert counts(found) == [0, 0, 0, 1, 0, 0]
    assert "schedule.optimizer.lr" in found[3][0]
    assert counts(told(method, range(21, 26), loss=0.5)) == [0] * 5


def test_student_that_rises_from_the_start(make_small):
    method = watched(make_small)
    assert counts(told(method, range(5), loss=2.0)) == [0] * 5
    assert counts(told(method, range(5, 10), loss=4.0)) == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("shown", "names", "said"),
    [
        ([1] * 20, (), "class 1 (of"),
        ([2] * 20, ("red cell", "plate\nlet", "white cell"), "class plate let (of"),
        ([1] * 19 + [2], (), None),
    ],
)
def test_one_class_that_gets_all_labels(make_small, shown, names, said):
    """20 boxes at each of 5 log lines, two of which are padding; the class is named where names are known."""
    method = watched(make_small)
    method.class_names = names
    labels = torch.tensor([[*shown, 2, 2]])
    valid = torch.arange(22)[None] < 20
    box = torch.tensor([0.0, 0, 5, 5]).expand(1, 22, 4)
    method.labels = {"classification": PaddedTargets(box, labels, torch.ones(1, 22), valid)}
    found = told(method, range(7))
    assert counts(found) == [0, 0, 0, 0, int(said is not None), 0, 0]
    assert said is None or (said in found[4][0] and "method.score" in found[4][0])


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
        found = pad(batch.unlabeled["strong"].targets).to_view(batch.unlabeled["strong"], batch.unlabeled["weak"])
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


@pytest.mark.parametrize("name", METHODS)
def test_labels_lie_in_the_strong_view(make_small, make_batch, map_box, monkeypatch, name):
    """T_strong T_weak^-1 of the teacher's boxes, clipped to the strong view's valid size, without those outside."""
    method = METHODS[name](make_small()).train()
    batch = make_batch()
    weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
    boxes = [[2.0, 0.0, 30.0, 22.0], [20.0, 30.0, 50.0, 64.0], [0.0, 20.0, 2.0, 40.0], [40.0, 10.0, 63.0, 25.0]]
    found = pad([Target(torch.tensor(boxes), torch.tensor([1, 2, 3, 1]), torch.full((4,), 0.99))] * 2)
    for call in ("find", "detections"):
        monkeypatch.setattr(method.teacher, call, lambda *_: found)
    method(batch, 0)
    for image, labels in enumerate(method.pseudo_labels["classification"]):
        size = strong.sizes[image].tolist()
        places = [map_box(box, weak.to_view[image], strong.to_view[image], size) for box in boxes]
        expected = [place for place in places if place[2] > place[0] and place[3] > place[1]]
        assert len(expected) == 3
        assert max(place[3] for place in expected) == size[0]
        assert max(place[2] for place in expected) == size[1]
        for label, place in zip(labels.boxes.tolist(), expected, strict=True):
            assert label == pytest.approx(place, abs=1e-4)
        assert labels.labels.tolist() == [1, 2, 1]


class Recorder:
    """Stands in for the teacher's `find` and keeps what it was asked."""

    def __init__(self, found: PaddedTargets) -> None:
        self.found = found
        self.asked: list[tuple] = []

    def __call__(self, *given: object) -> PaddedTargets:
        self.asked.append(given[2:])  # after features and view
        return self.found


@pytest.mark.parametrize("training", [True, False])
def test_what_the_teachers_are_asked(make_small, make_batch, monkeypatch, training):
    """Candidate score, and for Unbiased Teacher how many proposals."""
    batch = make_batch(pseudo=True)
    unbiased = UnbiasedTeacher(
        make_small(), 10, ema=EASY, burn_in=0, candidate_score=0.123, teacher_training_proposals=training
    )
    plain = MeanTeacher(make_small(), 10, ema=EASY, candidate_score=0.123)
    for method, expected in ((unbiased, (0.123, training)), (plain, (0.123,))):
        recorder = Recorder(
            pad(batch.unlabeled["strong"].targets).to_view(batch.unlabeled["strong"], batch.unlabeled["weak"])
        )
        monkeypatch.setattr(method.teacher, "find", recorder)
        method.train()(batch, 0)
        assert recorder.asked == [expected]


@pytest.mark.parametrize(("training", "count"), [(True, 30), (False, 20)])
def test_number_of_the_teachers_proposals(make_small, make_batch, monkeypatch, training, count):
    method = UnbiasedTeacher(make_small(), 10, ema=EASY, burn_in=0, teacher_training_proposals=training)
    seen = []
    original = method.teacher.detections

    def detections(features, view, proposals, score_threshold):
        seen.append(tuple(proposals.boxes.shape))
        return original(features, view, proposals, score_threshold)

    monkeypatch.setattr(method.teacher, "detections", detections)
    method.label(make_batch().unlabeled["weak"])
    assert seen == [(2, count, 4)]


@pytest.mark.parametrize(("weight", "gamma"), [(1.0, 0.0), (4.0, 1.5), (3.0, 2.0)])
def test_unlabelled_terms_of_unbiased_teacher(make_small, make_batch, monkeypatch, weight, gamma):
    """lambda_u times binary cross entropy of the RPN and (1 - p)^gamma * -log p of the second stage, in plain loops."""
    method = UnbiasedTeacher(
        make_small(roi={"batch_norm": False}), 10, ema=EASY, burn_in=0, lambda_u=weight, focal_gamma=gamma
    )
    student = method.student.eval()
    torch.nn.init.normal_(student.roi.head.classes.weight, std=0.5)
    batch = make_batch(pseudo=True)
    strong, keys = batch.unlabeled["strong"], batch.unlabeled_keys
    found_by_teacher(method, batch, [0.95], monkeypatch)
    losses, _ = method(batch, 0)

    pseudo = pad(method.pseudo_labels["classification"])
    assert pseudo.valid.sum() == 5
    features = student.features(strong.images)
    output = student.rpn(features, strong.images.shape[-2:])
    rois, count = student.roi.sample(student.rpn.proposals(output, strong.sizes, training=True), pseudo, keys)
    logits, _ = student.roi(features, rois.boxes, rois.images)
    total = 0.0
    for row, label in zip(logits.double().tolist(), rois.labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(math.exp(x) for x in row)
        total += (1 - p) ** gamma * -math.log(p)
    assert (rois.labels > 0).any()
    assert losses["unlabeled_roi_class"].item() == pytest.approx(weight * total / float(count), rel=1e-5)
    rpn = student.rpn.losses(output, pseudo, strong.sizes, keys, boxes=False)["rpn_class"].item()
    assert losses["unlabeled_rpn_class"].item() == pytest.approx(weight * rpn, rel=1e-5)


@pytest.mark.parametrize("buffers", [None, True])
def test_statistics_of_trained_batch_norm_are_averaged(make_small, make_batch, buffers):
    method = MeanTeacher(make_small(), 10, ema={"momentum": 0.5, "buffers": buffers}).train()
    first = state(method.student)
    step(method, make_batch(), 0)
    moved = 0
    for name, buffer in method.teacher.named_buffers():
        if buffer.is_floating_point():
            later = method.student.state_dict()[name]
            torch.testing.assert_close(buffer, (first[name] + later) / 2, atol=1e-6, rtol=1e-5)
            moved += int(not torch.equal(later, first[name]))
    assert moved


def test_statistics_that_would_be_stale(make_small):
    with pytest.raises(UserError, match=r"method\.ema\.buffers"):
        MeanTeacher(make_small(), 10, ema={"momentum": 0.5, "buffers": False})


def test_frozen_statistics_need_no_average(make_small):
    small = make_small(roi={"batch_norm": False})
    small.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8))
    for buffers, expected in ((None, False), (False, False), (True, True)):
        assert MeanTeacher(small, 10, ema={"momentum": 0.5, "buffers": buffers}).ema.buffers is expected


# The official codes' numbers (C.2 to C.6 of the specification that the methods were written from).
NUMBERS = {
    "stac": {
        "lambda_u": 2.0, "mean_of_branches": True, "unlabeled_rpn_loss": True, "reported": "student", "ema": None,
    },
    "unbiased_teacher": {
        "lambda_u": 4.0, "burn_in": 2000, "average_burn_in": False, "score": 0.7, "candidate_score": 0.05,
        "focal_gamma": 1.5, "labeled_views": ["weak", "strong"], "teacher_training_proposals": True,
        "reported": "teacher", "ema": {"momentum": 0.9996, "ramp": False, "update": "before", "buffers": True},
    },
    "soft_teacher": {
        "lambda_u": 4.0, "burn_in": 0, "candidate_score": 0.05, "initial_score": 0.5, "rpn_score": 0.9,
        "class_score": 0.9, "box_uncertainty": 0.02, "smallest_side": 0.0, "jitter_count": 10, "jitter_scale": 0.06,
        "jitter": "gaussian", "uncertainty_scale": "axes", "class_normalizer": "code",
        "teacher_training_proposals": True, "use_teacher_proposals": False,
        "reported": "student", "ema": {"momentum": 0.999, "ramp": True, "update": "before", "buffers": None},
    },
    "mean_teacher": {
        "lambda_u": 4.0, "burn_in": 0, "score": 0.9, "candidate_score": 0.05, "smallest_side": 0.01,
        "reported": "teacher", "ema": {"momentum": 0.999, "ramp": False, "update": "after", "buffers": None},
    },
    "supervised": {"labeled_view": "labeled", "reported": "student", "ema": None},
}  # fmt: skip
OFFLINE = {"threshold": 0.9, "keep_top1": True, "score_threshold": 0.05, "float16": True, "drop_empty": True}


def defaults(function: Callable) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_the_official_codes(name):
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    options = {key: value for key, value in config.items() if key not in ("_target_", *GROUPS["method"].own)}
    for ours in (options, options["ema"] or {}):  # ours, not the codes': off unless asked for
        assert not any(
            ours.pop(key, None) for key in ("joint_forward", "rise", "gamma", "interval", "first", "adaptive")
        )
    assert options == NUMBERS[name]
    own = defaults(get_method(config["_target_"]).__init__)
    assert not any(own.pop(key, None) for key in ("joint_forward", "rise", "adaptive"))
    assert own == {key: value for key, value in NUMBERS[name].items() if key in own}
    assert set(NUMBERS[name]) - set(own) <= {"ema"}


def test_numbers_of_offline_labels():
    offline = OmegaConf.to_container(OmegaConf.load(CONF / "stac.yaml").offline)
    assert {key: offline[key] for key in OFFLINE} == OFFLINE
    assert defaults(label_offline) == OFFLINE
