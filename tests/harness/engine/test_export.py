"""Exported files against the networks that they hold, on photographs, with torch and onnxruntime as readers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from harness.cli import main
from harness.config import compose
from harness.core.draws import image_keys
from harness.core.types import UserError
from harness.engine import build, export, trained

pytestmark = pytest.mark.timeout(240)
DOCS = Path(__file__).parents[3] / "docs" / "after_training.md"
PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"  # 512x600, a photograph


@pytest.fixture(scope="module")
def network(pets_run: Path, tmp_path_factory: pytest.TempPathFactory) -> trained.Trained:
    found = trained.of_run(pets_run, None, str(tmp_path_factory.mktemp("cache")))
    found.detector.eval()
    return found


def crops(count: int, canvas: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of a photograph at sizes of every kind, on the canvas."""
    rng, photo = np.random.default_rng(0), Image.open(PHOTO)
    found = []
    for _ in range(count):
        left, top = rng.integers(0, 250), rng.integers(0, 300)
        height, width = rng.integers(24, canvas[0] + 1), rng.integers(24, canvas[1] + 1)
        part = photo.crop((left, top, left + rng.integers(60, 250), top + rng.integers(60, 250)))
        pixels = np.asarray(part.resize((width, height)), np.float32)
        image = torch.zeros(3, *canvas)
        image[:, :height, :width] = torch.from_numpy(pixels).permute(2, 0, 1)
        found.append((image, torch.tensor([height, width])))
    return found


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_an_exported_file_predicts_what_its_run_does(kind: str, pets_run: Path, tmp_path: Path) -> None:
    file = tmp_path / f"net.{kind}"
    assert main(["export", f"run_dir={pets_run}", f"out={file}"]) == 0
    images = f"images={pets_run.parent / 'val'}"
    same = ["predict.score=0.02", "pipeline=torchvision", "pipeline.threads=0", "device=cpu", images]
    assert main(["predict", f"run_dir={pets_run}", f"out={tmp_path / 'run'}", *same]) == 0
    assert main(["predict", f"model={file}", f"out={tmp_path / 'file'}", *same]) == 0
    ours, theirs = ((tmp_path / name / "predictions.json").read_bytes() for name in ("run", "file"))
    assert ours == theirs
    assert len(json.loads(ours)) > 10


def test_a_file_says_what_it_holds(pets_run: Path, tmp_path: Path) -> None:
    assert main(["export", f"run_dir={pets_run}", "network=student", f"out={tmp_path / 'a.safetensors'}"]) == 0
    assert main(["export", f"run_dir={pets_run}", "network=student", f"out={tmp_path / 'b.bin'}", "format=pt"]) == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        about = json.loads(opened.metadata()["ssodbench"])
        names = set(opened.keys())
    content = torch.load(tmp_path / "b.bin", weights_only=True)
    assert content["ssodbench"] == about
    assert set(content["weights"]) == names
    assert (about["classes"], about["category_ids"], about["network"]) == (["cat", "dog"], [3, 8], "student")
    checkpoint = torch.load(next((pets_run / "checkpoints").glob("*.pt")), weights_only=True)
    for name, value in content["weights"].items():
        assert torch.equal(value, checkpoint["method"][f"student.{name}"])
    with pytest.raises(UserError, match=r"network=teacher, but .* holds the student"):
        trained.open_trained(compose.load([f"model={tmp_path / 'a.safetensors'}", "network=teacher"]))


def reader(content: bytes, kind: str, folder: Path) -> Callable[..., Any]:
    """Another program that runs a graph."""
    path = folder / f"net.{kind}"
    path.write_bytes(content)
    if kind == "pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["ssodbench"])["classes"] == ["cat", "dog"]
    return lambda image, size: session.run(None, {"image": image.numpy(), "size": size.numpy()})


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_graph_gives_the_boxes_of_the_network(kind: str, network: trained.Trained, tmp_path: Path) -> None:
    made = export.export(network, kind, score=0.02)
    assert made.program is not None
    assert made.program.canvas == [224, 224]  # 216 px is the longest side
    eager = export.ExportedGraph(network.detector, 0.02)
    run = reader(made.content, kind, tmp_path)
    images = crops(12, (224, 224))
    found = [export.output_differences(eager(*image), run(*image)) for image in images]
    assert max(box for box, _ in found) < 1e-3  # px
    assert max(score for _, score in found) < 1e-5
    assert max(int((eager(*image)[2] > 0).sum()) for image in images) > 5
    sure = reader(export.export(network, kind, score=0.999).content, kind, tmp_path)
    assert not any(np.asarray(part).any() for part in sure(*images[0]))  # nothing is found, and nothing fails


def test_a_graph_sees_what_the_pipeline_shows(network: trained.Trained, pets_run: Path) -> None:
    """The graph's own normalisation and padding, against those of a pipeline on the same pixels."""
    cfg = compose.load(["pipeline=torchvision", "pipeline.threads=0", "device=cpu"])
    from harness.core.distributed import World
    from harness.engine import predict

    source, _ = predict.source_of(predict.find_pictures(str(pets_run.parent / "val")), 1, predict.Found())
    feed = network.pipeline(cfg, World(0, 1, torch.device("cpu")))
    view = feed.render(source, "test", np.arange(1), image_keys(0, 0, source.ids[:1]))  # type: ignore[attr-defined]
    height, width = view.sizes[0].tolist()
    canvas = [int(side) for side in view.images.shape[-2:]]
    mean, std = (
        torch.tensor(part)[:, None, None] for part in (network.detector.normalize.mean, network.detector.normalize.std)
    )
    image = torch.full((3, *canvas), 77.0)  # what lies beyond the picture is not looked at
    image[:, :height, :width] = (view.images[0] * std + mean)[:, :height, :width]
    boxes, labels, scores = export.ExportedGraph(network.detector, 0.02)(image, view.sizes[0])
    (expected,) = network.detector.detect(view, 0.02)
    count = len(expected)
    assert count > 0
    assert torch.allclose(boxes[:count], expected.boxes, atol=1e-3)
    assert torch.equal(labels[:count], expected.labels)
    assert torch.allclose(scores[:count], expected.scores, atol=1e-5)
    assert not scores[count:].any()


@pytest.mark.parametrize("name", ["faster_rcnn_r18", "retinanet_r18", "fcos_r18", "small_consistent_retina"])
def test_every_detector_becomes_a_graph(name: str) -> None:
    cfg = compose.load([f"detector={name}", "detector.weights=scratch"])
    torch.manual_seed(0)
    detector = build.detector(cfg.detector, Path(cfg.cache_dir), 3).eval()
    about = export.Program(canvas=[128, 160], short=128, max=160, score=0.001)
    graph = export.capture(detector, about).module()
    eager = export.ExportedGraph(detector, 0.001)
    for image in crops(2, (128, 160)):
        assert export.output_differences(eager(*image), graph(*image))[0] < 1e-2


def test_the_lines_in_the_docs_run_without_this_program(network: trained.Trained, tmp_path: Path) -> None:
    (tmp_path / "detector.pt2").write_bytes(export.export(network, "pt2", score=0.01).content)
    Image.open(PHOTO).save(tmp_path / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    code = code.replace("score > 0.5", "score > 0.01")
    guard = "import sys\nfor name in ('harness', 'detectors', 'pipelines'): sys.modules[name] = None\n"
    (tmp_path / "lines.py").write_text(guard + code)
    ran = subprocess.run([sys.executable, "lines.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^(cat|dog) 0\.\d+ \[", ran.stdout), ran.stdout


def test_an_exported_file_scores_what_its_run_does(pets_run: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "net.safetensors", ["data=custom", f"data.root={pets_run.parent}", "device=cpu"]
    assert main(["export", f"run_dir={pets_run}", f"out={file}"]) == 0
    same = ["pipeline=torchvision", "pipeline.threads=0", "evaluation.score_threshold=0.02", *data]
    assert main(["evaluate", f"model={file}", f"out={tmp_path / 'scores.json'}", *same]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["networks"]
    record = json.loads((pets_run / "record.json").read_text())
    assert list(scores) == ["teacher"]
    assert scores["teacher"] == record["scores"]["teacher"]
