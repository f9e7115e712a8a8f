"""Datasets as arrays: images, boxes and categories of COCO's 118,287 images in under a second from the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness import annotation_cache, coco
from harness.annotations import CleanAnnotations, Finding, RawAnnotations, clean, finding, positions
from harness.cache import build_once
from harness.images import list_pictures, read_sizes
from harness.types import ImageSource, UserError

EMPTY_IMAGES = ("keep", "drop", "drop_unannotated")
CROWD_BOXES = ("drop", "keep")


@dataclass(frozen=True)
class CocoIndex:
    """Images and boxes of one annotation file. N images, M boxes, C classes.

    Boxes of image i are rows `offsets[i]:offsets[i + 1]`, in the file's order, as are the images.
    """

    name: str
    image_dir: str
    image_ids: np.ndarray  # (N,) int64
    file_names: Sequence[str]  # relative to image_dir, or absolute
    sizes: np.ndarray  # (N, 2) int64 (height, width) of the stored pixels, whatever an EXIF orientation says
    boxes: np.ndarray  # (M, 4) float32 xyxy px, clipped to the image
    xywh: np.ndarray  # (M, 4) float64 as the file gives them, for the evaluation
    labels: np.ndarray  # (M,) int64 in 1..C: position of the category, by ascending id
    crowd: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float32 px, of the object's mask where the file gives it
    offsets: np.ndarray  # (N + 1,) int64
    category_ids: np.ndarray  # (C,) int64, the dataset's own ids of the labels 1..C
    category_names: Sequence[str]
    sha256: str  # of the annotation files' content
    findings: tuple[Finding, ...] = ()  # what was wrong in them, and what was done about it

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.category_ids)

    def positions(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Rows of images in the index.

        Raises:
            UserError: if an id is not in it.
        """
        ids = np.asarray(ids, np.int64)
        rows = positions(self.image_ids, ids)
        if (rows < 0).any():
            raise UserError(f"image id {ids[rows < 0][0]} is not in {self.name}: give ids that the annotations list")
        return rows

    def box_rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the boxes of images.

        Args:
            images: (K,) rows of images, in any order.

        Returns:
            (R,) rows of their boxes, in that order, and (R,) which of the K images each belongs to.
        """
        counts = self.offsets[images + 1] - self.offsets[images]
        owner = np.repeat(np.arange(len(images)), counts)
        first = np.cumsum(counts) - counts
        return np.arange(len(owner)) - first[owner] + self.offsets[images][owner], owner

    def nonempty_ids(self) -> np.ndarray:
        """(K,) ids of the images with at least one box that is not a crowd, in file order."""
        return self.image_ids[self._counts(~self.crowd) > 0]

    def _counts(self, boxes: np.ndarray) -> np.ndarray:
        """(N,) how many boxes of each image are in the mask `boxes` (M,)."""
        total = np.concatenate([[0], np.cumsum(boxes)])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def boxes_per_class(self, ids: np.ndarray | Sequence[int] | None = None, crowd: str = "drop") -> np.ndarray:
        """(C,) number of boxes of each class on the given images, without crowds unless crowd="keep"."""
        rows, _ = self.box_rows(np.arange(len(self)) if ids is None else self.positions(ids))
        rows = rows if crowd == "keep" else rows[~self.crowd[rows]]
        return np.bincount(self.labels[rows] - 1, minlength=self.num_classes)

    def source(
        self,
        ids: np.ndarray | Sequence[int] | None = None,
        crowd: str = "drop",
        empty: str = "keep",
        min_side: int = 0,
        boxes: bool = True,
    ) -> ImageSource:
        """Images for a pipeline, in the order of `ids`.

        Args:
            ids: which images; default: all, in file order.
            crowd: "drop" leaves crowd boxes out, so that they are background; "keep" shows them as any other.
            empty: "keep" images without a shown box, "drop" them, or "drop_unannotated": only those without any
                annotation, so that images with crowd boxes alone stay.
            min_side: drop images with a shorter side in px.
            boxes: False for unlabelled images; the boxes then decide nothing but what `empty` asks for.
        """
        _choice("crowd_boxes", crowd, CROWD_BOXES)
        _choice("empty_images", empty, EMPTY_IMAGES)
        images = np.arange(len(self)) if ids is None else self.positions(ids)
        shown = np.ones(len(self.crowd), bool) if crowd == "keep" else ~self.crowd
        if empty != "keep":
            counts = np.diff(self.offsets) if empty == "drop_unannotated" else self._counts(shown)
            images = images[counts[images] > 0]
        images = images[self.sizes[images].min(1) >= min_side] if min_side else images
        rows, owner = self.box_rows(images)
        visible = shown[rows] if boxes else np.zeros(len(rows), bool)
        rows, owner = rows[visible], owner[visible]
        counts = np.bincount(owner, minlength=len(images))
        return ImageSource(
            [os.path.join(self.image_dir, self.file_names[i]) for i in images.tolist()],
            self.image_ids[images],
            self.sizes[images],
            self.boxes[rows],
            self.labels[rows],
            np.ones(len(rows), np.float32),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        )

    def coco_ground_truth(self, ids: np.ndarray | Sequence[int] | None = None) -> dict[str, Any]:
        """The annotations as a COCO dictionary for pycocotools: original category ids, boxes and areas, crowds marked.

        Annotations are numbered from 1: pycocotools takes a match with number 0 for none.
        """
        images = np.arange(len(self)) if ids is None else self.positions(ids)
        rows, owner = self.box_rows(images)
        categories = self.category_ids[self.labels[rows] - 1].tolist()
        columns = (self.image_ids[images[owner]].tolist(), categories, self.xywh[rows].tolist())
        flags = (self.areas[rows].tolist(), self.crowd[rows].astype(int).tolist())
        return {
            "info": {"description": self.name},
            "images": [
                {"id": int(self.image_ids[i]), "file_name": self.file_names[i], "height": int(h), "width": int(w)}
                for i, (h, w) in zip(images.tolist(), self.sizes[images], strict=True)
            ],
            "annotations": [
                {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": a, "iscrowd": k}
                for n, i, c, b, a, k in zip((rows + 1).tolist(), *columns, *flags, strict=True)
            ],
            "categories": [
                {"id": int(i), "name": name} for i, name in zip(self.category_ids, self.category_names, strict=True)
            ],
        }


@dataclass(frozen=True)
class Dataset:
    """Training images, images for evaluation, and perhaps more without labels."""

    name: str
    train: CocoIndex
    val: CocoIndex
    unlabeled: CocoIndex | None = None
    no_unlabeled: str = "the dataset names none"  # why `unlabeled` is None, for the message when it is asked for


def _without_boxes(folder: Path, names: list[str], sizes: list[Any]) -> RawAnnotations:
    none = np.zeros(0, np.int64)
    ids = np.arange(1, len(names) + 1, dtype=np.int64)
    size_array = np.array(sizes, np.int64).reshape(-1, 2)
    return RawAnnotations(
        str(folder), ids, names, size_array, [], none, none, np.zeros((0, 4)), none.astype(bool), np.zeros(0)
    )


def make_index(name: str, image_dir: Path, annotations: CleanAnnotations, sha256: str) -> CocoIndex:
    """An index from checked annotations."""
    values = {field.name: getattr(annotations, field.name) for field in fields(annotations)}
    return CocoIndex(name=name, image_dir=str(image_dir), sha256=sha256, **values)


def coco_index(
    annotations: Path, image_dir: Path, cache_dir: Path, *, labeled: bool = True, verify: bool = False
) -> CocoIndex:
    """Opens one COCO annotation file.

    Args:
        annotations: the JSON file.
        image_dir: folder that its file names are relative to.
        cache_dir: root of the cache.
        labeled: whether it must hold annotations and categories.
        verify: hash the file even if it looks unchanged.
    """
    origin = str(annotations)
    parsed, sha256 = annotation_cache.load(
        [annotations],
        {"form": "coco", "labeled": labeled},
        cache_dir,
        lambda contents: clean(coco.parse(contents.pop(), origin, labeled)),
        verify,
    )
    return make_index(annotations.stem, image_dir, parsed, sha256)


def folder_index(folder: Path, cache_dir: Path, threads: int = 8) -> CocoIndex:
    """The pictures in a folder and below it, by name; those that cannot be read are left out and counted.

    Their headers are read once, and again when a name, size, inode or time in the folder has changed. The sha256 is of
    names, file sizes and picture sizes.
    """
    listed = list_pictures(folder)
    names = [name for name, _ in listed]
    state = [[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in listed]

    def build(to: Path) -> None:
        seen = read_sizes([str(folder / name) for name in names], threads)
        usable = [row for row, size in enumerate(seen) if not isinstance(size, str)]
        bad = np.array([isinstance(size, str) for size in seen], bool)
        annotations = clean(_without_boxes(folder, [names[row] for row in usable], [seen[row] for row in usable]))
        annotations.findings += tuple(
            finding("pictures that cannot be read, left out", bad, lambda row: f"{names[row]} {seen[row]}")
        )
        annotation_cache.save(to, annotations)

    path = build_once(
        cache_dir / "annotations", {"form": "folder", "state": state, "code": annotation_cache.code_sha256()}, build
    )
    annotations = annotation_cache.read(path)
    size_of = {name: s.st_size for name, s in listed}
    described = [
        [n, size_of[n], *size] for n, size in zip(annotations.file_names, annotations.sizes.tolist(), strict=True)
    ]
    sha256 = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return make_index(folder.name, folder, annotations, sha256)


def coco_dataset(
    name: str,
    root: str | Path,
    cache_dir: str | Path,
    train_annotations: str = "train.json",
    train_images: str = "train",
    val_annotations: str = "val.json",
    val_images: str = "val",
    unlabeled_annotations: str | None = None,
    unlabeled_images: str | None = None,
    download: str = "",
    verify: bool = False,
) -> Dataset:
    """A dataset in COCO format.

    Args:
        name: how reports call it.
        root: folder that the other paths are relative to.
        cache_dir: root of the cache.
        train_annotations, val_annotations: JSON files.
        train_images, val_images: folders that the file names in them are relative to.
        unlabeled_annotations: JSON file that lists more images; needed only by split.protocol=full.
        unlabeled_images: their folder; without a JSON file, every picture in it.
        download: where to get the files, for the message when they are missing.
        verify: hash the annotation files even if they look unchanged.

    Raises:
        UserError: if a file is missing, cannot be used, or the classes of the parts differ.
    """
    root, cache = Path(root).expanduser(), Path(cache_dir)
    for part, file in (("train_annotations", train_annotations), ("val_annotations", val_annotations)):
        require(root / file, name, part, download)
    for part, folder in (("train_images", train_images), ("val_images", val_images)):
        require(root / folder, name, part, download)
    train = coco_index(root / train_annotations, root / train_images, cache, verify=verify)
    val = coco_index(root / val_annotations, root / val_images, cache, verify=verify)
    check_same_classes(train, val)
    missing = [root / file for file in (unlabeled_annotations, unlabeled_images) if file and not (root / file).exists()]
    if missing or not unlabeled_images:
        why = f"{missing[0]} is not there" if missing else "data.unlabeled_images names none"
        return Dataset(name, train, val, None, why)
    pictures = root / unlabeled_images
    if unlabeled_annotations:
        more = coco_index(root / unlabeled_annotations, pictures, cache, labeled=False, verify=verify)
    else:
        more = folder_index(pictures, cache)
    return Dataset(name, train, val, as_unlabeled(more, train))


def as_unlabeled(index: CocoIndex, train: CocoIndex) -> CocoIndex:
    """An index beside the training one: the same classes, and ids of its own."""
    if index.num_classes:
        check_same_classes(train, index)
    index = replace(index, category_ids=train.category_ids, category_names=train.category_names)
    clash = np.isin(index.image_ids, train.image_ids).any()
    return with_ids_from(index, int(train.image_ids.max()) + 1) if clash else index


def require(path: Path, dataset: str, key: str, download: str = "") -> None:
    """Raises UserError, with the remedy, if a file or folder of a dataset is missing."""
    if not path.exists():
        remedy = f"{download}, or set data.root" if download else f"set data.root or data.{key}"
        raise UserError(f"data={dataset} needs {path} ({key}), which is not there: {remedy}")


def check_same_classes(first: CocoIndex, second: CocoIndex) -> None:
    """Raises UserError unless both have the same categories under the same ids."""
    a, b = (dict(zip(i.category_ids.tolist(), i.category_names, strict=True)) for i in (first, second))
    if a != b:
        differing = [
            f"{i} is {a.get(i, 'absent')} / {b.get(i, 'absent')}" for i in sorted(a | b) if a.get(i) != b.get(i)
        ]
        raise UserError(
            f"the classes of {first.name} and {second.name} differ (category {', '.join(differing[:5])}"
            f"{', ...' if len(differing) > 5 else ''}): give both the same categories"
        )


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"split.{key}={value} is not one of {', '.join(choices)}")


def with_ids_from(index: CocoIndex, first: int) -> CocoIndex:
    """The same images, numbered from `first` on in their order."""
    return replace(index, image_ids=np.arange(first, first + len(index), dtype=np.int64))
