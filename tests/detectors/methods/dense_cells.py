"""What tests of dense methods share: a narrow FCOS, and arithmetic of one cell in plain Python."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detectors.fcos import Fcos, small_fcos
from detectors.one_stage import DenseOutput

EMA = {"momentum": 0.9, "ramp": False, "update": "after", "buffers": True}


def make_fcos(seed: int = 0, **options: object) -> Fcos:
    """A narrow FCOS that tells IoU, whose cells differ in all that they say."""
    torch.manual_seed(seed)
    detector = small_fcos(
        num_classes=3, name="small_fcos_iou", cache_dir=".", weights="scratch", channels=(8, 8, 16, 16),
        pyramid_channels=16, convolutions=1, **{"quality": "iou", "scales": True, **options},
    )  # fmt: skip
    for name, parameter in detector.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_reg.weight", "bbox_ctrness.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return detector


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(p: float, q: float) -> float:
    return -(q * math.log(p) + (1 - q) * math.log(1 - p))


def giou_loss(a: list[float], b: list[float]) -> float:
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    return 1 - shared / (union + 1e-7) + (hull - union) / (hull + 1e-7)


def unlabelled(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("unlabeled_"): value for name, value in losses.items() if name.startswith("unlabeled")}


def without_values(output: DenseOutput) -> DenseOutput:
    """On torch's meta device: who asks for a value, for which a step would wait on a GPU, gets an error."""
    assert output.quality is not None
    logits, deltas, quality = (
        part.detach().to("meta").requires_grad_() for part in (output.logits, output.deltas, output.quality)
    )
    return DenseOutput(logits, deltas, quality, output.anchors.to("meta"), output.level_sizes)
