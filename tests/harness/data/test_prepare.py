"""What `prepare` finds in pictures, splits and split files, and what a run is then given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harness import cli
from harness.config import compose as config_file
from harness.config.run import settings_of
from harness.core.types import UserError
from harness.data import prepare, split_files
from harness.data.datasets import Dataset, coco_dataset
from harness.data.images import check_images
from harness.engine import build
from harness.splits.protocols import SplitOptions

TINY = Path(__file__).parents[4] / "shared" / "data" / "coco_tiny"
CLASSES = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rotated(path: Path) -> None:
    """As a phone held upright writes it: 40x30 pixels are stored, and EXIF asks to show them turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path, exif=exif)


def cut(path: Path, share: float) -> None:
    picture().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((30, 40), 50_000, np.uint16)).save(path)


def sixteen_bit_colour(path: Path) -> None:
    """Pillow writes no such file; OpenCV does."""
    import cv2

    cv2.imwrite(str(path), np.full((30, 40, 3), 50_000, np.uint16))


# File name, how it is made, the size the annotations give; then what makes the picture bad, or what is said of it.
PICTURES: dict[str, tuple[str, Callable[[Path], Any], tuple[int, int], str | None, str | None]] = {
    "JPEG": ("a.jpg", picture().save, (40, 30), None, None),
    "PNG": ("a.png", picture().save, (40, 30), None, None),
    "spaces and letters beyond ASCII": ("grüne Äpfel 苹果.jpg", picture().save, (40, 30), None, None),
    "PNG named JPEG": ("a.jpg", lambda p: picture().save(p, "PNG"), (40, 30), None, None),
    "gray": ("a.jpg", picture(mode="L").save, (40, 30), None, "gray pixels"),
    "CMYK": ("a.jpg", picture(mode="CMYK").save, (40, 30), None, "CMYK pixels"),
    "palette": ("a.png", picture(mode="P").save, (40, 30), None, "palette pixels"),
    "alpha": ("a.png", picture(mode="RGBA").save, (40, 30), None, "alpha pixels"),
    "gray with alpha": ("a.png", picture(mode="LA").save, (40, 30), None, "alpha pixels"),
    "16 bit gray": ("a.png", sixteen_bit, (40, 30), None, "16 bit pixels"),
    "16 bit colour": ("a.png", sixteen_bit_colour, (40, 30), None, "16 bit pixels"),
    "rotated by EXIF": ("a.jpg", rotated, (40, 30), None, "EXIF rotation, which is not applied"),
    "annotated after rotation": ("a.jpg", rotated, (30, 40), "annotated after rotation by EXIF: stored as 40x30", None),
    "other size": ("a.jpg", picture().save, (41, 30), "of another size than annotated: 40x30", None),
    "missing": ("a.jpg", lambda _: None, (40, 30), "missing", None),
    "empty": ("a.jpg", lambda p: p.write_bytes(b""), (40, 30), "empty", None),
    "text": ("a.jpg", lambda p: p.write_text("404 not found"), (40, 30), "not an image", None),
    "a folder": ("a.jpg", lambda p: p.mkdir(), (40, 30), "a folder", None),
    "half a JPEG": ("a.jpg", lambda p: cut(p, 0.5), (40, 30), "truncated", None),
    "first bytes of a JPEG": ("a.jpg", lambda p: cut(p, 0.02), (40, 30), "not an image", None),
}


@pytest.mark.parametrize("level", ["quick", "headers", "full"])
@pytest.mark.parametrize("case", PICTURES)
def test_pictures(tmp_path: Path, case: str, level: str) -> None:
    name, make, (width, height), bad, note = PICTURES[case]
    path = tmp_path / name
    make(path)
    check = check_images([str(path)], np.array([17]), np.array([[height, width]]), level)
    assert list(check.bad) == ([17] if bad else [])
    assert all(bad in reason for reason in check.bad.values() if bad)
    assert [f.count for f in check.findings] == ([1] if bad or note else [])
    assert all((bad or note or "").split(":")[0] in str(f) and name in str(f) for f in check.findings)


def test_half_a_png_shows_when_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cut(path, 0.5)
    arguments: Any = ([str(path)], np.array([1]), np.array([[30, 40]]))
    assert check_images(*arguments, "headers").bad == {}
    assert check_images(*arguments, "full").bad == {1: "truncated"}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 30}])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_jpeg_cut_short_with_an_end_marker_shows_when_it_is_decoded(
    tmp_path: Path, options: dict[str, Any], share: float
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path, **options)
    whole = path.read_bytes()
    arguments: Any = ([str(path)], np.array([1]), np.array([[120, 160]]))
    assert check_images(*arguments, "full").bad == {}
    path.write_bytes(whole + b"what a camera puts after the picture")
    assert check_images(*arguments, "full").bad == {}
    path.write_bytes(whole[: int(len(whole) * share)] + b"\xff\xd9")
    assert check_images(*arguments, "headers").bad == {}
    assert check_images(*arguments, "full").bad == {1: "cut short, with an end marker put on"}


@pytest.mark.timeout(60)
def test_many_pictures(tmp_path: Path) -> None:
    """In order, by threads, each exactly once; quick looks at every file but reads only a sample of headers."""
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    picture().save(good)
    bad.write_bytes(b"x")
    count = 3000
    paths = [str(bad if i == 2999 else tmp_path / "none.jpg" if i == 1001 else good) for i in range(count)]
    sizes = np.tile([30, 40], (count, 1))
    for level, checked in (("quick", 2000), ("headers", count)):
        steps: list[int] = []
        check = check_images(paths, np.arange(count), sizes, level, threads=3, progress=steps.append)
        assert (check.checked, sum(steps)) == (checked, count)
        assert check.bad == {1001: "missing", 2999: "not an image, or damaged"}


def make_dataset(
    root: Path, train: int = 20, val: int = 3, boxes: int = 2, change: Callable[[dict[str, Any]], Any] = lambda _: None
) -> Dataset:
    """Images train/0.jpg and on, of 64x48 px, each with `boxes` boxes; `change` edits the training annotations."""
    for part, count in (("train", train), ("val", val)):
        (root / part).mkdir(parents=True, exist_ok=True)
        images = [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(count)]
        for image in images:
            picture(64, 48).save(root / part / str(image["file_name"]))
        rows = [
            {"image_id": 10 + i, "category_id": (3, 8)[n % 2], "bbox": [n, 1.5, 10, 12.25], "iscrowd": 0, "area": 5}
            for i in range(count)
            for n in range(boxes)
        ]
        content = {"images": images, "annotations": rows, "categories": CLASSES}
        if part == "train":
            change(content)
        (root / f"{part}.json").write_text(json.dumps(content))
    return open_dataset(root)


def open_dataset(root: Path, **options: Any) -> Dataset:
    return coco_dataset("mine", root, root / "cache", **options)


def config(protocol: str = "soft_teacher", percent: float = 10, **more: Any) -> SplitOptions:
    none = dict.fromkeys(("index_file", "empty_images", "crowd_boxes", "min_side"))
    return SplitOptions(**{"protocol": protocol, "percent": percent, "fold": 1, "offset": 0, **none, **more})


def test_sources(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    split = prepare.resolve_split(dataset, config())
    labeled, unlabeled = prepare.sources(dataset, split, config())
    assert unlabeled is not None
    assert (len(labeled), len(labeled.boxes)) == (2, 4)
    assert (len(unlabeled), len(unlabeled.boxes), len(unlabeled.labels)) == (18, 0, 0)
    assert sorted([*labeled.ids, *unlabeled.ids]) == list(range(10, 30))
    everything = prepare.resolve_split(dataset, config(percent=100))
    assert prepare.sources(dataset, everything, config(percent=100))[1] is None


# Image 10 has no annotation, 11 a crowd alone, 12 is 20 px high: which labelled images each protocol shows of 10..14.
SHOWN = {
    "stac": [12, 13, 14],
    "soft_teacher": [11, 13, 14],
    "unbiased_teacher": [12, 13, 14],
    "ids": [10, 11, 12, 13, 14],
}


@pytest.mark.parametrize("protocol", SHOWN)
def test_policy_of_each_protocol(tmp_path: Path, protocol: str) -> None:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image |= {"width": 400, "height": 300}
        content["images"][2]["height"] = 20
        rows = [row for row in content["annotations"] if row["image_id"] > 10]
        for row in rows:
            row["iscrowd"] = int(row["image_id"] == 11)
        content["annotations"] = rows

    dataset = make_dataset(tmp_path, train=5, change=change)
    file = tmp_path / "index.json"
    content = {"60.0": {"1": [0, 1, 2]}} if protocol == "unbiased_teacher" else list(range(10, 15))
    file.write_text(json.dumps(content))
    wanted = config(protocol, 60 if protocol == "unbiased_teacher" else 100)
    wanted = replace(wanted, index_file=str(file) if protocol in ("unbiased_teacher", "ids") else None)
    labeled, _ = prepare.sources(dataset, prepare.resolve_split(dataset, wanted), wanted)
    assert labeled.ids.tolist() == SHOWN[protocol]
    if protocol != "unbiased_teacher":
        wanted = replace(wanted, empty_images="keep", crowd_boxes="keep", min_side=0)
        labeled, _ = prepare.sources(dataset, prepare.resolve_split(dataset, wanted), wanted)
        assert labeled.ids.tolist() == [10, 11, 12, 13, 14]
        assert len(labeled.boxes) == 8


@pytest.mark.parametrize(
    "given_key", [{"index_file": "x.json"}, {"protocol": "stac", "offset": 3}, {"protocol": "full", "index_file": "x"}]
)
def test_keys_that_the_protocol_does_not_read_are_refused(tmp_path: Path, given_key: dict[str, Any]) -> None:
    dataset = make_dataset(tmp_path)
    dataset = Dataset("mine", dataset.train, dataset.val, lambda: dataset.val)
    with pytest.raises(UserError, match=r"is read by split\.protocol="):
        prepare.resolve_split(dataset, replace(config(), **given_key))


def test_labelled_part_without_a_box(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, boxes=1, change=lambda c: c.update(annotations=c["annotations"][:1]))
    with pytest.raises(UserError, match=r"split.percent=5 split.fold=1 show no box \(split.crowd_boxes=drop"):
        prepare.resolve_split(dataset, config("stac", 5))


def test_full(tmp_path: Path) -> None:
    dataset = with_more_pictures(tmp_path)
    wanted = config("full")
    split = prepare.resolve_split(dataset, wanted)
    labeled, unlabeled = prepare.sources(dataset, split, wanted)
    assert unlabeled is not None
    assert (len(labeled), len(unlabeled), split.percent) == (20, 1, 100)
    assert not set(labeled.ids) & set(unlabeled.ids)
    assert dataset.unlabeled_of(split) is dataset.unlabeled
    with pytest.raises(UserError, match=r"but .*none\.json is not there"):
        prepare.resolve_split(
            open_dataset(tmp_path, unlabeled_annotations="none.json", unlabeled_images="more"), wanted
        )


@pytest.mark.parametrize("protocol", ["stac", "soft_teacher", "annotated", "ids", "full"])
def test_a_folder_is_added_under_any_protocol(tmp_path: Path, protocol: str) -> None:
    """Ids of its own behind those of the training part, no truth even where images without boxes show nothing."""
    labelled_in_part(tmp_path)
    (tmp_path / "more").mkdir()
    for name in ("y.jpg", "x.jpg"):
        picture(64, 48).save(tmp_path / "more" / name)
    (tmp_path / "ids.json").write_text("[10, 11, 14]")
    wanted = config(protocol, 50, index_file=str(tmp_path / "ids.json") if protocol == "ids" else None)
    plain, dataset = open_dataset(tmp_path), open_dataset(tmp_path, unlabeled_images="more")
    split = prepare.resolve_split(dataset, wanted)
    _, unlabeled = prepare.sources(dataset, split, wanted)
    assert unlabeled is not None
    added = [path for path in unlabeled.paths if "/more/" in path]
    assert [Path(path).name for path in added] == ["x.jpg", "y.jpg"] == [Path(p).name for p in unlabeled.paths[-2:]]
    assert len(set(unlabeled.ids.tolist()) | set(split.labeled_ids.tolist())) == len(unlabeled) + len(split.labeled_ids)
    assert prepare.added_pictures(dataset, unlabeled) == 2
    assert len(unlabeled.boxes) == 0
    truth = prepare.known_truth(dataset, split, config(protocol, empty_images="keep"), unlabeled)
    assert truth is None or not any("/more/" in path for path in truth.paths)
    if protocol != "full":
        before = prepare.resolve_split(plain, wanted)
        assert split.labeled_ids.tolist() == before.labeled_ids.tolist()
        assert split.unlabeled_ids[:-2].tolist() == before.unlabeled_ids.tolist()
        assert split.sha256 != before.sha256
        assert prepare.known_truth(plain, before, wanted, prepare.sources(plain, before, wanted)[1]) is None or truth
    checks = prepare.require_usable(dataset, unlabeled=True)
    assert set(checks.pictures) == {"train", "val", "unlabeled"}


def test_bad_pictures_of_an_added_folder_are_left_out(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    (tmp_path / "more").mkdir()
    for place in range(12):
        picture(64, 48).save(tmp_path / "more" / f"{place:02d}.jpg")
    dataset = open_dataset(tmp_path, unlabeled_images="more")
    split = prepare.resolve_split(dataset, config())
    (tmp_path / "more" / "03.jpg").write_bytes(b"x")
    checks = prepare.require_usable(dataset, unlabeled=True)
    _, unlabeled = prepare.sources(dataset, split, config(), checks)
    assert unlabeled is not None
    assert prepare.added_pictures(dataset, unlabeled) == 11
    assert list(prepare.bad_files(dataset, checks)) == [str(tmp_path / "more" / "03.jpg")]


def labelled_in_part(folder: Path, every: int = 4) -> Dataset:
    """Images 10, 14, 18, ... of 20 have boxes, one of them crowds alone; nobody labelled the others."""

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = [a for a in content["annotations"] if (a["image_id"] - 10) % every == 0]
        for row in content["annotations"]:
            row["iscrowd"] = int(row["image_id"] == 14)

    return make_dataset(folder, change=change)


def test_annotated(tmp_path: Path) -> None:
    dataset = labelled_in_part(tmp_path)
    wanted = config("annotated")
    split = prepare.resolve_split(dataset, wanted)
    labeled, unlabeled = prepare.sources(dataset, split, wanted)
    assert unlabeled is not None
    assert labeled.ids.tolist() == [10, 14, 18, 22, 26]
    assert unlabeled.ids.tolist() == [i for i in range(10, 30) if i not in (10, 14, 18, 22, 26)]
    assert split.percent == 25
    assert prepare.known_truth(dataset, split, wanted, unlabeled) is None
    assert prepare.known_truth(dataset, split, replace(wanted, empty_images="keep"), unlabeled) is None
    names = [path.name for path in split_files.export_all(dataset, [split], tmp_path / "out")]
    assert names == ["train.annotated.json", "train.annotated-unlabeled.json"]


def test_share_of_a_list(tmp_path: Path) -> None:
    """20 % of the images is 20 %, whatever split.percent says; a name that gives a percentage is believed."""
    dataset = make_dataset(tmp_path)
    for name, percent in (("ids.json", 20), ("train.1@10.json", 10)):
        (tmp_path / name).write_text(json.dumps({"images": [{"id": i} for i in (10, 12, 14, 16)]}))
        split = prepare.resolve_split(dataset, config("ids", index_file=str(tmp_path / name)))
        assert (len(split.labeled_ids), split.percent) == (4, percent)


@pytest.mark.parametrize(
    ("empty_images", "known"), [(None, [18, 22, 26]), ("drop", [18, 22, 26]), ("keep", list(range(15, 30)))]
)
def test_truth_of_images_without_boxes_is_unknown(tmp_path: Path, empty_images: str | None, known: list[int]) -> None:
    """Unless the user says that they show nothing. A crowd counts as an annotation, here of a labelled image."""
    dataset = labelled_in_part(tmp_path)
    (tmp_path / "ids.json").write_text(json.dumps(list(range(10, 15))))
    wanted = config("ids", index_file=str(tmp_path / "ids.json"), empty_images=empty_images)
    split = prepare.resolve_split(dataset, wanted)
    _, unlabeled = prepare.sources(dataset, split, wanted)
    assert unlabeled is not None
    truth = prepare.known_truth(dataset, split, wanted, unlabeled)
    assert truth is not None
    assert truth.ids.tolist() == known
    assert len(truth.boxes) == 6


def test_truth_of_a_folder_is_unknown(tmp_path: Path) -> None:
    dataset = with_more_pictures(tmp_path)
    split = prepare.resolve_split(dataset, config("full"))
    _, unlabeled = prepare.sources(dataset, split, config("full"))
    assert unlabeled is not None
    assert prepare.known_truth(dataset, split, config("full", empty_images="keep"), unlabeled) is None


# Protocol, then what is said of the 15 images without a box, 5 of whose 20 are labelled.
SAID = {
    "soft_teacher": r"chose \d+ of them among its 10 labelled images, which are left out \(split.empty_images=drop_un",
    "stac": r"which are left out \(split.empty_images=drop\), the others are unlabelled.* say split.protocol=annotated",
    "annotated": "no box at all and are the unlabelled part, the other 5 the labelled one",
    "full": r"chose 15 of them among its 20 labelled images, which are left out",
    "ids": r"chose 2 of them among its 3 labelled images, which are shown as images without objects",
}


@pytest.mark.parametrize("protocol", SAID)
def test_images_without_a_box_are_told(tmp_path: Path, protocol: str) -> None:
    labelled_in_part(tmp_path)
    (tmp_path / "more").mkdir()
    picture(64, 48).save(tmp_path / "more" / "x.jpg")
    (tmp_path / "ids.json").write_text("[10, 11, 12]")
    dataset = open_dataset(tmp_path, unlabeled_images="more")
    wanted = config(protocol, 50, index_file=str(tmp_path / "ids.json") if protocol == "ids" else None)
    split = prepare.resolve_split(dataset, wanted)
    labeled, _ = prepare.sources(dataset, split, wanted)
    first, *others = prepare.about_split(dataset, split, wanted, labeled)
    assert first.startswith("15 of the 20 training images have no box at all")
    assert re.search(SAID[protocol], first)
    assert others == []


def test_whole_dataset_gives_no_warning(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    split = prepare.resolve_split(dataset, config(percent=50))
    labeled, _ = prepare.sources(dataset, split, config(percent=50))
    assert prepare.about_split(dataset, split, config(percent=50), labeled) == []


def test_classes_without_a_labelled_box_are_told(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, boxes=1)
    split = prepare.resolve_split(dataset, config(percent=50))
    labeled, _ = prepare.sources(dataset, split, config(percent=50))
    (line,) = prepare.about_split(dataset, split, config(percent=50), labeled)
    assert line.startswith("no labelled box shows 1 of the 2 classes (dog)")


# Checks before a training.


def test_bad_training_pictures_are_left_out(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    (tmp_path / "train" / "7.jpg").unlink()
    (tmp_path / "train" / "8.jpg").write_bytes(b"")
    checks = prepare.require_usable(dataset)
    assert sum(len(check.bad) for check in checks.pictures.values()) == 2
    split = prepare.resolve_split(dataset, config("soft_teacher", 100))
    assert len(split.labeled_ids) == 20
    files = prepare.bad_files(dataset, checks)
    assert files == {str(tmp_path / "train" / "7.jpg"): "missing", str(tmp_path / "train" / "8.jpg"): "empty"}
    labeled, _ = prepare.sources(dataset, split, config("soft_teacher", 100), checks)
    assert sorted(labeled.ids) == [i for i in range(10, 30) if i not in (17, 18)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val" / "1.jpg").unlink(), r"1 of the 3 val pictures .*1\.jpg \(missing\)"),
        (
            lambda root: [p.unlink() for p in (root / "train").iterdir()],
            r"20 of the 20 train pictures .*more than a tenth",
        ),
    ],
)
def test_fatal_pictures(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    dataset = make_dataset(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare.require_usable(dataset)
    assert "\n" not in str(caught.value)


def test_evaluation_without_a_box(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    content = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(UserError, match="no box to score against"):
        prepare.require_usable(open_dataset(tmp_path))


def test_shared_pictures_are_reported(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    dataset = open_dataset(tmp_path, val_images="train")
    (finding,) = prepare.require_usable(dataset).findings
    assert finding.count == 3
    assert "in train and in val" in str(finding)


def test_unknown_level(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check=deep is not one of quick, headers, full"):
        prepare.require_usable(make_dataset(tmp_path), "deep")


# Split files.


@settings(max_examples=8, deadline=None)
@given(
    percent=st.sampled_from([5, 10, 12.5, 50]),
    fold=st.integers(1, 10),
    protocol=st.sampled_from(["stac", "soft_teacher"]),
)
def test_soft_teachers_files_come_back(
    tmp_path_factory: pytest.TempPathFactory, percent: float, fold: int, protocol: str
) -> None:
    root = tmp_path_factory.getbasetemp() / "shared dataset"
    dataset = open_dataset(root) if root.exists() else make_dataset(root, train=40)
    wanted = config(protocol, percent, fold=fold)
    split = prepare.resolve_split(dataset, wanted)
    folder = root / "annotations of splits"
    labeled, unlabeled = split_files.export_all(dataset, [split], folder)
    assert labeled.name == f"train.{fold}@{percent:g}.json"
    assert unlabeled.name == f"train.{fold}@{percent:g}-unlabeled.json"
    pattern = str(folder / "train.{fold}@{percent}.json")
    again = prepare.resolve_split(dataset, replace(wanted, protocol="ids", index_file=pattern))
    assert again.sha256 == split.sha256
    content = json.loads(labeled.read_text())
    assert [image["id"] for image in content["images"]] == split.labeled_ids.tolist()
    assert content["categories"] == CLASSES
    assert content["annotations"][0].keys() >= {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}
    assert content["annotations"][0]["bbox"] == [0, 1.5, 10, 12.25]
    rest = json.loads(unlabeled.read_text())
    numbers = [row["id"] for part in (content, rest) for row in part["annotations"]]
    assert sorted(numbers) == list(range(1, 81))


@pytest.mark.skipif(not TINY.exists(), reason="coco_tiny is not here")
def test_files_hold_what_the_original_scripts_put_in_them(tmp_path: Path) -> None:
    """NumPy's global stream over the file's own list; images in file order, all their annotations, crowds too."""
    original = json.loads((TINY / "annotations" / "instances_train2017.json").read_text())
    np.random.seed(3)
    chosen = set(np.random.choice(range(80), size=8, replace=False).tolist())
    files = {"train_annotations": "annotations/instances_train2017.json", "train_images": "train2017"}
    files |= {"val_annotations": "annotations/instances_val2017.json", "val_images": "val2017"}
    dataset = coco_dataset("coco", TINY, tmp_path / "cache", **files)
    written = split_files.export_all(dataset, [prepare.resolve_split(dataset, config(fold=3))], tmp_path)
    assert [path.name for path in written] == [f"instances_train2017.3@10{end}.json" for end in ("", "-unlabeled")]
    for path, labeled in zip(written, (True, False), strict=True):
        content = json.loads(path.read_text())
        ids = [image["id"] for row, image in enumerate(original["images"]) if (row in chosen) == labeled]
        assert content.keys() == {"info", "licenses", "images", "annotations", "categories"}
        assert [image["id"] for image in content["images"]] == ids

        def rows(annotations: list[dict[str, Any]], wanted: set[int]) -> list[Any]:
            keys = ("image_id", "category_id", "bbox", "iscrowd")
            return sorted([a[key] for key in keys] for a in annotations if a["image_id"] in wanted)

        assert rows(content["annotations"], set(ids)) == rows(original["annotations"], set(ids))
        assert len(content["annotations"]) == len(rows(content["annotations"], set(ids)))


def with_more_pictures(folder: Path) -> Dataset:
    """A dataset with a folder of unlabelled pictures."""
    make_dataset(folder)
    (folder / "more").mkdir()
    picture(64, 48).save(folder / "more" / "x.jpg")
    return open_dataset(folder, unlabeled_images="more")


def test_files_of_full(tmp_path: Path) -> None:
    dataset = with_more_pictures(tmp_path)
    split = prepare.resolve_split(dataset, config("full"))
    labeled, unlabeled = split_files.export_all(dataset, [split], tmp_path / "out")
    content = json.loads(unlabeled.read_text())
    assert (labeled.name, unlabeled.name) == ("train.json", "instances_unlabeled2017.json")
    assert (len(content["images"]), content["annotations"], content["categories"]) == (1, [], CLASSES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_replaces_nothing_but_exports(tmp_path: Path) -> None:
    """The labelled file of `full` is named as the dataset's own, so that a slip of export_dir would lose it."""
    dataset = with_more_pictures(tmp_path / "data")
    full, tenth = (prepare.resolve_split(dataset, config(*key)) for key in (("full",), ("soft_teacher", 10)))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"train\.json is an annotation file of data=mine and is not replaced"):
        split_files.export_all(dataset, [full], tmp_path / "data")
    assert contents(tmp_path) == before
    first = split_files.export_all(dataset, [full], tmp_path / "out")
    written = contents(tmp_path / "out")
    assert split_files.export_all(dataset, [full], tmp_path / "out") == first  # an earlier export may be made again
    assert contents(tmp_path / "out") == written
    (tmp_path / "out" / "train.1@10-unlabeled.json").write_text('{"images": []}')
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"train\.1@10-unlabeled\.json is there and is no earlier export"):
        split_files.export_all(dataset, [full, tenth], tmp_path / "out")
    assert contents(tmp_path) == before


def test_an_export_that_is_the_dataset_is_not_replaced(tmp_path: Path) -> None:
    """A dataset may be made of exported files; an export beside them would be named alike."""
    original = with_more_pictures(tmp_path)
    full = prepare.resolve_split(original, config("full"))
    split_files.export_all(original, [full], tmp_path / "out")
    again = open_dataset(tmp_path, train_annotations="out/train.json", unlabeled_images="more")
    with pytest.raises(UserError, match="is an annotation file of data=mine"):
        split_files.export_all(again, [full], tmp_path / "out")


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path)
    splits = [prepare.resolve_split(dataset, config(fold=fold)) for fold in (1, 2)]
    encode, made = split_files._encode, []

    def full_disk(*arguments: Any) -> bytes:
        made.append(arguments)
        if len(made) == 3:
            raise OSError(28, "No space left on device")
        return encode(*arguments)

    monkeypatch.setattr(split_files, "_encode", full_disk)
    with pytest.raises(UserError, match=r"cannot export to .* \(No space left on device\)"):
        split_files.export_all(dataset, splits, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


# Content of the file of labelled ids (None: no file), its name, and what comes of it.
ID_FILES: dict[str, tuple[str | None, str, Any]] = {
    "list": ("[10, 12]", "ids.json", [10, 12]),
    "object": ('{"labeled": [12], "unlabeled": [10]}', "ids.json", [12]),
    "lines": ("10\n12\n", "ids.txt", [10, 12]),
    "COCO": ('{"images": [{"id": 10, "file_name": "0.jpg"}]}', "some.json", [10]),
    "right name": ('{"images": [{"id": 10}]}', "train.1@10.json", [10]),
    "mmdetection's name": ('{"images": [{"id": 10}]}', "train.1@10.0.json", [10]),
    "wrong fold": ('{"images": [{"id": 10}]}', "train.2@10.json", "is fold 2 at 10 %, not split.fold=1"),
    "wrong percent": ('{"images": [{"id": 10}]}', "train.1@5.json", "is fold 1 at 5 %, not split.fold=1"),
    "unlabelled half": ('{"images": [{"id": 10}]}', "train.1@10-unlabeled.json", "is the unlabelled half"),
    "no file": (None, "ids.json", "cannot read split.index_file=.*No such file"),
    "not JSON": ("[1, 2", "ids.json", "is not JSON"),
    "other JSON": ('{"ids": []}', "ids.json", "is neither a list"),
    "names": ("a.jpg\nb.jpg\n", "ids.txt", "no image id"),
    "images without ids": ('{"images": ["a"]}', "x.json", "whose images have ids"),
    "unknown id": ("[99]", "ids.json", "first 99, are not in the dataset"),
}


@pytest.mark.parametrize("case", ID_FILES)
def test_files_of_ids(tmp_path: Path, case: str) -> None:
    content, name, outcome = ID_FILES[case]
    dataset = make_dataset(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    wanted = config("ids", index_file=str(tmp_path / name))
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=outcome):
            prepare.resolve_split(dataset, wanted)
    else:
        assert prepare.resolve_split(dataset, wanted).labeled_ids.tolist() == outcome


def test_index_file_of_unbiased_teacher(tmp_path: Path) -> None:
    """Positions count only images with a box that is not a crowd."""
    dataset = make_dataset(tmp_path, change=lambda c: c.update(annotations=c["annotations"][2:]))
    (tmp_path / "index.txt").write_text('{"10.0": {"1": [0, 18], "2": [19]}}')
    wanted = config("unbiased_teacher", index_file=str(tmp_path / "index.txt"))
    assert prepare.resolve_split(dataset, wanted).labeled_ids.tolist() == [11, 29]
    with pytest.raises(UserError, match="points to image 19 of a list of 19"):
        prepare.resolve_split(dataset, replace(wanted, fold=2))


# The command.


def run(tmp_path: Path, *overrides: str) -> int:
    return cli.main(["prepare", f"cache_dir={tmp_path}/cache", *overrides])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "ein Ordner = mit ü")
    (tmp_path / "ein Ordner = mit ü" / "train" / "3.jpg").write_text("")
    out = tmp_path / "exported files"
    keys = (f"data.root={tmp_path}/ein Ordner = mit ü", f"export_dir={out}", "prepare.percents=[10]", "check=full")
    assert run(tmp_path, "data=custom", *keys) == 0
    found = json.loads((out / "prepared.json").read_text())
    assert found["classes"] == ["cat", "dog"]
    train = found["parts"]["train"]
    assert (train["images"], train["boxes"], train["boxes_per_class"]) == (20, 40, {"cat": 20, "dog": 20})
    assert train["pictures"]["bad"] == {"13": "empty"}
    assert [(row["percent"], row["fold"]) for row in found["splits"]] == [(10, fold) for fold in range(1, 6)]
    row = found["splits"][0]
    assert (row["protocol"], row["labeled_images"], row["empty_images"]) == ("soft_teacher", 1, "drop_unannotated")
    assert row["labeled_ids"] == 2  # one of them is the empty file
    assert len(row["sha256"]) == 64
    assert sorted(p.name for p in out.iterdir()) == ["prepared.json", "train.1@10-unlabeled.json", "train.1@10.json"]
    printed = capsys.readouterr().out
    for words in ("custom", "cat", "dog", "train: pictures empty: 1 (3.jpg)", row["sha256"][:10], "train.1@10.json"):
        assert words in printed


def test_yaml_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in DIR/data, and --config-dir DIR, are all that another dataset takes."""
    make_dataset(tmp_path / "pictures")
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "birds.yaml").write_text(
        f"_target_: harness.data.datasets.coco_dataset\nname: birds\nroot: {tmp_path}/pictures\n"
        "train_annotations: train.json\ntrain_images: train\nval_annotations: val.json\nval_images: val\n"
    )
    command = ["--config-dir", str(tmp_path / "conf"), "prepare", "data=birds", f"cache_dir={tmp_path}/cache"]
    assert cli.main(command) == 0
    assert "data=birds" in capsys.readouterr().out


def test_command_names_classes_without_a_labelled_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path, boxes=1)
    assert run(tmp_path, "data=custom", f"data.root={tmp_path}", f"export_dir={tmp_path}") == 0
    found = json.loads((tmp_path / "prepared.json").read_text())
    rows = {row["percent"]: row for row in found["splits"] if row["fold"] == 1}
    assert "1" not in rows
    assert "less than one" in rows[1.0]["error"]
    assert rows[10.0]["classes_without_labeled_box"] == ["dog"]
    assert "no split: split.percent=1 of 20 images is less than one" in capsys.readouterr().out


def test_training_says_what_prepare_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Odd boxes, images without any, classes without a labelled box; here a run that cannot begin follows."""

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] > 12]
        content["annotations"][0]["bbox"] = [1, 1, 0, 5]

    make_dataset(tmp_path, boxes=1, change=change)
    train = ["train", "data=custom", f"data.root={tmp_path}", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    own = ["split.percent=100", "method=soft_teacher", "detector.weights=scratch", "device=cpu"]
    assert cli.main([*train, *own]) == 2
    told = capsys.readouterr().err.splitlines()
    for words in (
        "warning: train: boxes of zero or negative width or height, dropped: 1 (3.jpg [1, 1, 0, 5])",
        "warning: 4 of the 20 training images have no box at all: ",
        "warning: no labelled box shows 1 of the 2 classes (dog)",
        "ssodbench: method=soft_teacher needs unlabelled images and split.percent=100 leaves none",
    ):
        assert any(line.startswith(words) for line in told), (words, told)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=coco"], "instances_train2017.json.*download train2017.zip.*set data.root"),
        (["data=voc"], "trainval.txt.*download.*set data.root"),
        (["data=custom"], "train.json.*set data.root"),
        (["data=bccd"], "trainval.txt.*BCCD_Dataset.*set data.root"),
    ],
)
def test_missing_files_say_what_to_get(
    tmp_path: Path,
    overrides: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSODBENCH_DATA", str(tmp_path / "nothing"))
    assert run(tmp_path, *overrides) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_fatal_findings_end_the_command_after_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path)
    (tmp_path / "val" / "0.jpg").write_text("no picture")
    assert run(tmp_path, "data=custom", f"data.root={tmp_path}", f"export_dir={tmp_path}/out") == 2
    streams = capsys.readouterr()
    assert "val: pictures not an image, or damaged: 1 (0.jpg)" in streams.out
    assert "1 of the 3 val pictures" in streams.err
    assert not (tmp_path / "out" / "train.1@10.json").exists()


def test_every_split_is_resolved_before_one_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 % of 20 images is none."""
    make_dataset(tmp_path / "data")
    own = ("data=custom", f"data.root={tmp_path}/data", "split.percent=10", f"export_dir={tmp_path}/out")
    assert run(tmp_path, *own, "prepare.percents=[10,50,1]", "split.protocol=stac") == 2
    assert "less than one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a file", "a file/below"])
def test_export_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    make_dataset(tmp_path / "data")
    (tmp_path / "a file").write_text("mine")
    assert run(tmp_path, "data=custom", f"data.root={tmp_path}/data", f"export_dir={tmp_path}/{place}") == 2
    streams = capsys.readouterr()
    assert f"{tmp_path}/a file is a file: give a folder" in streams.err
    assert len(streams.err.splitlines()) == 1
    assert streams.out == ""  # told before anything is opened
    assert (tmp_path / "a file").read_text() == "mine"


def test_unlabelled_pictures_matter_to_full_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad ones refuse a run that needs them, and no other; the same goes for what `prepare` describes."""
    make_dataset(tmp_path / "data")
    images = [{"id": 99 + i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(3)]
    (tmp_path / "data" / "more.json").write_text(json.dumps({"images": images}))
    (tmp_path / "data" / "more").mkdir()
    keys = ["data.unlabeled_annotations=more.json", "data.unlabeled_images=more", f"cache_dir={tmp_path}/cache"]
    keys += ["data=custom", f"data.root={tmp_path}/data"]
    data = build.data(settings_of(config_file.load(keys)))
    assert data.unlabeled is not None
    assert "unlabeled" not in vars(data.dataset)  # not opened
    with pytest.raises(UserError, match="3 of the 3 unlabeled pictures"):
        build.data(settings_of(config_file.load([*keys, "split.protocol=full"])))
    assert run(tmp_path, *keys, f"export_dir={tmp_path}/out") == 0
    found = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert list(found["parts"]) == ["train", "val"]
    capsys.readouterr()
    assert run(tmp_path, *keys, "split.protocol=full") == 2
    assert "3 of the 3 unlabeled pictures" in capsys.readouterr().err


@pytest.mark.skipif(not TINY.exists(), reason="coco_tiny is not here")
def test_coco_tiny(tmp_path: Path) -> None:
    assert run(tmp_path, "data=coco", f"data.root={TINY}", "check=full", f"export_dir={tmp_path}") == 0
    found = json.loads((tmp_path / "prepared.json").read_text())
    parts = {part: (e["images"], e["boxes"], e["crowd_boxes"]) for part, e in found["parts"].items()}
    assert parts == {"train": (80, 699, 6), "val": (80, 804, 11)}
    assert (tmp_path / "instances_train2017.1@10.json").exists()
    assert (tmp_path / "instances_train2017.1@10-unlabeled.json").exists()
