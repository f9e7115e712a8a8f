from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from detectors import weights
from detectors.backbones import ResNetBackbone, SmallBackbone, build_resnet
from detectors.faster_rcnn import faster_rcnn, small_faster_rcnn
from harness.core.types import Normalize, UserError


def random_resnet(depth: int = 18) -> nn.Module:
    torch.manual_seed(0)
    network = resnet50() if depth == 50 else resnet18()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def detectron2_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] in ("conv1", "bn1"):
        return "stem.conv1." + ("norm." if parts[0] == "bn1" else "") + parts[1]
    stage = f"res{int(parts[0][5]) + 1}.{parts[1]}"
    if parts[2] == "downsample":
        return f"{stage}.shortcut." + ("norm." if parts[3] == "1" else "") + parts[4]
    return f"{stage}.conv{parts[2][-1]}." + ("norm." if parts[2].startswith("bn") else "") + parts[3]


def caffe2_name(name: str) -> str | None:
    parts = name.split(".")
    kind = {"weight": "bn_s", "bias": "bn_b"}.get(parts[-1])
    if parts[0] == "conv1":
        return "conv1_w"
    if parts[0] == "bn1":
        return kind and f"res_conv1_{kind}"
    stage = f"res{int(parts[0][5]) + 1}_{parts[1]}"
    if parts[2] == "downsample":
        return f"{stage}_branch1_w" if parts[3] == "0" else kind and f"{stage}_branch1_{kind}"
    branch = "abc"[int(parts[2][-1]) - 1]
    if parts[2].startswith("conv"):
        return f"{stage}_branch2{branch}_w"
    return kind and f"{stage}_branch2{branch}_{kind}"


def body_state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.") and "num_batches" not in k}


def write(layout: str, network: nn.Module, folder: Path) -> Path:
    state = body_state(network)
    if layout == "torchvision":
        torch.save(network.state_dict(), folder / "weights.pth")
        return folder / "weights.pth"
    if layout == "mmdetection":
        torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, folder / "weights.pth")
        return folder / "weights.pth"
    if layout == "detectron2":
        arrays = {detectron2_name(k): v.numpy() for k, v in state.items()}
        content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    else:
        named = {caffe2_name(k): v.numpy() for k, v in state.items()}
        content = {"blobs": {k: v for k, v in named.items() if k}}
        content["blobs"]["fc1000_b"] = state["bn1.bias"].numpy()
    path = folder / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


@pytest.mark.parametrize("layout", ["torchvision", "mmdetection", "detectron2", "caffe2"])
def test_layouts(layout, tmp_path):
    """Each layout gives the features of the network it was written from."""
    depth = 50 if layout == "caffe2" else 18  # bottlenecks have the strides that differ
    source = random_resnet(depth).eval()
    if layout == "caffe2":  # its batch normalisation is folded into a scale and a shift
        for module in source.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.running_mean)
                nn.init.constant_(module.running_var, 1 - 1e-5)
    path = write(layout, source, tmp_path)
    body, normalize, words = build_resnet(depth, str(path), None, None, None, tmp_path)
    caffe = layout == "caffe2"
    assert normalize == (Normalize(std=(1.0, 1.0, 1.0), bgr=True) if caffe else Normalize())
    if caffe:
        assert body.layer2[0].conv1.stride == (2, 2)
    assert path.name in words
    if caffe:
        for layer in (source.layer2, source.layer3, source.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = source.maxpool(source.relu(source.bn1(source.conv1(images))))
        for layer, found in zip(("layer1", "layer2", "layer3", "layer4"), body(images), strict=True):
            x = getattr(source, layer)(x)
            torch.testing.assert_close(found, x, atol=1e-4 * float(x.abs().max()), rtol=1e-3)


def test_caffe_can_be_said(tmp_path):
    path = write("mmdetection", random_resnet(50), tmp_path)
    body, normalize, _ = build_resnet(50, str(path), None, None, True, tmp_path)
    assert normalize.bgr
    assert body.layer2[0].conv1.stride == (2, 2)


def trained_on(pixels: float, folded: bool) -> nn.Module:
    """A ResNet-18 whose first layer has the statistics and scales of one trained on pixels of that deviation."""
    network = random_resnet()
    generator = torch.Generator().manual_seed(3)
    weight = network.conv1.weight.data.normal_(0, 0.1, generator=generator)
    response = torch.exp(torch.randn(64, generator=generator)) * pixels**2  # eigenvalues of image patches, spread
    variance = weight.flatten(1).square().sum(1) * response
    scale = 0.25 * torch.exp(0.3 * torch.randn(64, generator=generator))
    scale[:10] = 1e-8  # dead channels, as trained networks have them
    mean = torch.randn(64, generator=generator) * variance.sqrt() * 0.1
    network.bn1.weight.data, network.bn1.running_mean, network.bn1.running_var = scale, mean, variance
    if folded:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data = module.weight / (module.running_var + 1e-5).sqrt()
                module.bias.data = module.bias - module.running_mean * module.weight
                module.running_mean.zero_()
                module.running_var.fill_(1.0)
    return network


@pytest.mark.parametrize("layout", ["torchvision", "mmdetection", "detectron2"])
@pytest.mark.parametrize("folded", [False, True])
def test_weights_for_raw_pixels_are_never_taken_for_rgb(layout, folded, tmp_path):
    path = write(layout, trained_on(58.0, folded), tmp_path)
    with pytest.raises(UserError, match=r"looks like caffe weights.*detector\.caffe=true.*detector\.caffe=false"):
        build_resnet(18, str(path), None, None, None, tmp_path)
    for caffe in (False, True):
        assert build_resnet(18, str(path), None, None, caffe, tmp_path)[1].bgr == caffe


@pytest.mark.parametrize("pixels", [0.25, 1.0])
def test_weights_for_normalised_pixels_are_taken_as_they_are(pixels, tmp_path):
    """Of unit deviation, or of 0 to 1."""
    path = write("torchvision", trained_on(pixels, folded=False), tmp_path)
    assert build_resnet(18, str(path), None, None, None, tmp_path)[1] == Normalize()


@pytest.mark.parametrize(
    ("name", "shrink", "reason"),
    [("conv1.weight", 58.0, "variance"), ("bn1.weight", 58.0, "scales pixels down")],
)
def test_each_sign_of_raw_pixels_is_enough(name, shrink, reason):
    state = {k: v.clone() for k, v in trained_on(1.0, folded=False).state_dict().items()}
    assert weights.raw_pixels(state) is None
    state[name] /= shrink
    assert reason in (weights.raw_pixels(state) or "")


def test_untrained_weights_are_no_caffe_weights():
    assert weights.raw_pixels(resnet50().state_dict()) is None
    assert weights.raw_pixels({}) is None


def test_frozen_stages(tmp_path):
    path = write("torchvision", random_resnet(), tmp_path)
    body, _, _ = build_resnet(18, str(path), None, None, None, tmp_path)
    trained = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert not any("bn" in name for name, _ in body.named_parameters())  # all BatchNorm is frozen
    nothing, _, _ = build_resnet(18, str(path), "batch", 0, None, tmp_path)
    assert all(p.requires_grad for p in nothing.parameters())


def test_from_scratch_has_group_norm_everywhere():
    detector = faster_rcnn(num_classes=3, name="x", cache_dir=".", depth=18, weights="scratch")
    assert any(isinstance(m, nn.GroupNorm) for m in detector.backbone.fpn.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in detector.modules())
    assert all(p.requires_grad for p in detector.parameters())
    assert "scratch" in detector.pretraining


def test_a_download_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"cannot be downloaded.*no route to host.*local file") as caught:
        faster_rcnn(num_classes=3, name="x", cache_dir=tmp_path, depth=18)
    assert "\n" not in str(caught.value)


def test_a_download_lands_in_the_cache(tmp_path, monkeypatch):
    seen = {}

    def load(url: str, model_dir: str, **options: object) -> dict[str, torch.Tensor]:
        seen.update(url=url, folder=model_dir, check=options["check_hash"])
        return resnet18().state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    _, normalize, words = build_resnet(18, "torchvision", None, None, None, tmp_path)
    assert seen["folder"] == str(tmp_path / "weights")
    assert seen["check"] is True
    assert normalize == Normalize()
    assert "ImageNet" in words


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "is no file"),
        (lambda p: p.write_bytes(b"nonsense"), "cannot be read"),
        (lambda p: p.write_bytes(pickle.dumps({"model": Bomb()})), "cannot be read"),
        (lambda p: p.write_bytes(pickle.dumps([1, 2])), "no dictionary"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "neither"),
    ],
)
def test_files_that_do_not_work(tmp_path, make, words):
    path = tmp_path / "weights.pkl"
    make(path)
    with pytest.raises(UserError, match=words):
        build_resnet(18, str(path), None, None, None, tmp_path)


def test_a_file_of_another_depth(tmp_path):
    path = write("torchvision", random_resnet(), tmp_path)
    with pytest.raises(UserError, match="depth"):
        build_resnet(50, str(path), None, None, None, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 34}, "depth"),
        ({"norm": "layer"}, "norm"),
        ({"weights": "scratch", "norm": "frozen"}, "frozen"),
        ({"weights": "scratch", "norm": "frozen_statistics"}, "frozen_statistics"),
        ({"weights": "scratch", "pyramid_channels": 48}, "pyramid_channels"),
        ({"weights": "scratch", "frozen_stages": 2}, "frozen_stages"),
        ({"norm": "group"}, "norm"),
        ({"caffe": True}, "caffe"),
        ({"weights": "scratch", "anchor_sizes": (1, 2)}, "anchor_sizes"),
        ({"weights": "scratch", "style": "yolo"}, "style"),
        ({"weights": "scratch", "roi": {"batches": 1}}, "batches"),
    ],
)
def test_combinations_that_do_not_work(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        faster_rcnn(num_classes=3, name="x", cache_dir=tmp_path, **options)


def test_small_detector_takes_its_generated_weights(tmp_path):
    torch.manual_seed(5)
    state = SmallBackbone((8, 8, 16, 16)).state_dict()
    made = weights.Generated(state, "generated patches")
    detector = small_faster_rcnn(
        num_classes=3, name="small", cache_dir=tmp_path, generated=made, channels=(8, 8, 16, 16), pyramid_channels=16
    )
    assert all(torch.equal(v, detector.backbone.body.state_dict()[k]) for k, v in state.items())
    assert "generated" in detector.pretraining
    torch.save(state, tmp_path / "own.pt")
    other = small_faster_rcnn(
        num_classes=3, name="small", cache_dir=tmp_path, weights=str(tmp_path / "own.pt"),
        channels=(8, 8, 16, 16), pyramid_channels=16,
    )  # fmt: skip
    assert torch.equal(other.backbone.body.stem[0].weight, state["stem.0.weight"])
    with pytest.raises(UserError, match="is no file"):
        small_faster_rcnn(num_classes=3, name="small", cache_dir=tmp_path, weights="missing.pt")


def test_caffe_statistics_are_declared():
    assert weights.CAFFE.bgr
    assert weights.CAFFE.std == (1.0, 1.0, 1.0)
    assert isinstance(ResNetBackbone(18, "group", 0), nn.Module)


def test_a_damaged_download_is_named_and_made_again(tmp_path, monkeypatch, caplog):
    content = b"weights" * 100
    path = tmp_path / "weights" / f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.parent.mkdir()
    known = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=f"https://example.org/{path.name}"))
    monkeypatch.setattr(weights, "models", SimpleNamespace(ResNet18_Weights=known))
    there = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: there.append(path.exists()) or {})
    path.write_bytes(content)
    weights._download(18, tmp_path)
    path.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    weights._download(18, tmp_path)
    assert there == [True, False]
    assert f"{path} are damaged" in caplog.text
