from __future__ import annotations

import pytest
import torch

from detectors.detector import targets_of
from detectors.fcos import fcos
from detectors.methods.stac import Stac
from harness.core.types import UserError


@pytest.mark.parametrize(("mean_of_branches", "weights"), [(True, (0.5, 1.0)), (False, (1.0, 2.0))])
def test_loss_is_the_weighted_sum_of_two_separate_forwards(make_small, make_batch, mean_of_branches, weights):
    """L = L_s / 2 + lambda_u L_u / 2 with lambda_u = 2 in the official code."""
    method = Stac(make_small(roi={"batch_norm": False}), 10, mean_of_branches=mean_of_branches)
    batch = make_batch(pseudo=True)
    student = method.student.eval()  # BatchNorm must not move between the two ways
    losses, _ = method(batch, 0)
    for part, view, keys, weight in (
        ("", batch.labeled["labeled"], batch.labeled_keys, weights[0]),
        ("unlabeled_", batch.unlabeled["strong"], batch.unlabeled_keys, weights[1]),
    ):
        own = student.losses(student.features(view.images), view, targets_of(view), keys)
        for name, value in own.items():
            torch.testing.assert_close(losses[part + name], weight * value, atol=1e-6, rtol=1e-6)


def test_joint_forward_equals_two_where_no_statistics_are_shared(make_small, make_batch):
    batch = make_batch(pseudo=True)
    results = []
    for joint in (False, True):
        method = Stac(make_small(roi={"batch_norm": False}), 10, joint_forward=joint)
        method.student.eval()
        results.append(method(batch, 0)[0])
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-5, rtol=1e-5)


def test_labels_are_those_of_the_strong_view(make_small, make_batch):
    method = Stac(make_small(), 10)
    batch = make_batch(pseudo=True)
    method(batch, 0)
    for own, given in zip(method.pseudo_labels["classification"], batch.unlabeled["strong"].targets, strict=True):
        assert torch.equal(own.boxes, given.boxes)


def test_unlabelled_rpn_terms_can_be_left_out(make_small, make_batch):
    """The keys stay, and nothing but these terms changes."""
    results = []
    for wanted in (True, False):
        method = Stac(make_small(), 10, unlabeled_rpn_loss=wanted).train()
        losses, _ = method(make_batch(pseudo=True), 0)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in method.student.parameters())
        results.append(losses)
    with_rpn, without = results
    assert with_rpn.keys() == without.keys()
    for name, value in without.items():
        dropped = name in ("unlabeled_rpn_class", "unlabeled_rpn_box")
        assert value == 0 if dropped else torch.equal(value, with_rpn[name])
        assert with_rpn[name] != 0


def test_a_detector_without_rpn_has_no_such_terms():
    detector = fcos(num_classes=3, name="fcos_r18", cache_dir=".", depth=18, weights="scratch", pyramid_channels=32)
    with pytest.raises(UserError, match=r"method\.unlabeled_rpn_loss=false does not fit detector=fcos_r18"):
        Stac(detector, 10, unlabeled_rpn_loss=False)
