"""VOC folders against hand-written files, and the real blood cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.core.types import UserError
from harness.data.voc import voc_dataset

BCCD = Path(__file__).parents[4] / "shared" / "data" / "bccd"

OBJECT = (
    "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def xml(*objects: tuple[Any, ...], size: tuple[int, int] = (30, 20), suffix: str = ".jpg") -> str:
    """Objects are (name, xmin, ymin, xmax, ymax, difficult or None)."""
    body = "".join(
        OBJECT.format(name, "" if hard is None else f"<difficult>{hard}</difficult>", *box)
        for name, *box, hard in objects
    )
    width, height = size
    return (
        f"<annotation><filename>x{suffix}</filename><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{body}</annotation>"
    )


def write(root: Path, lists: dict[str, str], files: dict[str, str]) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text, encoding="utf-8")
    for name, text in files.items():
        (root / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(
        tmp_path / "VOC2007",
        {"trainval": "b\na\n", "test": "c\n"},
        {
            "a": xml(("dog", 1, 1, 30, 20, 0)),
            "b": xml(("cat", 2, 3, 10, 11, 1), ("dog", 5, 5, 6, 6, None), suffix=".png"),
            "c": xml(("cat", 1.5, 1, 2.5, 9, 0), size=(8, 9)),
        },
    ).parent


def test_hand_example(root: Path, tmp_path: Path) -> None:
    """Pixels count from 1 and include the last: a box over the whole picture is 1 1 30 20."""
    dataset = open_voc(root, tmp_path)
    train, val = dataset.train, dataset.val
    assert list(train.category_names) == ["cat", "dog"]
    assert list(train.file_names) == ["VOC2007/JPEGImages/b.png", "VOC2007/JPEGImages/a.jpg"]
    assert train.image_ids.tolist() == [1, 2]
    assert val.image_ids.tolist() == [3]
    assert train.sizes.tolist() == [[20, 30], [20, 30]]
    assert train.boxes.tolist() == [[1, 2, 10, 11], [4, 4, 6, 6], [0, 0, 30, 20]]
    assert train.labels.tolist() == [1, 2, 2]
    assert train.crowd.tolist() == [True, False, False]
    assert val.boxes.tolist() == [[0.5, 0, 2.5, 9]]
    assert val.labels.tolist() == [1]


def open_voc(root: Path, tmp_path: Path, **options: Any) -> Any:
    lists = {part: [f"VOC2007/ImageSets/Main/{name}.txt"] for part, name in (("train", "trainval"), ("val", "test"))}
    return voc_dataset(**({"name": "voc", "root": root, "cache_dir": tmp_path / "cache"} | lists | options))


@pytest.mark.parametrize(("difficult", "boxes", "crowds"), [("crowd", 3, 1), ("keep", 3, 0), ("drop", 2, 0)])
def test_difficult(root: Path, tmp_path: Path, difficult: str, boxes: int, crowds: int) -> None:
    dataset = open_voc(root, tmp_path, difficult=difficult)
    assert dataset.voc_ap
    train = dataset.train
    assert (len(train.boxes), int(train.crowd.sum())) == (boxes, crowds)


def test_order_of_classes_is_the_given_one(root: Path, tmp_path: Path) -> None:
    train = open_voc(root, tmp_path, classes=["dog", "cat"]).train
    assert train.labels.tolist() == [2, 1, 1]


def test_other_classes_are_dropped_and_counted(root: Path, tmp_path: Path) -> None:
    train = open_voc(root, tmp_path, classes=["dog"]).train
    assert train.labels.tolist() == [1, 1]
    assert "category that is not listed, dropped: 1 (cat)" in str(train.findings[0])


def test_several_roots(root: Path, tmp_path: Path) -> None:
    """Two years may use the same picture names."""
    write(root / "VOC2012", {"trainval": "a\n"}, {"a": xml(("dog", 1, 1, 2, 2, 0))})
    both = ["VOC2007/ImageSets/Main/trainval.txt", "VOC2012/ImageSets/Main/trainval.txt"]
    joined = open_voc(root, tmp_path, train=both).train
    assert [name.split("/")[0] for name in joined.file_names] == ["VOC2007", "VOC2007", "VOC2012"]
    apart = open_voc(root, tmp_path, unlabeled=both[1:])
    assert apart.unlabeled.image_ids.tolist() == [4]
    assert open_voc(root, tmp_path, unlabeled=["VOC2013/ImageSets/Main/x.txt"]).unlabeled is None


def test_unlabelled_lists_are_opened_on_first_use(root: Path, tmp_path: Path) -> None:
    write(root / "VOC2012", {"trainval": "gone\n"}, {})
    dataset = open_voc(root, tmp_path, unlabeled=["VOC2012/ImageSets/Main/trainval.txt"])
    with pytest.raises(UserError, match=r"whose annotation is not there, first .*gone\.xml"):
        _ = dataset.unlabeled


def test_lists_of_one_class_and_names_with_spaces(root: Path, tmp_path: Path) -> None:
    """The second column of a class list is a flag, unless it belongs to the name of a picture."""
    write(
        root / "VOC2007",
        {"trainval": "a  1\nb -1\nphoto 1\nzwölf ü 0\n\n"},
        {"photo 1": xml(("dog", 1, 1, 2, 2, 0)), "zwölf ü": xml(("dog", 1, 1, 2, 2, 0))},
    )
    names = [Path(name).name for name in open_voc(root, tmp_path).train.file_names]
    assert names == ["a.jpg", "photo 1.jpg", "zwölf ü.jpg"]


def test_points_are_dropped_and_listed(root: Path, tmp_path: Path) -> None:
    write(root / "VOC2007", {}, {"a": xml(("dog", 5, 5, 5, 5, 0), ("dog", 1, 1, 3, 3, 0), ("cat", 9, 1, 7, 3, 0))})
    train = open_voc(root, tmp_path).train
    assert len(train.boxes) == 3
    assert "zero or negative width or height, dropped: 2" in str(train.findings[0])


def test_changed_file_is_seen(root: Path, tmp_path: Path) -> None:
    before = open_voc(root, tmp_path).train
    write(root / "VOC2007", {}, {"a": xml(("dog", 1, 1, 29, 20, 0))})
    after = open_voc(root, tmp_path).train
    assert after.boxes[-1].tolist() == [0, 0, 29, 20]
    assert after.sha256 != before.sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "a.xml is not a VOC annotation"),
        ("", "a.xml is not a VOC annotation"),
        ("<annotation/>", "no <size><height>"),
        (xml(("dog", "one", 1, 2, 2, 0)), "could not convert string to float: 'one'"),
        (xml().replace("</annotation>", "<object><name>dog</name></object></annotation>"), "no <bndbox><xmin>"),
        (xml(size=(0, 5)), "not positive"),
    ],
)
def test_malformed(root: Path, tmp_path: Path, text: str, message: str) -> None:
    write(root / "VOC2007", {}, {"a": text})
    with pytest.raises(UserError, match=message) as caught:
        open_voc(root, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_empty(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs .*nothing\.txt .*: fetch it, or set data.root"):
        open_voc(root, tmp_path, train=["VOC2007/ImageSets/Main/nothing.txt"], download="fetch it")
    write(root / "VOC2007", {"trainval": "a\nzzz\n"}, {})
    with pytest.raises(UserError, match=r"1 picture whose annotation is not there, first .*zzz\.xml"):
        open_voc(root, tmp_path)
    write(root / "VOC2007", {"trainval": "\n"}, {})
    with pytest.raises(UserError, match="lists no image"):
        open_voc(root, tmp_path)
    write(root / "VOC2007", {"trainval": "a\na\n"}, {})
    with pytest.raises(UserError, match=r"file name \(VOC2007/JPEGImages/a.jpg\) more than once"):
        open_voc(root, tmp_path)
    with pytest.raises(UserError, match="difficult=often"):
        open_voc(root, tmp_path, difficult="often")


@pytest.mark.skipif(not BCCD.exists(), reason="bccd is not here")
def test_blood_cells(tmp_path: Path) -> None:
    options = {"train": ["ImageSets/Main/trainval.txt"], "val": ["ImageSets/Main/test.txt"]}
    dataset = voc_dataset("bccd", BCCD, tmp_path, **options)
    assert (len(dataset.train), len(dataset.val)) == (292, 72)
    counts = dataset.train.boxes_per_class() + dataset.val.boxes_per_class()
    assert list(dataset.train.category_names) == ["Platelets", "RBC", "WBC"]
    assert counts.tolist() == [361, 4155 - 2, 372]
    (points,) = dataset.train.findings
    assert points.count == 2
    assert "00338" in points.examples[0]
    assert "00343" in points.examples[1]
    source = dataset.val.source()
    assert np.all(source.sizes == [480, 640])
    with Image.open(source.paths[0]) as picture:
        assert picture.size == (640, 480)
