"""Splits by images of each class: against the documented rule in plain loops, and what it promises on random images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness import api
from harness.config import compose
from harness.config.identity import config_sha256
from harness.core.types import Split, UserError
from harness.data import prepare
from harness.data.set_apart import set_apart
from harness.splits.protocols import Candidates
from harness.suite import plan
from tests.harness.data.test_set_apart import dataset_of, options

Images = dict[int, frozenset[int]]  # id -> the classes that it shows


def split_of(images: Images, shots: int, fold: int = 1, classes: int = 4) -> Split:
    ids = np.array(list(images), np.int64)
    shows = np.zeros((len(ids), classes), bool)
    for row, shown in enumerate(images.values()):
        shows[row, sorted(shown)] = True
    chosen = options("shots", fold=fold, shots=shots)
    names = [f"class {number}" for number in range(classes)]
    some = shows.any(1)
    return chosen.chosen.split(Candidates(ids, some, some, None, shows, names), chosen)


def by_the_rule(images: Images, shots: int, fold: int, classes: int = 4) -> set[int]:
    """As `ShotsSplit` documents it."""
    in_order = sorted(images)
    shuffled = [in_order[row] for row in np.random.RandomState(fold).permutation(len(in_order))]
    on = {label: [image for image in shuffled if label in images[image]] for label in range(classes)}
    taken: list[int] = []
    for label in sorted(range(classes), key=lambda one: (len(on[one]), one)):
        for image in on[label]:
            if sum(label in images[other] for other in taken) < shots and image not in taken:
                taken.append(image)
    for image in list(reversed(taken)):
        without = [other for other in taken if other != image]
        if all(sum(label in images[other] for other in without) >= shots for label in images[image]):
            taken = without
    return set(taken)


@st.composite
def _images(draw: st.DrawFn) -> tuple[Images, int]:
    """Images of which enough show each class, and the shots."""
    shots = draw(st.integers(1, 4))
    ids = draw(st.lists(st.integers(0, 10**6), min_size=4 * shots, max_size=40, unique=True))
    shown = {image: draw(st.frozensets(st.integers(0, 3), max_size=4)) for image in ids}
    for label in range(4):  # so that each has enough
        for image in ids[label * shots : (label + 1) * shots]:
            shown[image] = shown[image] | {label}
    return shown, shots


@settings(max_examples=150, deadline=None)
@given(_images(), st.integers(1, 10), st.randoms(use_true_random=False))
def test_what_a_split_promises(drawn: tuple[Images, int], fold: int, random: Any) -> None:
    images, shots = drawn
    split = split_of(images, shots, fold)
    labeled = set(split.labeled_ids.tolist())
    assert labeled == by_the_rule(images, shots, fold)
    assert labeled | set(split.unlabeled_ids.tolist()) == set(images)
    assert len(split.labeled_ids) + len(split.unlabeled_ids) == len(images)
    assert split.percent == pytest.approx(100 * len(labeled) / len(images))
    assert split.shots == shots
    for label in range(4):
        assert sum(label in images[image] for image in labeled) >= shots
    for image in labeled:  # none can be spared
        rest = labeled - {image}
        assert any(sum(label in images[other] for other in rest) < shots for label in range(4))
    elsewhere = list(images)
    random.shuffle(elsewhere)
    other = split_of({image: images[image] for image in elsewhere}, shots, fold)
    assert other.sha256 == split.sha256
    assert other.labeled_ids.tolist() == [image for image in elsewhere if image in labeled]  # in the file's order


def test_by_hand() -> None:
    """The permutation of five images by seed 1 is 2, 1, 4, 0, 3."""
    assert np.random.RandomState(1).permutation(5).tolist() == [2, 1, 4, 0, 3]
    images = {10: {0}, 20: {0, 1}, 30: {0}, 40: {1, 2}, 50: {0, 1}}
    # Class 2 is on 40 alone, class 1 then has one: with one shot it needs no other, and class 0 takes 30.
    known = {image: frozenset(shown) for image, shown in images.items()}
    assert split_of(known, 1, 1, 3).labeled_ids.tolist() == [30, 40]
    # Two shots of classes 0 and 1: class 1 takes 20 and 50, which are enough for class 0, too.
    two = {image: shown - {2} for image, shown in known.items()}
    assert split_of(two, 2, 1, 2).labeled_ids.tolist() == [20, 50]
    # 20 is taken for class 1, then 30 for class 0 as well where that needs two.
    spared = {10: {0}, 20: {1}, 30: {0, 1}, 40: {0}, 50: {0}}
    assert by_the_rule({i: frozenset(s) for i, s in spared.items()}, 1, 1, 2) == {30}


def test_an_image_that_is_not_needed_any_more_is_given_back() -> None:
    """What was taken for a rare class may lose its use by what a commoner one takes."""
    found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        images = {row: frozenset(np.flatnonzero(rng.random(4) < 0.4).tolist()) for row in range(12)}
        on = [sum(label in shown for shown in images.values()) for label in range(4)]
        if min(on) >= 2:
            first: set[int] = set()
            for label in sorted(range(4), key=lambda one: (on[one], one)):
                for row in np.random.RandomState(1).permutation(12).tolist():
                    if label in images[row] and sum(label in images[other] for other in first) < 2:
                        first.add(row)
            labeled = set(split_of(images, 2).labeled_ids.tolist())
            assert labeled <= first
            found += labeled < first
    assert found > 5


def test_folds_differ_and_stay() -> None:
    rng = np.random.default_rng(5)
    images = {row: frozenset(np.flatnonzero(rng.random(4) < (0.5, 0.2, 0.1, 0.05)).tolist()) for row in range(500)}
    splits = [split_of(images, 5, fold) for fold in range(1, 11)]
    assert len({split.sha256 for split in splits}) == 10
    assert split_of(images, 5, 3).sha256 == splits[2].sha256
    # NumPy's legacy stream is frozen, and so is what is drawn from it.
    assert splits[0].labeled_ids.tolist() == [67, 78, 90, 101, 119, 207, 249, 250, 305, 324, 350, 425, 485]


def test_too_few_images_of_a_class_are_told() -> None:
    images = {1: frozenset({0, 1}), 2: frozenset({0}), 3: frozenset({0, 1}), 4: frozenset({0})}
    with pytest.raises(UserError, match=r"split\.shots=3 .* 1 of the 2 classes .*class 1 2\): lower split\.shots to 2"):
        split_of(images, 3, classes=2)
    with pytest.raises(UserError, match=r"class 2 0.*take a class that is on none off the annotations"):
        split_of(images, 1, classes=3)


def test_images_count_as_a_run_shows_them() -> None:
    """Crowds, and images that are too small, show nothing."""
    dataset = dataset_of([[1], [1], [1], [1], [2], [2]])
    train = dataset.train
    train.crowd[:2] = True
    train.sizes[2] = (16, 64)
    assert train.shown_classes().sum(0).tolist() == [2, 2, 0]
    assert train.shown_classes("keep").sum(0).tolist() == [4, 2, 0]
    assert train.shown_classes("keep", 32).sum(0).tolist() == [3, 2, 0]
    for crowd, side in (("drop", 0), ("keep", 0), ("drop", 32), ("keep", 32)):
        source = train.source(None, crowd, "keep", side)
        shown = {int(number): set(source.labels[source.rows(row)].tolist()) for row, number in enumerate(source.ids)}
        found = train.shown_classes(crowd, side)
        for number, row in zip(train.image_ids.tolist(), found, strict=True):
            assert set((np.flatnonzero(row) + 1).tolist()) == shown.get(number, set())


def test_a_tuning_set_takes_no_labelled_image() -> None:
    """The split is drawn from what it leaves, so that each class keeps its images."""
    rng = np.random.default_rng(1)
    dataset = dataset_of([(np.flatnonzero(rng.random(3) < 0.4) + 1).tolist() for _ in range(200)])
    chosen = options("shots", shots=10, tune=0.5, empty_images="keep")
    with pytest.raises(UserError, match=r"the training part by split\.tune=0\.2 evaluation\.set=tune"):
        set_apart(dataset, options("shots", shots=10))
    divided = set_apart(dataset, chosen, "tune")
    assert divided.tune is not None
    split = prepare.resolve_split(divided, chosen)
    assert not np.isin(split.labeled_ids, divided.tune.image_ids).any()
    assert not np.isin(split.unlabeled_ids, divided.tune.image_ids).any()
    counts = prepare.images_by_class(divided.train, prepare.labeled_source(divided, split, chosen))
    assert min(counts.values()) >= 10


def test_what_does_not_go_with_it_is_refused() -> None:
    for words_given, words in {
        ("split.protocol=shots",): r"needs split\.shots",
        ("split.protocol=shots", "split.shots=5", "split.percent=10"): r"split\.percent and split\.shots both",
        ("split.shots=5",): r"split\.shots=5 is read by split\.protocol=shots, not by soft_teacher",
        ("split.protocol=shots", "split.shots=5", "split.holdout=0.2"): r"split\.holdout=0\.2 takes labelled images",
        ("split.protocol=shots", "split.shots=0"): r"split\.shots=0 must be",
    }.items():
        with pytest.raises(UserError, match=words):
            compose.load(words_given)


def test_what_is_new_changes_no_run_of_before() -> None:
    cfg = compose.load(["method=soft_teacher"])
    assert cfg.split.shots is None
    digest = config_sha256(cfg)
    OmegaConf.set_struct(cfg, False)
    del cfg.split["shots"]
    assert config_sha256(cfg) == digest


def test_a_suite_of_shots() -> None:
    cells = plan.plan(compose.load(["suite=smoke", "suite.shots=[1,5]", "suite.folds=[1,2]"]))
    assert len(cells) == 12
    for cell in cells:
        assert (cell.cfg.split.protocol, cell.cfg.split.shots, cell.cfg.split.fold) == (
            "shots",
            cell.percent,
            cell.fold,
        )
        assert f"shots-{cell.cfg.split.shots}-fold{cell.fold}" in cell.name
        own = compose.load(cell.overrides)  # as its process does
        assert config_sha256(own) == config_sha256(cell.cfg)
        assert sum(word.startswith("split.shots=") for word in cell.overrides) == 1
        if cell.needs is not None:
            assert cell.needs.cfg.split.shots == cell.cfg.split.shots
    same = plan.plan(compose.load(["suite=smoke", "suite.shots=[1]", "split.protocol=shots"]))
    assert {cell.cfg.split.shots for cell in same} == {1}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["suite.shots=[1]", "suite.percents=[5]"], "suite.percents and suite.shots both"),
        (["suite.shots=[1]", "split.protocol=stac"], "draws by split.protocol=shots, not by stac"),
        (["suite.shots=[1]", "suite.reference=true"], "suite.reference=true trains on all labels"),
        (["suite.shots=[]"], "suite.shots="),
        (["suite.shots=[0]"], "suite.shots"),
        (["suite.shots=[1]", "split.shots=5"], "say suite.shots="),
        (["split.protocol=shots"], "suite.shots=\\[1,5\\]"),
    ],
)
def test_a_suite_that_does_not_fit_is_refused(given: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan.plan(compose.load(["suite=smoke", *given]))


def test_files_of_a_split_are_named_by_its_shots() -> None:
    split = split_of({1: frozenset({0}), 2: frozenset({0})}, 1, 3, 1)
    labeled, unlabeled = options("shots", shots=1, fold=3).chosen.exported_names("train", split)
    assert (labeled, unlabeled) == ("train.3@1shots.json", "train.3@1shots-unlabeled.json")


@pytest.mark.timeout(120)
def test_a_run_records_what_is_labelled(tmp_path: Any) -> None:
    given = ["data=shapes", "data.train_images=60", "data.val_images=8", "split.protocol=shots", "split.shots=3"]
    small = ["schedule=smoke", "schedule.steps=2", "batch.labeled=2", "detector.weights=scratch", "device=cpu"]
    more = ["pipeline=torchvision", "evaluation.every=null", f"cache_dir={tmp_path / 'cache'}", "logging.loggers=[]"]
    cfg = api.load_config("method=supervised", *given, *small, *more, run_dir=str(tmp_path / "run"))
    record = api.train(cfg).record
    assert (record.protocol, record.shots) == ("shots", 3)
    assert min(record.labeled_by_class.values()) >= 3
    assert record.percent == pytest.approx(100 * record.labeled_images / 60)
    assert sum(record.labeled_by_class.values()) <= record.labeled_boxes
