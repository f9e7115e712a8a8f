"""timm's networks by name, with their weights: timm's own, those of a package, or a file's."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from detectors.weight_packages import PACKAGES
from detectors.weights import LATER, load_backbone, read_tensors
from harness.core.types import UserError
from harness.core.validate import Limits, near

# What a configuration may say.
TimmName = Annotated[str, Limits(pattern=r"\Atimm:[A-Za-z0-9_.]+\Z", words="timm:NAME, of one of timm's networks")]

PATCH = 16  # px: transformers get patches of this side, so that strides are powers of two


def timm_network(name: str, weights: str, cache_dir: Path) -> Any:
    """timm's network, with timm's own weights where these are asked for."""
    timm = _timm()
    if not timm.is_model(name):
        raise UserError(
            f"detector.backbone=timm:{name} is none of timm's networks"
            f"{near(name, timm.list_models()) or ': timm.list_models() gives their names'}"
        )
    if weights in ("torchvision", "generated"):
        packaged = " or package" if name in PACKAGES else ""
        raise UserError(
            f"detector.weights={weights} does not fit detector.backbone=timm:{name}: give detector.weights=timm "
            f"(downloaded once){packaged}, scratch, or the path of a file"
        )
    if weights == "package" and name not in PACKAGES:
        raise UserError(
            f"detector.weights=package: no package ships weights of timm:{name}, only of {', '.join(PACKAGES)}: "
            "give timm (downloaded once), scratch, or the path of a file"
        )
    options: dict[str, Any] = {"num_classes": 0}
    network = timm.create_model(name, **options)
    reductions = {info["reduction"] for info in network.feature_info}
    if len(reductions) == 1 and len(network.feature_info) > 1:
        side = network.pretrained_cfg["input_size"][-1]
        (patch,) = reductions
        options |= {"patch_size": PATCH, "img_size": side // patch * PATCH, "dynamic_img_size": True}
        try:
            network = timm.create_model(name, **options)
        except TypeError as error:
            raise UserError(
                f"detector.backbone=timm:{name} does not take pictures of every size: choose another of timm's networks"
            ) from error
    if weights != "timm":
        return network
    try:
        return timm.create_model(name, pretrained=True, cache_dir=str(cache_dir / "weights"), **options)
    except Exception as error:  # of many kinds: no internet, no such file there, no weights at all
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        packaged = ", or take detector.weights=package" if name in PACKAGES else ""
        raise UserError(
            f"timm's weights of {name} cannot be had ({why}): set detector.weights to a file of them{packaged}"
        ) from error


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise UserError(
            "detector.backbone=timm:NAME needs timm, which is not installed: pip install 'ssodbench[timm]', or leave "
            "detector.backbone null"
        ) from error


@torch.no_grad()
def require_any_size(network: Any, name: str, indices: Sequence[int]) -> None:
    """Refuses a network that takes pictures of one size alone, as some transformers do."""
    try:
        network.eval().forward_intermediates(torch.zeros(1, 3, 64, 96), indices=indices, intermediates_only=True)
    except (AssertionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"detector.backbone=timm:{name} does not take pictures of every size ({why}): choose another of timm's "
            "networks"
        ) from error


def load_timm_weights(network: nn.Module, name: str, weights: str) -> str:
    """Gives the network its weights, if it has not got them; where they come from, in words."""
    if weights == "later":
        return LATER
    if weights == "scratch":
        return f"timm:{name} from scratch, nothing pre-trained"
    version = importlib.metadata.version("timm")
    if weights == "timm":
        tag = network.pretrained_cfg.get("tag")  # type: ignore[union-attr, operator]
        return f"timm:{name}, timm's own weights{f' {tag}' if tag else ''} (timm {version})"
    if weights == "package":
        package = PACKAGES[name]
        state, origin = package.tensors(), f"the package {package.name} ({package.about})"
    else:
        path = Path(weights)
        state, origin = _fitted(network, read_tensors(path, "timm, scratch"), weights), f"the file {path.name}"
    load_backbone(network, state, weights, "of this network")
    return f"timm:{name} from {origin}"


def _fitted(network: nn.Module, tensors: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """Tensors of a file by the network's names, those of a transformer in its patch and picture size."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    state = {re.sub(r"^module\.", "", name): value for name, value in tensors.items()}
    if convert is None:
        return state
    try:
        return dict(convert(state, network))
    except (KeyError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"detector.weights={weights} does not fit the network ({why}): choose a file of this network"
        ) from error
