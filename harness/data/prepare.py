"""The split that a configuration names, the images of its parts, and checks that a training can use them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from harness.core.console import counted
from harness.core.types import ImageSource, Split, UserError
from harness.data.annotations import Finding, finding
from harness.data.datasets import CocoIndex, Dataset
from harness.data.images import LEVELS, ImageCheck, check_images
from harness.splits.protocols import Candidates, SplitOptions, SplitProtocol, with_unlabeled, without_images

_FEW = 20  # images, below which AP is mostly chance
_SHOWN = 5  # classes named in a warning
_MOST_BAD = 0.1  # of the training pictures; more than that is a wrong folder rather than a few bad files


def resolve_split(dataset: Dataset, options: SplitOptions) -> Split:
    """The split that the configuration names.

    Raises:
        UserError: if there is no such split, or its labelled part shows no box.
    """
    protocol = options.chosen
    train = dataset.train if protocol.leaves_tune else dataset.whole.train
    listed = protocol.read(options)
    more = _unlabeled_part(dataset, protocol) if dataset.reads_unlabeled(protocol) else None
    protocol.refuse_unread(options)
    others = more.image_ids if more and protocol.takes_unlabeled_part else None
    protocol.check_amount(options)
    policy, by_class = options.policy, "shots" in protocol.reads
    shows = train.shown_classes(policy.crowd_boxes, policy.min_side) if by_class else None
    images = Candidates(train.image_ids, train.annotated(), train.boxed(), others, shows, train.category_names)
    split = protocol.split(images, options, listed)
    if dataset.undivided and not protocol.leaves_tune:
        split = without_images(split, train.image_ids[~np.isin(train.image_ids, dataset.train.image_ids)])
    if more and not protocol.takes_unlabeled_part:
        split = with_unlabeled(split, more.image_ids, more.sha256)
    if not len(labeled_source(dataset, split, options).boxes):
        raise UserError(_no_labeled_box(dataset, split, options))
    return split


def _unlabeled_part(dataset: Dataset, protocol: SplitProtocol) -> CocoIndex:
    if dataset.unlabeled is None:
        remedy = f"add them to data={dataset.name}, or take split.percent=100 of another protocol"
        if dataset.adds_pictures:
            remedy = "set data.unlabeled_images to a folder of pictures, or to null"
        raise UserError(f"split.protocol={protocol.name} needs unlabelled images, but {dataset.no_unlabeled}: {remedy}")
    return dataset.unlabeled


def added_pictures(dataset: Dataset, unlabeled: ImageSource | None) -> int:
    """How many of the unlabelled images are of the folder data.unlabeled_images, of which no truth is known."""
    if unlabeled is None or not dataset.adds_pictures or dataset.unlabeled is None:
        return 0
    return int(np.isin(unlabeled.ids, dataset.unlabeled.image_ids).sum())


def _no_labeled_box(dataset: Dataset, split: Split, options: SplitOptions) -> str:
    """One sentence on why the labelled part shows no box."""
    policy, train = options.policy, dataset.train
    if not len(train.boxes):
        return _no_box(train)
    which = f"the {counted(len(split.labeled_ids), 'labelled image')} of {options.said}"
    kept = f"show no box (split.crowd_boxes={policy.crowd_boxes}, split.min_side={policy.min_side})"
    if not options.chosen.draws:
        return f"{which} {kept}: label images with a box that is kept"
    return (
        f"{which} split.fold={split.fold} {kept}: give a larger percent or another fold"
        f"{'' if train.annotated().all() else ', or split.protocol=annotated to label the images with a box alone'}"
    )


def _no_box(train: CocoIndex) -> str:
    return (
        f"{train.name} has no box that can be trained on{_dropped(train)}: correct the annotations, or set "
        "data.train_annotations (for Pascal VOC data.train and data.classes)"
    )


def _dropped(index: CocoIndex) -> str:
    """The counts of dropped boxes in brackets; an empty text if none was dropped."""
    reasons = [str(finding) for finding in index.findings if finding.what.endswith("dropped")]
    return f" ({'; '.join(reasons)})" if reasons else ""


def labeled_source(dataset: Dataset, split: Split, options: SplitOptions, checks: Checks | None = None) -> ImageSource:
    """The labelled images, with their boxes."""
    policy = options.policy
    ids = _without(split.labeled_ids, checks, "train")
    return dataset.train.source(ids, policy.crowd_boxes, policy.empty_images, policy.min_side)


def images_by_class(index: CocoIndex, source: ImageSource) -> dict[str, int]:
    """Class -> how many images of a source show it."""
    owner = np.repeat(np.arange(len(source)), np.diff(source.offsets))
    shows = np.zeros((len(source), index.num_classes), bool)
    shows[owner, source.labels - 1] = True
    return dict(zip(index.category_names, shows.sum(0).tolist(), strict=True))


def sources(
    dataset: Dataset, split: Split, options: SplitOptions, checks: Checks | None = None
) -> tuple[ImageSource, ImageSource | None]:
    """The images of the two parts.

    Args:
        dataset: what was split.
        split: from `resolve_split`.
        options: for its policy.
        checks: from `require_usable`, to leave out pictures that were found bad; a training draws from whole lists.

    Returns:
        Labelled images with boxes; unlabelled images without, or None where there is none.
    """
    labeled = labeled_source(dataset, split, options, checks)
    ids = _without(split.unlabeled_ids, checks, "unlabeled")
    if not options.chosen.takes_unlabeled_part:
        ids = _without(ids, checks, "train")
    if not len(ids):
        return labeled, None
    return labeled, dataset.unlabeled_of(split).source(ids, min_side=options.policy.min_side, boxes=False)


def known_truth(dataset: Dataset, split: Split, options: SplitOptions, unlabeled: ImageSource) -> ImageSource | None:
    """Ground truth of those unlabelled images whose truth is known, to measure pseudo labels; None if there are none.

    The truth of an image with an annotation is known. One without any may show nothing or may never have been labelled,
    so that its truth is unknown unless split.empty_images=keep says that such images show nothing; even then nothing is
    known of a part without a single annotation, nor of a folder that is added.
    """
    index = dataset.unlabeled_of(split)
    annotated = index.annotated()[index.positions(unlabeled.ids)]
    if not annotated.any():
        return None
    if options.empty_images == "keep":
        annotated |= True if options.chosen.takes_unlabeled_part else np.isin(unlabeled.ids, dataset.train.image_ids)
    return index.source(unlabeled.ids[annotated])


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
    """The result of looking at all pictures of a dataset."""

    pictures: dict[str, ImageCheck]  # by part: train, val, and unlabeled where the protocol needs it
    findings: list[Finding]  # about the parts together
    fatal: str | None  # one sentence, where nothing should be trained


def parts(dataset: Dataset, unlabeled: bool = False) -> dict[str, CocoIndex]:
    """The indices of a dataset by the name of the part; the unlabelled one only if it is asked for and there."""
    found = {"train": dataset.train, "val": dataset.val, "unlabeled": dataset.unlabeled if unlabeled else None}
    return {name: index for name, index in found.items() if index is not None}


def inspect_dataset(
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


def require_usable(dataset: Dataset, level: str = "quick", threads: int = 1, unlabeled: bool = False) -> Checks:
    """`inspect_dataset`, before a training; with the unlabelled part only where the run needs it.

    Raises:
        UserError: if an evaluation picture cannot be used, more than a tenth of the training pictures cannot, or the
            evaluation part has no box.
    """
    checks = inspect_dataset(dataset, level, threads, unlabeled=unlabeled)
    if checks.fatal:
        raise UserError(checks.fatal)
    return checks


def found_in_files(indices: Mapping[str, CocoIndex], checks: Checks) -> list[str]:
    """One line for everything odd in annotations and pictures."""
    lines = [f"{part}: {found}" for part, index in indices.items() for found in index.findings]
    lines += [f"{part}: {found}" for part in indices for found in checks.pictures[part].findings]
    return lines + [str(found) for found in checks.findings]


def about_split(dataset: Dataset, split: Split, options: SplitOptions, labeled: ImageSource) -> list[str]:
    """Warnings about a split before training: images without any box, classes without a labelled one.

    Args:
        dataset: what was split.
        split: from `resolve_split`.
        options: for its protocol and policy.
        labeled: from `sources`.
    """
    lines = []
    train, protocol = dataset.train, options.chosen
    annotated = train.annotated()
    empty = int((~annotated).sum())
    if empty:
        chosen = int((~annotated[train.positions(split.labeled_ids)]).sum())
        fate = protocol.fate_of_unannotated(chosen, len(split.labeled_ids), options.policy)
        lines.append(f"{empty:,} of the {len(train):,} training images have no box at all{fate}")
    counts = np.bincount(labeled.labels - 1, minlength=train.num_classes)
    names = [name for name, count in zip(train.category_names, counts, strict=True) if not count]
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        remedy = (
            f"a larger split.{protocol.amount} or another split.fold may have some" if protocol.draws else "label some"
        )
        lines.append(
            f"no labelled box shows {len(names)} of the {train.num_classes} classes ({shown}), which nothing can be "
            f"learnt of: {remedy}"
        )
    return lines


def about_evaluation(dataset: Dataset) -> list[str]:
    """A warning where so few images are evaluated on that AP says little."""
    images = len(dataset.val)
    if images >= _FEW:
        return []
    remedy = "a larger split.holdout" if dataset.evaluated_on == "holdout" else "more images to evaluate on"
    if dataset.evaluated_on == "tune":
        remedy = "a larger split.tune"
    return [f"{counted(images, 'image')} to evaluate on: AP of so few is mostly chance; give {remedy}"]


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
