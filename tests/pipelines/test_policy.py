"""Policies as data: the shipped ones, their formulas, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import compose, sections
from harness.core.types import UserError, Views
from pipelines.policy import Policy, Range

POLICIES = sorted(p.stem for p in (Path(__file__).parents[2] / "harness" / "conf" / "augment").glob("*.yaml"))
Config = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", POLICIES)
def test_shipped_policies_are_valid(name: str, policy_config: Config) -> None:
    policy = Policy.from_config(policy_config(name))
    assert policy.name == name
    assert {"test", "pseudo"} <= set(policy.views)


def test_soft_teacher_levels(policy_config: Config) -> None:
    """The values at levels 1..9, by the formulas of Soft Teacher's code."""
    ops = Policy.from_config(policy_config("soft_teacher")).views["strong"].color[0].ops
    levels = range(1, 10)
    assert len(ops) == 9
    assert ops["solarize"].values == tuple(min(int(25.6 * m), 255) for m in levels)
    assert ops["posterize"].values == tuple(4 - int(0.4 * m) for m in levels)
    for name in ("saturation", "contrast", "brightness", "sharpness"):
        np.testing.assert_allclose(ops[name].values, [0.18 * m + 0.1 for m in levels])
    stac = Policy.from_config(policy_config("stac")).views["strong"].color[0].ops
    assert stac["solarize"].values == tuple(256 - int(25.6 * m) for m in levels)


def test_ranges() -> None:
    u = np.linspace(0, 1, 1001)[:-1]
    assert Range(400, 1200, integer=True).sample(u).min() == 400
    assert Range(400, 1200, integer=True).sample(np.array([np.nextafter(1, 0)]))[0] == 1200
    tenths = Range.parse("x", {"range": [0.1, 1.9], "decimals": 1}).sample(u)
    assert set(np.round(tenths * 10).astype(int)) == set(range(1, 20))
    bits = Range.parse("x", {"range": [0, 4], "decimals": 1, "ceil": True}).sample(u)
    assert abs((bits == 0).mean() - 0.0125) < 0.002  # a black image, about once in 80
    assert abs(np.log(Range(0.7, 1.3, log=True).sample(u)).mean() - np.log([0.7, 1.3]).mean()) < 1e-3
    assert (Range.parse("x", 3).sample(u) == 3).all()
    assert Range.parse("x", {"values": [1, 2]}).sample(u).mean() == 1.5


def test_changed_keys_become_deviations(policy_config: Config) -> None:
    config = policy_config("soft_teacher")
    stated = Policy.from_config(config).deviations
    changed = Policy.from_config({**config, "color_at": "source", "antialias": True}).deviations
    assert set(changed) - set(stated) == {"color_at=source (paper: view)", "antialias=True (paper: False)"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"views": {}}, "at least one view"),
        ({"colour_at": "view"}, "colour_at"),
        ({"color_at": "somewhere"}, "color_at"),
        ({"views": {"weak": {"flips": 0.5}}}, r"views\.weak.*flips"),
        ({"views": {"weak": {"color": [{"one_of": {"saturate": 1}}]}}}, "saturate"),
        ({"views": {"weak": {"color": [{"probability": 1}]}}}, "one_of or all_of"),
        ({"views": {"weak": {"geometry_of": "strong"}}}, "no view 'strong'"),
        ({"views": {"weak": {"resize": {"max": 3}}}}, r"resize\.short is missing"),
        ({"views": {"weak": {"affine": {"one_of": {"rotate": [30, -30]}}}}}, "low, high"),
        ({"views": {"weak": {"erase": [{"count": 1}]}}}, "ratio, or area and aspect"),
        ({"views": {"weak": {"fill": [1, 2]}}}, "one or three"),
        ({"views": {"weak": {"fill": 300}}}, "fill=300 must be mean or a whole number from 0 to 255"),
        (
            {"views": {"weak": {"erase_fill": [0, 127.5, 0]}}},
            r"erase_fill\[1\]=127\.5 must be a whole number from 0 to 255",
        ),
        ({"views": {"weak": {"zoom": {"values": [1, 0]}}}}, r"zoom.*above 0"),
        ({"views": {"weak": {"zoom": {"range": [0, 2], "log": True}}}}, r"zoom.*logarithm"),
        ({"views": {"weak": {"resize": {"short": 0}}}}, r"short.*above 0"),
        ({"views": {"weak": {"erase": [{"ratio": 0.1, "count": 0}]}}}, r"count.*at least one"),
        ({"views": {"weak": {"erase": [{"area": 0.1, "aspect": [0, 2]}]}}}, r"aspect.*above 0"),
    ],
)
def test_mistakes_name_the_key(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Policy.from_config({"name": "x", "views": {"weak": {}}, **change})


def test_unknown_view_is_named() -> None:
    with pytest.raises(UserError, match="no view 'strong'"):
        Policy.from_config({"name": "x", "views": {"weak": {}}}).view("strong")


@pytest.mark.parametrize(
    "change",
    [
        {"geometry_of": "strong"},
        {"flip": 0.4},
        {"zoom": [0.5, 1]},
        {"resize": {"short": 32}},
        {"affine": {"one_of": {"rotate": [-3, 3]}}},
    ],
)
def test_any_other_geometry_takes_views_apart(change: dict[str, Any]) -> None:
    weak = {"resize": {"short": 64}, "flip": 0.5}
    for own, aligned in (({}, True), (change, False)):
        views = {"weak": weak, "strong": {**weak, "geometry_of": "weak", "color": [], **own}}
        assert Policy.from_config({"name": "x", "views": views}).aligned(("weak", "strong")) == aligned


STRONG_BASELINES = {
    "strong": ["method=supervised", "preset=paper", "method.labeled_view=strong"],
    "labeled_strong": ["method=supervised", "preset=paper", "augment=stac", "method.labeled_view=labeled_strong"],
}


@pytest.mark.parametrize("name", STRONG_BASELINES)
def test_strong_supervised_baselines(name: str, policy_config: Config) -> None:
    """The unlabelled images' strong chain, after the labelled images' resize and flip."""
    cfg = compose.load(STRONG_BASELINES[name])
    policy = Policy.from_config(sections.group(cfg, "augment"))
    view = policy.view(str(cfg.method.labeled_view))
    theirs = Policy.from_config(policy_config("stac" if name == "labeled_strong" else "soft_teacher")).view("strong")
    assert (view.resize, view.flip) == (policy.view("labeled").resize, 0.5)
    for field in ("color", "affine", "shuffle", "erase", "fill", "erase_fill", "keep_a_box", "zoom"):
        assert getattr(view, field) == getattr(theirs, field)
    assert view.geometry_of == view.name


@pytest.mark.parametrize("name", STRONG_BASELINES)
def test_strong_supervised_baselines_are_rendered(
    name: str, policy_config: Config, training: Callable[..., Any], build: Callable[..., Any]
) -> None:
    policy = policy_config("stac" if name == "labeled_strong" else "supervised")
    policy["views"][name]["resize"] = {"short": 64, "max": 128}
    pipeline = build("torchvision", policy, **training(4, 0, Views((name,))))
    batch = next(iter(pipeline.batches()))
    view = batch.labeled[name]
    assert view.images.shape[0] == len(view.targets) == 4
    assert (view.sizes.min(1).values == 64).any()
    assert batch.unlabeled == {}
    assert any(len(target) for target in view.targets)
