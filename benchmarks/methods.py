"""The methods that benchmarks take: all of `harness/conf/method`, each with small detectors that it can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

import harness
from detectors.detector import Detector
from detectors.methods.method import Method
from harness.config.make import make
from harness.config.targets import GROUPS
from harness.core.types import UserError

CONF = Path(harness.__file__).parent / "conf"
METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
DETECTORS: dict[str, dict[str, Any]] = {  # and options, which some methods ask for
    "small": {},
    "small_retinanet": {},
    "small_fcos": {"quality": "iou", "scales": True},
    "small_consistent_retina": {},
}
EVERYWHERE = ("mean_teacher", "supervised")  # measured with all of these


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
    config = OmegaConf.merge(config, {"weights": "scratch", "cache_dir": ".", **DETECTORS[name]})
    detector: Detector = make("detector", config, num_classes=classes)
    return detector.to(memory_format=torch.channels_last)


def make_method(name: str, detector: Detector, burn_in: int = 0) -> Method:
    """A method that trains a detector, in its small preset.

    Raises:
        UserError: it cannot train that one.
    """
    options = {k: v for k, v in method_config(name).items() if k not in GROUPS["method"].own}
    if "burn_in" in options:
        options["burn_in"] = burn_in
    method: Method = get_class(options.pop("_target_"))(detector=detector, steps=1000, **options)
    return method.train()


def _fits(method: str, detector: str) -> bool:
    try:
        make_method(method, make_detector(detector))
    except UserError:
        return False
    return True


def pairs() -> list[tuple[str, str]]:
    """Each method with the first of `DETECTORS` that it can train; some with all."""
    found = []
    for method in METHODS:
        fitting = [name for name in DETECTORS if _fits(method, name)]
        found += [(method, name) for name in (fitting if method in EVERYWHERE else fitting[:1])]
    return found
