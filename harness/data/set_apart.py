"""Images that are taken out of the training part: to choose settings on, and to evaluate on where there are no others.

Both draws are the same in every run: the split of a fold is drawn as ever, and loses what was taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from harness.core.types import UserError
from harness.data.datasets import Dataset
from harness.data.index import CocoIndex
from harness.data.prepare import resolve_split
from harness.splits.protocols import SplitOptions

# Lists, since a fold's number alone would give the very images that the fold draws as labelled ones.
_SEEDS = {"split.tune": (0, 1), "split.holdout": (0, 2)}


def set_apart(dataset: Dataset, options: SplitOptions, evaluate_on: str | None = None) -> Dataset:
    """The dataset without the images of `split.tune` and `split.holdout`, and with those that it is evaluated on.

    Only images whose truth is known are taken: those with an annotation, or any where split.empty_images=keep says that
    images without one show nothing. Held-out ones are of the labelled images, tuning ones of all.

    Args:
        dataset: as it was opened.
        options: the protocol, and how many images to take.
        evaluate_on: `tune` for the tuning set; `val` or None for the held-out images, or else the dataset's own.

    Raises:
        UserError: there is nothing to evaluate on, or too few images to take.
    """
    if evaluate_on == "tune" and options.tune is None:
        raise UserError("evaluation.set=tune needs images to evaluate on: set split.tune, such as split.tune=0.1")
    if dataset.no_val and options.holdout is None and evaluate_on != "tune":
        share = "the training part by split.tune=0.2 evaluation.set=tune"
        if not options.chosen.leaves_tune:
            share = "the labelled ones by split.holdout=0.2"
        raise UserError(
            f"data={dataset.name} has no images to evaluate on ({dataset.no_val}): give some, or take a share of "
            f"{share}"
        )
    if options.tune is None and options.holdout is None:
        return dataset
    train = dataset.train
    ids = train.image_ids if options.empty_images == "keep" else train.image_ids[train.annotated()]
    tune = _taken(train, ids, options.tune, "split.tune", "images with known truth")
    labeled = resolve_split(dataset, options).labeled_ids
    ids = labeled[np.isin(labeled, ids) & ~np.isin(labeled, tune)]
    held = _taken(train, ids, options.holdout, "split.holdout", "labelled images with known truth")
    rest = train.image_ids[~np.isin(train.image_ids, np.concatenate([tune, held]))]
    divided = replace(dataset, train=train.select(rest), undivided=dataset)
    if len(tune):
        divided = replace(divided, tune=_part(train, tune))
    if evaluate_on == "tune":
        assert divided.tune is not None
        return replace(divided, val=divided.tune, evaluated_on="tune", no_val="")
    return replace(divided, val=_part(train, held), evaluated_on="holdout", no_val="") if len(held) else divided


def _part(train: CocoIndex, ids: np.ndarray) -> CocoIndex:
    """Images of the training part as a part of their own."""
    sha256 = hashlib.sha256(train.sha256.encode() + ids.astype("<i8").tobytes()).hexdigest()
    return replace(train.select(ids), sha256=sha256, findings=())


def _taken(train: CocoIndex, ids: np.ndarray, amount: float | None, key: str, what: str) -> np.ndarray:
    """The ids that a key takes of `ids` (N,), ascending; none where it is null."""
    if amount is None:
        return ids[:0]
    if amount >= 1 and amount != int(amount):
        raise UserError(f"{key}={amount:g} must be a share below 1, or a whole number of images: give {amount:.0f}")
    count = int(amount) if amount >= 1 else max(1, round(amount * len(ids)))
    if count >= len(ids):
        raise UserError(f"{key}={amount:g} leaves none of the {len(ids):,} {what} to train on: give less")
    return stratified(train, np.sort(ids), count, _SEEDS[key])


def stratified(index: CocoIndex, ids: np.ndarray, count: int, seed: Sequence[int]) -> np.ndarray:
    """Draws images so that each class keeps its share of them.

    An image stands for the rarest class that it shows, or for images without any. Of the n images of such a stratum,
    shuffled, the k-th (from 0) has rank (k + 0.5) / n, and the lowest ranks of all are taken: of every stratum the same
    share, to within one image.

    Args:
        index: where the images are.
        ids: (N,) int64, ascending.
        count: how many to draw.
        seed: of the shuffle, in NumPy's legacy stream, which is frozen.

    Returns:
        (count,) int64, ascending.
    """
    strata = _rarest_class(index, ids)
    shuffled = np.random.RandomState(seed).permutation(len(ids))
    ranks = np.empty(len(ids))
    for stratum in np.unique(strata):
        members = shuffled[strata[shuffled] == stratum]
        ranks[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(ranks[shuffled], kind="stable")]
    return np.sort(ids[order[:count]])


def _rarest_class(index: CocoIndex, ids: np.ndarray) -> np.ndarray:
    """(N,) of each image the label that the fewest of these images show; 0 for one without a box."""
    rows, owner = index.box_rows(index.positions(ids))
    shows = np.zeros((len(ids), index.num_classes + 1), bool)
    shows[owner, index.labels[rows]] = True
    images = np.where(shows, shows.sum(0), len(ids) + 1)
    return np.where(shows.any(1), images.argmin(1), 0)
