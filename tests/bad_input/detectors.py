"""Mistakes in the detector: unknown styles and rules, norms that do not fit, files of other weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.models import resnet18

from tests.bad_input.case import Case

TRAIN = "train data=custom data.root={pets} device=cpu schedule=smoke run_dir={tmp}/run"
RESNET = f"{TRAIN} detector=faster_rcnn_r18"
SCRATCH = f"{RESNET} detector.weights=scratch"
FILE = f"{RESNET} detector.weights={{tmp}}/r18.pth"


def _folded(folder: Path) -> None:
    """Scales of batch normalisation, and no statistics: MSRA's weights as mmdetection converts them."""
    state = resnet18().state_dict()
    state["bn1.weight"] *= 0.01
    torch.save({"state_dict": state}, folder / "r18.pth")


def _raw_pixels(folder: Path) -> None:
    """A first layer whose statistics are those of pixels of 0 to 255."""
    state = resnet18().state_dict()
    state["bn1.running_mean"] += 3.0
    state["bn1.running_var"] *= 58.0**2
    torch.save(state, folder / "r18.pth")


def _plain(folder: Path) -> None:
    torch.save(resnet18().state_dict(), folder / "r18.pth")


CASES = [
    Case("unknown style", f"{SCRATCH} detector.style=yolo", ("detector.style=yolo", "mmdetection")),
    Case("unknown style of all", f"{SCRATCH} detector_style=mmdet", ("detector_style=mmdet", "mmdetection")),
    Case("unknown style, small", f"{TRAIN} detector.style=caffe", ("detector.style=caffe", "tensorpack")),
    Case(
        "style of RetinaNet",
        f"{TRAIN} detector=retinanet_r18 detector.weights=scratch detector.style=tensorpack",
        ("detector.style=tensorpack", "detectron"),
    ),
    Case("unknown norm", f"{SCRATCH} detector.norm=instance", ("detector.norm=instance", "frozen_statistics")),
    Case("frozen norm from scratch", f"{SCRATCH} detector.norm=frozen", ("detector.norm=frozen", "group")),
    Case(
        "frozen statistics from scratch",
        f"{SCRATCH} detector.norm=frozen_statistics",
        ("detector.norm=frozen_statistics", "group"),
    ),
    Case("group norm of a file", f"{FILE} detector.norm=group", ("detector.norm=group", "r18.pth"), _plain),
    Case("frozen stages from scratch", f"{SCRATCH} detector.frozen_stages=2", "detector.frozen_stages"),
    Case(
        "uneven groups", f"{SCRATCH} detector.pyramid_channels=48", ("detector.pyramid_channels=48", "multiple of 32")
    ),
    Case("unknown candidates", f"{SCRATCH} detector.rpn.candidates=near", ("detector.rpn.candidates=near", "padded")),
    Case(
        "unknown side of low-quality matches",
        f"{SCRATCH} detector.rpn.low_quality_of=both",
        ("detector.rpn.low_quality_of=both", "anchor"),
    ),
    Case("three anchor sizes for five levels", f"{SCRATCH} detector.anchor_sizes=[8,16,32]", "detector.anchor_sizes"),
    Case("folded statistics", FILE, ("r18.pth", "caffe", "detector.caffe=true", "detector.caffe=false"), _folded),
    Case("raw pixels", FILE, ("r18.pth", "caffe", "detector.caffe=true", "detector.caffe=false"), _raw_pixels),
    Case(
        "raw pixels, RetinaNet",
        f"{TRAIN} detector=retinanet_r18 detector.weights={{tmp}}/r18.pth",
        ("r18.pth", "detector.caffe=true"),
        _raw_pixels,
    ),
    Case("caffe of torchvision's", f"{RESNET} detector.caffe=true", ("detector.caffe=true", "torchvision")),
    Case("file of another depth", f"{FILE} detector.depth=50", ("r18.pth", "depth"), _plain),
    Case("no such file", f"{RESNET} detector.weights={{tmp}}/none.pth", ("none.pth", "is no file")),
]
