"""First weights of ResNets: downloaded or from a local file, in the words a record needs. Never a silent fall-back.

Layouts of a local file, told apart by their names: torchvision's (`layer1.0.conv1.weight`; mmdetection's conversion of
the MSRA weights too), detectron2's (`res2.0.conv1.norm.weight`) and caffe2's (`res2_0_branch2a_bn_s`). Names do not say
what pixels a network wants; where the values say that they are not RGB ones, the user is asked.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.models as models
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.core.types import Normalize, UserError

logger = logging.getLogger(__name__)

RGB = Normalize()  # what torchvision's weights want
CAFFE = Normalize(std=(1.0, 1.0, 1.0), bgr=True)  # MSRA's weights: BGR, mean subtraction only

LATER = "none yet, those of a trained detector follow"  # words for `weights: later`

_EPS = 1e-5  # of the batch normalisation, which caffe2's folded statistics must undo


@dataclass(frozen=True)
class FirstWeights:
    """What a ResNet starts from."""

    state: dict[str, Tensor] | None  # by torchvision's names; None: from scratch
    caffe: bool  # BGR input, and stride in the 1x1 convolutions
    words: str  # for records


@dataclass(frozen=True)
class Generated:
    """A backbone's first weights that were made rather than read from a file."""

    state: dict[str, Tensor]
    origin: str  # in words, for records


def first_weights(depth: int, weights: str, caffe: bool | None, cache_dir: Path) -> FirstWeights:
    """Finds the first weights of a ResNet.

    Args:
        depth: 18, 50 or 101.
        weights: `torchvision` (downloaded once into the cache), `scratch`, the path of a file, or `later` for those of
            a whole detector, which will replace them.
        caffe: whether the file wants BGR and has its strides in the 1x1 convolutions; None: yes for caffe2's layout, no
            for the others, unless `raw_pixels` doubts it.
        cache_dir: downloads go to its sub-folder `weights`.

    Raises:
        UserError: there is no such file, its layout is unknown, the download fails, or `caffe` is None and the file
            looks as if it wanted raw pixels.
    """
    if weights == "scratch":
        return FirstWeights(None, bool(caffe), f"ResNet-{depth} from scratch, nothing pre-trained")
    if weights == "later":
        return FirstWeights(None, bool(caffe), LATER)
    if weights == "torchvision":
        if caffe:
            raise UserError("detector.caffe=true does not fit detector.weights=torchvision: those weights want RGB")
        return FirstWeights(
            _download(depth, cache_dir),
            False,
            f"ResNet-{depth}, ImageNet-1k classification (torchvision IMAGENET1K_V1)",
        )
    path = Path(weights)
    state, layout = to_torchvision_names(read_tensors(path), path)
    if caffe is None:
        caffe = layout == "caffe2"
        reason = None if caffe else raw_pixels(state)
        if reason:
            raise UserError(
                f"detector.weights={path} looks like caffe weights (MSRA's), {reason}: set detector.caffe=true (BGR "
                "pixels of 0 to 255, strides in the 1x1 convolutions), or detector.caffe=false if the file wants "
                "normalised RGB"
            )
    return FirstWeights(state, caffe, f"ResNet-{depth} from the file {path.name} ({layout} layout)")


_PLAIN_VARIANCE = 60.0  # geometric mean of 1, of normalised pixels, and 58^2, of pixels of 0 to 255
_SMALL_GAIN = (
    0.03  # an eighth of what a trained first layer makes of normalised pixels, which is 58 times that of raw ones
)


def raw_pixels(state: Mapping[str, Tensor]) -> str | None:
    """Why these weights look as if they wanted raw pixels, as caffe's do; None if they do not.

    Pixels of 0 to 255 have a standard deviation of about 58, normalised ones of 1. The first layer shows which of them
    it was trained on: its running variance divided by the sum of its squared weights is about the variance of the
    pixels, and its scale makes up for their size. MSRA's statistics are folded into that scale: a mean of 0 and one
    variance for all channels is what no trained network has.

    Args:
        state: by torchvision's names.
    """
    names = ("conv1.weight", "bn1.weight", "bn1.running_mean", "bn1.running_var")
    if any(name not in state for name in names):
        return None  # `load_backbone` will say so
    weight, scale, mean, variance = (state[name].double() for name in names)
    norm, scale = weight.flatten(1).norm(dim=1), scale.abs()
    if not bool(mean.any()) and bool((variance == variance[0]).all()) and bool((scale != 1).any()):
        return "since its statistics are folded into scale and shift"
    live = scale > 1e-3 * scale.max()  # some channels die in training
    if float((variance / norm.square().clamp(min=1e-12))[live].median()) > _PLAIN_VARIANCE:
        return "since its first layer saw a variance far above that of normalised pixels"
    if float((scale * norm / variance.clamp(min=_EPS).sqrt())[live].median()) < _SMALL_GAIN:
        return "since its first layer scales pixels down as raw ones need it"
    return None


def load_backbone(
    backbone: nn.Module, state: Mapping[str, Tensor], weights: str, kind: str = "of the same depth"
) -> None:
    """Copies weights into a backbone of the same names; `kind` says what file fits, for messages.

    Raises:
        UserError: something is missing or has another shape.
    """
    own = backbone.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in state]
    if missing:
        raise UserError(
            f"detector.weights={weights} lacks {missing[0]} and {len(missing) - 1} more of {len(needed)} tensors: "
            f"choose a file {kind}"
        )
    for name in needed:
        if own[name].shape != state[name].shape:
            raise UserError(
                f"detector.weights={weights}: {name} has the shape {tuple(state[name].shape)} instead of "
                f"{tuple(own[name].shape)}: choose a file {kind}"
            )
        own[name].copy_(state[name])


def _download(depth: int, cache_dir: Path) -> dict[str, Tensor]:
    url = getattr(models, f"ResNet{depth}_Weights").IMAGENET1K_V1.url
    folder = Path(cache_dir) / "weights"
    try:
        _remove_damaged(folder / url.rpartition("/")[2])
        return torch.hub.load_state_dict_from_url(
            url, model_dir=str(folder), progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the weights {url} cannot be downloaded ({error}): put that file into {folder}, or set detector.weights "
            "to a local file, or to scratch with detector.norm=group"
        ) from error


def _remove_damaged(path: Path) -> None:
    """Removes a download, to be made again, whose sha256 does not begin as its name says (`resnet50-0676ba61.pth`).

    The download itself compares them, but what lies in the cache is loaded as it is.
    """
    expected = path.stem.rpartition("-")[2]
    if not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        logger.warning("the weights %s are damaged (checksum) and are downloaded again", path)
        path.unlink(missing_ok=True)


_HARMLESS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain containers, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)


def read_tensors(path: Path, others: str = "torchvision, scratch") -> dict[str, Any]:
    """The tensors of a .pkl, .pth, .pt or .safetensors file by name, out of whatever dictionary they lie in.

    Args:
        path: of the file.
        others: what `detector.weights` may be besides, for messages.

    Raises:
        UserError: there is no file, or it holds no tensors.
    """
    if not path.is_file():
        raise UserError(f"detector.weights={path} is no file: give {others}, or the path of a file")
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                state = _Unpickler(file, encoding="latin1").load()
        elif path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"detector.weights={path} cannot be read: {error}") from error
    for wrapper in ("model", "state_dict", "blobs"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise UserError(f"detector.weights={path} holds no dictionary of tensors: choose another file")
    return {str(name): value for name, value in state.items()}


def to_torchvision_names(tensors: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], str]:
    """Renames tensors of any known layout.

    Returns:
        The backbone's tensors by torchvision's names, and the layout: torchvision, detectron2 or caffe2.

    Raises:
        UserError: an unknown layout.
    """
    names = [re.sub(r"^(module\.)?(backbone\.)?(bottom_up\.|body\.)?", "", name) for name in tensors]
    values = list(tensors.values())
    if any(re.match(r"res2_0_branch", name) for name in names):
        layout, rename = "caffe2", _from_caffe2
    elif any(name.startswith("res2.0.") for name in names):
        layout, rename = "detectron2", _from_detectron2
    elif any(name.startswith("layer1.0.") for name in names):
        layout, rename = "torchvision", _from_torchvision
    else:
        raise UserError(
            f"detector.weights={path} has neither torchvision's, detectron2's nor caffe2's names: choose another file"
        )
    state = {}
    for name, value in zip(names, values, strict=True):
        new = rename(name)
        if new is not None:
            state[new] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    _complete_folded_norms(state)
    return state, layout


def _complete_folded_norms(state: dict[str, Tensor]) -> None:
    """Batch normalisation that was folded into scale and bias: statistics that change nothing."""
    for name in [name for name in state if re.search(r"(bn\d|downsample\.1)\.weight$", name)]:
        stem = name.removesuffix("weight")
        state.setdefault(stem + "running_mean", torch.zeros_like(state[name]))
        state.setdefault(stem + "running_var", torch.ones_like(state[name]) - _EPS)


def _from_torchvision(name: str) -> str | None:
    return name if re.match(r"(conv1|bn1|layer\d)\.", name) else None


def _from_detectron2(name: str) -> str | None:
    name = re.sub(r"^stem\.", "", name)
    name = re.sub(r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", name)
    name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return _from_torchvision(re.sub(r"conv(\d)\.norm\.", r"bn\1.", name))


_CAFFE2_KINDS = {"w": "weight", "bn_s": "weight", "bn_b": "bias", "bn_rm": "running_mean", "bn_riv": "running_var"}


def _from_caffe2(name: str) -> str | None:
    stem = re.fullmatch(r"(?:res_)?conv1_(w|bn_s|bn_b|bn_rm|bn_riv)", name)
    if stem:
        return f"{'conv1' if stem[1] == 'w' else 'bn1'}.{_CAFFE2_KINDS[stem[1]]}"
    block = re.fullmatch(r"res(\d)_(\d+)_branch(1|2a|2b|2c)_(w|bn_s|bn_b|bn_rm|bn_riv)", name)
    if not block:
        return None
    level, index, branch, kind = block.groups()
    if branch == "1":
        part = "downsample.0" if kind == "w" else "downsample.1"
    else:
        part = ("conv" if kind == "w" else "bn") + str("abc".index(branch[1]) + 1)
    return f"layer{int(level) - 1}.{index}.{part}.{_CAFFE2_KINDS[kind]}"
