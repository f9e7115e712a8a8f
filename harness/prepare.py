"""What a run needs of its data: the split that the configuration names, and the images of its two parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.datasets import CocoIndex, Dataset
from harness.splits import make_split
from harness.types import ImageSource, Split, UserError


@dataclass(frozen=True)
class Policy:
    """Which images of the labelled and unlabelled part a run shows, and with which boxes."""

    empty_images: str  # labelled images without a box: keep, drop, or drop_unannotated
    crowd_boxes: str  # drop (background) or keep (as any other box)
    min_side: int = 0  # px; images with a shorter side are left out of both parts


# What the papers' code does. STAC leaves out labelled images without a box that is not a crowd. Soft Teacher, through
# mmdetection, leaves out those without any annotation, so that images with crowds alone stay, and tiny images. Unbiased
# Teacher's list has no image without a box in the first place. None shows a crowd box.
POLICIES = {
    "stac": Policy("drop", "drop"),
    "soft_teacher": Policy("drop_unannotated", "drop", 32),
    "unbiased_teacher": Policy("drop", "drop"),
    "ids": Policy("keep", "drop"),
    "full": Policy("drop_unannotated", "drop", 32),
}


def policy(split_config: Mapping[str, Any]) -> Policy:
    """The protocol's policy, with the keys empty_images, crowd_boxes and min_side of the configuration over it."""
    default = POLICIES[split_config["protocol"]]
    values = {key: split_config.get(key) for key in ("empty_images", "crowd_boxes", "min_side")}
    return Policy(**{key: getattr(default, key) if value is None else value for key, value in values.items()})


def resolve_split(dataset: Dataset, split_config: Mapping[str, Any]) -> Split:
    """The split that the configuration names.

    Args:
        dataset: what to split.
        split_config: keys protocol, percent, fold, offset and index_file.

    Raises:
        UserError: if there is no such split, or its labelled part shows no box.
    """
    protocol, file = split_config["protocol"], split_config.get("index_file")
    index = _read_json(file) if file and protocol in ("unbiased_teacher", "ids") else None
    ids = dataset.train.nonempty_ids() if protocol == "unbiased_teacher" else dataset.train.image_ids
    if protocol == "full" and dataset.unlabeled is None:
        raise UserError(f"split.protocol=full needs unlabelled images, and {dataset.no_unlabeled}")
    split = make_split(
        ids,
        split_config.get("percent", 10),
        split_config.get("fold", 1),
        protocol,
        offset=split_config.get("offset") or 0,
        index=index,
        unlabeled_ids=dataset.unlabeled.image_ids if protocol == "full" and dataset.unlabeled else None,
    )
    if not len(labeled_source(dataset, split, split_config).boxes):
        raise UserError(
            f"the {len(split.labeled_ids)} labelled image(s) of split.percent={split.percent:g} "
            f"split.fold={split.fold} show no box: give a larger percent or another fold"
        )
    return split


def unlabeled_index(dataset: Dataset, split: Split) -> CocoIndex:
    """The index that the split's unlabelled ids are in; their hidden boxes too, for measuring pseudo labels."""
    if split.protocol == "full":
        assert dataset.unlabeled is not None
        return dataset.unlabeled
    return dataset.train


def labeled_source(dataset: Dataset, split: Split, split_config: Mapping[str, Any]) -> ImageSource:
    """The labelled images, with their boxes."""
    p = policy(split_config)
    return dataset.train.source(split.labeled_ids, p.crowd_boxes, p.empty_images, p.min_side)


def sources(dataset: Dataset, split: Split, split_config: Mapping[str, Any]) -> tuple[ImageSource, ImageSource | None]:
    """The images of the two parts.

    Returns:
        Labelled images with boxes; unlabelled images without, or None where there is none.
    """
    labeled = labeled_source(dataset, split, split_config)
    if not len(split.unlabeled_ids):
        return labeled, None
    index = unlabeled_index(dataset, split)
    return labeled, index.source(split.unlabeled_ids, min_side=policy(split_config).min_side, boxes=False)


def _read_json(file: str | Path) -> Any:
    path = Path(file).expanduser()
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read split.index_file={path} ({error.strerror}): give an existing file") from error
    except ValueError as error:
        raise UserError(f"split.index_file={path} is not JSON ({error}): give an index file") from error


def class_counts(index: CocoIndex, source: ImageSource) -> np.ndarray:
    """(C,) boxes of each class in a source."""
    return np.bincount(source.labels - 1, minlength=index.num_classes)
