"""`ssodbench train`: what it says before anything is trained."""

from __future__ import annotations

import pytest

from harness.commands import train
from harness.config import compose


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=raccoon"], True),
        (["data=raccoon", "detector=small_fcos"], True),
        (["data=raccoon", "preset=photos"], False),
        (["data=raccoon", "preset=paper"], False),
        (["data=shapes"], False),
    ],
)
def test_photographs_with_the_preset_for_drawn_shapes(
    overrides: list[str], said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    train._suggest_photos(compose.load([*overrides, "device=cpu"]))
    err = capsys.readouterr().err
    assert ("take preset=photos" in err) == said
    assert err.count("\n") == said


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["detector=small", "detector.backbone=timm:resnet10t"], "small_resnet10t"),
        (["detector=small_fcos", "detector.backbone=timm:resnet10t"], "small_fcos_resnet10t"),
        (["detector=faster_rcnn", "detector.backbone=timm:convnext_tiny.fb_in1k"], "faster_rcnn_convnext_tiny.fb_in1k"),
        (["detector=fcos", "detector.backbone=timm:resnet10t", "detector.name=mine"], "mine"),
        (["detector=retinanet"], "retinanet_r50"),
        (["preset=photos"], "lite0"),
    ],
)
def test_a_detector_is_called_by_its_backbone(overrides: list[str], name: str) -> None:
    assert compose.load(overrides).detector.name == name
