"""Soft Teacher's formulas, written out from the paper and its code in plain loops."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from detectors.methods.soft_teacher import SoftTeacher, map_proposals, relative_deviation
from detectors.padded import pad
from detectors.roi import Rois
from harness.core.draws import uniform
from harness.core.types import Target, UserError

RAMP = {"momentum": 0.999, "ramp": True, "update": "before", "buffers": None}


def make_method(detector, **options) -> SoftTeacher:
    return SoftTeacher(detector, 10, ema=RAMP, **options)


def rois_of(labels: list[int]) -> Rois:
    n = len(labels)
    boxes = torch.zeros(n, 4)
    return Rois(boxes, torch.zeros(n, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64), boxes, torch.ones(n))


LOGITS = [[1.0, 0.2, -0.5], [0.3, 2.0, 0.1], [-1.0, 0.5, 0.8], [0.0, 0.0, 0.0]]
LABELS = [0, 1, 0, 2]
TEACHER = [0.9, 0.4, 0.25, 0.7]  # its probability of background


def surprises() -> list[float]:
    result = []
    for row, label in zip(LOGITS, LABELS, strict=True):
        result.append(-math.log(math.exp(row[label]) / sum(math.exp(x) for x in row)))
    return result


def test_soft_background_weights_of_the_code(make_small):
    # Foreground counts 1, background as much as the teacher believes in it; one sum of weights for both.
    weights = [TEACHER[i] if label == 0 else 1.0 for i, label in enumerate(LABELS)]
    expected = sum(w * s for w, s in zip(weights, surprises(), strict=True)) / max(1.0, sum(weights))
    found = make_method(make_small()).class_loss(torch.tensor(LOGITS), rois_of(LABELS), torch.tensor(TEACHER))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_soft_background_weights_of_the_paper(make_small):
    # 1 / N_fg * sum over foreground + sum over background of w_j / sum(w).
    s = surprises()
    expected = (s[1] + s[3]) / 2 + (0.9 * s[0] + 0.25 * s[2]) / (0.9 + 0.25)
    method = make_method(make_small(), class_normalizer="paper")
    found = method.class_loss(torch.tensor(LOGITS), rois_of(LABELS), torch.tensor(TEACHER))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_normalizer_is_at_least_one(make_small):
    method = make_method(make_small())
    found = method.class_loss(torch.tensor(LOGITS[:1]), rois_of([0]), torch.tensor([0.2]))
    assert found.item() == pytest.approx(0.2 * surprises()[0], abs=1e-6)
    nothing = method.class_loss(torch.zeros(0, 3), rois_of([]), torch.zeros(0))
    assert nothing.item() == 0


@pytest.mark.parametrize("scale", ["axes", "half_perimeter"])
def test_relative_deviation_by_hand(scale):
    boxes = [[[10.0, 20.0, 30.0, 60.0], [12.0, 21.0, 29.0, 63.0], [8.0, 19.0, 33.0, 61.5]], [[5.0, 5.0, 5.3, 5.4]] * 3]
    expected = []
    for versions in boxes:
        mean = [statistics.fmean(v[c] for v in versions) for c in range(4)]
        width, height = max(1.0, mean[2] - mean[0]), max(1.0, mean[3] - mean[1])
        units = [width, height, width, height] if scale == "axes" else [(width + height) / 2] * 4
        sigma = [statistics.stdev(v[c] for v in versions) for c in range(4)]  # K - 1 in the denominator
        expected.append(statistics.fmean(s / u for s, u in zip(sigma, units, strict=True)))
    assert relative_deviation(torch.tensor(boxes), scale).tolist() == pytest.approx(expected, abs=1e-6)


def test_no_box_has_no_deviation_and_no_warning(recwarn):
    assert relative_deviation(torch.zeros(0, 10, 4), "axes").shape == (0,)
    assert not recwarn.list


@pytest.mark.parametrize("jitter", ["gaussian", "uniform"])
@pytest.mark.parametrize("counts", [(1, 0), (2, 3), (0, 0)])
def test_uncertainty_against_loops(make_small, make_batch, jitter, counts):
    """Jitter in the teacher's frame, the class's own regression, clipped to the weak view, unbiased deviation."""
    method = make_method(make_small(), jitter=jitter, jitter_count=4).eval()
    batch = make_batch(unlabeled_boxes=(2, 3))
    weak = batch.unlabeled["weak"]
    weak.sizes[1] = torch.tensor([50, 40])
    generator = torch.Generator().manual_seed(0)
    targets = []
    for n in counts:
        corner = torch.rand(n, 2, generator=generator) * 30
        targets.append(Target(torch.cat([corner, corner + 15], 1), torch.arange(n) % 3 + 1, torch.ones(n)))
    with torch.no_grad():
        features = method.teacher.features(weak.images)
        found = method.uncertainty(features, weak, pad(targets), batch.unlabeled_keys)
    head, settings = method.teacher.roi.head, method.teacher.roi.settings
    for image, target in enumerate(targets):
        for slot, (box, label) in enumerate(zip(target.boxes.tolist(), target.labels.tolist(), strict=True)):
            key = np.array([int(batch.unlabeled_keys[image]) + slot], dtype=np.int64)
            count = 4 * 4
            if jitter == "gaussian":
                draws = uniform(key, 2 * count, "jitter")[0]
                noise = np.sqrt(-2 * np.log(1 - draws[:count])) * np.cos(2 * np.pi * draws[count:])
            else:
                noise = uniform(key, count, "jitter")[0] * 2 - 1
            noise = noise.reshape(4, 4)
            units = [max(1.0, box[2] - box[0]), max(1.0, box[3] - box[1])] * 2
            refined = []
            for k in range(4):
                moved = [c + 0.06 * u * e for c, u, e in zip(box, units, noise[k], strict=True)]
                w, h = moved[2] - moved[0], moved[3] - moved[1]
                level = min(4, max(2, math.floor(3 + math.log2(math.sqrt(w * h) / 32) + 1e-6)))
                region = torch.tensor([[image, *moved]], dtype=torch.float32)
                pooled = roi_align(features[level - 2], region, settings.output, 2.0**-level, 1, False)
                with torch.no_grad():
                    dx, dy, dw, dh = head(pooled)[1][0, label].double().tolist()
                cx, cy = (moved[0] + moved[2]) / 2 + dx / 10 * w, (moved[1] + moved[3]) / 2 + dy / 10 * h
                w, h = w * math.exp(dw / 5), h * math.exp(dh / 5)
                height, width = weak.sizes[image].tolist()
                corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                refined.append([min(max(0.0, c), limit) for c, limit in zip(corners, [width, height] * 2, strict=True)])
            mean = [statistics.fmean(v[c] for v in refined) for c in range(4)]
            size = [max(1.0, mean[2] - mean[0]), max(1.0, mean[3] - mean[1])] * 2
            expected = statistics.fmean(statistics.stdev(v[c] for v in refined) / size[c] for c in range(4))
            assert found[image, slot].item() == pytest.approx(expected, abs=1e-5)
        assert torch.isinf(found[image, len(target) :]).all()


def test_uncertainty_of_an_image_does_not_depend_on_its_neighbours(make_small, make_batch):
    method = make_method(make_small()).eval()
    batch = make_batch()
    targets = [Target(torch.tensor([[5.0, 5, 25, 30]]), torch.tensor([1]), torch.ones(1)) for _ in range(2)]
    alone = targets[1]
    targets[0] = Target(targets[0].boxes.repeat(7, 1), torch.ones(7, dtype=torch.int64), torch.ones(7))
    with torch.no_grad():
        features = method.teacher.features(batch.unlabeled["weak"].images)
        both = method.uncertainty(features, batch.unlabeled["weak"], pad(targets), batch.unlabeled_keys)
        targets[0] = alone
        other = method.uncertainty(features, batch.unlabeled["weak"], pad(targets), batch.unlabeled_keys)
    assert torch.equal(both[1, 0], other[1, 0])
    assert len(set(both[0].tolist())) == 7  # the same box in other slots draws other numbers


def test_background_score_looks_at_the_same_place_of_the_weak_view(make_small, make_batch, map_box):
    """T_weak T_strong^-1 of the region, clipped to the weak view's own valid size."""
    method = make_method(make_small()).eval()
    batch = make_batch()
    weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
    weak.sizes = torch.tensor([[64, 58], [61, 64]])
    # The first two reach out of the weak view, whose right end is the strong view's left one.
    boxes = torch.tensor([[0.0, 20.0, 20.0, 50.0], [1.0, 40.0, 25.0, 52.0], [22.0, 4.0, 48.0, 20.0]])
    images = torch.tensor([0, 1, 1])
    rois = Rois(boxes, images, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4), torch.ones(3))
    with torch.no_grad():
        features = method.teacher.features(weak.images)
        found = method.background_score(features, weak, strong, rois)
        places = [
            map_box(box, strong.to_view[image], weak.to_view[image], weak.sizes[image].tolist())
            for box, image in zip(boxes.tolist(), images.tolist(), strict=True)
        ]
        logits, _ = method.teacher.roi(features, torch.tensor(places, dtype=torch.float32), images)
    assert places[0][2] == 58
    assert places[1][3] == pytest.approx(61)
    for row, value in zip(logits.double().tolist(), found.tolist(), strict=True):
        assert value == pytest.approx(math.exp(row[0]) / sum(math.exp(x) for x in row), abs=1e-6)


def test_proposals_of_the_teacher_are_mapped(make_small, make_batch, map_box):
    """T_strong T_weak^-1, clipped to the strong view's valid size; what lies outside of it is no proposal."""
    batch = make_batch()
    weak, strong = batch.unlabeled["weak"], batch.unlabeled["strong"]
    method = make_method(make_small(), use_teacher_proposals=True).eval()
    with torch.no_grad():
        _, proposals = method.label(method.teacher.features(weak.images), weak)
    proposals.boxes[:, 0] = torch.tensor([0.0, 10.0, 2.0, 20.0])  # right of the strong view
    found = map_proposals(proposals, weak, strong)
    for image in range(2):
        size = strong.sizes[image].tolist()
        for box, valid, place, kept in zip(
            proposals.boxes[image].tolist(), proposals.valid[image], found.boxes[image], found.valid[image], strict=True
        ):
            expected = map_box(box, weak.to_view[image], strong.to_view[image], size)
            assert place.tolist() == pytest.approx(expected, abs=1e-4)
            assert bool(kept) == bool(valid and expected[2] > expected[0] and expected[3] > expected[1])
    assert not found.valid[:, 0].any()


def test_student_looks_at_the_teachers_proposals(make_small, make_batch, monkeypatch):
    """Both samplings do, in the strong view."""
    method = make_method(make_small(), use_teacher_proposals=True).train()
    batch = make_batch()
    with torch.no_grad():
        _, proposals = method.label(method.teacher.features(batch.unlabeled["weak"].images), batch.unlabeled["weak"])
    expected = map_proposals(proposals, batch.unlabeled["weak"], batch.unlabeled["strong"])
    looked_at = []
    original = method.student.roi.sample

    def sample(given, *rest, **options):
        looked_at.append(given)
        return original(given, *rest, **options)

    monkeypatch.setattr(method.student.roi, "sample", sample)
    losses, _ = method(batch, 0)
    assert all(torch.isfinite(value) for value in losses.values())
    assert len(looked_at) == 3  # the labelled images' own, and two of the unlabelled images
    for given in looked_at[1:]:
        assert torch.equal(given.boxes, expected.boxes)
        assert torch.equal(given.valid, expected.valid)


@pytest.mark.parametrize(("training", "count"), [(True, 30), (False, 20)])
def test_number_of_the_teachers_proposals(make_small, make_batch, training, count):
    method = make_method(make_small(), teacher_training_proposals=training).eval()
    weak = make_batch().unlabeled["weak"]
    with torch.no_grad():
        _, proposals = method.label(method.teacher.features(weak.images), weak)
    assert proposals.boxes.shape == (2, count, 4)


def test_candidate_and_initial_score(make_small, make_batch, monkeypatch):
    """The teacher is asked for boxes above the candidate score; of these, those above the initial score stay."""
    method = make_method(make_small(), candidate_score=0.123, initial_score=0.25).eval()
    batch = make_batch(unlabeled_boxes=(4, 4), pseudo=True)
    found = pad(batch.unlabeled["strong"].targets).to_view(batch.unlabeled["strong"], batch.unlabeled["weak"])
    found.scores = torch.tensor([0.9, 0.26, 0.25, 0.2]).repeat(2, 1)
    asked = []
    monkeypatch.setattr(method.teacher, "detections", lambda *given: asked.append(given[3]) or found)
    labels, _ = method.label(method.teacher.features(batch.unlabeled["weak"].images), batch.unlabeled["weak"])
    assert asked == [0.123]
    assert labels.valid.tolist() == [[True, True]] * 2


@pytest.mark.parametrize(("side", "kept"), [(0.0, 3), (0.01, 2), (5.0, 1)])
def test_smallest_side_of_labels(make_small, make_batch, monkeypatch, side, kept):
    """Of sides in the strong view, strictly longer."""
    method = make_method(make_small(), smallest_side=side).train()
    batch = make_batch(unlabeled_boxes=(3, 3), pseudo=True)
    for target in batch.unlabeled["strong"].targets:
        target.boxes = torch.tensor([[5.0, 5.0, 25.0, 25.0], [5.0, 30.0, 25.0, 30.005], [30.0, 30.0, 34.9, 40.0]])
    with_labels(method, batch, [0.95], [0.001], monkeypatch)
    method(batch, 0)
    for labels in method.pseudo_labels.values():
        assert [len(target) for target in labels] == [kept, kept]


def with_labels(method: SoftTeacher, batch, scores: list[float], uncertainty: list[float], monkeypatch) -> None:
    """Lets the teacher find the hidden boxes with given scores and uncertainties."""
    found = pad(batch.unlabeled["strong"].targets).to_view(batch.unlabeled["strong"], batch.unlabeled["weak"])
    found.scores = torch.tensor(scores).expand_as(found.scores).clone()
    _, proposals = method.label(method.teacher.features(batch.unlabeled["weak"].images), batch.unlabeled["weak"])
    monkeypatch.setattr(method, "label", lambda *_: (found.keep(found.scores > method.initial_score), proposals))
    monkeypatch.setattr(method, "uncertainty", lambda *_: torch.tensor(uncertainty).expand_as(found.scores))


def test_which_labels_go_where(make_small, make_batch, monkeypatch):
    """RPN and classes take scores above 0.9, boxes take uncertainties below 0.02, both strictly."""
    method = make_method(make_small()).eval()
    batch = make_batch(unlabeled_boxes=(4, 4), pseudo=True)
    score = torch.tensor(0.9).item()
    uncertain = torch.tensor(0.02).item()
    with_labels(method, batch, [0.95, score, 0.6, 0.5], [0.5, 0.01, uncertain, 0.001], monkeypatch)
    method.class_score = method.rpn_score = score
    method.box_uncertainty = uncertain
    method.train()(batch, 0)
    truth = batch.unlabeled["strong"].targets
    for name, slots in (("classification", [0]), ("rpn", [0]), ("box", [1])):
        labels = method.pseudo_labels[name]
        for image in range(2):
            torch.testing.assert_close(labels[image].boxes, truth[image].boxes[slots], atol=1e-4, rtol=0)
    assert next(iter(method.pseudo_labels)) == "classification"


def test_box_loss_divides_by_all_samples_of_its_own_sampling(make_small, make_batch, monkeypatch):
    """L1 over the positives of a second, independent sampling, divided by how many regions that one drew."""
    method = make_method(make_small(style="mmdetection", roi={"batch_norm": False, "sampling_ratio": 1}))
    for parameter in method.student.roi.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = make_batch(unlabeled_boxes=(2, 1), pseudo=True)
    with_labels(method, batch, [0.6], [0.001], monkeypatch)  # no class label, every box reliable
    views, keys = (batch.unlabeled["strong"], batch.unlabeled["weak"]), batch.unlabeled_keys
    features = method.student.features(batch.unlabeled["strong"].images)
    found, _ = method.unlabeled_losses(features, *views, keys)

    student = method.student
    output = student.rpn(features, (64, 64))
    proposals = student.rpn.proposals(output, batch.unlabeled["strong"].sizes, training=True)
    rois, count = student.roi.sample(proposals, pad(batch.unlabeled["strong"].targets), keys, stream="roi_box")
    _, deltas = student.roi(features, rois.boxes, rois.images)
    expected = 0.0
    for box, wanted, label, row in zip(rois.boxes, rois.wanted, rois.labels, deltas, strict=True):
        if label:
            (x1, y1, x2, y2), (u1, v1, u2, v2) = box.tolist(), wanted.tolist()
            w, h = x2 - x1, y2 - y1
            target = [
                10 * ((u1 + u2) - (x1 + x2)) / 2 / w, 10 * ((v1 + v2) - (y1 + y2)) / 2 / h,
                5 * math.log((u2 - u1) / w), 5 * math.log((v2 - v1) / h),
            ]  # fmt: skip
            expected += sum(abs(a - b) for a, b in zip(row[label].tolist(), target, strict=True))
    assert int(count) == 32
    assert found["roi_box"].item() == pytest.approx(expected / 32, abs=1e-5)
    classes, _ = student.roi.sample(proposals, pad(batch.unlabeled["strong"].targets), keys)
    assert not torch.equal(classes.boxes, rois.boxes)  # the two samplings are independent
    # Without a class label every region is background, weighted by the teacher's belief in that.
    only_background, _ = student.roi.sample(proposals, method.labels["classification"], keys)
    logits, _ = student.roi(features, only_background.boxes, only_background.images)
    teacher = method.background_score(
        method.teacher.features(batch.unlabeled["weak"].images),
        batch.unlabeled["weak"],
        batch.unlabeled["strong"],
        only_background,
    )
    total, weight = 0.0, 0.0
    for row, w in zip(logits.double().tolist(), teacher.tolist(), strict=True):
        total += w * -math.log(math.exp(row[0]) / sum(math.exp(x) for x in row))
        weight += w
    assert found["roi_class"].item() == pytest.approx(total / max(1.0, weight), abs=1e-5)


def test_lambda_weighs_all_four_terms(make_small, make_batch, monkeypatch):
    results = []
    for weight in (1.0, 4.0):
        method = make_method(make_small(), lambda_u=weight)
        batch = make_batch(pseudo=True)
        with_labels(method, batch, [0.95], [0.001], monkeypatch)
        method.train()
        results.append(method(batch, 0)[0])
    for name in ("rpn_class", "rpn_box", "roi_class", "roi_box"):
        torch.testing.assert_close(4 * results[0][f"unlabeled_{name}"], results[1][f"unlabeled_{name}"])
        torch.testing.assert_close(results[0][name], results[1][name])


def test_burn_in_is_supervised(make_small, make_batch):
    method = make_method(make_small(), burn_in=0.5).train()
    assert method.unlabeled_from == 5
    batch = make_batch()
    losses, metrics = method(batch, 4)
    assert all(losses[name] == 0 for name in losses if name.startswith("unlabeled"))
    after, measured = method(batch, 5)
    assert losses.keys() == after.keys()
    assert metrics.keys() == measured.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"jitter_count": 1}, "jitter_count"),
        ({"jitter": "laplace"}, "jitter"),
        ({"class_normalizer": "mean"}, "class_normalizer"),
        ({"burn_in": 10}, "burn_in"),
        ({"reported": "nobody"}, "reported"),
    ],
)
def test_wrong_options(make_small, options, words):
    with pytest.raises(UserError, match=words):
        make_method(make_small(), **options)
