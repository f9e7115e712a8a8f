"""timm's networks as backbones, by name. What has maps at several strides goes below the usual pyramid, a vision
transformer, which has one, below ViTDet's simple pyramid."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detectors.backbones import Body, Pyramid
from detectors.folding import FoldedConv, folded, is_thin
from detectors.simple_pyramid import SimplePyramid
from detectors.timm_networks import PATCH, load_timm_weights, require_any_size, timm_network
from harness.core.types import Normalize, UserError

_NORMS = ("frozen", "frozen_statistics", "batch")


class TimmBackbone(Body):
    """One of timm's networks without its classifier and without what lies behind the coarsest map that is asked for.

    Args:
        network: from timm, with its weights.
        indices: of the maps, in timm's order.
        strides: of these maps, px.
        channels: of these maps.
        norm: what BatchNorm does: `frozen` (constant), `frozen_statistics` (scale and shift trained) or `batch`.
        frozen: names of the modules that are not trained, from the image on.
        transformer: it has one map, behind its last block.
    """

    def __init__(
        self,
        network: nn.Module,
        indices: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        norm: str | None,
        frozen: Sequence[str],
        transformer: bool = False,
    ) -> None:
        super().__init__()
        self.indices, self.strides, self.out_channels = list(indices), tuple(strides), list(channels)
        self.transformer = transformer
        self.network = folded(_frozen_norms(network)) if norm == "frozen" else network
        inside = {module.conv for module in self.network.modules() if isinstance(module, FoldedConv)}
        self.thin = any(is_thin(module) and module not in inside for module in self.network.modules())
        self.fixed = [module for module in self.network.modules() if _is_batch_norm(module)]
        if norm == "frozen_statistics":
            for module in self.fixed:
                module.no_weight_decay = True  # type: ignore[assignment]  # see `harness.engine.optim`
        elif norm != "frozen":
            self.fixed = []
        present = dict(self.network.named_modules())
        self.frozen = [present[name] for name in frozen if name in present]  # what was pruned or folded is not
        for module in self.frozen:
            module.requires_grad_(False)
        if transformer and frozen:  # parameters that lie in no module of their own
            for _, parameter in self.network.named_parameters(recurse=False):
                parameter.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> TimmBackbone:
        """Sets the mode of what is trained; frozen stages and frozen statistics stay as they are in either."""
        super().train(mode)
        for module in (*self.frozen, *self.fixed):
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to maps, finest first, of ceil(H / stride) rows.

        On a CPU convolutions with one channel per group stay float32 under autocast, as bfloat16 makes them slower:
        those that are folded each by itself, and the whole network where others have them.
        """
        with torch.autocast(
            images.device.type,
            enabled=torch.is_autocast_enabled(images.device.type) and not (self.thin and images.device.type == "cpu"),
        ):
            return self._maps(images)

    def _maps(self, images: Tensor) -> list[Tensor]:
        if self.transformer:
            height, width = images.shape[-2:]
            images = F.pad(images, (0, -width % PATCH, 0, -height % PATCH))
        return self.network.forward_intermediates(  # type: ignore[operator]
            images, indices=self.indices, norm=self.transformer, output_fmt="NCHW", intermediates_only=True
        )


def timm_pyramid(
    backbone: str,
    *,
    weights: str,
    norm: str | None,
    usual_norm: str,
    frozen_stages: int | None,
    cache_dir: str | Path,
    strides: Sequence[int],
    channels: int,
    after: Callable[[int], nn.Module] | None = None,
    extra: Callable[[], ExtraFPNBlock] | None = None,
) -> tuple[Pyramid | SimplePyramid, Normalize, str]:
    """One of timm's networks with a pyramid, what it wants of pixels, and where its weights come from.

    Args:
        backbone: `timm:NAME`.
        weights: `timm` (its own, downloaded once), `package` (see `PACKAGES`), `scratch`, `later`, or a file's path.
        norm: what BatchNorm does; None: `batch` from scratch, `usual_norm` otherwise.
        usual_norm: of pre-trained networks that have BatchNorm.
        frozen_stages: k freezes what leads to the map of stride 2^k; of a transformer 1 freezes the embedding of
            patches, and each more a quarter of the blocks. None: 2, but 0 from scratch.
        cache_dir: downloads go to its sub-folder `weights`.
        strides: of the backbone's maps that the pyramid takes.
        channels: of every level.
        after: normalisation after the pyramid's convolutions; ViTDet's has its own.
        extra: makes the block that adds coarser levels, or None.

    Raises:
        UserError: timm is not installed or has no such network; it has no maps of these strides; the weights cannot be
            had or do not fit; or `norm` or `frozen_stages` do not.
    """
    name = backbone.removeprefix("timm:")
    network = timm_network(name, weights, Path(cache_dir))
    levels = [(int(info["reduction"]), int(info["num_chs"])) for info in network.feature_info]
    transformer = len(levels) > 1 and levels[0][0] == levels[-1][0]
    indices = [len(levels) - 1] if transformer else _levels(name, [stride for stride, _ in levels], strides)
    frozen = _frozen_modules(network, weights, frozen_stages, transformer)
    norm = _norm(network, name, weights, norm, usual_norm)
    network.prune_intermediate_layers(indices, prune_norm=not transformer, prune_head=True)
    words = load_timm_weights(network, name, weights)
    own = network.pretrained_cfg
    normalize = Normalize(
        tuple(255.0 * value for value in own["mean"]),
        tuple(255.0 * value for value in own["std"]),
    )
    require_any_size(network, name, indices)
    kept = [levels[i] for i in indices]
    body = TimmBackbone(
        network,
        indices,
        [stride for stride, _ in kept],
        [width for _, width in kept],
        norm,
        frozen,
        transformer,
    )
    block = extra() if extra is not None else None
    if transformer:
        return SimplePyramid(body, channels, strides, block), normalize, words
    return Pyramid(body, channels, norm=after, extra=block), normalize, words


def _levels(name: str, given: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The places of the maps that a pyramid needs."""
    if any(stride not in given for stride in wanted):
        raise UserError(
            f"detector.backbone=timm:{name} has maps at strides {', '.join(map(str, given))}, and this detector's "
            f"pyramid needs {', '.join(map(str, wanted))}: choose another of timm's networks"
        )
    return [list(given).index(stride) for stride in wanted]


def _frozen_modules(network: Any, weights: str, stages: int | None, transformer: bool) -> list[str]:
    """Names of the modules that are not trained, in the order in which an image passes them."""
    scratch = weights == "scratch"
    if scratch and stages:
        raise UserError("detector.frozen_stages must be 0 with detector.weights=scratch: nothing is learnt there yet")
    stages = (0 if scratch else 2) if stages is None else stages
    if not stages:
        return []
    if transformer:
        blocks = len(network.feature_info) * (stages - 1) // 4
        end = network.feature_info[blocks - 1]["module"] if blocks else None
        first = next(iter(network.feature_info))["module"].rpartition(".")[0]
        before = [name for name, _ in network.named_children()]
        names = before[: before.index(first)] + [f"{first}.{i}" for i in range(blocks)]
        return [*names, "norm"] if end and blocks == len(network.feature_info) else names
    ends = [info["module"] for info in network.feature_info if info["reduction"] <= 2**stages]
    if not ends:
        return []
    names = [name for name, module in network.named_modules() if name]
    last = names.index(ends[-1])
    inside = [name for name in names if name.startswith(f"{ends[-1]}.")]
    passed = names[: last + 1 + len(inside)]
    # A module that goes on behind the end is left out; what lies in it is named by itself.
    return [name for name in passed if not any(n.startswith(f"{name}.") for n in names[len(passed) :])]


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _frozen_norms(network: nn.Module) -> nn.Module:
    return importlib.import_module("timm.layers").freeze_batch_norm_2d(network)


def _norm(network: nn.Module, name: str, weights: str, norm: str | None, usual: str) -> str | None:
    has_any = any(_is_batch_norm(module) for module in network.modules())
    if norm is None:
        return None if not has_any else "batch" if weights == "scratch" else usual
    if not has_any:
        raise UserError(f"detector.norm={norm}: timm:{name} has no BatchNorm, leave detector.norm null")
    if norm not in _NORMS:
        raise UserError(
            f"detector.norm={norm} does not fit timm:{name}, which has BatchNorm: choose one of {', '.join(_NORMS)}"
        )
    if weights == "scratch" and norm != "batch":
        raise UserError(
            f"detector.norm={norm} needs pre-trained weights: take detector.norm=batch with weights=scratch"
        )
    return norm
