"""The generated dataset as files: the same bytes from the same parameters, valid COCO, cached."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from harness.core.types import UserError
from harness.data.drawing import render
from harness.data.shapes import shapes_dataset

FEW = {"train_images": 12, "val_images": 5}


def digests(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.*")}


def folder_of(dataset):
    return Path(dataset.train.image_dir).parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def dataset(cache):
    return shapes_dataset("shapes", cache, **FEW)


def test_the_same_parameters_give_the_same_bytes(tmp_path, dataset):
    again = shapes_dataset("shapes", tmp_path, **FEW)
    ours, theirs = digests(folder_of(dataset)), digests(folder_of(again))
    assert len(ours) == 12 + 5 + 5 + 3 + 1
    assert ours == theirs
    assert (again.train.sha256, again.val.sha256) == (dataset.train.sha256, dataset.val.sha256)


def test_other_counts_keep_the_common_images(tmp_path, dataset):
    fewer = folder_of(shapes_dataset("shapes", tmp_path, train_images=3, val_images=2))
    for file in ("train/000003.jpg", "val/000002.jpg", "tune/000001.jpg"):
        assert (fewer / file).read_bytes() == (folder_of(dataset) / file).read_bytes()


def test_sets_do_not_share_images(cache, dataset):
    tune = shapes_dataset("shapes", cache, val_set="tune", **FEW)
    assert folder_of(tune) == folder_of(dataset)
    assert tune.train.sha256 == dataset.train.sha256
    assert tune.val.sha256 != dataset.val.sha256
    images = [hash_ for name, hash_ in digests(folder_of(dataset)).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images)


def test_annotations_open_in_pycocotools_and_fit_the_drawings(dataset):
    for name, number, count in (("train", 1, 12), ("tune", 2, 5), ("val", 3, 5)):
        coco = COCO(str(folder_of(dataset) / f"{name}.json"))
        assert [category["name"] for category in coco.dataset["categories"]] == [
            "ellipse",
            "square",
            "triangle",
            "cross",
        ]
        assert len(coco.imgs) == count
        for index, image in enumerate(coco.dataset["images"]):
            pixels, boxes, labels = render(np.random.default_rng([0, number, index]))
            stored = np.asarray(Image.open(folder_of(dataset) / name / image["file_name"]))
            assert stored.shape == (image["height"], image["width"], 3)
            assert np.abs(stored.astype(int) - pixels).mean() < 12  # JPEG
            annotations = coco.imgToAnns[image["id"]]
            corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
            np.testing.assert_allclose(corners, boxes, atol=0.02)
            assert [a["category_id"] for a in annotations] == labels.tolist()
            for annotation in annotations:
                assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3])
                assert annotation["iscrowd"] == 0


def test_the_index_agrees_with_the_file(dataset):
    written = json.loads((folder_of(dataset) / "train.json").read_text())
    assert len(dataset.train) == 12
    assert dataset.train.num_classes == 4
    assert len(dataset.train.boxes) == len(written["annotations"])


def test_cached_files_are_used_again_and_other_parameters_are_not_mixed_up(tmp_path):
    first = folder_of(shapes_dataset("shapes", tmp_path, **FEW))
    times = {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")}
    assert folder_of(shapes_dataset("shapes", tmp_path, **FEW)) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")} == times
    for change in ({"quality": 60}, {"seed": 1}, {"size": 96}, {"max_objects": 2}, {"train_images": 13}):
        other = folder_of(shapes_dataset("shapes", tmp_path, **{**FEW, **change}))
        assert other != first
        assert (other / "train" / "000001.jpg").exists()


def test_a_damaged_cache_is_made_anew(tmp_path):
    folder = folder_of(shapes_dataset("shapes", tmp_path, **FEW))
    before = digests(folder)
    (folder / "train" / "000002.jpg").unlink()
    (folder / "val.json").write_text("{}")
    dataset = shapes_dataset("shapes", tmp_path, **FEW)
    assert digests(folder) == before
    assert len(dataset.val) == 5


@pytest.mark.timeout(120)
def test_two_processes_at_once(tmp_path, dataset):
    code = f"""
from pathlib import Path
from harness.data.shapes import shapes_dataset
assert len(shapes_dataset("shapes", Path({str(tmp_path)!r}), train_images=12, val_images=5).train) == 12
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    folder = folder_of(shapes_dataset("shapes", tmp_path, **FEW))
    assert digests(folder) == digests(folder_of(dataset))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_images", 0),
        ("val_images", -1),
        ("max_objects", 0),
        ("val_set", "train"),
        ("size", 16),
        ("quality", 100),
        ("seed", -1),
    ],
)
def test_values_that_cannot_be_used_are_named(tmp_path, key, value):
    with pytest.raises(UserError, match=f"data.{key}={value}"):
        shapes_dataset("shapes", tmp_path, **{**FEW, key: value})
    assert not list(tmp_path.iterdir())
