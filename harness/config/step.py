"""How a student step is made up: the one home of the rules about its images, micro-batches and processes."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.config import schema
from harness.core.types import UserError, Views
from harness.core.validate import shown

RATIOS = ("exact", "bernoulli")


@dataclass(frozen=True)
class StepShape:
    """The images of a student step, over all processes, and how they are divided into micro-batches.

    Args:
        labeled: labelled images of a step.
        unlabeled: unlabelled images of a step; 0 for a method that draws none.
        micro: images of a micro-batch; None for all of a step.
        world: processes that share a step.
        ratio: "exact" spreads either kind over the micro-batches as evenly as it goes; with "bernoulli" each image is
            labelled with probability labeled / (labeled + unlabeled), and every micro-batch has one of either kind.

    Raises:
        UserError: numbers that do not fit together.
    """

    labeled: int
    unlabeled: int
    micro: int | None = None
    world: int = 1
    ratio: str = "exact"

    def __post_init__(self) -> None:
        self._check_images()
        self._check_micro()
        self._check_world()

    @property
    def images(self) -> int:
        """Images of a step."""
        return self.labeled + self.unlabeled

    @property
    def micro_images(self) -> int:
        """Images of a micro-batch."""
        return self.images if self.micro is None else self.micro

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.images // self.micro_images

    @property
    def micro_batches_per_device(self) -> int:
        """Micro-batches of a step that each process computes."""
        return self.micro_batches // self.world

    def _check_images(self) -> None:
        if self.labeled < 0 or self.unlabeled < 0 or not self.images:
            raise UserError(
                f"batch.labeled={self.labeled} and batch.unlabeled={self.unlabeled} make no step: give 0 or more of "
                "either kind, and not both 0"
            )
        if self.ratio not in RATIOS:
            raise UserError(f"batch.ratio={self.ratio} is unknown: give {' or '.join(RATIOS)}")

    def _check_micro(self) -> None:
        if self.micro_images < 1 or self.images % self.micro_images:
            raise UserError(
                f"batch.micro={self.micro} does not divide the {self.images} images of a step: choose a divisor, so "
                "that every micro-batch has the same size"
            )
        both = self.labeled > 0 and self.unlabeled > 0
        if both and self.micro_images < 2:
            raise UserError("batch.micro=1 leaves no room for a labelled and an unlabelled image: give at least 2")
        for name, part in (("labeled", self.labeled), ("unlabeled", self.unlabeled)):
            if both and self.ratio == "exact" and part < self.micro_batches:
                raise UserError(
                    f"batch.{name}={part} leaves some of the {self.micro_batches} micro-batches without such an image: "
                    f"raise it to {self.micro_batches}, or raise batch.micro (now {self.micro})"
                )

    def _check_world(self) -> None:
        assert self.world >= 1, "a step is computed by at least one process"
        if self.micro_batches % self.world:
            plural = "es" if self.micro_batches > 1 else ""
            raise UserError(
                f"{self.world} devices cannot share the {self.images} images of a step evenly, batch.micro="
                f"{shown(self.micro)} makes {self.micro_batches} micro-batch{plural} of them: set it so that their "
                f"number is a multiple of {self.world}, or lower devices"
            )


def check_annealing(anneal_steps: int, ratio: str, steps: int) -> None:
    """Checks over how many last steps the share of labelled images may fall.

    Raises:
        UserError: the ratio is not drawn, or the schedule is shorter.
    """
    if anneal_steps and (ratio != "bernoulli" or not 0 < anneal_steps <= steps):
        raise UserError(
            f"batch.anneal_steps={anneal_steps} needs batch.ratio=bernoulli and schedule.steps (now {steps}) of at "
            "least as many: set these, or leave it 0"
        )


def shape_of(batch: schema.BatchOptions, method: str, unlabeled: bool, world: int) -> StepShape:
    """How a student step of a method is made up.

    Args:
        batch: the keys of `batch`.
        method: its name.
        unlabeled: whether it draws unlabelled images.
        world: processes that share the step.

    Raises:
        UserError: naming the keys of `batch` that do not fit together, or do not fit the method.
    """
    if unlabeled and not batch.unlabeled:
        raise UserError(
            f"method={method} needs unlabelled images: batch.unlabeled must be at least 1, or take method=supervised"
        )
    return StepShape(
        labeled=batch.labeled,
        unlabeled=batch.unlabeled if unlabeled else 0,
        micro=batch.micro,
        world=world,
        ratio=batch.ratio,
    )


def draws_unlabeled(method: Mapping[str, Any]) -> bool:
    """Whether a method draws unlabelled images, told without building it.

    By `method.unlabeled`; a class of the user's own is asked for its `views` first, since it may stand in a YAML that
    was made for another one.
    """
    declared, target = method.get("unlabeled"), str(method["_target_"])
    if declared is None or not target.startswith("detectors.methods."):
        views = _views(target)
        if views is not None:
            return bool(views.unlabeled)
    return bool(declared)


def _views(target: str) -> Views | None:
    """The views that a method's class names; None for one that chooses them when it is built."""
    try:
        return getattr(pkgutil.resolve_name(target), "views", None)
    except Exception:  # whatever the user's module raises: building the method tells it better
        return None
