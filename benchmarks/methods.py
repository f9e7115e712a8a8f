"""The methods that benchmarks take: all of `harness/conf/method`, each with small detectors that it can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

import harness
from detectors.detector import Detector
from harness.config.make import make

CONF = Path(harness.__file__).parent / "conf"
METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
DETECTORS = ("small", "small_retinanet", "small_fcos")
EVERYWHERE = "mean_teacher"  # trains every detector, and is measured with all of these


def method_config(name: str) -> dict[str, Any]:
    """A method's YAML with its small preset."""
    files = (CONF / "method" / f"{name}.yaml", CONF / "method" / "preset" / f"{name}_small.yaml")
    merged = OmegaConf.merge(*[OmegaConf.load(file) for file in files if file.exists()])
    config = OmegaConf.to_container(merged)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def make_detector(name: str, classes: int = 4) -> Detector:
    """One of `DETECTORS` from scratch, the same weights every time."""
    torch.manual_seed(0)
    config = OmegaConf.load(CONF / "detector" / f"{name}.yaml")
    config = OmegaConf.merge(config, {"weights": "scratch", "cache_dir": "."})
    detector: Detector = make("detector", config, num_classes=classes)
    return detector.to(memory_format=torch.channels_last)


def pairs() -> list[tuple[str, str]]:
    """Each method with the first of `DETECTORS` that it can train; one of them with all."""
    made = {name: make_detector(name) for name in DETECTORS}
    found = []
    for method in METHODS:
        needs = get_class(method_config(method)["_target_"]).needs
        fitting = [name for name in DETECTORS if isinstance(made[name], needs)]
        found += [(method, name) for name in (fitting if method == EVERYWHERE else fitting[:1])]
    return found
