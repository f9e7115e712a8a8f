"""What a run needs of its data: the split that the configuration names, its images, and whether they can be used.

`run` is the command `ssodbench prepare`, which says all of that before anything is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.config import split_names
from harness.core.types import ImageSource, Split, UserError
from harness.data import split_files
from harness.data.annotations import Finding, finding
from harness.data.datasets import CocoIndex, Dataset
from harness.data.images import LEVELS, ImageCheck, check_images
from harness.data.protocols import BY_PERCENT, make_split

_SHOWN = 5  # classes named in a warning
_ANNOTATED = (
    "if nobody has labelled the images without a box, say split.protocol=annotated (labelled: the images with a box, "
    "unlabelled: the rest)"
)
_MOST_BAD = 0.1  # of the training pictures; more than that is a wrong folder rather than a few bad files


@dataclass(frozen=True)
class Policy:
    """Which images of the labelled and unlabelled part a run shows, and with which boxes."""

    empty_images: str  # labelled images without a box: keep, drop, or drop_unannotated
    crowd_boxes: str  # drop (background) or keep (as any other box)
    min_side: int = 0  # px; images with a shorter side are left out of both parts


# What the papers' code does. STAC leaves out labelled images without a box that is not a crowd. Soft Teacher, through
# mmdetection, leaves out those without any annotation, so that images with crowds alone stay, and tiny images. Unbiased
# Teacher's list has no image without a box in the first place. None shows a crowd box. `full` follows Soft Teacher, and
# explicit ids mean what they say, as annotations do.
POLICIES = {
    "stac": Policy("drop", "drop"),
    "soft_teacher": Policy("drop_unannotated", "drop", 32),
    "unbiased_teacher": Policy("drop", "drop"),
    "ids": Policy("keep", "drop"),
    "annotated": Policy("keep", "drop"),
    "full": Policy("drop_unannotated", "drop", 32),
}


def policy(split_config: Mapping[str, Any]) -> Policy:
    """The protocol's policy, with the keys empty_images, crowd_boxes and min_side of the configuration over it."""
    default = POLICIES[split_config["protocol"]]
    values = {key: split_config.get(key) for key in ("empty_images", "crowd_boxes", "min_side")}
    return Policy(**{key: getattr(default, key) if value is None else value for key, value in values.items()})


def needs_unlabeled(split_config: Mapping[str, Any]) -> bool:
    """Whether the protocol takes the dataset's own unlabelled part; no other opens it."""
    return bool(split_config["protocol"] == "full")


def resolve_split(dataset: Dataset, split_config: Mapping[str, Any]) -> Split:
    """The split that the configuration names.

    Args:
        dataset: what to split.
        split_config: keys protocol, percent, fold, offset and index_file, as `make_split` explains them; in index_file,
            {percent} and {fold} stand for the split's.

    Raises:
        UserError: if there is no such split, or its labelled part shows no box.
    """
    protocol, train = split_config["protocol"], dataset.train
    percent, fold = float(split_config.get("percent", 10)), int(split_config.get("fold", 1))
    named: float | None = percent
    index = unlabeled_ids = None
    file = split_config.get("index_file")
    if file and protocol == "unbiased_teacher":
        index = split_files.read_index(split_names.index_path(file, percent, fold))
    elif file and protocol == "ids":
        index, unlabeled_ids = split_files.read_ids(split_names.index_path(file, percent, fold), percent, fold)
        named = percent if split_names.names_percent(file) else None
    elif protocol == "annotated":
        index, named = train.image_ids[train.annotated()], None
        if not len(index):
            raise UserError(_no_box(train))
    elif needs_unlabeled(split_config):
        if dataset.unlabeled is None:
            raise UserError(
                f"split.protocol=full needs unlabelled images, but {dataset.no_unlabeled}: "
                f"add them to data={dataset.name}"
            )
        unlabeled_ids = dataset.unlabeled.image_ids
    _refuse_unread(split_config)
    ids = train.nonempty_ids() if protocol == "unbiased_teacher" else train.image_ids
    offset = int(split_config.get("offset") or 0)
    split = make_split(ids, named, fold, protocol, offset=offset, index=index, unlabeled_ids=unlabeled_ids)
    if not len(labeled_source(dataset, split, split_config).boxes):
        raise UserError(_no_labeled_box(dataset, split, split_config))
    return split


def _no_labeled_box(dataset: Dataset, split: Split, split_config: Mapping[str, Any]) -> str:
    """One sentence on why the labelled part shows no box."""
    p, train = policy(split_config), dataset.train
    if not len(train.boxes):
        return _no_box(train)
    which = f"the {len(split.labeled_ids)} labelled image(s) of split."
    kept = f"show no box (split.crowd_boxes={p.crowd_boxes}, split.min_side={p.min_side})"
    if split.protocol not in BY_PERCENT:
        return f"{which}protocol={split.protocol} {kept}: label images with a box that is kept"
    return (
        f"{which}percent={split.percent:g} split.fold={split.fold} {kept}: give a larger percent or another fold"
        f"{'' if train.annotated().all() else ', or split.protocol=annotated to label the images with a box alone'}"
    )


def _no_box(train: CocoIndex) -> str:
    return (
        f"{train.name} has no box that can be trained on{_dropped(train)}: correct the annotations, or set "
        "data.train_annotations (for Pascal VOC data.train and data.classes)"
    )


def _dropped(index: CocoIndex) -> str:
    """What happened to the boxes of an index, in brackets; nothing if nothing did."""
    reasons = [str(finding) for finding in index.findings if finding.what.endswith("dropped")]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _refuse_unread(split_config: Mapping[str, Any]) -> None:
    """A key that the protocol does not read would make the user believe in another split."""
    protocol = split_config["protocol"]
    if split_config.get("index_file") and protocol not in ("unbiased_teacher", "ids"):
        raise UserError(
            f"split.index_file is read by split.protocol=unbiased_teacher and ids, not by {protocol}: "
            "take one of these, or leave it null"
        )
    if split_config.get("offset") and protocol != "soft_teacher":
        raise UserError(f"split.offset is read by split.protocol=soft_teacher, not by {protocol}: leave it 0")


def unlabeled_index(dataset: Dataset, split: Split) -> CocoIndex:
    """The index that the split's unlabelled ids are in; with their hidden boxes, to measure pseudo labels."""
    if split.protocol == "full":
        assert dataset.unlabeled is not None
        return dataset.unlabeled
    return dataset.train


def labeled_source(
    dataset: Dataset, split: Split, split_config: Mapping[str, Any], checks: Checks | None = None
) -> ImageSource:
    """The labelled images, with their boxes."""
    p = policy(split_config)
    ids = _without(split.labeled_ids, checks, "train")
    return dataset.train.source(ids, p.crowd_boxes, p.empty_images, p.min_side)


def sources(
    dataset: Dataset, split: Split, split_config: Mapping[str, Any], checks: Checks | None = None
) -> tuple[ImageSource, ImageSource | None]:
    """The images of the two parts.

    Args:
        dataset: what was split.
        split: from `resolve_split`.
        split_config: for its policy.
        checks: from `check`, to leave pictures out that were found bad; a training draws from whole lists instead.

    Returns:
        Labelled images with boxes; unlabelled images without, or None where there is none.
    """
    labeled = labeled_source(dataset, split, split_config, checks)
    part = "unlabeled" if split.protocol == "full" else "train"
    ids = _without(split.unlabeled_ids, checks, part)
    if not len(ids):
        return labeled, None
    index = unlabeled_index(dataset, split)
    return labeled, index.source(ids, min_side=policy(split_config).min_side, boxes=False)


def known_truth(
    dataset: Dataset, split: Split, split_config: Mapping[str, Any], unlabeled: ImageSource
) -> ImageSource | None:
    """Ground truth of those unlabelled images whose truth is known, to measure pseudo labels; None if there are none.

    The truth of an image with an annotation is known. One without any may show nothing or may never have been labelled,
    so that its truth is unknown unless split.empty_images=keep says that such images show nothing; even then nothing is
    known of a part without a single annotation.
    """
    index = unlabeled_index(dataset, split)
    annotated = index.annotated()[index.positions(unlabeled.ids)]
    if not annotated.any():
        return None
    all_known = split_config.get("empty_images") == "keep"
    return index.source(unlabeled.ids if all_known else unlabeled.ids[annotated])


def _without(ids: np.ndarray, checks: Checks | None, part: str) -> np.ndarray:
    bad = list(checks.pictures[part].bad) if checks and part in checks.pictures else []
    return ids[~np.isin(ids, bad)] if bad else ids


def bad_files(dataset: Dataset, checks: Checks) -> dict[str, str]:
    """File -> reason of every picture that was found bad, as `ImageSource.paths` name it."""
    found: dict[str, str] = {}
    for part, index in parts(dataset, "unlabeled" in checks.pictures).items():
        bad = checks.pictures[part].bad
        rows = index.positions(list(bad)).tolist()
        found |= {
            os.path.join(index.image_dir, index.file_names[row]): reason
            for row, reason in zip(rows, bad.values(), strict=True)
        }
    return found


@dataclass
class Checks:
    """What was found in a dataset."""

    pictures: dict[str, ImageCheck]  # by part: train, val, and unlabeled where the protocol needs it
    findings: list[Finding]  # about the parts together
    fatal: str | None  # one sentence, where nothing should be trained

    @property
    def bad_images(self) -> int:
        """Pictures that no run will see."""
        return sum(len(check.bad) for check in self.pictures.values())


def parts(dataset: Dataset, unlabeled: bool = False) -> dict[str, CocoIndex]:
    """The indices of a dataset by the name of the part; the unlabelled one only if it is asked for and there."""
    found = {"train": dataset.train, "val": dataset.val, "unlabeled": dataset.unlabeled if unlabeled else None}
    return {name: index for name, index in found.items() if index is not None}


def inspect(
    dataset: Dataset,
    level: str = "quick",
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
    unlabeled: bool = False,
) -> Checks:
    """Looks at every picture of a dataset; see `harness.data.images.check_images` for the levels."""
    if level not in LEVELS:
        raise UserError(f"check={level} is not one of {', '.join(LEVELS)}")
    pictures, paths = {}, {}
    indices = parts(dataset, unlabeled)
    for part, index in indices.items():
        source = index.source(boxes=False)
        paths[part] = index.real_paths()
        pictures[part] = check_images(source.paths, source.ids, source.sizes, level, threads, progress)
    findings = []
    for other in ("val", "unlabeled"):
        if other in paths:
            known, here = set(paths["train"]), paths[other]
            shared = np.array([path in known for path in here])
            findings += finding(f"pictures that are in train and in {other}", shared, here.__getitem__)
    return Checks(pictures, findings, _fatal(indices, pictures))


def check(dataset: Dataset, level: str = "quick", threads: int = 1, unlabeled: bool = False) -> Checks:
    """`inspect`, before a training; with the unlabelled part only where the run needs it.

    Raises:
        UserError: if an evaluation picture cannot be used, more than a tenth of the training pictures cannot, or the
            evaluation part has no box.
    """
    checks = inspect(dataset, level, threads, unlabeled=unlabeled)
    if checks.fatal:
        raise UserError(checks.fatal)
    return checks


def found_in_files(indices: Mapping[str, CocoIndex], checks: Checks) -> list[str]:
    """One line for everything odd in annotations and pictures."""
    lines = [f"{part}: {found}" for part, index in indices.items() for found in index.findings]
    lines += [f"{part}: {found}" for part in indices for found in checks.pictures[part].findings]
    return lines + [str(found) for found in checks.findings]


def about_split(dataset: Dataset, split: Split, split_config: Mapping[str, Any], labeled: ImageSource) -> list[str]:
    """What a user should know of a split before training: images without any box, classes without a labelled one.

    Args:
        dataset: what was split.
        split: from `resolve_split`.
        split_config: for its policy.
        labeled: from `sources`.
    """
    lines = []
    train = dataset.train
    empty = int((~train.annotated()).sum())
    if empty:
        what = _about_empty(train, split, policy(split_config).empty_images)
        lines.append(f"{empty:,} of the {len(train):,} training images have no box at all{what}")
    counts = np.bincount(labeled.labels - 1, minlength=train.num_classes)
    names = [name for name, count in zip(train.category_names, counts, strict=True) if not count]
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        drawn = split.protocol in BY_PERCENT
        remedy = "a larger split.percent or another split.fold may have some" if drawn else "label some"
        lines.append(
            f"no labelled box shows {len(names)} of the {train.num_classes} classes ({shown}), which nothing can be "
            f"learnt of: {remedy}"
        )
    return lines


def _about_empty(train: CocoIndex, split: Split, policy_of_empty: str) -> str:
    """What the split does with training images that have no annotation."""
    if split.protocol == "annotated":
        return f" and are the unlabelled part, the other {len(split.labeled_ids):,} the labelled one"
    if split.protocol == "unbiased_teacher":
        return f": split.protocol=unbiased_teacher takes none of them, neither labelled nor unlabelled; {_ANNOTATED}"
    without = int((~train.annotated()[train.positions(split.labeled_ids)]).sum())
    if not without:
        return f": split.protocol={split.protocol} takes none of them as labelled"
    fate = "shown as images without objects" if policy_of_empty == "keep" else "left out"
    rest = "" if split.protocol == "full" else ", the others are unlabelled images like any"
    return (
        f": split.protocol={split.protocol} chose {without:,} of them among its {len(split.labeled_ids):,} labelled "
        f"images, which are {fate} (split.empty_images={policy_of_empty}){rest}; {_ANNOTATED}"
    )


def _fatal(indices: dict[str, CocoIndex], pictures: dict[str, ImageCheck]) -> str | None:
    for part, index in indices.items():
        bad = pictures[part].bad
        allowed = 0 if part == "val" else int(_MOST_BAD * len(index))
        if len(bad) > allowed:
            number, reason = next(iter(bad.items()))
            name = index.file_names[int(index.positions([number])[0])]
            why = "every evaluation image counts" if part == "val" else "that is more than a tenth"
            return (
                f"{len(bad)} of the {len(index)} {part} pictures under {index.image_dir} cannot be used and {why}; the "
                f"first is {name} ({reason}): put the files there, or take them off the annotations"
            )
    if indices["val"].crowd.all():
        return (
            f"{indices['val'].name} has no box to score against{_dropped(indices['val'])}: give evaluation images with "
            "boxes"
        )
    return None
