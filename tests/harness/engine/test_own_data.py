"""`init` on folders of every format: what it writes trains, and its sizes are those of the boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from harness.cli import main
from harness.config import compose
from harness.engine import build, own_data
from tests.bad_input.conftest import make_pets

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSODBENCH_CACHE", str(tmp_path / "cache"))


def opened(name: str, folder: str = "conf"):
    cfg = compose.load([f"data={name}"], [folder])
    return build.dataset(cfg.data, Path(cfg.cache_dir))


def test_coco_files_beside_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pets(tmp_path / "pets")
    assert main(["init", "pets"]) == 0
    said = capsys.readouterr().out
    assert "COCO's format: 16 pictures" in said
    assert "ssodbench prepare --config-dir conf data=pets" in said
    written = yaml.safe_load(Path("conf/data/pets.yaml").read_text())
    assert written["root"] == str(tmp_path / "pets")
    assert written["small"]["short_side"] == 64  # pictures are not enlarged
    assert written["small"]["anchor_sizes"][0] == pytest.approx((24 * 30) ** 0.5, abs=0.5)
    dataset = opened("pets")
    assert (len(dataset.train), len(dataset.val)) == (16, 4)
    assert main(["prepare", "--config-dir", "conf", "data=pets", "split.percent=50"]) == 0


def test_coco_files_apart_from_their_folders_and_odd_names(tmp_path: Path) -> None:
    root = tmp_path / "Fotos für später (1)"
    make_pets(tmp_path / "pets")
    (root / "labels json").mkdir(parents=True)
    for part, folder in (("train", "bilder/übung"), ("val", "bilder/prüfung")):
        (root / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "pets" / part).rename(root / folder)
        (tmp_path / "pets" / f"{part}.json").rename(root / f"instances_{part}.json")
        content = json.loads((root / f"instances_{part}.json").read_text())
        for image in content["images"]:
            image["file_name"] = f"{Path(folder).name}/{image['file_name']}"
        content["categories"] = [{"id": 3, "name": "Hauskatze, groß"}, {"id": 900, "name": "犬"}]
        for box in content["annotations"]:
            box["category_id"] = {8: 900}.get(box["category_id"], box["category_id"])
        (root / f"instances_{part}.json").write_text(json.dumps(content))
    assert main(["init", str(root)]) == 0
    (file,) = Path("conf/data").iterdir()
    written = yaml.safe_load(file.read_text())
    assert (written["train_images"], written["val_images"]) == ("bilder", "bilder")
    assert list(opened(file.stem).train.category_names) == ["Hauskatze, groß", "犬"]


def test_yolo_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "yo" / kind / part).mkdir(parents=True)
        for n in range(6):
            Image.fromarray(rng.integers(0, 255, (240, 320, 3), np.uint8)).save(tmp_path / f"yo/images/{part}/{n}.jpg")
            (tmp_path / f"yo/labels/{part}/{n}.txt").write_text("0 0.5 0.5 0.3 0.4\n")
    (tmp_path / "yo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [one thing]\n")
    assert main(["init", "yo", "out=own/data/mine.yaml"]) == 0
    assert (
        "YOLO's format: 6 pictures to train on, with 6 boxes, 6 to evaluate, 1 class (one thing)"
        in capsys.readouterr().out
    )
    assert main(["init", "yo", "out=own/data/mine.yaml"]) == 2  # nothing is overwritten
    dataset = opened("mine", "own")
    assert list(dataset.train.category_names) == ["one thing"]


def test_voc_folder(tmp_path: Path) -> None:
    root = tmp_path / "voc"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    xml = (
        "<annotation><filename>{}.jpg</filename><size><width>300</width><height>200</height></size><object>"
        "<name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>"
    )
    for n in range(9):
        Image.new("RGB", (300, 200)).save(root / "JPEGImages" / f"{n}.jpg")
        side = (20, 60, 180)[n % 3]
        (root / "Annotations" / f"{n}.xml").write_text(xml.format(n, side, side))
    (root / "ImageSets/Main/train.txt").write_text("0\n1\n2\n3\n4\n5\n")
    (root / "ImageSets/Main/val.txt").write_text("6\n7\n8\n")
    assert main(["init", "voc"]) == 0
    written = yaml.safe_load(Path("conf/data/voc-own.yaml").read_text())  # `voc` comes with the program
    assert written["unlabeled"] is None
    assert written["small"] == {"short_side": 128, "max_side": 192, "anchor_sizes": [13, 38, 115]}  # 128 / 200 of them
    assert main(["prepare", "--config-dir", "conf", "data=voc-own", "split.percent=50"]) == 0


def test_rare_classes_count_like_frequent_ones() -> None:
    sides = np.array([10.0] * 900 + [40.0] * 30 + [80.0] * 3)
    weights = np.repeat([1 / 900, 1 / 30, 1 / 3], [900, 30, 3])
    assert own_data._quantiles(sides, weights).tolist() == [10, 40, 80]


def test_pictures_that_nobody_labelled_are_unlabelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pets(tmp_path / "pets")
    content = json.loads((tmp_path / "pets/train.json").read_text())
    content["annotations"] = content["annotations"][:4]
    (tmp_path / "pets/train.json").write_text(json.dumps(content))
    assert main(["init", "pets"]) == 0
    assert "split.protocol=annotated" in capsys.readouterr().out
