"""Splits against the published vectors, counts and properties."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.core.types import Split, UserError
from harness.splits.protocols import PROTOCOLS, Candidates, SplitOptions, labeled_count

IMAGES, NONEMPTY = 118_287, 117_266  # of COCO train2017; with a box that is not a crowd
COCO = np.random.default_rng(0).permutation(6 * IMAGES)[:IMAGES]  # ids in file order

# Labelled images of STAC and mmdetection, folds 1 to 5.
LABELED = {
    1: (1174, 1175, 1174, 1174, 1175),
    2: (2329, 2346, 2342, 2337, 2343),
    5: (5764, 5772, 5756, 5766, 5762),
    10: (11285, 11261, 11234, 11262, 11235),
}
# First draws of fold 1: positions in the list of images.
STAC = [98539, 77708, 5192, 98047, 50057]
SOFT_TEACHER = [105285, 107335, 49358, 65744, 101669]
UNBIASED_TEACHER = [111401, 87201, 73289, 77773, 100286]  # of percent 1.0; in the list sorted by id


def make_split(
    image_ids: Any,
    percent: float | None = 10,
    fold: int = 1,
    protocol: str = "stac",
    *,
    offset: int = 0,
    index: Any = None,
    unlabeled_ids: Any = None,
) -> Split:
    """A split of images that all have a box; `percent` None: of a list that was made for no percentage.

    Args:
        index: what the protocol's index file holds; for `annotated`, the ids of the images with an annotation.
        unlabeled_ids: for `full` and `ids`.
    """
    ids = np.asarray(image_ids, np.int64)
    options = SplitOptions(
        protocol=protocol,
        percent=10 if percent is None else percent,
        fold=fold,
        offset=offset,
        index_file=None if percent is None else "{percent}.json",
        empty_images=None,
        crowd_boxes=None,
        min_side=None,
    )
    annotated = np.isin(ids, index) if protocol == "annotated" else np.ones(len(ids), bool)
    others = np.asarray(unlabeled_ids, np.int64) if protocol == "full" else None
    listed = (index, unlabeled_ids) if protocol == "ids" and index is not None else index
    return options.chosen.split(Candidates(ids, annotated, np.ones(len(ids), bool), others), options, listed)


@pytest.mark.parametrize("percent", LABELED)
def test_stac_counts(percent: int) -> None:
    counts = tuple(len(make_split(COCO, percent, fold, "stac").labeled_ids) for fold in range(1, 6))
    assert counts == LABELED[percent]


@pytest.mark.parametrize(("percent", "count"), [(1, 1182), (2, 2365), (5, 5914), (10, 11828)])
def test_soft_teacher_counts(percent: int, count: int) -> None:
    assert labeled_count(IMAGES, percent) == count
    assert len(make_split(COCO, percent, 3, "soft_teacher").labeled_ids) == count


def test_first_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draws themselves, spied on, bit for bit and in order."""
    drawn = []

    class Spy(np.random.RandomState):
        def choice(self, *args: Any, **kwargs: Any) -> Any:
            drawn.append(super().choice(*args, **kwargs))
            return drawn[-1]

    monkeypatch.setattr(np.random, "RandomState", Spy)
    stac = make_split(COCO, 1, 1, "stac")
    soft_teacher = make_split(COCO, 1, 1, "soft_teacher")
    assert [list(d[:5]) for d in drawn] == [STAC, SOFT_TEACHER]
    assert set(stac.labeled_ids) == set(COCO[drawn[0]])
    assert set(soft_teacher.labeled_ids) == set(COCO[drawn[1]])


def test_same_as_the_global_stream() -> None:
    """The scripts seed NumPy's global stream."""
    np.random.seed(3)
    expected = set(COCO[np.random.choice(range(IMAGES), size=labeled_count(IMAGES, 5))])
    assert set(make_split(COCO, 5, 3, "stac").labeled_ids) == expected
    np.random.seed(3 + 17)
    expected = set(COCO[np.random.choice(range(IMAGES), size=labeled_count(IMAGES, 5), replace=False)])
    assert set(make_split(COCO, 5, 3, "soft_teacher", offset=17).labeled_ids) == expected


@pytest.mark.parametrize("protocol", ["stac", "soft_teacher"])
def test_nested(protocol: str) -> None:
    parts = [set(make_split(COCO, percent, 2, protocol).labeled_ids) for percent in (0.01, 1, 10, 50, 100)]
    for small, large in pairwise(parts):
        assert small < large


def test_unbiased_teacher() -> None:
    """Positions count in the list sorted by id."""
    ids = COCO[:NONEMPTY]
    split = make_split(ids, 1, 1, "unbiased_teacher", index={"1.0": {"0": [5], "1": UNBIASED_TEACHER}})
    assert split.labeled_ids.tolist() == sorted(np.sort(ids)[UNBIASED_TEACHER])
    assert len(split.unlabeled_ids) == NONEMPTY - 5
    assert (np.diff(split.unlabeled_ids) > 0).all()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    ids = draw(st.lists(st.integers(0, 2**40), min_size=2, max_size=120, unique=True))
    protocol = draw(st.sampled_from(["stac", "soft_teacher", "unbiased_teacher", "ids"]))
    options: dict[str, Any] = {"image_ids": ids, "protocol": protocol, "fold": draw(st.integers(1, 10))}
    options["percent"] = draw(st.floats(100 / len(ids) + 1e-6, 100) if len(ids) > 1 else st.just(100.0))
    chosen = st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=len(ids), unique=True)
    if protocol == "unbiased_teacher":
        options["index"] = {str(options["percent"]): {str(options["fold"]): draw(chosen)}}
    elif protocol == "ids":
        options["index"] = [ids[row] for row in draw(chosen)]
    elif protocol == "soft_teacher":
        options["offset"] = draw(st.integers(0, 32767))
    return options


@settings(max_examples=80, deadline=None)
@given(cases())
def test_every_image_is_in_exactly_one_part(options: dict[str, Any]) -> None:
    split = make_split(**options)
    labeled, unlabeled = split.labeled_ids.tolist(), split.unlabeled_ids.tolist()
    assert sorted(labeled + unlabeled) == sorted(options["image_ids"])
    assert labeled
    ordered = sorted(options["image_ids"]) if options["protocol"] == "unbiased_teacher" else options["image_ids"]
    assert labeled == [i for i in ordered if i in set(labeled)]
    assert unlabeled == [i for i in ordered if i in set(unlabeled)]
    again = make_split(**options)
    assert again.sha256 == split.sha256
    assert (split.protocol, split.percent, split.fold) == (options["protocol"], options["percent"], options["fold"])


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["ids", "annotated"]))
def test_share_of_a_list_is_what_it_has(total: int, count: int, protocol: str) -> None:
    """Where no percentage is asked for, the split says which one the list gives; the fold changes nothing."""
    ids = list(range(7, 7 + total))
    listed = ids[: min(count, total)]
    split = make_split(ids, None, 1, protocol, index=listed)
    assert split.percent == pytest.approx(100 * len(listed) / total)
    assert (split.labeled_ids.tolist(), split.unlabeled_ids.tolist()) == (listed, ids[len(listed) :])
    assert make_split(ids, None, 4, protocol, index=listed).sha256 == split.sha256


def test_hash_names_the_two_sets() -> None:
    ids = list(range(100, 200))
    drawn = make_split(ids, 10, 1, "soft_teacher")
    listed = make_split(ids[::-1], 10, 1, "ids", index=drawn.labeled_ids[::-1])
    assert listed.sha256 == drawn.sha256
    others = [
        make_split(ids, 10, 2, "soft_teacher"),
        make_split(ids, 20, 1, "soft_teacher"),
        make_split(ids, 10, 1, "stac"),
    ]
    assert len({drawn.sha256, *(s.sha256 for s in others)}) == 4


def test_full() -> None:
    split = make_split([3, 1], 5, 1, "full", unlabeled_ids=[9, 7])
    assert (split.labeled_ids.tolist(), split.unlabeled_ids.tolist(), split.percent) == ([3, 1], [9, 7], 100)


def test_ids_with_both_parts_given() -> None:
    split = make_split([5, 4, 3, 2, 1], 40, 1, "ids", index=[1, 4], unlabeled_ids=[2, 5])
    assert (split.labeled_ids.tolist(), split.unlabeled_ids.tolist()) == ([4, 1], [5, 2])


def test_all_labelled() -> None:
    for protocol in ("stac", "soft_teacher", "unbiased_teacher"):
        split = make_split([3, 1, 2], 100, 1, protocol)
        assert (sorted(split.labeled_ids), len(split.unlabeled_ids)) == ([1, 2, 3], 0)


INDEX = {"1.0": {"1": [0, 1]}, "10.0": {"1": [0, 99], "2": ["a"], "3": []}}

# Options over 50 images, and what the message must say.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown protocol": ({"protocol": "coco"}, "protocol=coco is not one of stac, soft_teacher"),
    "percent 0": ({"percent": 0}, "percent=0 is not between"),
    "percent 101": ({"percent": 101}, "percent=101 is not between"),
    "percent NaN": ({"percent": float("nan")}, "percent=nan"),
    "fold 0": ({"fold": 0}, "fold=0 is not between"),
    "fold 11": ({"fold": 11}, "fold=11 is not between"),
    "no labelled image": ({"percent": 1}, "percent=1 of 50 images is less than one: give at least 2"),
    "negative seed": ({"protocol": "soft_teacher", "offset": -9}, "offset=-9"),
    "no images": ({"image_ids": []}, "no image to split"),
    "ids twice": ({"image_ids": [1, 1]}, "not distinct"),
    "no index file": ({"protocol": "unbiased_teacher"}, "needs split.index_file"),
    "index is a list": ({"protocol": "unbiased_teacher", "index": [1]}, "needs split.index_file"),
    "percent not in the index": (
        {"protocol": "unbiased_teacher", "percent": 5, "index": INDEX},
        "no split.percent=5; it has 1.0, 10.0",
    ),
    "fold not in the index": (
        {"protocol": "unbiased_teacher", "percent": 10, "fold": 9, "index": INDEX},
        "no split.fold=9; it has 1, 2, 3",
    ),
    "beyond the list": ({"protocol": "unbiased_teacher", "percent": 10, "index": INDEX}, "image 99 of a list of 50"),
    "not numbers": ({"protocol": "unbiased_teacher", "percent": 10, "fold": 2, "index": INDEX}, "whole numbers"),
    "empty list": ({"protocol": "unbiased_teacher", "percent": 10, "fold": 3, "index": INDEX}, "lists no image"),
    "no ids": ({"protocol": "ids"}, "ids needs split.index_file"),
    "ids are names": ({"protocol": "ids", "index": ["a.jpg"]}, "whole numbers"),
    "ids are fractions": ({"protocol": "ids", "index": [1.5]}, "whole numbers"),
    "unknown id": ({"protocol": "ids", "index": [7, 77]}, "1 labelled image.*first 77, are not in the dataset"),
    "unknown unlabelled id": ({"protocol": "ids", "index": [7], "unlabeled_ids": [78]}, "1 unlabelled image.*first 78"),
    "in both parts": (
        {"protocol": "ids", "index": [7, 8], "unlabeled_ids": [8]},
        "first 8, are given as labelled and as",
    ),
    "empty ids": ({"protocol": "ids", "index": []}, "is empty"),
    "ids beyond 64 bits": ({"protocol": "ids", "index": [2**64]}, "whole numbers"),
    "positions beyond 64 bits": ({"protocol": "unbiased_teacher", "index": {"10": {"1": [2**63]}}}, "whole numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make_split(**({"image_ids": range(50)} | options))


def test_unbiased_teacher_draws_from_images_with_a_box_alone() -> None:
    options = SplitOptions(
        protocol="unbiased_teacher", percent=10, fold=1, offset=0, index_file="x", empty_images=None, crowd_boxes=None,
        min_side=None,
    )  # fmt: skip
    boxed = np.array([True, False, True, True])
    images = Candidates(np.array([9, 8, 7, 6]), np.ones(4, bool), boxed)
    split = options.chosen.split(images, options, {"10": {"1": [0, 2]}})
    assert (split.labeled_ids.tolist(), split.unlabeled_ids.tolist()) == ([6, 9], [7])


def test_every_protocol_is_named_as_it_is_chosen() -> None:
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())
