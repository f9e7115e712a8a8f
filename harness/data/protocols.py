"""Which images are labelled: the published protocols as pure functions of the list of image ids.

"10 % of COCO" means three different sets in the literature:

* `stac`: STAC's and mmdetection's scripts draw int(percent / 100 * N) positions of the annotation file's image list
  with replacement from NumPy's legacy stream seeded by the fold; duplicates fall together, so 10 % of COCO's 118,287
  images are about 11,250 labelled ones instead of 11,828.
* `soft_teacher`: Soft Teacher's script draws without replacement, seed = fold + offset. Its shell driver took the
  offset from the shell's random numbers, so the authors' own folds cannot be made again; with offset 0, the default
  here, the folds are at least the same for everybody.
* `unbiased_teacher`: Unbiased Teacher ships a file of positions in the list of images that have a box which is not a
  crowd, sorted by image id (117,266 of COCO's).
* `ids`: the labelled ids are given, and the rest is unlabelled unless that is given too.
* `annotated`: images with an annotation are labelled, the rest is unlabelled: for datasets that are labelled in part.
* `full`: all of one dataset is labelled, another one is unlabelled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.core.types import Split, UserError

PROTOCOLS = ("stac", "soft_teacher", "unbiased_teacher", "ids", "annotated", "full")
BY_PERCENT = ("stac", "soft_teacher", "unbiased_teacher")  # the others take the images that they are given

Ids = np.ndarray | Sequence[int]


def make_split(
    image_ids: Ids,
    percent: float | None = 10,
    fold: int = 1,
    protocol: str = "stac",
    *,
    offset: int = 0,
    index: Any = None,
    unlabeled_ids: Ids | None = None,
) -> Split:
    """Splits images into labelled and unlabelled ones.

    Args:
        image_ids: (N,) distinct ids in the order of the annotation file; for `unbiased_teacher`, of the images that
            have a box which is not a crowd.
        percent: 0.01 to 100. At 100 every image is labelled, without a draw or an index file. For `ids` and
            `annotated`, which draw nothing, what the list was made for, or None: the share of the images that it has.
        fold: 1 to 10; for `unbiased_teacher`, one that the index file has.
        protocol: one of PROTOCOLS.
        offset: `soft_teacher`: added to the fold to give the seed.
        index: `unbiased_teacher`: the parsed file, {percent: {fold: [positions]}}; `ids`, `annotated`: labelled ids.
        unlabeled_ids: `full`: ids of the other dataset; `ids`: the unlabelled ids, default all others.

    Returns:
        The split; both parts keep the order of `image_ids` (sorted by id for `unbiased_teacher`).

    Raises:
        UserError: if no such split exists.
    """
    ids = np.asarray(image_ids, np.int64)
    _check(ids, percent, fold, protocol)
    if protocol == "full":
        if unlabeled_ids is None:
            raise UserError("split.protocol=full needs unlabelled images: name them in the dataset's YAML")
        return _split(ids, np.asarray(unlabeled_ids, np.int64), 100.0, fold, protocol)
    if protocol in ("ids", "annotated"):
        return _given(ids, index, unlabeled_ids, percent, fold, protocol)
    assert percent is not None
    if protocol == "unbiased_teacher":
        ids = np.sort(ids)
    if percent == 100:
        rows = np.arange(len(ids))
    elif protocol == "unbiased_teacher":
        rows = _unbiased_teacher(len(ids), percent, fold, index)
    else:
        rows = _drawn(len(ids), percent, fold, protocol, offset)
    labeled = np.zeros(len(ids), bool)
    labeled[rows] = True
    return _split(ids[labeled], ids[~labeled], percent, fold, protocol)


def labeled_count(total: int, percent: float) -> int:
    """How many positions the scripts of STAC, mmdetection and Soft Teacher draw."""
    return int(percent / 100.0 * total)


def _check(ids: np.ndarray, percent: float | None, fold: int, protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f"split.protocol={protocol} is not one of {', '.join(PROTOCOLS)}")
    if percent is not None and not 0.01 <= percent <= 100:
        raise UserError(f"split.percent={percent:g} is not between 0.01 and 100")
    if protocol in ("stac", "soft_teacher") and not 1 <= fold <= 10:
        raise UserError(f"split.fold={fold} is not between 1 and 10")
    if not len(ids):
        raise UserError("there is no image to split: give a dataset with images")
    if not np.diff(np.sort(ids)).all():  # thirty times as fast as np.unique
        raise UserError("image ids are not distinct: number the images apart")


def _split(labeled: np.ndarray, unlabeled: np.ndarray, percent: float, fold: int, protocol: str) -> Split:
    """The hash is of the sorted ids, so that it names the two sets and nothing else."""
    digest = hashlib.sha256()
    for part in (labeled, unlabeled):
        digest.update(np.sort(part).astype("<i8").tobytes() + b"|")
    return Split(labeled, unlabeled, float(percent), int(fold), protocol, digest.hexdigest())


def _drawn(total: int, percent: float, fold: int, protocol: str, offset: int) -> np.ndarray:
    """Positions from NumPy's legacy stream, which is frozen: the same in every version, and prefixes of one stream."""
    count = labeled_count(total, percent)
    if not count:
        raise UserError(
            f"split.percent={percent:g} of {total} images is less than one: give at least {_ceil(100 / total):g}"
        )
    if protocol == "stac":
        return np.random.RandomState(fold).choice(total, count)
    seed = fold + offset
    if not 0 <= seed < 2**32:
        raise UserError(f"split.offset={offset} gives the seed {seed}, which is not between 0 and 2**32 - 1")
    return np.random.RandomState(seed).choice(total, count, replace=False)


def _ceil(value: float) -> float:
    """Rounded up to two digits, for messages."""
    digits = 1 - int(np.floor(np.log10(value)))
    return float(np.ceil(value * 10**digits) / 10**digits)


def _unbiased_teacher(total: int, percent: float, fold: int, index: Any) -> np.ndarray:
    folds = _lookup(index, percent, "split.percent")
    rows = _integers(_lookup(folds, fold, "split.fold"), "the index file")
    beyond = rows[(rows < 0) | (rows >= total)]
    if len(beyond):
        raise UserError(
            f"the index file points to image {beyond[0]} of a list of {total} ({len(beyond)} such positions): "
            "it was made for another dataset; give the file that belongs to this one as split.index_file"
        )
    if not len(rows):
        raise UserError(f"the index file lists no image for split.percent={percent:g} split.fold={fold}")
    return rows


def _lookup(table: Any, number: float, key: str) -> Any:
    """The entry of a JSON object whose key, a string, is this number."""
    if not isinstance(table, Mapping):
        raise UserError(
            "split.protocol=unbiased_teacher needs split.index_file, a JSON file {percent: {fold: [positions]}}: for "
            "COCO take dataseed/COCO_supervision.txt from https://github.com/facebookresearch/unbiased-teacher, or set "
            "split.protocol=stac"
        )
    for name, entry in table.items():
        try:
            if float(name) == float(number):
                return entry
        except ValueError:
            continue
    raise UserError(f"the index file has no {key}={number:g}; it has {', '.join(map(str, table))}")


def _integers(values: Any, what: str) -> np.ndarray:
    """(K,) int64 of a list of whole numbers."""
    try:
        array = np.asarray(values)
        if array.size and array.dtype.kind not in "iu":
            raise ValueError
        return array.astype(np.int64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{what} must list whole numbers, not {json.dumps(values, default=str)[:60]}") from error


def _given(ids: np.ndarray, labeled: Any, unlabeled: Any, percent: float | None, fold: int, protocol: str) -> Split:
    if labeled is None:
        raise UserError("split.protocol=ids needs split.index_file with the ids of the labelled images")
    labeled = _integers(labeled, "the labelled ids")
    is_labeled = np.isin(ids, labeled)
    rest = ids[~is_labeled] if unlabeled is None else _integers(unlabeled, "the unlabelled ids")
    for part, wanted in (("labelled", labeled), ("unlabelled", rest)):
        unknown = wanted[~np.isin(wanted, ids)]
        if len(unknown):
            raise UserError(
                f"{len(unknown)} {part} image id(s), first {unknown[0]}, are not in the dataset: "
                "give image ids, not positions"
            )
    both = labeled[np.isin(labeled, rest)]
    if len(both):
        raise UserError(
            f"{len(both)} image id(s), first {both[0]}, are given as labelled and as unlabelled: choose one"
        )
    if not len(labeled):
        raise UserError("the list of labelled image ids is empty: give at least one")
    share = 100 * float(is_labeled.mean()) if percent is None else percent
    return _split(ids[is_labeled], ids[np.isin(ids, rest)], share, fold, protocol)
