"""Mistakes in a dataset: files that are not of the form, pictures and lists that do not fit, splits that it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case
from tests.bad_input.conftest import make_pets

DATA = "data=custom data.root={tmp}/pets"
PREPARE = f"prepare {DATA}"
TRAIN = f"train {DATA} device=cpu schedule=smoke detector.weights=scratch run_dir={{tmp}}/run"
VOC = "prepare data=voc data.root={tmp}/voc data.train=[ImageSets/Main/train.txt] data.val=[ImageSets/Main/val.txt]"
ENTRIES = {"image": "images", "box": "annotations", "class": "categories"}
Edit = Callable[[dict[str, Any]], Any]


def pets(change: Edit | None = None, part: str = "train") -> Callable[[Path], None]:
    """A copy of the healthy dataset with other annotations."""

    def prepare(folder: Path) -> None:
        make_pets(folder / "pets")
        path = folder / "pets" / f"{part}.json"
        content = json.loads(path.read_text())
        if change is not None:
            change(content)
        path.write_text(json.dumps(content))

    return prepare


def with_file(content: bytes, name: str = "train.json") -> Callable[[Path], None]:
    """A copy with one file's bytes replaced."""

    def prepare(folder: Path) -> None:
        make_pets(folder / "pets")
        (folder / "pets" / name).write_bytes(content)

    return prepare


def in_pets(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A copy with its files changed."""

    def prepare(folder: Path) -> None:
        make_pets(folder / "pets")
        change(folder / "pets")

    return prepare


def value(kind: str, key: str, new: Any, row: int = 2) -> Callable[[Path], None]:
    """A copy in which one entry has another value."""
    return pets(lambda content: content[ENTRIES[kind]][row].update({key: new}))


def without(kind: str, key: str) -> Callable[[Path], None]:
    return pets(lambda content: content[ENTRIES[kind]][1].pop(key))


def every_box(key: str, new: Any, part: str = "train") -> Callable[[Path], None]:
    return pets(lambda content: [row.update({key: new}) for row in content["annotations"]], part)


# What is wrong with one value, and what the sentence names: the file, the entry, the remedy.
VALUES: list[tuple[str, Callable[[Path], None], tuple[str, ...]]] = [
    ("image id beyond 2**53", value("image", "id", 2**53 + 1), ("'003.jpg'", "2**53", "number from 1")),
    ("image id beyond 64 bits", value("image", "id", 2**70), ("'003.jpg'", "2**53")),
    ("image id far below 0", value("image", "id", -(2**60)), ("'003.jpg'", "2**53")),
    ("image id with a fraction", value("image", "id", 3.5), ("images[2].id", "003.jpg", "whole numbers")),
    ("image id true", value("image", "id", True), ("images[2].id", "bool", "whole numbers")),
    ("image id in quotes", value("image", "id", "3"), ("images[2].id", "str", "without quotes")),
    ("image id null", value("image", "id", None), ("images[2].id", "003.jpg")),
    ("image id a list", value("image", "id", [3]), ("images[2].id", "003.jpg")),
    ("image id NaN", value("image", "id", float("nan")), ("images[2].id", "whole numbers")),
    ("image id twice", value("image", "id", 1), ("image id (1)", "number the images apart")),
    ("image id twice once written as a float", value("image", "id", 1.0), ("image id (1)", "more than once")),
    ("box of an image beyond 2**53", value("box", "image_id", 2**53 + 1), ("annotations[2]", "2**53")),
    ("box of an image in quotes", value("box", "image_id", "3"), ("annotations[2].image_id", "without quotes")),
    ("box of an image with a fraction", value("box", "image_id", 0.5), ("annotations[2].image_id", "whole numbers")),
    ("box of no image", without("box", "image_id"), ("image_id", "annotations[1]")),
    ("box of class beyond 64 bits", value("box", "category_id", 2**64), ("annotations[2]", "2**53")),
    ("box of class true", value("box", "category_id", True), ("annotations[2].category_id", "bool")),
    ("box of no class", without("box", "category_id"), ("category_id", "annotations[1]")),
    ("class id beyond 2**53", value("class", "id", 2**60, 1), ("category 'dog'", "2**53")),
    ("class id in quotes", value("class", "id", "8", 1), ("categories[1].id", "without quotes")),
    ("class id twice", value("class", "id", 3, 1), ("category id (3)", "number the classes apart")),
    ("class without an id", without("class", "id"), ("`id`", "categories[1]")),
    ("class without a name", without("class", "name"), ("`name`", "categories[1]")),
    ("class name a number", value("class", "name", 7, 1), ("categories[1].name", "in quotes")),
    ("class name empty", value("class", "name", "", 1), ("category 8", "''")),
    ("class name of two lines", value("class", "name", "big\ndog", 1), ("category 8", "'big\\ndog'")),
    ("class a text", pets(lambda c: c.update(categories=["cat", "dog"])), ("categories[0]",)),
    ("bbox of three numbers", value("box", "bbox", [1, 2, 3]), ("annotations[2].bbox", "[x, y, width, height]")),
    ("bbox of five numbers", value("box", "bbox", [1, 2, 3, 4, 5]), ("annotations[2].bbox", "four numbers")),
    ("bbox in quotes", value("box", "bbox", "1 2 3 4"), ("annotations[2].bbox", "four numbers")),
    ("bbox of texts", value("box", "bbox", ["1", "2", "3", "4"]), ("annotations[2].bbox[0]", "four numbers")),
    ("bbox of named sides", value("box", "bbox", {"x": 1}), ("annotations[2].bbox", "four numbers")),
    ("bbox with a side beyond floats", value("box", "bbox", [1, 1, 10**400, 1]), ("annotations[2].bbox[2]",)),
    ("bbox null", value("box", "bbox", None), ("annotations[2].bbox", "four numbers")),
    ("no bbox", without("box", "bbox"), ("`bbox`", "annotations[1]", "four numbers")),
    ("area in quotes", value("box", "area", "720"), ("annotations[2].area", "square pixels")),
    ("crowd in words", value("box", "iscrowd", "no"), ("annotations[2].iscrowd", "0 or 1")),
    ("width 0", value("image", "width", 0), ("003.jpg", "not positive")),
    ("height below 0", value("image", "height", -64), ("003.jpg", "not positive")),
    ("width with a fraction", value("image", "width", 64.5), ("images[2].width", "whole pixels")),
    ("width in quotes", value("image", "width", "64"), ("images[2].width", "whole pixels")),
    ("width beyond 64 bits", value("image", "width", 2**70), ("width of image '003.jpg'", "stored picture")),
    ("no height", without("image", "height"), ("`height`", "images[1]", "002.jpg")),
    ("no file name", without("image", "file_name"), ("`file_name`", "images[1]")),
    ("file name null", value("image", "file_name", None), ("images[2].file_name", "in quotes")),
    ("file name a number", value("image", "file_name", 3), ("images[2].file_name", "in quotes")),
    ("file name empty", value("image", "file_name", ""), ("image 3", "''")),
    ("file name with a zero byte", value("image", "file_name", "0\0.jpg"), ("image 3", "'0\\x00.jpg'")),
    ("file name of two lines", value("image", "file_name", "0\n3.jpg"), ("image 3", "'0\\n3.jpg'")),
    ("file name twice", value("image", "file_name", "001.jpg"), ("file name (001.jpg)", "once")),
    ("file name twice in two ways", value("image", "file_name", "./001.jpg"), ("file name (001.jpg)", "once")),
    ("images an object", pets(lambda c: c.update(images={"1": c["images"][0]})), ("$.images",)),
    ("images of names", pets(lambda c: c.update(images=["001.jpg"])), ("images[0]",)),
    ("boxes a text", pets(lambda c: c.update(annotations="none")), ("$.annotations",)),
    ("no images", pets(lambda c: c.pop("images")), ("`images`",)),
    ("no image", pets(lambda c: c.update(images=[], annotations=[])), ("lists no image",)),
    ("no boxes key", pets(lambda c: c.pop("annotations")), ("`annotations`",)),
    ("no classes key", pets(lambda c: c.pop("categories")), ("`categories`",)),
    ("no class", pets(lambda c: c.update(categories=[])), ("lists no category",)),
    ("no JSON", with_file(b"{images: []}"), ("cannot be read as JSON",)),
    ("half a file", with_file(b'{"images": [{"id": 1, "file_na'), ("cannot be read as JSON", "complete")),
    ("empty file", with_file(b""), ("is empty",)),
    ("a byte order mark alone", with_file(b"\xef\xbb\xbf"), ("is empty",)),
    ("UTF-16", with_file('{"images": []}'.encode("utf-16")), ("cannot be read as JSON",)),
    ("Latin letters beyond UTF-8", with_file(b'{"images": [{"file_name": "gr\xfcn.jpg"}]}'), ("cannot be read",)),
    ("deeply nested", with_file(b'{"info": ' + b"[" * 100_000), ("cannot be read as JSON",)),
    ("a list", with_file(b"[]"), ("list", "JSON object with images and annotations")),
    ("a list of detections", with_file(b'[{"image_id": 1, "score": 0.5}]'), ("perhaps of detections",)),
    ("JSON null", with_file(b"null"), ("JSON object",)),
    ("a number", with_file(b"5"), ("JSON object",)),
]
# Boxes that are dropped one by one leave nothing to train on if all are like that.
NO_BOX: list[tuple[str, Callable[[Path], None], tuple[str, ...]]] = [
    ("no box at all", pets(lambda c: c.update(annotations=[])), ("no box that can be trained on",)),
    ("boxes of unknown classes alone", every_box("category_id", 1), ("category 1", "not listed", "16")),
    ("boxes of unknown images alone", every_box("image_id", 99), ("image 99", "not listed")),
    ("negative sides alone", every_box("bbox", [9, 9, -3, 4]), ("negative width", "001.jpg [9, 9, -3, 4]")),
    ("NaN alone", every_box("bbox", [9, 9, float("nan"), 4]), ("NaN or infinite",)),
    ("infinity alone", every_box("bbox", [9, 9, float("inf"), 4]), ("NaN or infinite",)),
    ("huge coordinates alone", every_box("bbox", [1e300, 9, 1e300, 4]), ("beyond a billion px",)),
    ("boxes outside alone", every_box("bbox", [200, 9, 5, 4]), ("outside",)),
    ("crowds alone", every_box("iscrowd", 1), ("show no box", "split.crowd_boxes=drop")),
]


def voc(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """The pictures in Pascal VOC's layout, with something changed."""

    def prepare(folder: Path) -> None:
        make_pets(folder / "pets")
        root = folder / "voc"
        for name in ("Annotations", "ImageSets/Main"):
            (root / name).mkdir(parents=True)
        (root / "JPEGImages").mkdir()
        for part in ("train", "val"):
            stems = [f"{part}{path.stem}" for path in sorted((folder / "pets" / part).iterdir())]
            (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(stems))
            for stem in stems:
                shutil.copy(folder / "pets" / part / f"{stem[-3:]}.jpg", root / "JPEGImages" / f"{stem}.jpg")
                (root / "Annotations" / f"{stem}.xml").write_text(XML.format(stem))
        change(root)

    return prepare


XML = (
    "<annotation><filename>{}.jpg</filename><size><width>64</width><height>64</height></size><object><name>cat</name>"
    "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>"
)


def xml(old: str, new: str, content: bytes | None = None) -> Callable[[Path], None]:
    """One XML file with something replaced."""
    text = XML.format("train001").replace(old, new).encode() if content is None else content
    return voc(lambda root: (root / "Annotations" / "train001.xml").write_bytes(text))


def listed(name: str, content: bytes) -> Callable[[Path], None]:
    return voc(lambda root: (root / "ImageSets" / "Main" / f"{name}.txt").write_bytes(content))


VOC_FILES: list[tuple[str, Callable[[Path], None], tuple[str, ...]]] = [
    ("broken XML", xml("</object>", ""), ("train001.xml", "correct that file")),
    ("empty XML", xml("", "", b""), ("train001.xml", "no element")),
    ("XML in an unknown encoding", xml("", "", b'<?xml version="1.0" encoding="klingon"?><a/>'), ("train001.xml",)),
    ("no size", xml("<size><width>64</width><height>64</height></size>", ""), ("train001.xml", "<size><height>")),
    ("width in words", xml("<width>64", "<width>wide"), ("train001.xml", "wide")),
    ("width with a fraction", xml("<width>64", "<width>64.5"), ("train001.xml", "<size><width> is 64.5")),
    ("width NaN", xml("<width>64", "<width>nan"), ("train001.xml", "<size><width> is nan")),
    ("width beyond 64 bits", xml("<width>64", "<width>1e30"), ("train001.xml", "<size><width> is 1e30")),
    ("width 0 in XML", xml("<width>64", "<width>0"), ("train001.jpg", "not positive")),
    ("corner in words", xml("<xmin>5", "<xmin>left"), ("train001.xml", "object 1", "left")),
    ("corner missing", xml("<ymax>30</ymax>", ""), ("train001.xml", "object 1", "<bndbox><ymax>")),
    ("no box in XML", xml("bndbox>", "polygon>"), ("train001.xml", "object 1", "<bndbox>")),
    ("object without a name", xml("<name>cat</name>", ""), ("train001.xml", "object 1", "<name>")),
    ("object of an empty name", xml("<name>cat", "<name> "), ("train001.xml", "object 1", "<name> is empty")),
    ("XML missing", voc(lambda r: (r / "Annotations" / "train002.xml").unlink()), ("train002.xml", "off the list")),
    ("picture missing", voc(lambda r: (r / "JPEGImages" / "val001.jpg").unlink()), ("val001.jpg", "missing")),
    ("list of missing pictures", listed("train", b"nothing\nnobody\n"), ("2 pictures", "nothing.xml")),
    ("empty list", listed("train", b"\n\n"), ("train.txt", "lists no image")),
    ("list in another encoding", listed("val", b"\xff\xfe\x00x"), ("val.txt", "UTF-8")),
    ("list of a picture twice", listed("train", b"train001\ntrain001\n"), ("train001.jpg", "more than once")),
]


def _list_is_a_folder(root: Path) -> None:
    path = root / "ImageSets" / "Main" / "train.txt"
    path.unlink()
    path.mkdir()


def _as_it_is(_root: Path) -> None:
    """Changes nothing."""


def _alone(folder: Path) -> None:
    make_pets(folder / "pets")
    shutil.copytree(folder / "pets" / "train", folder / "alone")


def _yolo(folder: Path) -> None:
    for name in ("images", "labels"):
        (folder / "yolo" / name).mkdir(parents=True)
    (folder / "yolo" / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")


def _ids(content: Any) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        make_pets(folder / "pets")
        (folder / "ids.json").write_text(content if isinstance(content, str) else json.dumps(content))

    return prepare


QUOTED = pets(lambda content: content["images"][0].update(id="1"), "val")
IDS = f"{PREPARE} split.protocol=ids split.index_file={{tmp}}/ids.json"
FULL = f"{PREPARE} split.protocol=full"
SHOTS = f"{PREPARE} split.protocol=shots split.shots"
ALONE = ("split.protocol=full", "data.unlabeled_images={tmp}/alone")
CUSTOM = "data=custom data.root={tmp}/pets"

LABELS = f"{TRAIN} split.percent=50 method=stac method.offline.labels={{tmp}}/labels.json"
OWL = "method.offline.labeller=owl"

CASES = [
    *(Case(f"prepare, {name}", PREPARE, ("train.json", *names), prepare) for name, prepare, names in VALUES),
    *(Case(f"train, {name}", TRAIN, ("train.json", *names), prepare) for name, prepare, names in VALUES[::5]),
    *(Case(f"prepare, {name}", f"{PREPARE} split.percent=50", names, prepare) for name, prepare, names in NO_BOX),
    *(Case(f"train, {name}", f"{TRAIN} split.percent=50", names, prepare) for name, prepare, names in NO_BOX[::3]),
    *(Case(f"VOC, {name}", VOC, names, prepare) for name, prepare, names in VOC_FILES),
    Case("VOC, other classes", f"{VOC} data.classes=[dog]", ("no box", "cat", "not listed"), voc(_as_it_is)),
    Case("VOC, list is a folder", VOC, ("train.txt", "Is a directory"), voc(_list_is_a_folder)),
    Case("evaluation, id in quotes", PREPARE, ("val.json", "images[0].id"), QUOTED),
    Case("evaluation, id in quotes, train", TRAIN, ("val.json", "images[0].id"), QUOTED),
    Case(
        "evaluation, boxes dropped", PREPARE, ("no box to score", "negative"), every_box("bbox", [1, 1, -1, 1], "val")
    ),
    Case(
        "evaluation, other classes",
        PREPARE,
        ("classes of train and val differ", "bird"),
        pets(lambda content: content["categories"].append({"id": 9, "name": "bird"}), "val"),
    ),
    Case(
        "annotations a folder",
        PREPARE,
        ("train.json", "Is a directory"),
        in_pets(lambda root: [(root / "train.json").unlink(), (root / "train.json").mkdir()]),
    ),
    Case(
        "annotations gone",
        PREPARE,
        ("train.json", "train_annotations", "data.root"),
        in_pets(lambda root: (root / "train.json").unlink()),
    ),
    Case("picture folder gone", PREPARE, ("pets/val", "val_images"), in_pets(lambda root: shutil.rmtree(root / "val"))),
    Case(
        "picture folder a file",
        PREPARE,
        ("pets/val", "data.val_images", "no folder"),
        in_pets(lambda root: [shutil.rmtree(root / "val"), (root / "val").write_text("")]),
    ),
    Case(
        "all pictures gone",
        PREPARE,
        ("16 of the 16 train pictures", "001.jpg"),
        in_pets(lambda root: [path.unlink() for path in (root / "train").iterdir()]),
    ),
    Case(
        "a picture that is no file name",
        TRAIN,
        ("4 val pictures", "missing"),
        in_pets(lambda root: (root / "val" / "002.jpg").rename(root / "val" / "2.jpg")),
    ),
    Case("root a file", "prepare data=custom data.root={pets}/train.json", ("is a file", "data.root")),
    Case("root gone", "prepare data=custom data.root={tmp}/nowhere", ("nowhere/train.json", "data.root")),
    Case("root too long", f"prepare data=custom data.root=/{'x' * 5000}", ("train_annotations", "too long")),
    Case("data a folder", "prepare data={pets}", "say data=custom data.root={pets}"),
    Case("data a folder below this one", "train data=pets", "say data=custom data.root=pets", pets()),
    Case(
        "data a folder with a blank",
        ["prepare", "data={tmp}/my pets"],
        "say data=custom 'data.root={tmp}/my pets'",
        lambda folder: make_pets(folder / "my pets"),
    ),
    Case("data an annotation file", "prepare data={pets}/train.json", "data.train_annotations=train.json"),
    Case("data a VOC folder", "prepare data={tmp}/voc", VOC.removeprefix("prepare "), voc(_as_it_is)),
    Case("data a YOLO folder", "prepare data={tmp}/yolo", "data=yolo data.root=", _yolo),
    Case("data a YOLO file", "prepare data={tmp}/yolo/data.yaml", ("data=yolo", "data.description=data.yaml"), _yolo),
    Case("data=yolo without a folder", "train data=yolo data.root={tmp}", ("data.yaml", "data.root")),
    Case("data a folder of pictures", "prepare data={tmp}/alone", ALONE, _alone),
    Case("data nowhere", "prepare data=/no/such/place", ("data=/no/such/place", "data=custom data.root=DIR")),
    Case("data misspelt", "prepare data=cocoo", "data=cocoo is not known (did you mean coco?): choose one of"),
    Case("data unknown", "prepare data=zebra", "data=zebra is not known: choose one of"),
    Case("root of COCO a folder of pictures", "prepare data=coco data.root={tmp}/alone", ALONE, _alone),
    Case("root a folder of pictures", "train data=custom data.root={tmp}/alone", ALONE, _alone),
    Case("root of COCO in our own layout", f"prepare data=coco {CUSTOM.split()[1]}", CUSTOM, pets()),
    Case("root of VOC in our own layout", f"prepare data=voc {CUSTOM.split()[1]}", CUSTOM, pets()),
    Case("root in VOC's layout", "prepare data=custom data.root={tmp}/voc", "data=voc", voc(_as_it_is)),
    Case("root in YOLO's format", "prepare data=custom data.root={tmp}/yolo", ("train.json", "data=yolo"), _yolo),
    Case(
        "added folder gone",
        f"{PREPARE} split.percent=50 data.unlabeled_images={{tmp}}/none",
        ("none is not there", "data.unlabeled_images"),
        pets(),
    ),
    Case(
        "added folder gone, VOC",
        f"{VOC} data.unlabeled_images={{tmp}}/none",
        ("none is not there", "data.unlabeled_images"),
        voc(_as_it_is),
    ),
    Case(
        "added folder of texts, train",
        f"{TRAIN} split.percent=50 data.unlabeled_images={{tmp}}/texts",
        ("texts", "no picture", "data.unlabeled_images"),
        lambda folder: (make_pets(folder / "pets"), (folder / "texts").mkdir()),
    ),
    Case(
        "full without unlabelled images",
        FULL,
        ("data.unlabeled_images names none", "add them to data=custom", "split.percent=100"),
        pets(),
    ),
    Case("unlabelled folder gone", f"{FULL} data.unlabeled_images={{tmp}}/none", "none is not there", pets()),
    Case(
        "unlabelled folder of texts",
        f"{FULL} data.unlabeled_images={{tmp}}/texts",
        ("texts", "no picture"),
        lambda folder: (make_pets(folder / "pets"), (folder / "texts").mkdir()),
    ),
    Case(
        "unlabelled pictures that are none",
        f"{FULL} data.unlabeled_images={{tmp}}/bad",
        ("a.jpg", "can be read"),
        lambda folder: (make_pets(folder / "pets"), (folder / "bad").mkdir(), (folder / "bad/a.jpg").write_text("x")),
    ),
    Case("unlabelled pictures that are labelled", f"{FULL} data.unlabeled_images=train", "already", pets()),
    Case("labels of nobody", f"{LABELS}", ("method.offline.labels", "method.offline.labeller=NAME"), pets()),
    Case(
        "a labeller without labels",
        f"{TRAIN} method=stac method.offline.labeller=owl",
        ("method.offline.labeller=owl", "set method.offline.labels"),
        pets(),
    ),
    Case("labels gone", f"{LABELS} {OWL}", ("labels.json", "cannot be read"), pets()),
    Case(
        "labels that are none",
        f"{LABELS} {OWL}",
        ("labels.json", "no list of boxes"),
        lambda folder: (make_pets(folder / "pets"), (folder / "labels.json").write_text("[3]")),
    ),
    Case(
        "labels of other pictures",
        f"{LABELS} {OWL}",
        ("labels.json", "image ids"),
        lambda folder: (make_pets(folder / "pets"), (folder / "labels.json").write_text("[]")),
    ),
    Case(
        "labels and a stage 1",
        f"{LABELS} {OWL} method.offline.checkpoint={{tmp}}/run",
        ("method.offline.labels", "method.offline.checkpoint", "leave one"),
        pets(),
    ),
    Case(
        "nothing to evaluate on",
        f"{TRAIN} split.percent=50 data.val_annotations=null",
        ("data.val_annotations is null", "split.holdout=0.2"),
        pets(),
    ),
    Case(
        "nothing to evaluate on, VOC",
        f"{VOC} data.val=null",
        ("data.val names no list", "split.holdout=0.2"),
        voc(_as_it_is),
    ),
    Case("all held out", f"{PREPARE} split.percent=50 split.holdout=8", ("split.holdout=8", "give less"), pets()),
    Case("half an image held out", f"{PREPARE} split.holdout=1.5", ("split.holdout=1.5", "whole number"), pets()),
    Case("tuning set of all", f"{TRAIN} split.percent=50 split.tune=16", ("split.tune=16", "give less"), pets()),
    Case(
        "no tuning set", f"{TRAIN} split.percent=50 evaluation.set=tune", ("evaluation.set", "split.tune=0.1"), pets()
    ),
    Case("ids no JSON", IDS, ("ids.json", "not JSON"), _ids("[1, 2")),
    Case("ids of names", IDS, ("ids.json", "[0]", "whole numbers"), _ids(["001.jpg"])),
    Case("ids with a fraction", IDS, "whole numbers", _ids([1.5])),
    Case("ids beyond 64 bits", IDS, "whole numbers", _ids([2**70])),
    Case("ids that are not there", IDS, ("99", "not in the dataset"), _ids([1, 99])),
    Case("no ids", IDS, "empty", _ids([])),
    Case("ids without a file", f"{PREPARE} split.protocol=ids", "split.index_file", pets()),
    Case("annotated with an index file", f"{IDS} split.protocol=annotated", "split.index_file is read by", _ids([1])),
    Case(
        "annotated without a rest",
        f"{TRAIN} split.protocol=annotated method=soft_teacher",
        ("split.protocol=annotated leaves none", "method=supervised"),
        pets(),
    ),
    Case("too few images for the share", f"{PREPARE} split.percent=1", ("less than one", "at least"), pets()),
    Case("shots without a number", f"{PREPARE} split.protocol=shots", ("needs split.shots", "split.shots=5"), pets()),
    Case("shots of another protocol", f"{PREPARE} split.shots=5", ("split.shots=5", "split.protocol=shots"), pets()),
    Case("shots as a share", f"{SHOTS}=0.5", ("split.shots=0.5", "whole number"), pets()),
    Case("shots and percent", f"{SHOTS}=1 split.percent=50", ("split.percent and split.shots", "leave"), pets()),
    Case("shots and holdout", f"{SHOTS}=1 split.holdout=2", ("split.holdout=2", "split.tune=0.2"), pets()),
    Case(
        "shots and shares to describe", f"{SHOTS}=1 prepare.percents=[5]", ("prepare.percents", "leave it null"), pets()
    ),
    Case("shares and shots to describe", f"{PREPARE} prepare.shots=[5]", ("prepare.shots", "leave it null"), pets()),
    Case(
        "more shots than images of a class",
        f"{SHOTS}=9 prepare.folds=[1]",
        ("split.shots=9", "lower split.shots"),
        pets(),
    ),
    Case(
        "a suite with more shots than images of a class",
        f"suite suite=quick {DATA} suite.shots=[1,9]",
        ("shots-9-fold1", "lower split.shots", "suite.shots"),
        pets(),
    ),
    Case(
        "a suite by shots and percents",
        f"suite suite=quick {DATA} suite.shots=[1] suite.percents=[50]",
        ("suite.percents and suite.shots", "leave one"),
        pets(),
    ),
    Case(
        "a suite by shots of another protocol",
        f"suite suite=quick {DATA} suite.shots=[1] split.protocol=stac",
        ("suite.shots", "split.protocol=shots, not by stac"),
        pets(),
    ),
    Case(
        "a suite by shots with a reference",
        f"suite suite=quick {DATA} suite.shots=[1] suite.reference=true",
        ("suite.reference=true", "split.protocol=shots"),
        pets(),
    ),
    Case(
        "a suite of one split many times",
        f"suite suite=quick {DATA} split.protocol=annotated",
        ("suite.percents", "split.protocol=annotated"),
        pets(),
    ),
]
