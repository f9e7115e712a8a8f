"""Guesses the format of a folder of data: for messages that say which settings read it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from harness.core.types import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_CONF = Path(__file__).parents[1] / "conf" / "data"
_MOST = 2000  # entries of a folder that are looked at: enough to tell, and quick on any disk
_YOLO = ("yolo", "ultralytics", "darknet")  # with a version behind it, as in yolov8


def check_option(overrides: Sequence[str], config_dirs: Iterable[str | Path]) -> None:
    """Looks at `data=VALUE` where a path or a format was given instead of an option.

    Raises:
        UserError: saying what to write instead.
    """
    folders = [_CONF, *(Path(folder).expanduser() / "data" for folder in config_dirs)]
    for override in overrides:
        key, _, value = override.partition("=")
        value = value.strip("'\"")
        if key.lstrip("+") != "data" or not value or any((folder / f"{value}.yaml").exists() for folder in folders):
            continue
        if value.lower().rstrip("0123456789v") in _YOLO:
            raise UserError(f"data={value} is not known: say data=yolo data.root=DIR, where DIR holds data.yaml")
        path = Path(value).expanduser()
        if _exists(path):
            raise UserError(f"data={value} is a path, where the name of a dataset belongs: {_remedy(path)}")
        if "/" in value:
            options = ", ".join(sorted(file.stem for file in _CONF.glob("*.yaml")))
            raise UserError(
                f"data={value} is no file or folder that is there, and no dataset's name: choose one of {options}, or "
                "say data=custom data.root=DIR for your own"
            )


def _remedy(path: Path) -> str:
    if path.suffix in (".yaml", ".yml") and path.is_file():
        if path.parent.name == "data":
            return f"say --config-dir {path.parent.parent} data={path.stem}"
        if _is_yolo_yaml(path):
            return f"say data=yolo {_at(path.parent)} data.description={shlex.quote(path.name)}"
        return f"move it to DIR/data/ and say --config-dir DIR data={path.stem}"
    if path.suffix == ".json" and path.is_file():
        return (
            f"say data=custom {_at(path.parent)} data.train_annotations={path.name} data.train_images=FOLDER "
            "data.val_annotations=FILE.json data.val_images=FOLDER"
        )
    if path.is_file():
        return "give the folder of a dataset in COCO's format by data=custom data.root=DIR"
    return suggestion(path) or (
        f"for a dataset in COCO's format say data=custom {_at(path)}, in Pascal VOC's data=voc {_at(path)}"
    )


def _at(root: Path) -> str:
    """The key, as a shell takes it."""
    return shlex.quote(f"data.root={root}")


def suggestion(root: Path, but: str = "", tried: str = "") -> str | None:
    """The settings that read a folder, guessed from the files in it; None if nothing is recognised.

    Args:
        root: the folder.
        but: a format to leave out, "coco" or "voc".
        tried: the option that did not work; it is not suggested again.
    """
    names = {name.lower(): name for name in _names(root)}
    found = None
    if but != "coco":
        found = _coco(root, names)
        found = None if found == f"say data={tried} {_at(root)}" else found
    if found is None and but != "voc":
        found = _voc(root, names)
    if found is None and _looks_like_yolo(root, names):
        found = f"say data=yolo {_at(root)}"
        found = None if tried == "yolo" else found
    if found is None and _has_labels_beside(root, names):
        found = (
            f"{root} has text labels beside its pictures, which are YOLO's, and no data.yaml that names the parts and "
            "the classes: write one there with the lines `train: .` and `names: [FIRST, SECOND]`, and say data=yolo "
            f"{_at(root)} split.holdout=0.2"
        )
    if found is None and not any(name.endswith((".json", ".xml")) for name in names) and _has_pictures(root, names):
        key = shlex.quote(f"data.unlabeled_images={root.absolute()}")
        found = (
            f"{root} holds pictures alone, which can be the unlabelled part of a labelled dataset: say data=custom "
            f"data.root=DIR split.protocol=full {key}"
        )
    return found


def _coco(root: Path, names: dict[str, str]) -> str | None:
    if _exists(root / "annotations" / "instances_train2017.json"):
        return f"say data=coco {_at(root)}"
    if {"train.json", "val.json", "train", "val"} <= names.keys():
        return f"say data=custom {_at(root)}"
    exported = "_annotations.coco.json"  # Roboflow's name, beside the pictures
    val = next((part for part in ("valid", "val", "test") if _exists(root / part / exported)), None)
    if val and _exists(root / "train" / exported):
        return (
            f"say data=custom {_at(root)} data.train_annotations=train/{exported} data.train_images=train "
            f"data.val_annotations={val}/{exported} data.val_images={val}"
        )
    files = [name for low, name in names.items() if low.endswith(".json")]
    if not files and "annotations" in names:
        inner = names["annotations"]
        files = [f"{inner}/{name}" for name in _names(root / inner) if name.lower().endswith(".json")]
    train, val = (_named(files, words) for words in (("train",), ("val", "test")))
    if not train or not val:
        return None
    return (
        f"say data=custom {_at(root)} data.train_annotations={train} data.train_images=FOLDER "
        f"data.val_annotations={val} data.val_images=FOLDER"
    )


def _voc(root: Path, names: dict[str, str]) -> str | None:
    years = sorted(name for low, name in names.items() if re.fullmatch(r"voc20\d\d", low))
    if "VOC2007" in years:
        return f"say data=voc {_at(root)}"
    place = next((p for p in ("", *(f"{y}/" for y in years)) if _exists(root / f"{p}Annotations")), None)
    if place is None or not any(name.endswith(".xml") for name in _names(root / f"{place}Annotations")):
        return None
    lists = f"{place}ImageSets/Main"
    files = sorted((name for name in _names(root / lists) if name.endswith(".txt")), key=len)
    train, val = (_named(files, words) for words in (("trainval", "train"), ("test", "val")))
    settings = f"data.train=[{lists}/{train or 'TRAIN.txt'}] data.val=[{lists}/{val or 'VAL.txt'}] data.classes=null"
    add = "" if train and val else f" (each a list in {root / lists} with one picture name per line)"
    return f"say data=voc {_at(root)} {settings}{add}"


def _named(files: Sequence[str], words: Sequence[str]) -> str | None:
    """The first file whose name has one of the words, the words in order of preference; `trainval` is no `val`."""
    for word in words:
        for file in files:
            name = os.path.basename(file).lower()
            if word in (name.replace("trainval", "") if word == "val" else name):
                return file
    return None


def _looks_like_yolo(root: Path, names: dict[str, str]) -> bool:
    if "labels" in names or any(_exists(root / part / "labels") for part in ("train", "val", "valid")):
        return True
    return any(_is_yolo_yaml(root / name) for low, name in names.items() if low.endswith((".yaml", ".yml")))


def _is_yolo_yaml(path: Path) -> bool:
    try:
        text = path.read_text(errors="replace")[:10_000]
    except OSError:
        return False
    return bool(re.search(r"^(names|nc)\s*:", text, re.MULTILINE)) and bool(
        re.search(r"^train\s*:", text, re.MULTILINE)
    )


def _has_pictures(root: Path, names: dict[str, str]) -> bool:
    """Whether pictures lie in the folder, or in one of the first folders in it."""
    if any(name.endswith(SUFFIXES) for name in names):
        return True
    return any(name.lower().endswith(SUFFIXES) for inner in islice(names.values(), 20) for name in _names(root / inner))


def _has_labels_beside(root: Path, names: dict[str, str]) -> bool:
    """Whether a picture in the folder, or in one of the first folders in it, has a text file of its name beside it."""
    folders = [names, *({name.lower(): name for name in _names(root / inner)} for inner in islice(names.values(), 20))]
    return any(
        f"{os.path.splitext(name)[0]}.txt" in inside for inside in folders for name in inside if name.endswith(SUFFIXES)
    )


def _names(folder: Path) -> Iterator[str]:
    """Names in a folder; none if it is no folder that can be read."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in islice(entries, _MOST))
    except OSError:
        return


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False
