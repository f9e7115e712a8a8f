"""Images for evaluation and for choices that are taken out of the training part, against counts made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cli
from harness.config import compose
from harness.config.identity import config_sha256
from harness.config.run import settings_of
from harness.core.types import UserError
from harness.data import prepare
from harness.data.datasets import Dataset
from harness.data.index import CocoIndex
from harness.data.set_apart import set_apart, stratified
from harness.data.voc import voc_dataset
from harness.data.yolo import yolo_dataset
from harness.engine import build
from harness.splits.protocols import SplitOptions
from tests.bad_input.conftest import make_pets
from tests.harness.data.test_yolo import GOOD, LABELS, write


def index_of(shown: Iterable[Iterable[int]], classes: int = 3) -> CocoIndex:
    """An index whose image i has a box of each of the labels `shown[i]`."""
    rows = [list(labels) for labels in shown]
    flat = np.array([label for labels in rows for label in labels], np.int64)
    none = np.zeros((len(flat), 4))
    return CocoIndex(
        name="train",
        image_dir="pictures",
        image_ids=np.arange(len(rows), dtype=np.int64) * 3 + 5,
        file_names=[f"{row}.jpg" for row in range(len(rows))],
        sizes=np.full((len(rows), 2), 64, np.int64),
        boxes=none.astype(np.float32),
        xywh=none,
        labels=flat,
        crowd=np.zeros(len(flat), bool),
        areas=np.zeros(len(flat), np.float32),
        offsets=np.concatenate([[0], np.cumsum([len(labels) for labels in rows])]).astype(np.int64),
        category_ids=np.arange(classes, dtype=np.int64),
        category_names=[f"class {number}" for number in range(classes)],
        sha256="of the file",
    )


def options(protocol: str = "soft_teacher", percent: float = 50, **more: Any) -> SplitOptions:
    none = dict.fromkeys(("index_file", "empty_images", "crowd_boxes", "min_side"))
    return SplitOptions(**{"protocol": protocol, "percent": percent, "fold": 1, "offset": 0, **none, **more})


def dataset_of(shown: Iterable[Iterable[int]], **more: Any) -> Dataset:
    train = index_of(shown)
    return Dataset("mine", train, train.select([]), **{"no_val": "there is none", **more})


ONE_EACH = [[1]] * 60 + [[2]] * 30 + [[3, 1]] * 10


def test_each_class_keeps_its_share() -> None:
    """A fifth of 60, 30 and 10 images whose rarest class is 1, 2 and 3."""
    index = index_of(ONE_EACH)
    taken = stratified(index, index.image_ids, 20, seed=(2,))
    assert np.bincount(np.searchsorted([60, 90, 100], index.positions(taken), side="right")).tolist() == [12, 6, 2]
    assert taken.tolist() == stratified(index, index.image_ids, 20, seed=(2,)).tolist()
    assert taken.tolist() != stratified(index, index.image_ids, 20, seed=(3,)).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(1, 3)), min_size=2, max_size=60), st.data())
def test_strata_lose_the_same_share(shown: list[set[int]], data: st.DataObject) -> None:
    index = index_of(shown)
    count = data.draw(st.integers(1, len(shown) - 1))
    taken = set(stratified(index, index.image_ids, count, seed=(1,)).tolist())
    assert len(taken) == count
    assert taken <= set(index.image_ids.tolist())
    images = {label: sum(label in labels for labels in shown) for label in (1, 2, 3)}
    rarest = [min(labels, key=lambda label: (images[label], label)) if labels else 0 for labels in shown]
    ids = index.image_ids.tolist()
    for stratum in set(rarest):
        members = [number for number, one in zip(ids, rarest, strict=True) if one == stratum]
        assert abs(len(taken & set(members)) - count * len(members) / len(ids)) < 1 + 1e-9 + len(set(rarest)) / 2


@pytest.mark.parametrize("protocol", ["stac", "soft_teacher", "annotated"])
def test_held_out_images_are_labelled_ones(protocol: str) -> None:
    """The rest of the split stays as the protocol drew it, and nobody trains on what is evaluated on."""
    dataset = dataset_of([*ONE_EACH, *([[]] * 40)])
    before = prepare.resolve_split(dataset, options(protocol))
    wanted = options(protocol, holdout=0.25)
    divided = set_apart(dataset, wanted)
    split = prepare.resolve_split(divided, wanted)
    held = divided.val.image_ids
    assert divided.evaluated_on == "holdout"
    assert set(held) <= set(before.labeled_ids)
    assert divided.val.annotated().all()  # the truth of an image without a box is not known
    assert sorted([*held, *split.labeled_ids]) == sorted(before.labeled_ids)
    assert split.unlabeled_ids.tolist() == before.unlabeled_ids.tolist()
    assert split.sha256 != before.sha256
    assert len(held) == round(0.25 * int(dataset.train.annotated()[dataset.train.positions(before.labeled_ids)].sum()))
    assert divided.val.sha256 != divided.train.sha256 == dataset.train.sha256
    assert not set(held) & set(divided.train.image_ids)
    for number in held:  # an image keeps its boxes
        assert divided.val.boxes_per_class([number]).tolist() == dataset.train.boxes_per_class([number]).tolist()


def test_a_number_of_images() -> None:
    divided = set_apart(dataset_of(ONE_EACH), options(holdout=7))
    assert len(divided.val) == 7


def test_the_tuning_set_is_the_same_for_every_fold_and_share() -> None:
    """It is taken from labelled and unlabelled images alike, and is evaluated on only where that is asked for."""
    dataset = dataset_of(ONE_EACH, no_val="")
    chosen = set()
    for fold in (1, 2):
        for percent in (10, 50):
            wanted = options(percent=percent, fold=fold, tune=0.2)
            before, divided = prepare.resolve_split(dataset, wanted), set_apart(dataset, wanted)
            split = prepare.resolve_split(divided, wanted)
            assert divided.tune is not None
            tune = set(divided.tune.image_ids.tolist())
            chosen.add(tuple(sorted(tune)))
            assert set(split.labeled_ids) == set(before.labeled_ids) - tune
            assert set(split.unlabeled_ids) == set(before.unlabeled_ids) - tune
            assert len(tune & set(before.labeled_ids)) < 20 * percent / 100 + 8  # drawn apart from the split
            assert (divided.evaluated_on, len(divided.val)) == ("val", 0)
            chosen_on = set_apart(dataset, wanted, "tune")
            assert (chosen_on.evaluated_on, set(chosen_on.val.image_ids)) == ("tune", tune)
    assert len(chosen) == 1
    assert len(chosen.pop()) == 20


def test_both_are_taken() -> None:
    wanted = options("annotated", holdout=10, tune=20)
    divided = set_apart(dataset_of(ONE_EACH), wanted)
    assert divided.tune is not None
    assert len({*divided.tune.image_ids, *divided.val.image_ids, *divided.train.image_ids}) == len(ONE_EACH)
    assert (len(divided.tune), len(divided.val), len(divided.train)) == (20, 10, 70)


def test_without_either_nothing_changes() -> None:
    dataset = dataset_of(ONE_EACH, no_val="")
    assert set_apart(dataset, options()) is dataset


@pytest.mark.parametrize(
    ("keys", "evaluate_on", "message"),
    [
        ({}, None, r"no images to evaluate on \(there is none\): .* split\.holdout=0\.2"),
        ({"tune": 5}, None, "no images to evaluate on"),
        ({}, "tune", r"evaluation\.set=tune needs .* split\.tune=0\.1"),
        ({"holdout": 2.5}, None, r"split\.holdout=2\.5 must be a share below 1, or a whole number"),
        ({"holdout": 50}, None, r"split\.holdout=50 leaves none of the 50 labelled images"),
        ({"tune": 100, "holdout": 1}, None, r"split\.tune=100 leaves none of the 100 images"),
    ],
)
def test_refused(keys: dict[str, Any], evaluate_on: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_apart(dataset_of(ONE_EACH), options(**keys), evaluate_on)


def test_nulls_are_not_in_the_identity() -> None:
    plain = config_sha256(compose.load([]))
    for key in ("split.holdout", "split.tune", "evaluation.set"):
        assert config_sha256(compose.load([f"{key}=null"])) == plain
    assert config_sha256(compose.load(["split.holdout=0.2"])) != plain
    assert config_sha256(compose.load(["split.tune=5", "evaluation.set=tune"])) != plain


KEYS = ["data=custom", "data.val_annotations=null", "split.protocol=annotated", "split.holdout=0.25"]


def test_coco_without_evaluation_images(tmp_path: Path) -> None:
    """Only labelled pictures, as a folder of one's own often is: no train and no val, no run without either."""
    make_pets(tmp_path / "pets")
    (tmp_path / "pets" / "val.json").unlink()
    keys = [*KEYS, f"data.root={tmp_path}/pets", f"cache_dir={tmp_path}/cache"]
    data = build.data(settings_of(compose.load(keys)))
    assert (len(data.val), len(data.labeled)) == (4, 12)
    assert not set(data.val.paths) & set(data.labeled.paths)
    again = build.data(settings_of(compose.load(keys)))
    assert again.split.sha256 == data.split.sha256
    with pytest.raises(UserError, match=r"no images to evaluate on \(data\.val_annotations is null\)"):
        build.data(settings_of(compose.load([*keys[:-3], *keys[-2:]])))


def test_suites_open_the_data_of_each_split(tmp_path: Path) -> None:
    make_pets(tmp_path / "pets")
    keys = ["data=custom", f"data.root={tmp_path}/pets", f"cache_dir={tmp_path}/cache", "split.holdout=2"]
    keys.append("detector.weights=scratch")
    build.prepare_caches([compose.load([*keys, f"split.percent={percent}"]) for percent in (50, 75)])


def test_yolo_without_val(tmp_path: Path) -> None:
    root = write(tmp_path / "d", {key: value for key, value in GOOD.items() if key != "val"}, LABELS)
    dataset = yolo_dataset("pets", root, tmp_path / "cache")
    assert (len(dataset.val), dataset.no_val) == (0, f"{root}/data.yaml has no key val")


def test_voc_without_val(tmp_path: Path) -> None:
    from tests.bad_input.annotations import _as_it_is, voc

    voc(_as_it_is)(tmp_path)
    lists = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("train.txt")]
    dataset = voc_dataset("voc", tmp_path, tmp_path / "cache", lists, None)
    assert (len(dataset.val), dataset.no_val) == (0, "data.val names no list")
    divided = set_apart(dataset, options("annotated", holdout=1))
    assert len(divided.val) == 1


def test_prepare_says_what_was_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pets(tmp_path / "pets")
    keys = [*KEYS, "split.tune=2", f"data.root={tmp_path}/pets", f"cache_dir={tmp_path}/cache"]
    assert cli.main(["prepare", *keys, f"export_dir={tmp_path}/out"]) == 0
    out = capsys.readouterr().out
    assert "the evaluation images are labelled training images that split.holdout took out" in out
    assert "split.tune took 2 images with" in out
    found = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert (found["evaluated_on"], found["tune"]["images"]) == ("holdout", 2)
    assert (found["parts"]["train"]["images"], found["parts"]["val"]["images"]) == (10, 4)
