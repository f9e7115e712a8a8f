"""What others add from outside of this repository, each as one file and one YAML: everything finds it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from harness.cli import main

pytestmark = pytest.mark.timeout(200)

SMALL = [
    "data.train_images=40", "data.val_images=12", "schedule=smoke", "split.percent=20", "batch.labeled=4",
    "batch.unlabeled=4", "device=cpu", "logging.loggers=[]", "evaluation.every=null",
]  # fmt: skip
TINY = ["detector.weights=scratch", "detector.channels=[8,8,16,16]", "detector.pyramid_channels=16"]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Adds a module and the YAML of a group that names it; gives the folder for --config-dir."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def added(module: str, code: str, group: str, yaml: str) -> Path:
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(code)
        (tmp_path / "conf" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / group / f"{module}.yaml").write_text(yaml)
        return tmp_path / "conf"

    return added


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def train(conf: Path, cache: Path, run_dir: Path, *overrides: str) -> dict:
    place = [f"cache_dir={cache}", f"run_dir={run_dir}"]
    assert main(["train", "--config-dir", str(conf), *SMALL, *place, *overrides]) == 0
    return json.loads((run_dir / "record.json").read_text())


def test_a_method_that_mixes_images_of_a_batch(add, cache: Path, tmp_path: Path) -> None:
    """Its file and its YAML; no pipeline, loop or report knows of it."""
    conf = add(
        "own_mix",
        """
from detectors.detector import targets_of
from detectors.methods.mean_teacher import MeanTeacher


class Mix(MeanTeacher):
    def unlabeled_losses(self, features, strong, weak, keys):
        pseudo = self.label(weak, strong)
        self.labels = {"classification": pseudo}
        mixed = (strong.images + strong.images.roll(1, 0)) / 2
        terms = self.student.losses(self.student.features(mixed), strong, pseudo, keys)
        return terms, {"pseudo_boxes": pseudo.valid.sum(1).float().mean()}
""",
        "method",
        "_target_: own_mix.Mix\nname: own_mix\naugment: small\nburn_in: 2\nscore: 0.05\nema: {momentum: 0.9}\n",
    )
    record = train(conf, cache, tmp_path / "run", "method=own_mix", *TINY)
    assert (record["method"], record["status"], list(record["scores"])) == ("own_mix", "ok", ["student", "teacher"])
    assert record["images_unlabeled"] == 4 * 4


@pytest.mark.parametrize("method", ["stac", "mean_teacher"])
def test_a_detector_with_a_slower_backbone(add, cache: Path, tmp_path: Path, method: str) -> None:
    """Its file, its YAML; methods train it unchanged, at a tenth of the rate in its backbone."""
    conf = add(
        "own_detector",
        """
from detectors.faster_rcnn import FasterRcnn, small_faster_rcnn


def slow(num_classes: int, name: str) -> FasterRcnn:
    made = small_faster_rcnn(
        num_classes=num_classes, name=name, cache_dir="", weights="scratch", channels=[8, 8, 8, 8], pyramid_channels=8
    )
    made.backbone_lr_scale = 0.1
    return made
""",
        "detector",
        "_target_: own_detector.slow\nname: own_detector\n",
    )
    own = ["method.offline.drop_empty=false"] if method == "stac" else []
    record = train(conf, cache, tmp_path / "run", "detector=own_detector", f"method={method}", *own)
    assert (record["status"], record["detector"]) == ("ok", "own_detector")


def test_an_annotation_format(add, cache: Path, tmp_path: Path) -> None:
    """One reader and one YAML: here the generated dataset under another name, as a function that gives a `Dataset`."""
    conf = add(
        "own_format",
        """
from pathlib import Path

from harness.data.datasets import Dataset
from harness.data.shapes import shapes_dataset


def read(name: str, cache_dir: Path, train_images: int, val_images: int) -> Dataset:
    return shapes_dataset(name, cache_dir, train_images=train_images, val_images=val_images)
""",
        "data",
        "_target_: own_format.read\nname: own_format\ntrain_images: 40\nval_images: 12\n"
        "small: {short_side: 64, max_side: 64, anchor_sizes: [12, 18, 28]}\n",
    )
    record = train(conf, cache, tmp_path / "run", "data=own_format", "method=supervised", *TINY)
    assert (record["status"], record["dataset"]) == ("ok", "own_format")


def test_a_pipeline_backend_that_profile_finds(add, cache: Path, tmp_path: Path) -> None:
    conf = add(
        "own_pipeline",
        "from pipelines.torchvision import TorchvisionPipeline\n\n\nclass Own(TorchvisionPipeline):\n    pass\n",
        "pipeline",
        "_target_: own_pipeline.Own\nname: own_pipeline\nthreads: 0\nprefetch: 2\non_bad_image: skip\n",
    )
    record = train(conf, cache, tmp_path / "run", "pipeline=own_pipeline", "method=supervised", *TINY)
    assert (record["status"], record["pipeline"]) == ("ok", "own_pipeline")
    out = tmp_path / "profile.json"
    options = ["profile.pipelines=[own_pipeline]", "profile.seconds=0.2", "profile.rounds=1", "profile.workers=0"]
    command = ["profile", "--config-dir", str(conf), *SMALL[:2], *options, f"out={out}", f"cache_dir={cache}"]
    assert main([*command, "device=cpu"]) == 0
    assert json.loads(out.read_text())["pipelines"]["own_pipeline"]["images"] > 0


def test_a_launcher(add, cache: Path, tmp_path: Path) -> None:
    conf = add(
        "own_launcher",
        """
from pathlib import Path

from omegaconf import DictConfig

from harness.launch.local import LocalLauncher


class Noted(LocalLauncher):
    def run(self, cfg: DictConfig) -> int:
        Path(cfg.run_dir).parent.joinpath("launched").touch()
        return super().run(cfg)
""",
        "launcher",
        "_target_: own_launcher.Noted\nname: own_launcher\n",
    )
    assert train(conf, cache, tmp_path / "run", "launcher=own_launcher", "method=supervised", *TINY)["status"] == "ok"
    assert (tmp_path / "launched").exists()
