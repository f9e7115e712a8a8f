"""`ssodbench profile` on a few generated images: what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from harness.cli import main
from harness.engine.profile import Meter, alternate, ratio

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    tiny = ["data.train_images=8", "data.val_images=2", "profile.seconds=0.2", "profile.rounds=2", "profile.batch=4"]
    return ["profile", *tiny, f"cache_dir={cache}", "device=cpu", "profile.workers=0"]


@pytest.mark.parametrize(
    ("augment", "overrides", "views"),
    [
        ("small", (), ["weak", "strong"]),
        ("supervised", (), ["labeled"]),
        ("small", ("profile.views=[labeled]",), ["labeled"]),
    ],
)
def test_figures_of_each_pipeline(
    command: list[str], tmp_path: Path, augment: str, overrides: tuple[str, ...], views: list[str]
) -> None:
    out = tmp_path / "new folder" / "speed.json"
    pipelines = "profile.pipelines=[dali,torchvision]"
    assert main([*command, pipelines, f"augment={augment}", *overrides, f"out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["views"] == views
    assert list(found["pipelines"]) == ["dali", "torchvision"]
    for figures in (*found["pipelines"].values(), *found["ceilings"].values()):
        assert figures["images"] % 4 == 0
        assert figures["images_per_s"] == pytest.approx(figures["images"] / figures["seconds"])
        assert figures["cpu_ms_per_image"] == pytest.approx(1000 * figures["cores"] / figures["images_per_s"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["profile.pipelines=[dali,fast]"], "'fast', which is none of dali"),
        (["profile.pipelines=[dali]", "profile.views=[sideways]"], "sideways"),
        (["profile.pipelines=[dali]", "profile.sweep={threads: [1]}"], "give one of them"),
    ],
)
def test_mistakes(command: list[str], overrides: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, *overrides]) == 2
    assert words in capfd.readouterr().err


def test_turns_alternate_and_are_of_equal_length() -> None:
    order: list[tuple[str, int]] = []

    def work(name: str) -> Callable[[int], int]:
        def run(batches: int) -> int:
            order.append((name, batches))
            return 4 * batches

        return run

    meters = alternate({name: work(name) for name in ("a", "b")}, 1e-9, 3, lambda: None)
    measured = [name for name, _ in order[4:]]
    assert measured == ["a", "b", "b", "a", "a", "b"]
    assert meters["a"].images == 4 * sum(batches for name, batches in order[4:] if name == "a")
    assert isinstance(meters["b"], Meter)
    assert len(meters["a"].rates) == 3


def test_interval_of_a_ratio_is_that_of_paired_logarithms() -> None:
    rng = np.random.default_rng(0)
    rates, others = rng.uniform(90, 110, 6), rng.uniform(40, 60, 6)
    found = ratio(rates.tolist(), others.tolist())
    test = scipy.stats.ttest_rel(np.log(rates), np.log(others)).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((np.exp(test.low), np.exp(test.high)))
    assert found["ratio"] == pytest.approx(scipy.stats.gmean(rates / others))
    assert ratio([2.0], [1.0]) == {"ratio": 2.0, "low": None, "high": None}
