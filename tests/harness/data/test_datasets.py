"""COCO annotations against hand examples, pycocotools and random datasets."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.core.types import UserError
from harness.data import annotation_cache, coco, datasets
from harness.data.annotations import RawAnnotations, clean, positions
from harness.data.datasets import CocoIndex, coco_dataset, coco_index

TINY = Path(__file__).parents[4] / "shared" / "data" / "coco_tiny"
needs_tiny = pytest.mark.skipif(not TINY.exists(), reason="coco_tiny is not here")


def annotations(**changes: Any) -> dict[str, Any]:
    """Two images, the second first; three boxes, one of them a crowd; category ids with a gap and out of order."""
    plain = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.jpg", "width": 20, "height": 10},
            {"id": 5, "file_name": "empty.jpg", "width": 20, "height": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 6.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0.5, 0.25, 10, 20], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 9, "bbox": [5, 5, 5, 5], "segmentation": [[5, 5, 10, 5, 10, 10]]},
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    return plain | changes


def write(folder: Path, content: Any, name: str = "train.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def opened(folder: Path, content: Any) -> CocoIndex:
    return coco_index(write(folder, content), folder / "train", folder / "cache")


def test_hand_example(tmp_path: Path) -> None:
    index = opened(tmp_path, annotations())
    assert index.image_ids.tolist() == [7, 3, 5]
    assert index.sizes.tolist() == [[30, 40], [10, 20], [10, 20]]
    assert index.category_ids.tolist() == [2, 9]
    assert list(index.category_names) == ["dog", "cat"]
    assert index.offsets.tolist() == [0, 2, 3, 3]
    assert index.boxes.tolist() == [[0.5, 0.25, 10.5, 20.25], [5, 5, 10, 10], [1, 2, 4, 6]]
    assert index.labels.tolist() == [1, 2, 2]
    assert index.crowd.tolist() == [True, False, False]
    assert index.areas.tolist() == [200, 25, 6.5]
    assert index.image_ids[index.boxed()].tolist() == [7, 3]
    assert index.findings == ()
    assert (index.boxes.dtype, index.labels.dtype) == (np.float32, np.int64)


def test_source_policies(tmp_path: Path) -> None:
    index = opened(tmp_path, annotations())
    everything = index.source()
    assert everything.ids.tolist() == [7, 3, 5]
    assert everything.boxes.tolist() == [[5, 5, 10, 10], [1, 2, 4, 6]]
    assert everything.offsets.tolist() == [0, 1, 2, 2]
    assert everything.paths[0] == str(tmp_path / "train" / "b.jpg")
    assert index.source(crowd="keep").labels.tolist() == [1, 2, 2]
    assert index.source(empty="drop").ids.tolist() == [7, 3]
    chosen = index.source([5, 3])
    assert (chosen.ids.tolist(), chosen.offsets.tolist()) == ([5, 3], [0, 0, 1])
    assert index.source(min_side=20).ids.tolist() == [7]
    hidden = index.source(boxes=False)
    assert (len(hidden.boxes), hidden.offsets.tolist()) == (0, [0, 0, 0, 0])


def test_images_with_crowds_alone(tmp_path: Path) -> None:
    content = annotations()
    del content["annotations"][2]
    index = opened(tmp_path, content)
    assert index.source(empty="drop").ids.tolist() == [3]
    assert index.source(empty="drop_unannotated").ids.tolist() == [7, 3]
    assert index.source(empty="drop", crowd="keep").ids.tolist() == [7, 3]
    with pytest.raises(UserError, match="empty_images=maybe"):
        index.source(empty="maybe")


def test_unknown_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image id 4 is not in train"):
        opened(tmp_path, annotations()).source([7, 4])


# What is wrong, what the message must name.
FATAL = {
    "not JSON": ("{images: 1}", "cannot be read as JSON"),
    "truncated": (json.dumps(annotations())[:-40], "cannot be read as JSON"),
    "empty file": ("", "cannot be read as JSON"),
    "a list": ([], "not a COCO annotation file"),
    "no images": ({"annotations": [], "categories": []}, "`images`"),
    "no annotations": ({"images": [], "categories": []}, "`annotations`"),
    "no categories": ({"images": [], "annotations": []}, "`categories`"),
    "no image": (annotations(images=[], annotations=[]), "lists no image"),
    "duplicate image id": (annotations(images=[annotations()["images"][0] | {"file_name": n} for n in "ab"]), r"\(7\)"),
    "duplicate file": (annotations(images=[annotations()["images"][0] | {"id": n} for n in (1, 2)]), r"\(b.jpg\)"),
    "duplicate category": (annotations(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category id"),
    "no size": (annotations(images=[{"id": 1, "file_name": "a.jpg"}]), r"`width`.*\$\.images\[0\]"),
    "zero size": (
        annotations(images=[{"id": 1, "file_name": "a.jpg", "width": 0, "height": 5}]),
        "not positive.*a.jpg",
    ),
    "size as a fraction": (
        annotations(images=[{"id": 1, "file_name": "a.jpg", "width": 4.5, "height": 5}]),
        r"\$\.images\[0\]\.width",
    ),
    "text id": (annotations(images=[{"id": "x1", "file_name": "a", "width": 1, "height": 1}]), r"\$\.images\[0\]\.id"),
    "id beyond 64 bits": (
        annotations(images=[annotations()["images"][0] | {"id": 2**70}]),
        r"id of image 'b.jpg' is \d+, beyond 2\*\*53",
    ),
    "three coordinates": (
        annotations(annotations=[{"image_id": 7, "category_id": 9, "bbox": [1, 2, 3]}]),
        r"\[0\]\.bbox",
    ),
    "no bbox": (annotations(annotations=[{"image_id": 7, "category_id": 9}]), "`bbox`"),
}


@pytest.mark.parametrize("case", FATAL)
def test_fatal_annotations(tmp_path: Path, case: str) -> None:
    content, message = FATAL[case]
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path, content)
    assert "train.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def box(*xywh: Any, image: int = 7, category: int = 9) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(xywh)}


# What is wrong (one box of an image of 40x30 px), what the finding says, and the box that is left.
SURVIVED: dict[str, tuple[Any, str, list[float] | None]] = {
    "unknown image": (box(1, 1, 1, 1, image=4), "image that is not listed, dropped: 1 (image 4)", None),
    "unknown category": (box(1, 1, 1, 1, category=1), "category that is not listed, dropped: 1 (category 1)", None),
    "NaN": (box(float("nan"), 1, 1, 1), "NaN or infinite", None),
    "infinite": (box(1, 1, float("inf"), 1), "NaN or infinite", None),
    "null": (box(1, None, 1, 1), "NaN or infinite", None),
    "zero width": (box(1, 1, 0, 5), "zero or negative width or height, dropped: 1 (b.jpg", None),
    "negative height": (box(1, 1, 5, -2), "zero or negative", None),
    "outside": (box(50, 1, 5, 5), "wholly outside", None),
    "left of the image": (box(-9, 1, 5, 5), "wholly outside", None),
    "partly outside": (box(-5, 20, 60, 20), "leave their image, clipped", [0, 20, 40, 30]),
    "a rounding error beyond the edge": (box(30, 20, 10.0004, 10), "", [30, 20, 40, 30]),
    "too small for float32": (box(39, 1, 1e-9, 5), "wholly outside", None),
}


@pytest.mark.parametrize("case", SURVIVED)
def test_odd_boxes(tmp_path: Path, case: str) -> None:
    entry, what, left = SURVIVED[case]
    index = opened(tmp_path, annotations(annotations=[entry, box(1, 2, 3, 4)]))
    assert index.boxes.tolist() == ([left] if left else []) + [[1, 2, 4, 6]]
    assert [finding.count for finding in index.findings] == ([1] if what else [])
    assert all(what in str(finding) for finding in index.findings)


def test_findings_count_all_and_show_some(tmp_path: Path) -> None:
    index = opened(tmp_path, annotations(annotations=[box(1, 1, 0, n) for n in range(1, 1201)]))
    (finding,) = index.findings
    assert finding.count == 1200
    assert str(finding).startswith("boxes of zero or negative width or height, dropped: 1,200 (b.jpg [1, 1, 0, 1], ")
    assert str(finding).endswith(", ...)")


def test_names_with_spaces_and_letters_beyond_ascii(tmp_path: Path) -> None:
    name = "grüne Äpfel/苹果 = 1.jpg"
    index = opened(
        tmp_path / "ein Ordner", annotations(images=[{"id": 7, "file_name": name, "width": 40, "height": 30}])
    )
    assert index.source().paths == [str(tmp_path / "ein Ordner" / "train" / name)]
    again = coco_index(tmp_path / "ein Ordner" / "train.json", tmp_path, tmp_path / "ein Ordner" / "cache")
    assert list(again.file_names) == [name]


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    index = opened(tmp_path, annotations(categories=[{"id": 2, "name": "cat"}, {"id": 9, "name": "cat"}]))
    assert list(index.category_names) == ["cat (id 2)", "cat (id 9)"]
    assert str(index.findings[0]) == "names that several classes have, told apart by id: 1 (cat)"


def test_annotations_that_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*train\.json \(Is a directory\)"):
        coco_index(tmp_path / "train.json", tmp_path, tmp_path / "cache")


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(annotations()).encode())
    assert len(coco_index(path, tmp_path, tmp_path / "cache")) == 3


def test_nan_in_a_name_is_no_number() -> None:
    content = json.dumps(annotations(annotations=[box(1, 2, 3, float("nan"))], categories=[{"id": 9, "name": "NaN"}]))
    raw = coco.parse(content.encode(), "x")
    assert raw.categories == [(9, "NaN")]
    assert np.isnan(raw.xywh[0, 3])


@given(
    known=st.lists(st.integers(-(2**62), 2**62), unique=True, max_size=30),
    other=st.lists(st.integers(-(2**62), 2**62), max_size=10),
    seed=st.randoms(use_true_random=False),
)
def test_positions(known: list[int], other: list[int], seed: random.Random) -> None:
    wanted = known + other
    seed.shuffle(wanted)
    got = positions(np.array(known, np.int64), np.array(wanted, np.int64))
    assert got.tolist() == [known.index(w) if w in known else -1 for w in wanted]


@st.composite
def raw_annotations(draw: st.DrawFn) -> RawAnnotations:
    """A random valid dataset: ids in any order, gaps, crowds, empty images."""
    ids = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=12, unique=True))
    categories = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    count = draw(st.integers(0, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = rng.integers(20, 200, (len(ids), 2))
    owner = rng.integers(0, len(ids), count)
    corner = (rng.random((count, 2)) * 0.6 * size[owner][:, ::-1]).round(2)
    extent = (0.1 + rng.random((count, 2)) * 0.3 * size[owner][:, ::-1]).round(2)
    return RawAnnotations(
        "random",
        np.array(ids),
        [f"{i}.jpg" for i in ids],
        size,
        [(c, f"class {c}") for c in categories],
        np.array(ids)[owner],
        rng.choice(categories, count),
        np.concatenate([corner, extent], 1),
        rng.random(count) < 0.3,
        np.full(count, np.nan),
    )


@settings(max_examples=60, deadline=None)
@given(raw_annotations())
def test_round_trip(raw: RawAnnotations) -> None:
    """Boxes, classes and flags come back from the ground truth dictionary as they went in, image by image."""
    index = datasets.make_index("random", Path("x"), clean(raw), "")
    assert index.findings == ()
    truth = index.coco_ground_truth()
    assert [(i["id"], i["height"], i["width"]) for i in truth["images"]] == [
        (i, h, w) for i, (h, w) in zip(raw.image_ids.tolist(), raw.sizes.tolist(), strict=True)
    ]
    assert {c["id"]: c["name"] for c in truth["categories"]} == dict(raw.categories)
    columns = (raw.box_image_ids, raw.box_category_ids, raw.xywh, raw.crowd)
    given_boxes = [(i, c, b, int(k)) for i, c, b, k in zip(*(v.tolist() for v in columns), strict=True)]
    boxes = [(a["image_id"], a["category_id"], a["bbox"], a["iscrowd"]) for a in truth["annotations"]]
    for image in raw.image_ids.tolist():
        assert [b for b in boxes if b[0] == image] == [b for b in given_boxes if b[0] == image]
    source = index.source(crowd="keep")
    names = dict(raw.categories)
    for row, image in enumerate(source.ids.tolist()):
        mine = [b for b in given_boxes if b[0] == image]
        assert [index.category_names[label - 1] for label in source.labels[source.rows(row)]] == [
            names[b[1]] for b in mine
        ]
        xyxy = np.array([[x, y, x + w, y + h] for _, _, (x, y, w, h), _ in mine]).reshape(-1, 4)
        np.testing.assert_allclose(source.boxes[source.rows(row)], xyxy, rtol=1e-6)


@needs_tiny
@pytest.mark.parametrize("part", ["train2017", "val2017"])
def test_same_as_pycocotools(tmp_path: Path, part: str) -> None:
    from pycocotools.coco import COCO

    path = TINY / "annotations" / f"instances_{part}.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
    index = coco_index(path, TINY / part, tmp_path)
    assert sorted(index.image_ids.tolist()) == sorted(truth.getImgIds())
    source = index.source(crowd="keep")
    for row, image in enumerate(source.ids.tolist()):
        mine = truth.loadAnns(truth.getAnnIds(imgIds=image))
        assert index.category_ids[source.labels[source.rows(row)] - 1].tolist() == [a["category_id"] for a in mine]
        xywh = np.array([a["bbox"] for a in mine])
        np.testing.assert_allclose(source.boxes[source.rows(row), 2:], xywh[:, :2] + xywh[:, 2:], atol=1e-3)
        with Image.open(source.paths[row]) as picture:
            assert picture.size == (source.sizes[row][1], source.sizes[row][0])


@needs_tiny
def test_scores_as_the_original_file(tmp_path: Path) -> None:
    """Detections get the same AP whether pycocotools reads the file or our dictionary."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path = TINY / "annotations" / "instances_val2017.json"
    index = coco_index(path, TINY / "val2017", tmp_path)
    rng = np.random.default_rng(0)
    stats = []
    with contextlib.redirect_stdout(io.StringIO()):
        original, ours = COCO(str(path)), COCO()
        ours.dataset = index.coco_ground_truth()
        ours.createIndex()
        rows = [
            [a["image_id"], *(np.array(a["bbox"]) * rng.uniform(0.9, 1.1, 4)), rng.random(), a["category_id"]]
            for a in original.dataset["annotations"]
        ]
        for truth in (original, ours):
            score = COCOeval(truth, truth.loadRes(np.array(rows)), "bbox")
            score.evaluate()
            score.accumulate()
            score.summarize()
            stats.append(score.stats)
    assert stats[0][0] > 0.2
    np.testing.assert_array_equal(*stats)


# The cache.


@pytest.fixture
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every file for one that was last touched long ago: change times cannot be set."""
    monkeypatch.setattr(annotation_cache, "_TICK_NS", -(10**15))


@pytest.mark.usefixtures("old_files")
def test_cached_and_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(tmp_path, annotations())
    monkeypatch.setattr(coco, "parse", lambda *_: pytest.fail("parsed again"))
    monkeypatch.setattr(annotation_cache, "digest", lambda _: pytest.fail("hashed again"))
    again = coco_index(tmp_path / "train.json", tmp_path / "train", tmp_path / "cache")
    assert again.sha256 == first.sha256
    for name in ("image_ids", "sizes", "boxes", "xywh", "labels", "crowd", "areas", "offsets", "category_ids"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert (again.file_names, again.category_names) == (first.file_names, first.category_names)


@pytest.mark.parametrize("old_enough", [False, True])
def test_same_size_and_time_is_not_the_same_file(
    tmp_path: Path, old_enough: bool, request: pytest.FixtureRequest
) -> None:
    """A rewrite that keeps the size and puts the modification time back is noticed, at once or later."""
    path = write(tmp_path, annotations())
    if old_enough:
        request.getfixturevalue("old_files")
    before = coco_index(path, tmp_path, tmp_path / "cache")
    stat = path.stat()
    if old_enough:
        time.sleep(0.05)  # several ticks of the file system's clock
    content = path.read_text().replace('"cat"', '"cow"')
    path.write_text(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = coco_index(path, tmp_path, tmp_path / "cache")
    assert list(after.category_names) == ["dog", "cow"]
    assert after.sha256 != before.sha256


def test_recent_files_are_hashed_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, annotations())
    calls = []
    read = annotation_cache._read_and_hash
    monkeypatch.setattr(annotation_cache, "_read_and_hash", lambda path: calls.append(1) or read(path))
    coco_index(tmp_path / "train.json", tmp_path, tmp_path / "cache")
    assert calls


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 21, 22, 100])
def test_content_and_hash_do_not_depend_on_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(annotation_cache, "_BLOCK", 7)
    content = bytes(range(size))
    (tmp_path / "file").write_bytes(content)
    expected = (content, hashlib.sha256(content).hexdigest())
    assert annotation_cache._read_and_hash(str(tmp_path / "file")) == expected


def test_copies_share_one_cache_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, annotations())
    other = write(tmp_path / "elsewhere", annotations())
    monkeypatch.setattr(coco, "parse", lambda *_: pytest.fail("parsed again"))
    assert coco_index(other, tmp_path / "pictures", tmp_path / "cache").image_dir == str(tmp_path / "pictures")


@pytest.mark.usefixtures("old_files")
@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "stamp"])
def test_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    first = opened(tmp_path, annotations())
    (arrays,) = (tmp_path / "cache").rglob("arrays.npz")
    if damage == "delete":
        arrays.unlink()
    elif damage == "truncate":
        arrays.write_bytes(arrays.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 0xFF
        arrays.write_bytes(bytes(content))
    else:
        for stamp in (tmp_path / "cache").rglob("stamps/*.json"):
            stamp.write_text("{")
    again = coco_index(tmp_path / "train.json", tmp_path / "train", tmp_path / "cache")
    np.testing.assert_array_equal(again.boxes, first.boxes)


def _open(folder: str) -> str:
    return coco_index(Path(folder) / "train.json", Path(folder), Path(folder) / "cache").sha256


@pytest.mark.timeout(60)
def test_many_processes_at_once(tmp_path: Path) -> None:
    write(tmp_path, annotations())
    with ProcessPoolExecutor(4) as pool:
        assert len(set(pool.map(_open, [str(tmp_path)] * 8))) == 1


@pytest.mark.timeout(60)
def test_file_that_changes_under_our_feet(tmp_path: Path) -> None:
    """Whatever was read, the sha256 belongs to what was parsed."""
    contents = [json.dumps(annotations(categories=[{"id": 2, "name": f"{n:03d}"}])) for n in range(200)]
    path = write(tmp_path, contents[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for content in contents:
                (tmp_path / "new").write_text(content)
                os.replace(tmp_path / "new", path)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(20):
            index = coco_index(path, tmp_path, tmp_path / "cache")
            assert index.sha256 == annotation_cache.digest([contents[int(index.category_names[0])].encode()])
    finally:
        stop.set()
        writer.join()


# Whole datasets.


def dataset_files(root: Path, train: Any = None, val: Any = None) -> Path:
    write(root, train or annotations(), "train.json")
    write(root, val or annotations(), "val.json")
    for part in ("train", "val"):
        (root / part).mkdir(exist_ok=True)
    return root


def test_dataset(tmp_path: Path) -> None:
    dataset = coco_dataset("mine", dataset_files(tmp_path), tmp_path / "cache")
    assert (dataset.name, len(dataset.train), len(dataset.val), dataset.unlabeled) == ("mine", 3, 3, None)


@pytest.mark.parametrize("missing", ["train.json", "val.json", "train", "val"])
def test_missing_part(tmp_path: Path, missing: str) -> None:
    path = dataset_files(tmp_path) / missing
    path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match=f"data=mine needs .*{missing} .*: fetch it from somewhere, or set data.root"):
        coco_dataset("mine", tmp_path, tmp_path / "cache", download="fetch it from somewhere")


def test_classes_differ(tmp_path: Path) -> None:
    other = annotations(categories=[{"id": 2, "name": "dog"}, {"id": 9, "name": "cow"}])
    with pytest.raises(UserError, match="category 9 is cat / cow"):
        coco_dataset("mine", dataset_files(tmp_path, val=other), tmp_path / "cache")


def test_unlabeled_list(tmp_path: Path) -> None:
    """COCO's list of unlabelled images has neither annotations nor categories; clashing ids are renumbered."""
    root = dataset_files(tmp_path)
    more = [{"id": i, "file_name": f"more {i}.jpg", "width": 8, "height": 6} for i in (1, 3)]
    write(root, {"images": more}, "more.json")
    (root / "more").mkdir()
    options = {"unlabeled_annotations": "more.json", "unlabeled_images": "more"}
    dataset = coco_dataset("mine", root, tmp_path / "cache", **options)
    assert dataset.unlabeled is not None
    assert dataset.unlabeled.image_ids.tolist() == [8, 9]
    assert dataset.unlabeled.category_ids.tolist() == [2, 9]
    (root / "more.json").unlink()
    dataset = coco_dataset("mine", root, tmp_path / "cache", **options)
    assert dataset.unlabeled is None
    assert "more.json is not there" in dataset.no_unlabeled


def test_unlabelled_images_are_opened_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be 123,000, and what is wrong with them is no matter of runs without them."""
    root = dataset_files(tmp_path)
    write(root, "no JSON", "more.json")
    (root / "more").mkdir()
    listed = coco_dataset("mine", root, tmp_path / "cache", unlabeled_annotations="more.json", unlabeled_images="more")
    with pytest.raises(UserError, match=r"more\.json cannot be read as JSON"):
        _ = listed.unlabeled
    calls = []
    monkeypatch.setattr(datasets, "list_pictures", lambda folder: calls.append(folder) or [])
    folder = coco_dataset("mine", root, tmp_path / "cache", unlabeled_images="more")
    assert not calls
    with pytest.raises(UserError, match=r"more holds no picture: set data\.unlabeled_images"):
        _ = folder.unlabeled
    assert calls == [root / "more"]


def test_unlabeled_folder(tmp_path: Path) -> None:
    root = dataset_files(tmp_path)
    (root / "more" / "deep").mkdir(parents=True)
    Image.new("RGB", (12, 9)).save(root / "more" / "b ü.jpg")
    Image.new("RGB", (5, 7)).save(root / "more" / "deep" / "a.PNG")
    (root / "more" / "notes.txt").write_text("no picture")
    (root / "more" / "broken.jpg").write_text("no picture")
    dataset = coco_dataset("mine", root, tmp_path / "cache", unlabeled_images="more")
    more = dataset.unlabeled
    assert more is not None
    assert list(more.file_names) == ["b ü.jpg", "deep/a.PNG"]
    assert more.sizes.tolist() == [[9, 12], [7, 5]]
    assert "pictures that cannot be read, left out: 1 (broken.jpg not an image" in str(more.findings[0])
    Image.new("RGB", (30, 20)).save(root / "more" / "b ü.jpg")
    again = coco_dataset("mine", root, tmp_path / "cache", unlabeled_images="more").unlabeled
    assert again is not None
    assert again.sizes.tolist() == [[20, 30], [7, 5]]
    assert again.sha256 != more.sha256


def test_unlabeled_pictures_among_the_labelled_ones(tmp_path: Path) -> None:
    """One folder, a few of its pictures labelled: the others are the unlabelled part."""
    root = dataset_files(tmp_path)
    for name in ("a.jpg", "b.jpg", "x.jpg"):
        Image.new("RGB", (40, 30)).save(root / "train" / name)
    more = coco_dataset("mine", root, tmp_path / "cache", unlabeled_images="train").unlabeled
    assert more is not None
    assert list(more.file_names) == ["x.jpg"]
    assert more.source().sizes.tolist() == [[30, 40]]
    assert str(more.findings[0]) == "pictures that train or val lists, left out: 2 (a.jpg, b.jpg)"
