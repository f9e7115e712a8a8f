"""Split protocols: which images of a dataset are labelled, as the literature draws them or as the user says.

"10 % of COCO" means three different sets in published results, so that a protocol is chosen by name:

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
* `shots`: at least `shots` labelled images show each class, drawn anew for each fold. Images are labelled whole, as
  people do it: every box on them is, so that frequent classes get more. Few-shot detection (TFA and after it) means
  something else by "k shots": k boxes of a class, while the other objects on those images stay without a label.
* `full`: all of one dataset is labelled, another one is unlabelled.

A new protocol is a subclass of `SplitProtocol` and its place in `PROTOCOLS`. This module opens no dataset: a protocol
sees arrays of image ids, and reads at most the index file that the user names.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from harness.core.types import Split, UserError
from harness.core.validate import File, Limits
from harness.splits import index_files

EmptyImages = Literal["keep", "drop", "drop_unannotated"]
CrowdBoxes = Literal["keep", "drop"]
Percent = Annotated[float, Limits(gt=0, le=100)]
Fold = Annotated[int, Limits(ge=1, le=10)]
Shots = Annotated[int, Limits(ge=1, le=1_000_000)]
Amount = Annotated[float, Limits(gt=0, le=1e9, words="a share below 1, or from 1 on a number of images: 0.2, 500")]

_ANNOTATED = (
    "if nobody has labelled the images without a box, say split.protocol=annotated (labelled: the images with a box, "
    "unlabelled: the rest)"
)


@dataclass(frozen=True)
class ImagePolicy:
    """Which images of the labelled and unlabelled part a run shows, and with which boxes."""

    empty_images: EmptyImages  # labelled images without a box; drop_unannotated: those without even a crowd
    crowd_boxes: CrowdBoxes  # drop (background) or keep (as any other box)
    min_side: int = 0  # px; images with a shorter side are left out of both parts


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """The keys of `split`: the protocol and what it is told."""

    protocol: Annotated[str, Limits(one_of=tuple(PROTOCOLS))]
    percent: Percent
    fold: Fold
    offset: Annotated[int, Limits(ge=0, le=2**32 - 11)]  # fold + offset seeds NumPy's legacy generator: 32 bits
    index_file: File | None
    empty_images: EmptyImages | None
    crowd_boxes: CrowdBoxes | None
    min_side: Annotated[int, Limits(ge=0, le=100_000)] | None
    holdout: Amount | None = None
    tune: Amount | None = None
    shots: Shots | None = None

    @property
    def chosen(self) -> SplitProtocol:
        """The protocol.

        Raises:
            UserError: there is none of that name.
        """
        if self.protocol not in PROTOCOLS:
            raise UserError(f"split.protocol={self.protocol} is not one of {', '.join(PROTOCOLS)}")
        return PROTOCOLS[self.protocol]

    @property
    def policy(self) -> ImagePolicy:
        """The protocol's policy, with what is given here over it."""
        own = self.chosen.policy
        return ImagePolicy(
            own.empty_images if self.empty_images is None else self.empty_images,
            own.crowd_boxes if self.crowd_boxes is None else self.crowd_boxes,
            own.min_side if self.min_side is None else self.min_side,
        )

    @property
    def label(self) -> str:
        """The split in a run's name."""
        return self.chosen.label(self)

    @property
    def said(self) -> str:
        """The key that decides how many images are labelled, with its value, for messages."""
        amount = self.chosen.amount
        return f"split.{amount}={getattr(self, amount):g}" if amount else f"split.protocol={self.protocol}"


@dataclass(frozen=True)
class Candidates:
    """The images of a dataset that a protocol chooses from, in the order of the annotation file."""

    ids: np.ndarray  # (N,) int64, of the training part
    annotated: np.ndarray  # (N,) bool, whether an image has an annotation, be it a crowd
    boxed: np.ndarray  # (N,) bool, whether it has a box that is not a crowd
    others: np.ndarray | None = None  # (M,) int64, ids of the dataset's unlabelled part where the protocol takes it
    shows: np.ndarray | None = None  # (N, C) bool, which classes a run sees on an image, where the protocol asks for it
    classes: Sequence[str] = ()  # (C,) their names


class SplitProtocol(ABC):
    """A way to divide a dataset into labelled and unlabelled images."""

    name: ClassVar[str]  # what `split.protocol` says
    policy: ClassVar[ImagePolicy]  # what the code of the paper shows of them
    reads: ClassVar[tuple[str, ...]] = ()  # of the keys percent, shots, fold, offset and index_file
    amount: ClassVar[str | None] = None  # the key that says how much it draws; None: it takes what it is told
    takes_unlabeled_part: ClassVar[bool] = False  # the unlabelled images are the dataset's own unlabelled part
    leaves_tune: ClassVar[bool] = False  # draws from what split.tune leaves, rather than to lose what that takes

    @property
    def draws(self) -> bool:
        """Whether it draws images; otherwise it takes those that it is told."""
        return self.amount is not None

    def split(self, images: Candidates, options: SplitOptions, listed: Any = None) -> Split:
        """Divides images.

        Args:
            images: to choose from.
            options: of which it looks at the keys that it `reads`.
            listed: from `read`.

        Returns:
            The split; both parts keep the order in which the protocol lists the images.

        Raises:
            UserError: there is no such split.
        """
        labeled, unlabeled, percent = self._choose(images, options, listed)
        sha256, shots = _sha256(labeled, unlabeled), options.shots if self.amount == "shots" else None
        return Split(labeled, unlabeled, float(percent), options.fold, self.name, sha256, shots)

    @abstractmethod
    def _choose(self, images: Candidates, options: SplitOptions, listed: Any) -> tuple[np.ndarray, np.ndarray, float]:
        """The labelled ids, the unlabelled ids, and the percentage that is labelled."""

    def read(self, options: SplitOptions) -> Any:  # noqa: ARG002
        """The content of the index file, where the protocol reads one and it is given.

        Raises:
            UserError: it cannot be read, or is something else.
        """
        return None

    def refuse_unread(self, options: SplitOptions) -> None:
        """A key that the protocol does not read would make the user believe in another split.

        Raises:
            UserError: naming the key, and which protocol reads it.
        """
        for key, remedy in (("index_file", "take one of these, or leave it null"), ("offset", "leave it 0")):
            if getattr(options, key) and key not in self.reads:
                readers = " and ".join(name for name, other in PROTOCOLS.items() if key in other.reads)
                raise UserError(f"split.{key} is read by split.protocol={readers}, not by {self.name}: {remedy}")

    def check_amount(self, options: SplitOptions, given: Collection[str] = ()) -> None:  # noqa: ARG002
        """A key that this protocol does not read may say how many images are labelled.

        Args:
            options: the keys of `split`.
            given: dotted keys that the user has written, where a default says nothing.

        Raises:
            UserError: naming the keys.
        """
        if options.shots is not None:
            raise UserError(
                f"split.shots={options.shots} is read by split.protocol=shots, not by {self.name}: say that, or leave "
                "split.shots null"
            )

    def label(self, options: SplitOptions) -> str:
        """The split in a run's name: the protocol, and what it was told to draw."""
        return f"{self.name}-{options.percent:g}pct-fold{options.fold}" if self.draws else self.name

    def exported_names(self, train: str, split: Split) -> tuple[str, str]:
        """Names of the labelled and the unlabelled annotation file, as Soft Teacher's configurations expect them.

        Args:
            train: stem of the training part's annotation file.
            split: what is exported.
        """
        stem = f"{train}.{split.fold}@{split.percent:g}"
        return f"{stem}.json", f"{stem}-unlabeled.json"

    def fate_of_unannotated(self, chosen: int, labeled: int, policy: ImagePolicy) -> str:
        """The end of a sentence that begins with how many training images have no annotation.

        Args:
            chosen: how many of them are labelled.
            labeled: how many images are labelled.
            policy: what the run does with them.
        """
        if not chosen:
            return f": split.protocol={self.name} takes none of them as labelled"
        fate = "shown as images without objects" if policy.empty_images == "keep" else "left out"
        rest = "" if self.takes_unlabeled_part else ", the others are unlabelled images like any"
        return (
            f": split.protocol={self.name} chose {chosen:,} of them among its {labeled:,} labelled images, which are "
            f"{fate} (split.empty_images={policy.empty_images}){rest}; {_ANNOTATED}"
        )


class _DrawnByPercent(SplitProtocol):
    """Takes `percent` of the images; at 100 all of them, without a draw or an index file."""

    reads: ClassVar[tuple[str, ...]] = ("percent", "fold")
    amount = "percent"

    def _choose(self, images: Candidates, options: SplitOptions, listed: Any) -> tuple[np.ndarray, np.ndarray, float]:
        ids = _distinct(self._pool(images))
        percent = options.percent
        if not 0.01 <= percent <= 100:
            raise UserError(f"split.percent={percent:g} is not between 0.01 and 100")
        rows = np.arange(len(ids)) if percent == 100 else self._rows(len(ids), options, listed)
        labeled = np.zeros(len(ids), bool)
        labeled[rows] = True
        return ids[labeled], ids[~labeled], percent

    def _pool(self, images: Candidates) -> np.ndarray:
        """(N,) the ids to draw from."""
        return images.ids

    @abstractmethod
    def _rows(self, total: int, options: SplitOptions, listed: Any) -> np.ndarray:
        """Positions of the labelled images in a list of `total`."""


class _Seeded(_DrawnByPercent):
    """Draws from NumPy's legacy stream, which is frozen: the same in every version, and prefixes of one stream."""

    replace: ClassVar[bool]  # whether an image may be drawn twice

    def _rows(self, total: int, options: SplitOptions, listed: Any) -> np.ndarray:  # noqa: ARG002
        if not 1 <= options.fold <= 10:
            raise UserError(f"split.fold={options.fold} is not between 1 and 10")
        count = labeled_count(total, options.percent)
        if not count:
            raise UserError(
                f"split.percent={options.percent:g} of {total} images is less than one: give at least "
                f"{_round_up(100 / total):g}"
            )
        return np.random.RandomState(self._seed(options)).choice(total, count, replace=self.replace)

    def _seed(self, options: SplitOptions) -> int:
        return options.fold


class StacSplit(_Seeded):
    """STAC's and mmdetection's scripts. STAC leaves out labelled images without a box that is not a crowd."""

    name = "stac"
    policy = ImagePolicy("drop", "drop")
    replace = True


class SoftTeacherSplit(_Seeded):
    """Soft Teacher's script. Through mmdetection it leaves out tiny images, and those without even a crowd."""

    name = "soft_teacher"
    policy = ImagePolicy("drop_unannotated", "drop", 32)
    reads = ("percent", "fold", "offset")
    replace = False

    def _seed(self, options: SplitOptions) -> int:
        seed = options.fold + options.offset
        if not 0 <= seed < 2**32:
            raise UserError(
                f"split.offset={options.offset} gives the seed {seed}, which is not between 0 and 2**32 - 1"
            )
        return seed


class UnbiasedTeacherSplit(_DrawnByPercent):
    """Unbiased Teacher's index file, whose list has no image without a box in the first place."""

    name = "unbiased_teacher"
    policy = ImagePolicy("drop", "drop")
    reads = ("percent", "fold", "index_file")

    def read(self, options: SplitOptions) -> Any:
        if not options.index_file:
            return None
        return index_files.read_positions(index_files.index_path(options.index_file, options.percent, options.fold))

    def _pool(self, images: Candidates) -> np.ndarray:
        return np.sort(images.ids[images.boxed])

    def _rows(self, total: int, options: SplitOptions, listed: Any) -> np.ndarray:
        folds = _lookup(listed, options.percent, "split.percent")
        rows = _integers(_lookup(folds, options.fold, "split.fold"), "positions")
        beyond = rows[(rows < 0) | (rows >= total)]
        if len(beyond):
            raise UserError(
                f"the index file points to image {beyond[0]} of a list of {total} ({len(beyond)} such positions): "
                "it was made for another dataset; give the file that belongs to this one as split.index_file"
            )
        if not len(rows):
            raise UserError(
                f"the index file lists no image for split.percent={options.percent:g} split.fold={options.fold}"
            )
        return rows

    def fate_of_unannotated(self, chosen: int, labeled: int, policy: ImagePolicy) -> str:  # noqa: ARG002
        return f": split.protocol={self.name} takes none of them, neither labelled nor unlabelled; {_ANNOTATED}"


class ShotsSplit(SplitProtocol):
    """At least `shots` images of each class, and none that no class needs.

    The images, in the order of their ids, are shuffled by NumPy's legacy stream, which is frozen; its seed is the fold.
    From the rarest class on (on the fewest images; of equal ones the lower category id) the next images that show it
    are taken, until it has `shots` of them, those included that were taken for another class. Then, from the last one
    taken on, an image whose classes all have enough without it is given back.
    """

    name = "shots"
    policy = ImagePolicy("keep", "drop")
    reads = ("shots", "fold")
    amount = "shots"
    leaves_tune = True

    def check_amount(self, options: SplitOptions, given: Collection[str] = ()) -> None:
        if options.shots is None:
            raise UserError(
                "split.protocol=shots needs split.shots, the labelled images of each class: say split.shots=5, for a "
                "suite suite.shots=[1,5]"
            )
        if "split.percent" in given:
            raise UserError(
                "split.percent and split.shots both say how many images are labelled: split.protocol=shots reads "
                "split.shots alone, leave split.percent out"
            )
        if options.holdout is not None:
            raise UserError(
                f"split.holdout={options.holdout:g} takes labelled images, of which split.protocol=shots has no more "
                "than its classes need: leave it null and give images to evaluate on, or evaluate on images of the "
                "training part by split.tune=0.2 evaluation.set=tune"
            )

    def label(self, options: SplitOptions) -> str:
        return f"{self.name}-{options.shots}-fold{options.fold}"

    def exported_names(self, train: str, split: Split) -> tuple[str, str]:
        stem = f"{train}.{split.fold}@{split.shots}shots"
        return f"{stem}.json", f"{stem}-unlabeled.json"

    def _choose(self, images: Candidates, options: SplitOptions, listed: Any) -> tuple[np.ndarray, np.ndarray, float]:  # noqa: ARG002
        assert images.shows is not None
        assert options.shots is not None
        ids = _distinct(images.ids)
        self._require_enough(images.shows.sum(0), images.classes, options.shots)
        shuffled = np.argsort(ids)[np.random.RandomState(options.fold).permutation(len(ids))]
        labeled = ids[_needed(images.shows, shuffled, options.shots)]
        return _by_list(ids, labeled, ids[~np.isin(ids, labeled)], None)

    def _require_enough(self, counts: np.ndarray, classes: Sequence[str], shots: int) -> None:
        """Raises UserError where fewer images show a class (C,) than it shall have."""
        rare = [(name, count) for name, count in zip(classes, counts.tolist(), strict=True) if count < shots]
        if not rare:
            return
        shown = ", ".join(f"{name} {count}" for name, count in rare[:5]) + (", ..." if len(rare) > 5 else "")
        least = min(count for _, count in rare)
        remedy = f"lower split.shots to {least}" if least else "take a class that is on none off the annotations"
        raise UserError(
            f"split.shots={shots} wants more images than show {len(rare)} of the {len(classes)} classes (images that "
            f"show them: {shown}): {remedy}, or label more"
        )


def _needed(shows: np.ndarray, order: np.ndarray, shots: int) -> np.ndarray:
    """The images that `ShotsSplit` takes.

    Args:
        shows: (N, C) bool, which classes each image shows.
        order: (N,) rows of the images, shuffled.
        shots: images of each class; as many show it.

    Returns:
        (K,) rows.
    """
    taken: list[int] = []
    free, have = np.ones(len(shows), bool), np.zeros(shows.shape[1], np.int64)
    for label in np.argsort(shows.sum(0), kind="stable"):
        found = order[shows[order, label] & free[order]][: max(0, shots - have[label])]
        taken += found.tolist()
        free[found] = False
        have += shows[found].sum(0)
    kept = []
    for row in reversed(taken):
        if (have[shows[row]] > shots).all():
            have -= shows[row]
        else:
            kept.append(row)
    return np.array(kept, np.int64)


class ListedSplit(SplitProtocol):
    """A list of ids, which means what it says, as annotations do."""

    name = "ids"
    policy = ImagePolicy("keep", "drop")
    reads = ("index_file",)

    def read(self, options: SplitOptions) -> Any:
        if not options.index_file:
            return None
        path = index_files.index_path(options.index_file, options.percent, options.fold)
        return index_files.read_ids(path, options.percent, options.fold)

    def _choose(self, images: Candidates, options: SplitOptions, listed: Any) -> tuple[np.ndarray, np.ndarray, float]:
        if listed is None:
            raise UserError(f"split.protocol={self.name} needs split.index_file with the ids of the labelled images")
        ids, given = _distinct(images.ids), index_files.names_percent(str(options.index_file or ""))
        labeled = _integers(listed[0], "labelled ids")
        rest = ids[~np.isin(ids, labeled)] if listed[1] is None else _integers(listed[1], "unlabelled ids")
        _check_lists(ids, labeled, rest)
        return _by_list(ids, labeled, rest, options.percent if given else None)

    def label(self, options: SplitOptions) -> str:
        """As of a draw, where the list was made for a percentage; otherwise with the name of the list."""
        file = str(options.index_file or "")
        if index_files.names_percent(file):
            return f"{self.name}-{options.percent:g}pct-fold{options.fold}"
        return f"{self.name}-{index_files.index_path(file, options.percent, options.fold).stem}"


class AnnotatedSplit(SplitProtocol):
    """The images with an annotation are labelled."""

    name = "annotated"
    policy = ImagePolicy("keep", "drop")

    def _choose(self, images: Candidates, options: SplitOptions, listed: Any) -> tuple[np.ndarray, np.ndarray, float]:  # noqa: ARG002
        ids = _distinct(images.ids)
        return _by_list(ids, ids[images.annotated], ids[~images.annotated], None)

    def exported_names(self, train: str, split: Split) -> tuple[str, str]:  # noqa: ARG002
        return f"{train}.{self.name}.json", f"{train}.{self.name}-unlabeled.json"

    def fate_of_unannotated(self, chosen: int, labeled: int, policy: ImagePolicy) -> str:  # noqa: ARG002
        return f" and are the unlabelled part, the other {labeled:,} the labelled one"


class FullSplit(SplitProtocol):
    """All of the training part is labelled, as in Soft Teacher, whose policy it has."""

    name = "full"
    policy = SoftTeacherSplit.policy
    takes_unlabeled_part = True

    def _choose(self, images: Candidates, options: SplitOptions, listed: Any) -> tuple[np.ndarray, np.ndarray, float]:  # noqa: ARG002
        assert images.others is not None
        return _distinct(images.ids), images.others, 100.0

    def exported_names(self, train: str, split: Split) -> tuple[str, str]:  # noqa: ARG002
        return f"{train}.json", "instances_unlabeled2017.json"


PROTOCOLS: dict[str, SplitProtocol] = {
    protocol.name: protocol
    for protocol in (
        StacSplit(),
        SoftTeacherSplit(),
        UnbiasedTeacherSplit(),
        ShotsSplit(),
        ListedSplit(),
        AnnotatedSplit(),
        FullSplit(),
    )
}


_LARGEST = 2**63 - 1  # that an id can be


def _sha256(labeled: np.ndarray, unlabeled: np.ndarray) -> str:
    """Of the sorted ids, so that it names the two sets and nothing else."""
    digest = hashlib.sha256()
    for part in (labeled, unlabeled):
        digest.update(np.sort(part).astype("<i8").tobytes() + b"|")
    return digest.hexdigest()


def without_images(split: Split, ids: np.ndarray) -> Split:
    """A split without images (K,) that no training may see; its percentage stays the one that was drawn."""
    labeled, unlabeled = (part[~np.isin(part, ids)] for part in (split.labeled_ids, split.unlabeled_ids))
    return replace(split, labeled_ids=labeled, unlabeled_ids=unlabeled, sha256=_sha256(labeled, unlabeled))


def with_unlabeled(split: Split, ids: np.ndarray, sha256: str) -> Split:
    """A split with more unlabelled images, which the dataset's training part does not list.

    Args:
        split: as a protocol made it.
        ids: (M,) int64, of the images.
        sha256: of what they are, since the ids alone do not tell.
    """
    digest = hashlib.sha256(f"{split.sha256}|{sha256}".encode()).hexdigest()
    return replace(split, unlabeled_ids=np.concatenate([split.unlabeled_ids, ids]), sha256=digest)


def labeled_count(total: int, percent: float) -> int:
    """How many positions the scripts of STAC, mmdetection and Soft Teacher draw."""
    return int(percent / 100.0 * total)


def _distinct(ids: np.ndarray) -> np.ndarray:
    if not len(ids):
        raise UserError("there is no image to split: give a dataset with images")
    if not np.diff(np.sort(ids)).all():  # thirty times as fast as np.unique
        raise UserError("image ids are not distinct: number the images apart")
    return ids


def _round_up(value: float) -> float:
    """To two digits, for messages."""
    digits = 1 - int(np.floor(np.log10(value)))
    return float(np.ceil(value * 10**digits) / 10**digits)


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
        if array.size and (array.dtype.kind not in "iu" or array.max() > _LARGEST):
            raise ValueError
        return array.astype(np.int64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        shown = json.dumps(values, default=str)[:60]
        raise UserError(f"split.index_file must list {what} that are whole numbers of 64 bits, not {shown}") from error


def _check_lists(ids: np.ndarray, labeled: np.ndarray, unlabeled: np.ndarray) -> None:
    """Raises UserError unless two lists are of images that are there, and of different ones."""
    for part, wanted in (("labelled", labeled), ("unlabelled", unlabeled)):
        unknown = wanted[~np.isin(wanted, ids)]
        if len(unknown):
            raise UserError(
                f"{len(unknown)} {part} image id(s), first {unknown[0]}, are not in the dataset: "
                "give image ids, not positions"
            )
    both = labeled[np.isin(labeled, unlabeled)]
    if len(both):
        raise UserError(
            f"{len(both)} image id(s), first {both[0]}, are given as labelled and as unlabelled: choose one"
        )
    if not len(labeled):
        raise UserError("the list of labelled image ids is empty: give at least one")


def _by_list(
    ids: np.ndarray, labeled: np.ndarray, unlabeled: np.ndarray, percent: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Both parts in the order of `ids`; without a percentage that the list was made for, the share that it has."""
    is_labeled = np.isin(ids, labeled)
    share = 100 * float(is_labeled.mean()) if percent is None else percent
    return ids[is_labeled], ids[np.isin(ids, unlabeled)], share
