"""Datasets in COCO format: annotation files, folders of pictures, and what belongs together."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.config import layouts
from harness.core.types import Split, UserError
from harness.core.validate import File, Name
from harness.data import annotation_cache, coco
from harness.data.annotations import CleanAnnotations, RawAnnotations, clean, finding
from harness.data.cache import build_once
from harness.data.images import list_pictures, read_sizes
from harness.data.index import CocoIndex
from harness.splits.protocols import PROTOCOLS, SplitProtocol

EvaluationSet = Literal["val", "holdout", "tune"]


@dataclass(frozen=True)
class Dataset:
    """Training images, images for evaluation, and perhaps more without labels."""

    name: str
    train: CocoIndex
    val: CocoIndex
    open_unlabeled: Callable[[], CocoIndex] | None = None
    no_unlabeled: str = "the dataset names none"  # why `unlabeled` is None, for the message when it is asked for
    annotation_files: tuple[Path, ...] = ()  # what an export must not replace
    voc_ap: bool = False  # VOC's own AP50 is of interest beside COCO's AP
    adds_pictures: bool = False  # the unlabelled part is a folder of pictures, which every protocol takes
    no_val: str = ""  # why there are no images for evaluation, where `val` is empty
    tune: CocoIndex | None = None  # images of `split.tune`, of which no training sees anything
    evaluated_on: EvaluationSet = "val"  # what `val` is: the dataset's own, or images that `set_apart` took out
    undivided: Dataset | None = None  # what `set_apart` was given

    @property
    def whole(self) -> Dataset:
        """The dataset before images were set apart."""
        return self.undivided or self

    @cached_property
    def unlabeled(self) -> CocoIndex | None:
        """More images without labels, opened on first use: they may be many, and few protocols need them."""
        return self.open_unlabeled() if self.open_unlabeled else None

    @cached_property
    def _pool(self) -> CocoIndex:
        """The training images, and after them those of the folder that is added to the unlabelled part."""
        assert self.unlabeled is not None
        return joined(self.train, self.unlabeled)

    def reads_unlabeled(self, protocol: SplitProtocol) -> bool:
        """Whether a split needs the unlabelled part: it is all that is unlabelled, or it is added to that."""
        return protocol.takes_unlabeled_part or self.adds_pictures

    def unlabeled_of(self, split: Split) -> CocoIndex:
        """The index that a split's unlabelled ids are in; with their hidden boxes, to measure pseudo labels."""
        if not PROTOCOLS[split.protocol].takes_unlabeled_part:
            return self._pool if self.adds_pictures else self.train
        assert self.unlabeled is not None
        return self.unlabeled


def make_index(name: str, image_dir: Path, annotations: CleanAnnotations, sha256: str) -> CocoIndex:
    """An index from checked annotations."""
    values = {field.name: getattr(annotations, field.name) for field in fields(annotations)}
    return CocoIndex(name=name, image_dir=str(image_dir), sha256=sha256, **values)


def coco_index(annotations: Path, image_dir: Path, cache_dir: Path, *, labeled: bool = True) -> CocoIndex:
    """Opens one COCO annotation file.

    Args:
        annotations: the JSON file.
        image_dir: folder that its file names are relative to.
        cache_dir: root of the cache.
        labeled: whether it is refused without annotations and categories.
    """
    origin = str(annotations)
    parsed, sha256 = annotation_cache.load_annotations(
        [annotations],
        {"form": "coco", "labeled": labeled},
        cache_dir,
        lambda contents: clean(coco.parse(contents.pop(), origin, labeled)),
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
        if not usable:
            first = f" that can be read (first {names[0]}: {seen[0]})" if names else ""
            raise UserError(f"{folder} holds no picture{first}: set data.unlabeled_images to a folder of pictures")
        bad = np.array([isinstance(size, str) for size in seen], bool)
        annotations = clean(_without_boxes(folder, [names[row] for row in usable], [seen[row] for row in usable]))
        annotations.findings += tuple(
            finding("pictures that cannot be read, left out", bad, lambda row: f"{names[row]} {seen[row]}")
        )
        annotation_cache.save_annotations(to, annotations)

    path = build_once(
        cache_dir / "annotations", {"form": "folder", "state": state, "code": annotation_cache.code_sha256()}, build
    )
    annotations = annotation_cache.read_annotations(path)
    size_of = {name: s.st_size for name, s in listed}
    described = [
        [n, size_of[n], *size] for n, size in zip(annotations.file_names, annotations.sizes.tolist(), strict=True)
    ]
    sha256 = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return make_index(folder.name, folder, annotations, sha256)


def _without_boxes(folder: Path, names: list[str], sizes: list[Any]) -> RawAnnotations:
    none = np.zeros(0, np.int64)
    ids = np.arange(1, len(names) + 1, dtype=np.int64)
    size_array = np.array(sizes, np.int64).reshape(-1, 2)
    return RawAnnotations(
        str(folder), ids, names, size_array, [], none, none, np.zeros((0, 4)), none.astype(bool), np.zeros(0)
    )


def coco_dataset(
    name: Name,
    root: str | Path,
    cache_dir: str | Path,
    train_annotations: File = "train.json",
    train_images: File = "train",
    val_annotations: File | None = "val.json",
    val_images: File = "val",
    unlabeled_annotations: File | None = None,
    unlabeled_images: File | None = None,
    download: str = "",
) -> Dataset:
    """A dataset in COCO format.

    Args:
        name: how reports call it.
        root: folder that the other paths are relative to.
        cache_dir: root of the cache.
        train_annotations, val_annotations: JSON files. Without images for evaluation, split.holdout takes some.
        train_images, val_images: folders that the file names in them are relative to.
        unlabeled_annotations: JSON file that lists more images; opened only for split.protocol=full.
        unlabeled_images: their folder; without a JSON file, every picture in it that is not in the other two parts, so
            that it may be the folder where the labelled pictures are. Such a folder is added to the unlabelled images
            of any protocol.
        download: where to get the files, for the message when they are missing.

    Raises:
        UserError: if a file is missing, cannot be used, or the classes of the parts differ.
    """
    root, cache = Path(root).expanduser(), Path(cache_dir)
    layout = ("coco", root, download)
    given = {"train": (train_annotations, train_images)} | (
        {"val": (val_annotations, val_images)} if val_annotations else {}
    )
    places = {part: [root / Path(str(entry)).expanduser() for entry in pair] for part, pair in given.items()}
    for part, (file, _) in places.items():
        require(file, name, f"{part}_annotations", layout)
    for part, (_, folder) in places.items():
        require(folder, name, f"{part}_images", layout, folder=True)
    train, *others = (coco_index(file, folder, cache) for file, folder in places.values())
    val = others[0] if others else train.select([])
    check_same_classes(train, val)
    no_val = "" if others else "data.val_annotations is null"
    more_file, pictures = (
        root / Path(entry).expanduser() if entry else None for entry in (unlabeled_annotations, unlabeled_images)
    )
    files = tuple(file for file, _ in places.values()) + ((more_file,) if more_file else ())
    missing = [entry for entry in (more_file, pictures) if entry and not entry.exists()]
    if missing or not pictures:
        why = f"{missing[0]} is not there" if missing else "data.unlabeled_images names none"
        adds = bool(pictures) and not more_file
        return Dataset(name, train, val, None, why, files, adds_pictures=adds, no_val=no_val)
    if not more_file:
        return with_pictures(Dataset(name, train, val, annotation_files=files, no_val=no_val), pictures, cache)

    def open_unlabeled() -> CocoIndex:
        return as_unlabeled(coco_index(more_file, pictures, cache, labeled=False), train)

    return Dataset(name, train, val, open_unlabeled, annotation_files=files, no_val=no_val)


def with_pictures(dataset: Dataset, folder: Path, cache_dir: Path) -> Dataset:
    """The dataset with the pictures of a folder as its unlabelled part, but for those that it lists already.

    A folder that is not there is refused when a split is made.
    """

    def open_unlabeled() -> CocoIndex:
        listed = (dataset.train, dataset.val)
        return as_unlabeled(_others(folder_index(folder, cache_dir), listed), dataset.train)

    is_there = folder.exists()
    why = dataset.no_unlabeled if is_there else f"{folder} is not there"
    return replace(dataset, open_unlabeled=open_unlabeled if is_there else None, no_unlabeled=why, adds_pictures=True)


def joined(first: CocoIndex, second: CocoIndex) -> CocoIndex:
    """The images of two indices that have the same classes and no image id in common, under the first one's name."""
    places = [os.path.join(os.path.abspath(second.image_dir), name) for name in second.file_names]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("image_ids", "sizes", "boxes", "xywh", "labels", "crowd", "areas")
    }
    offsets = np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]])
    return replace(first, file_names=[*first.file_names, *places], offsets=offsets, **columns)


def _others(index: CocoIndex, known: tuple[CocoIndex, ...]) -> CocoIndex:
    """The pictures of a folder without those that other parts list; the folder's have no boxes."""
    listed = {path for part in known for path in part.real_paths()}
    new = np.array([path not in listed for path in index.real_paths()], bool)
    if not new.any():
        raise UserError(
            f"every picture in {index.image_dir} is in the training or the evaluation part already: set "
            "data.unlabeled_images to a folder with others"
        )
    left_out = finding("pictures that train or val lists, left out", ~new, lambda row: index.file_names[row])
    return replace(
        index,
        image_ids=index.image_ids[new],
        file_names=[name for name, keep in zip(index.file_names, new, strict=True) if keep],
        sizes=index.sizes[new],
        offsets=np.zeros(int(new.sum()) + 1, np.int64),
        findings=index.findings + tuple(left_out),
    )


def as_unlabeled(index: CocoIndex, train: CocoIndex) -> CocoIndex:
    """An index beside the training one: the same classes, and ids of its own."""
    if index.num_classes:
        check_same_classes(train, index)
    index = replace(index, category_ids=train.category_ids, category_names=train.category_names)
    clash = np.isin(index.image_ids, train.image_ids).any()
    return with_ids_from(index, int(train.image_ids.max()) + 1) if clash else index


def require(path: Path, dataset: str, key: str, layout: tuple[str, Path, str], folder: bool = False) -> None:
    """Checks that a file or folder of a dataset is there.

    Args:
        path: which.
        dataset: how reports call the dataset.
        key: the key under `data` that names it.
        layout: the dataset's form ("coco", "voc" or "yolo"), its root, and where to get it ("" if nobody offers it).
        folder: whether it must be a folder.

    Raises:
        UserError: it is missing, or no folder; with the settings that would read what lies in the root instead.
    """
    form, root, download = layout
    begin = f"data={dataset} needs {path} ({key}), which"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = f"{download}, or set data.root" if download else f"set data.root or data.{key}"
        if root.is_dir():
            but = "" if form == "coco" and key.endswith("annotations") else form
            remedy = layouts.suggestion(root, but, tried=dataset) or remedy
        elif root.is_file():
            remedy = f"{root} is a file: set data.root to the folder that holds it"
        raise UserError(f"{begin} is not there: {remedy}") from error
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise UserError(f"{begin} cannot be read ({why}): set data.root or data.{key}") from error
    if folder and not stat.S_ISDIR(mode):
        raise UserError(f"{begin} is no folder: set data.{key} to the folder of the pictures")


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


def with_ids_from(index: CocoIndex, first: int) -> CocoIndex:
    """The same images, numbered from `first` on in their order."""
    return replace(index, image_ids=np.arange(first, first + len(index), dtype=np.int64))
