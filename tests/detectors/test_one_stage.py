from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import box_iou

from detectors.detector import targets_of
from detectors.fcos import fcos
from detectors.fcos_heads import ClassHead, DistanceHead
from detectors.matching import match_anchors
from detectors.one_stage import Wanted
from detectors.retinanet import retinanet
from harness.core.types import UserError, View

SIZES = (8, 16, 32, 64, 128)


def make_retinanet(style: str = "torchvision"):
    torch.manual_seed(0)
    return retinanet(
        num_classes=3,
        name="r",
        cache_dir=".",
        depth=18,
        weights="scratch",
        pyramid_channels=32,
        anchor_sizes=SIZES,
        style=style,
    )


def make_fcos(style: str = "torchvision", **options):
    torch.manual_seed(0)
    return fcos(
        num_classes=3, name="f", cache_dir=".", depth=18, weights="scratch", pyramid_channels=32, style=style, **options
    )


def shake(network: torch.nn.Module) -> None:
    """Larger weights in the heads, so that scores and boxes differ."""
    for name, parameter in network.named_parameters():
        if "head" in name and "conv." not in name:
            torch.nn.init.normal_(parameter, std=0.1)


def noise_like(features: list[torch.Tensor]) -> list[torch.Tensor]:
    """Features that leave no ties between scores."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(level.shape, generator=generator) for level in features]


def in_torchvisions_terms(view: View, kind: type):
    """torchvision's model around our backbone and heads, its targets, and its loss function's arguments."""

    class Backbone(torch.nn.Module):
        out_channels = 32

    if kind is detection.RetinaNet:
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in SIZES)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        model = kind(Backbone(), 3, anchor_generator=anchors, detections_per_img=100, score_thresh=0.3)
    else:
        model = kind(Backbone(), 3, detections_per_img=100, score_thresh=0.3)
    targets = [{"boxes": t.boxes, "labels": t.labels - 1} for t in view.targets]
    return model, targets


@pytest.mark.parametrize("boxes", [(3, 1), (0, 2), (0, 0)])
def test_retinanet_losses_and_detections_are_torchvisions(make_batch, boxes):
    detector = make_retinanet()
    shake(detector)
    view = make_batch(labeled_boxes=boxes).labeled["labeled"]
    features = noise_like(detector.features(view.images))
    output = detector.output(features, view)
    model, targets = in_torchvisions_terms(view, detection.RetinaNet)
    head = {"cls_logits": output.logits, "bbox_regression": output.deltas}
    expected = model.compute_loss(targets, head, [output.anchors] * 2)
    found = detector.losses(features, view, targets_of(view), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(found["class"], expected["classification"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["box"], expected["bbox_regression"], atol=1e-5, rtol=1e-5)

    split = {k: [t.detach() for t in v.split(output.level_sizes, 1)] for k, v in head.items()}
    anchors = [list(output.anchors.split(output.level_sizes))] * 2
    theirs = model.postprocess_detections(split, anchors, [(64, 64)] * 2)
    same_detections(detector.find(features, view, 0.3).unpad(), theirs)


@pytest.mark.parametrize("boxes", [(3, 1), (0, 2), (0, 0)])
def test_fcos_losses_and_detections_are_torchvisions(make_batch, boxes):
    detector = make_fcos()
    shake(detector)
    view = make_batch(labeled_boxes=boxes).labeled["labeled"]
    features = noise_like(detector.features(view.images))
    output = detector.output(features, view)
    model, targets = in_torchvisions_terms(view, detection.FCOS)
    head = {
        "cls_logits": output.logits, "bbox_regression": output.deltas, "bbox_ctrness": output.quality[..., None]
    }  # fmt: skip
    expected = model.compute_loss(targets, head, [output.anchors] * 2, output.level_sizes)
    found = detector.losses(features, view, targets_of(view), torch.zeros(2, dtype=torch.int64))
    for ours, name in (("class", "classification"), ("box", "bbox_regression"), ("centerness", "bbox_ctrness")):
        torch.testing.assert_close(found[ours], expected[name], atol=1e-5, rtol=1e-5)

    split = {k: [t.detach() for t in v.split(output.level_sizes, 1)] for k, v in head.items()}
    anchors = [list(output.anchors.split(output.level_sizes))] * 2
    theirs = model.postprocess_detections(split, anchors, [(64, 64)] * 2)
    same_detections(detector.find(features, view, 0.3).unpad(), theirs)


def same_detections(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        big = ((theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]) > 1e-2).all(1)  # torchvision reports empty boxes too
        count = min(len(ours), int(big.sum()))
        assert count > 0
        torch.testing.assert_close(ours.scores[:count], theirs["scores"][big][:count], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.boxes[:count], theirs["boxes"][big][:count], atol=1e-3, rtol=1e-4)
        assert torch.equal(ours.labels[:count], theirs["labels"][big][:count] + 1)


def test_batch_normalizer_of_retinanet(make_batch):
    """mmdetection divides by the positives of the batch: with p_i positives, sum_i (p_i L_i) / sum_i p_i."""
    detector = make_retinanet("detectron")
    view = make_batch(labeled_boxes=(4, 1)).labeled["labeled"]
    features = detector.features(view.images)
    keys = torch.zeros(2, dtype=torch.int64)
    found = detector.losses(features, view, targets_of(view), keys)["class"]
    positives = match_anchors(detector.output(features, view).anchors, targets_of(view), 0.5, 0.4, True).positive.sum(1)
    total = 0.0
    for image in range(2):
        alone = View(view.images[image : image + 1], view.sizes[:1], view.to_view[:1], view.targets[image : image + 1])
        own = detector.losses(
            [level[image : image + 1].detach() for level in features], alone, targets_of(alone), keys[:1]
        )
        total += own["class"].item() * int(positives[image])
    assert found.item() == pytest.approx(total / int(positives.sum()), rel=1e-5)


def test_centre_of_a_cell():
    anchors = torch.tensor([[-4.0, -4.0, 4.0, 4.0]])
    ones = torch.ones(1, 4)
    assert make_fcos("torchvision").decode(ones, anchors).tolist() == [[-8, -8, 8, 8]]
    assert make_fcos("detectron").decode(ones, anchors).tolist() == [[-4, -4, 12, 12]]


def test_wrong_style():
    with pytest.raises(UserError, match=r"detector\.style"):
        make_fcos("mmdetection")


def test_heads_of_fcos_are_torchvisions():
    """First weights and outputs to the bit, with the names under which weights are saved."""
    features = [torch.randn(2, 32, size, size) for size in (8, 4)]
    norm = functools.partial(torch.nn.GroupNorm, 8)
    torch.manual_seed(3)
    theirs = FCOSClassificationHead(32, 1, 3, 2, norm_layer=norm), FCOSRegressionHead(32, 1, 2, norm_layer=norm)
    torch.manual_seed(3)
    ours = ClassHead(32, 3, 2, 8), DistanceHead(32, 2, 8, 2, scales=False)
    for one, other in zip(ours, theirs, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(ours[0](features), theirs[0](features))
    (distances, quality), (boxes, centerness) = ours[1](features), theirs[1](features)
    assert torch.equal(distances, boxes)
    assert torch.equal(quality, centerness[..., 0])
    assert [tower.shape for tower in ours[0].towers(features)] == [level.shape for level in features]


def test_scales_multiply_the_distances_of_their_level():
    features = [torch.randn(1, 32, size, size) for size in (4, 2)]
    head = DistanceHead(32, 1, 8, 2, scales=True)
    torch.nn.init.normal_(head.bbox_reg.weight, std=0.3)
    before, _ = head(features)
    with torch.no_grad():
        head.scales.copy_(torch.tensor([2.0, -1.0]))
    after, _ = head(features)
    torch.testing.assert_close(after[:, :16], 2 * before[:, :16])
    assert (after >= 0).all()  # of a negative factor, what was negative before
    assert ((after[:, 16:] > 0) & (before[:, 16:] > 0)).sum() == 0
    assert (after[:, 16:] > 0).any()


def test_quality_of_fcos_may_be_the_iou_of_its_prediction(make_batch):
    detector = make_fcos("detectron", quality="iou", scales=True)
    shake(detector)
    view = make_batch(labeled_boxes=(3, 1)).labeled["labeled"]
    features = noise_like(detector.features(view.images))
    truth = targets_of(view)
    found = detector.losses(features, view, truth, torch.zeros(2, dtype=torch.int64))
    assert list(found) == ["class", "box", "iou"]
    output = detector.output(features, view)
    index, positive = detector.assign(output.anchors, output.level_sizes, truth)
    predicted = detector.decode(output.deltas, output.anchors).detach()
    total = 0.0
    for image, cell in positive.nonzero().tolist():
        pair = predicted[image, cell], truth.boxes[image, index[image, cell]]
        wanted = float(box_iou(pair[0][None], pair[1][None]))
        logit = float(output.quality[image, cell].detach())
        total += math.log1p(math.exp(-abs(logit))) + max(logit, 0) - wanted * logit
    assert positive.any()
    assert found["iou"].item() == pytest.approx(total / int(positive.sum()), rel=1e-4)
    found["iou"].backward()
    assert detector.regression_head.bbox_reg.weight.grad is None  # what it wants is a constant


def test_product_and_root_of_it_find_the_same_boxes(make_batch):
    view = make_batch().labeled["labeled"]
    root, product = make_fcos(), make_fcos(score="product")
    for detector in (root, product):
        torch.manual_seed(1)
        shake(detector)
    features = noise_like(root.features(view.images))
    one, two = root.find(features, view, 0.5), product.find(features, view, 0.25)
    assert one.valid.any()
    assert torch.equal(one.boxes, two.boxes)
    torch.testing.assert_close(one.scores.square(), two.scores)


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_a_method_may_hand_in_targets_of_its_own(make_batch, kind):
    """Soft classes, weights of single cells and other counts: sum(weights * loss) / count of each term."""
    detector = make_fcos() if kind == "fcos" else make_retinanet("detectron")
    shake(detector)
    view = make_batch().labeled["labeled"]
    output = detector.output(noise_like(detector.features(view.images)), view)
    targets = detector.targets(output, view, targets_of(view))
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(output.logits.shape, generator=generator)
    weights = torch.rand(output.logits.shape[:2], generator=generator)
    one_cell = torch.zeros_like(weights)
    one_cell[:, 5] = 1.0
    boxes = targets.boxes.values

    def squares(output, wanted):
        return (output.logits.sigmoid() - wanted).square().sum(-1)

    def loss(cells, count):
        wanted = Wanted(values, weights, torch.tensor(7.0)), Wanted(boxes, cells, torch.tensor(count))
        return detector.loss(output, replace(targets, classes=wanted[0], boxes=wanted[1]), squares)

    expected = ((output.logits.sigmoid() - values).square().sum(-1) * weights).sum() / 7
    torch.testing.assert_close(loss(one_cell, 1.0)["class"], expected)
    assert loss(one_cell, 1.0)["box"] > 0
    torch.testing.assert_close(loss(2 * one_cell, 3.0)["box"], loss(one_cell, 1.0)["box"] * 2 / 3)


def test_levels_of_cells(make_batch):
    view = make_batch().labeled["labeled"]
    detector = make_fcos()
    output = detector.output(detector.features(view.images), view)
    assert output.levels.tolist() == [level for level, size in enumerate(output.level_sizes) for _ in range(size)]
