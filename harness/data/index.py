"""A dataset's annotations as arrays: what splits, pipelines and the evaluation read, at the size of COCO."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.core.types import ImageSource, UserError
from harness.data.annotations import Finding, positions

EMPTY_IMAGES = ("keep", "drop", "drop_unannotated")
CROWD_BOXES = ("drop", "keep")


@dataclass(frozen=True)
class CocoIndex:
    """Images and boxes of one annotation file. N images, M boxes, C classes.

    Boxes of image i are rows `offsets[i]:offsets[i + 1]`, in the file's order, as are the images.
    """

    name: str
    image_dir: str
    image_ids: np.ndarray  # (N,) int64
    file_names: Sequence[str]  # relative to image_dir, or absolute
    sizes: np.ndarray  # (N, 2) int64 (height, width) of the stored pixels, whatever an EXIF orientation says
    boxes: np.ndarray  # (M, 4) float32 xyxy px, clipped to the image
    xywh: np.ndarray  # (M, 4) float64 as the file gives them, for the evaluation
    labels: np.ndarray  # (M,) int64 in 1..C: position of the category, by ascending id
    crowd: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float32 px, of the object's mask where the file gives it
    offsets: np.ndarray  # (N + 1,) int64
    category_ids: np.ndarray  # (C,) int64, the dataset's own ids of the labels 1..C
    category_names: Sequence[str]
    sha256: str  # of the annotation files' content
    findings: tuple[Finding, ...] = ()  # what was wrong in them, and what was done about it

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.category_ids)

    def real_paths(self) -> list[str]:
        """Where each picture lies, for telling whether two indices show the same one."""
        folder = os.path.realpath(self.image_dir)
        return [os.path.normpath(os.path.join(folder, name)) for name in self.file_names]

    def positions(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Rows of images in the index.

        Raises:
            UserError: if an id is not in it.
        """
        ids = np.asarray(ids, np.int64)
        rows = positions(self.image_ids, ids)
        if (rows < 0).any():
            raise UserError(f"image id {ids[rows < 0][0]} is not in {self.name}: give ids that the annotations list")
        return rows

    def box_rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the boxes of images.

        Args:
            images: (K,) rows of images, in any order.

        Returns:
            (R,) rows of their boxes, in that order, and (R,) which of the K images each belongs to.
        """
        counts = self.offsets[images + 1] - self.offsets[images]
        owner = np.repeat(np.arange(len(images)), counts)
        first = np.cumsum(counts) - counts
        return np.arange(len(owner)) - first[owner] + self.offsets[images][owner], owner

    def shown_classes(self, crowd: str = "drop", min_side: int = 0) -> np.ndarray:
        """(N, C) bool, of which classes the images show a box, as `source` gives them with the same arguments."""
        boxes = np.ones(len(self.crowd), bool) if crowd == "keep" else ~self.crowd
        owner = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        found = np.zeros((len(self), self.num_classes), bool)
        found[owner[boxes], self.labels[boxes] - 1] = True
        found[self.sizes.min(1, initial=np.iinfo(self.sizes.dtype).max) < min_side] = False
        return found

    def annotated(self) -> np.ndarray:
        """(N,) bool, the images with an annotation, be it a crowd."""
        return np.diff(self.offsets) > 0

    def boxed(self) -> np.ndarray:
        """(N,) bool, the images with at least one box that is not a crowd."""
        return self._counts(~self.crowd) > 0

    def _counts(self, boxes: np.ndarray) -> np.ndarray:
        """(N,) how many boxes of each image are in the mask `boxes` (M,)."""
        total = np.concatenate([[0], np.cumsum(boxes)])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def boxes_per_class(self, ids: np.ndarray | Sequence[int] | None = None, crowd: str = "drop") -> np.ndarray:
        """(C,) number of boxes of each class on the given images, without crowds unless crowd="keep"."""
        rows, _ = self.box_rows(np.arange(len(self)) if ids is None else self.positions(ids))
        rows = rows if crowd == "keep" else rows[~self.crowd[rows]]
        return np.bincount(self.labels[rows] - 1, minlength=self.num_classes)

    def select(self, ids: np.ndarray | Sequence[int]) -> CocoIndex:
        """Some of the images (K,) with their boxes, in the order of `ids`.

        Everything else stays, `sha256` too: it is still that of the files.
        """
        images = self.positions(ids)
        rows, owner = self.box_rows(images)
        return replace(
            self,
            image_ids=self.image_ids[images],
            file_names=[self.file_names[i] for i in images.tolist()],
            sizes=self.sizes[images],
            boxes=self.boxes[rows],
            xywh=self.xywh[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            areas=self.areas[rows],
            offsets=np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(images)))]).astype(np.int64),
        )

    def source(
        self,
        ids: np.ndarray | Sequence[int] | None = None,
        crowd: str = "drop",
        empty: str = "keep",
        min_side: int = 0,
        boxes: bool = True,
    ) -> ImageSource:
        """Images for a pipeline, in the order of `ids`.

        Args:
            ids: which images; default: all, in file order.
            crowd: "drop" leaves crowd boxes out, so that they are background; "keep" shows them as any other.
            empty: "keep" images without a shown box, "drop" them, or "drop_unannotated": only those without any
                annotation, so that images with crowd boxes alone stay.
            min_side: drop images with a shorter side in px.
            boxes: False for unlabelled images; the boxes then decide nothing but what `empty` asks for.
        """
        _choice("crowd_boxes", crowd, CROWD_BOXES)
        _choice("empty_images", empty, EMPTY_IMAGES)
        images = np.arange(len(self)) if ids is None else self.positions(ids)
        shown = np.ones(len(self.crowd), bool) if crowd == "keep" else ~self.crowd
        if empty != "keep":
            kept = self.annotated() if empty == "drop_unannotated" else self._counts(shown) > 0
            images = images[kept[images]]
        images = images[self.sizes[images].min(1) >= min_side] if min_side else images
        rows, owner = self.box_rows(images)
        visible = shown[rows] if boxes else np.zeros(len(rows), bool)
        rows, owner = rows[visible], owner[visible]
        counts = np.bincount(owner, minlength=len(images))
        return ImageSource(
            [os.path.join(self.image_dir, self.file_names[i]) for i in images.tolist()],
            self.image_ids[images],
            self.sizes[images],
            self.boxes[rows],
            self.labels[rows],
            np.ones(len(rows), np.float32),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            annotated=boxes,
        )

    def coco_ground_truth(self, ids: np.ndarray | Sequence[int] | None = None) -> dict[str, Any]:
        """The annotations as a COCO dictionary for pycocotools: original category ids, boxes and areas, crowds marked.

        Annotations are numbered from 1: pycocotools takes a match with number 0 for none.
        """
        images = np.arange(len(self)) if ids is None else self.positions(ids)
        rows, owner = self.box_rows(images)
        categories = self.category_ids[self.labels[rows] - 1].tolist()
        columns = (self.image_ids[images[owner]].tolist(), categories, self.xywh[rows].tolist())
        flags = (self.areas[rows].tolist(), self.crowd[rows].astype(int).tolist())
        return {
            "info": {"description": self.name},
            "licenses": [],
            "images": [
                {"id": int(self.image_ids[i]), "file_name": self.file_names[i], "height": int(h), "width": int(w)}
                for i, (h, w) in zip(images.tolist(), self.sizes[images], strict=True)
            ],
            "annotations": [
                {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": a, "iscrowd": k}
                for n, i, c, b, a, k in zip((rows + 1).tolist(), *columns, *flags, strict=True)
            ],
            "categories": [
                {"id": int(i), "name": name} for i, name in zip(self.category_ids, self.category_names, strict=True)
            ],
        }


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"split.{key}={value} is not one of {', '.join(choices)}")
