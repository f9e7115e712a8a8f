"""Pascal VOC folders: one XML file per picture, lists of names under ImageSets/Main.

VOC counts pixels from 1 and includes the last one, so a box is [xmin - 1, xmax] x [ymin - 1, ymax] in continuous
coordinates. Boxes whose corners share a row or column of pixels are taken for mistakes and dropped.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from harness.core.console import counted
from harness.core.types import UserError
from harness.core.validate import File, Limits, Name
from harness.data import annotation_cache
from harness.data.annotation_cache import Content
from harness.data.annotations import CleanAnnotations, RawAnnotations, clean
from harness.data.datasets import CocoIndex, Dataset, make_index, require, with_ids_from, with_pictures

DIFFICULT = ("crowd", "keep", "drop")

# name, (xmin, ymin, xmax, ymax), difficult
_Object = tuple[str, tuple[float, float, float, float], bool]


Files = Annotated[Sequence[File], Limits(least=1)]


def voc_dataset(
    name: Name,
    root: str | Path,
    cache_dir: str | Path,
    train: File | Files,
    val: File | Files | None,
    unlabeled: File | Sequence[File] | None = None,
    unlabeled_images: File | None = None,
    classes: Sequence[str | int | float | bool] | None = None,
    difficult: Literal["crowd", "keep", "drop"] = "crowd",
    download: str = "",
) -> Dataset:
    """A dataset in VOC format, of one folder or several joined.

    Args:
        name: how reports call it.
        root: folder that the lists are relative to.
        cache_dir: root of the cache.
        train, val: list files, such as VOC2007/ImageSets/Main/trainval.txt; the pictures and annotations of
            a list lie in JPEGImages and Annotations two folders above it. Without `val`, split.holdout takes images to
            evaluate on.
        unlabeled: lists of more images; opened only for split.protocol=full.
        unlabeled_images: a folder of pictures that nobody labelled, in place of `unlabeled`; added to the unlabelled
            images of any protocol.
        classes: class names, in the order of their labels; default: those of the training boxes, alphabetically.
        difficult: what to do with objects so marked. "crowd" gives them COCO's crowd flag: split.crowd_boxes decides
            whether training sees them, and the evaluation does not count them (with COCO's rule for crowds: several
            detections may match one). "keep" treats them as any other, "drop" leaves them out.
        download: where to get the files, for the message when they are missing.

    Images are numbered from 1 in the order of the lists: training, evaluation, unlabelled.

    Raises:
        UserError: if a file is missing or cannot be used.
    """
    if difficult not in DIFFICULT:
        raise UserError(f"data.difficult={difficult} is not one of {', '.join(DIFFICULT)}")
    base = Path(root).expanduser()
    train, val, unlabeled = (_as_list(lists) for lists in (train, val or (), unlabeled or ()))
    names = [str(name) for name in classes] if classes else None  # YAML reads names such as 7 or no as other things
    for key, lists in (("train", train), ("val", val)):
        for file in lists:
            require(base / file, name, key, ("voc", base, download))

    def open_part(lists: Sequence[str], known: Sequence[str] | None) -> CocoIndex:
        return voc_index(base, lists, Path(cache_dir), known, difficult)

    first = open_part(train, names)
    opened = open_part(val, first.category_names) if val else first.select([])
    second, no_val = with_ids_from(opened, len(first) + 1), "" if val else "data.val names no list"
    if unlabeled_images:
        whole = Dataset(name, first, second, voc_ap=True, no_val=no_val)
        return with_pictures(whole, base / Path(unlabeled_images).expanduser(), Path(cache_dir))
    missing = [base / file for file in unlabeled if not (base / file).exists()]
    if missing or not unlabeled:
        why = f"{missing[0]} is not there" if missing else "data.unlabeled names no list"
        return Dataset(name, first, second, None, why, voc_ap=True, no_val=no_val)

    def open_unlabeled() -> CocoIndex:
        third = open_part(unlabeled, first.category_names)
        return with_ids_from(third, len(first) + len(second) + 1)

    return Dataset(name, first, second, open_unlabeled, voc_ap=True, no_val=no_val)


def _as_list(lists: str | Sequence[str]) -> list[str]:
    return [lists] if isinstance(lists, str) else list(lists)


def voc_index(
    root: Path,
    lists: Sequence[str],
    cache_dir: Path,
    classes: Sequence[str] | None = None,
    difficult: Literal["crowd", "keep", "drop"] = "crowd",
) -> CocoIndex:
    """Opens the pictures of VOC list files; images and classes are numbered from 1.

    Args:
        root: folder that `lists` and the file names of the index are relative to.
        lists: list files, joined in this order.
        cache_dir: root of the cache.
        classes: names in the order of their labels; boxes of others are dropped and counted. Default: every name that
            occurs, alphabetically.
        difficult: see `voc_dataset`.
    """
    entries = [entry for file in lists for entry in _read_list(root, file)]
    if not entries:
        raise UserError(f"{root / lists[0] if lists else root} lists no image: give a list with one name per line")
    files = [root / folder / "Annotations" / f"{stem}.xml" for folder, stem in entries]
    names = [os.path.normpath(os.path.join(folder, "JPEGImages", stem)) for folder, stem in entries]
    parameters = {
        "form": "voc",
        "entries": [list(entry) for entry in entries],
        "classes": list(classes) if classes else None,
        "difficult": difficult,
    }
    origin = str(root / lists[0])

    def parse(contents: list[Content]) -> CleanAnnotations:
        return clean(_raw(origin, names, files, contents, classes, difficult))

    absent = [file for file in files if not file.exists()]
    if absent:
        raise UserError(
            f"{origin} lists {counted(len(absent), 'picture')} whose annotation is not there, first {absent[0]}: add "
            "it, or take the name off the list"
        )
    parsed, sha256 = annotation_cache.load_annotations(files, parameters, cache_dir, parse)
    return make_index(Path(lists[0]).stem, root, parsed, sha256)


def _read_list(root: Path, file: str) -> list[tuple[str, str]]:
    """(folder of the VOC tree relative to root, name of the picture without suffix) of each line.

    Lists of one class have a second column: -1 for pictures without the class, which are left out, 0 and 1 for others.
    """
    folder = os.path.normpath(os.path.join(file, "..", "..", ".."))
    try:
        lines = (root / file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else "is not a UTF-8 text file"
        raise UserError(f"{root / file} {why}: give a list with one picture name per line") from error
    found = []
    for line in filter(None, map(str.strip, lines)):
        name, _, flag = line.rpartition(" ")
        if not name or flag not in ("-1", "0", "1") or (root / folder / "Annotations" / f"{line}.xml").exists():
            found.append((folder, line))
        elif flag != "-1":
            found.append((folder, name.strip()))
    return found


def _raw(
    origin: str,
    stems: list[str],
    files: list[Path],
    contents: Sequence[Content],
    classes: Sequence[str] | None,
    difficult: str,
) -> RawAnnotations:
    """XML files as unchecked arrays. `stems` are picture names without their suffix, which the XML file knows."""
    names, sizes, objects, owners = [], [], [], []
    for number, (stem, file, content) in enumerate(zip(stems, files, contents, strict=True), 1):
        suffix, size, found = _parse(content, file)
        found = [entry for entry in found if not (entry[2] and difficult == "drop")]
        names.append(stem + suffix)
        sizes.append(size)
        objects += found
        owners += [number] * len(found)
    used = list(classes) if classes else sorted({name for name, _, _ in objects})
    others = sorted({name for name, _, _ in objects} - set(used))
    number_of = {name: label for label, name in enumerate([*used, *others], 1)}
    flags = np.array([flag for _, _, flag in objects], bool)
    corners = np.array([box for _, box, _ in objects], np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore", over="ignore"):  # "nan" and "inf" are numbers too; such boxes are dropped
        extent = corners[:, 2:] - corners[:, :2]
    extent = np.where(extent > 0, extent + 1, extent)  # both corners on one pixel: a click, not an object; dropped
    return RawAnnotations(
        origin,
        np.arange(1, len(names) + 1, dtype=np.int64),
        names,
        np.array(sizes, np.int64).reshape(-1, 2),
        list(enumerate(used, 1)),
        np.array(owners, np.int64),
        np.array([number_of[name] for name, _, _ in objects], np.int64),
        np.concatenate([corners[:, :2] - 1, extent], 1),
        flags if difficult == "crowd" else np.zeros(len(flags), bool),
        np.full(len(flags), np.nan),
        {number_of[name]: name for name in others},
    )


def _parse(content: Content, file: Path) -> tuple[str, tuple[int, int], list[_Object]]:
    """Suffix of the picture, its (height, width), and its objects."""
    try:
        tree = ElementTree.fromstring(content)
        suffix = os.path.splitext(tree.findtext("filename") or "")[1] or ".jpg"
        size = (_side(tree, "height"), _side(tree, "width"))
        objects = [_object(node, number) for number, node in enumerate(tree.iter("object"), 1)]
        return suffix, size, objects
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last: an encoding that nobody knows
        raise UserError(f"{file} is not a VOC annotation ({error}): correct that file") from error


def _side(tree: ElementTree.Element, name: str) -> int:
    """Height or width in pixels; some tools write 500.0."""
    text = _text(tree, f"size/{name}")
    side = float(text)
    if not 0 <= side < 2**31 or not side.is_integer():
        raise ValueError(f"<size><{name}> is {text}, not a whole number of pixels")
    return int(side)


def _object(node: ElementTree.Element, number: int) -> _Object:
    """An object; `number` counts those of a file, for messages."""
    try:
        name = _text(node, "name").strip()
        if not name:
            raise ValueError("<name> is empty")
        box = tuple(float(_text(node, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise ValueError(f"object {number}: {error}") from error
    return name, box, (node.findtext("difficult") or "0").strip() == "1"  # type: ignore[return-value]


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"no <{path.replace('/', '><')}> in <{node.tag}>")
    return text
