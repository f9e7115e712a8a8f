"""The boxes that an evaluation is scored against, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.core.types import UserError
from harness.data.annotations import positions
from harness.data.index import CocoIndex


@dataclass(frozen=True)
class GroundTruth:
    """Annotated boxes of I images and K classes, G in all, in the order in which pycocotools sees them."""

    image_ids: np.ndarray  # (I,) int64, ascending
    category_ids: np.ndarray  # (K,) int64, ascending
    category_names: Sequence[str]
    images: np.ndarray  # (G,) int64, row of `image_ids`
    classes: np.ndarray  # (G,) int64, row of `category_ids`
    xywh: np.ndarray  # (G, 4) float64 px
    areas: np.ndarray  # (G,) float64 px^2, what the object's size is judged by
    crowd: np.ndarray  # (G,) bool: COCO's crowds, VOC's difficult objects; neither found nor missed

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where predictions belong.

        Args:
            predictions: (N, 7): image id, x, y, width, height, score, category id.

        Returns:
            (N,) rows of `image_ids` and (N,) rows of `category_ids`.

        Raises:
            UserError: if an image or a category is not of this ground truth.
        """
        found = []
        for what, known, column in (("image", self.image_ids, 0), ("category", self.category_ids, 6)):
            ids = predictions[:, column].astype(np.int64)
            at = positions(known, ids)
            if (at < 0).any():
                raise UserError(
                    f"the predictions have a box of {what} {ids[at < 0][0]}, which the ground truth does not have: "
                    "give the annotations of the images that were evaluated"
                )
            found.append(at)
        return found[0], found[1]


def from_index(index: CocoIndex) -> GroundTruth:
    """The boxes of an opened annotation file."""
    images = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    return _sorted(
        index.image_ids,
        index.category_ids,
        index.category_names,
        images,
        index.labels - 1,
        index.xywh,
        index.areas,
        index.crowd,
    )


def from_coco(truth: dict[str, Any]) -> GroundTruth:
    """The boxes of a COCO annotation dictionary, such as `CocoIndex.coco_ground_truth` gives."""
    boxes = truth["annotations"]
    image_ids = np.array([image["id"] for image in truth["images"]], np.int64)
    category_ids = np.array([category["id"] for category in truth["categories"]], np.int64)
    return _sorted(
        image_ids,
        category_ids,
        [category["name"] for category in truth["categories"]],
        positions(image_ids, np.array([box["image_id"] for box in boxes], np.int64)),
        positions(category_ids, np.array([box["category_id"] for box in boxes], np.int64)),
        np.array([box["bbox"] for box in boxes], np.float64).reshape(-1, 4),
        np.array([box["area"] for box in boxes], np.float64),
        np.array([box.get("iscrowd", 0) for box in boxes], bool),
    )


def _sorted(
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    names: Sequence[str],
    images: np.ndarray,
    classes: np.ndarray,
    xywh: np.ndarray,
    areas: np.ndarray,
    crowd: np.ndarray,
) -> GroundTruth:
    """Images and classes by ascending id; within an image the boxes keep their order."""
    by_image, by_class = np.argsort(image_ids, kind="stable"), np.argsort(category_ids, kind="stable")
    images, classes = np.argsort(by_image)[images], np.argsort(by_class)[classes]
    order = np.argsort(images, kind="stable")
    return GroundTruth(
        image_ids[by_image],
        category_ids[by_class],
        [names[i] for i in by_class],
        images[order],
        classes[order],
        np.asarray(xywh, np.float64)[order],
        np.asarray(areas, np.float64)[order],
        np.asarray(crowd, bool)[order],
    )
