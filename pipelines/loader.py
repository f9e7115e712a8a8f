"""What the torchvision and OpenCV backends share: image after image in a DataLoader's workers, normalised by torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from harness.core.files import read_picture, require_shared_memory
from harness.core.stages import stage
from harness.core.types import Normalize, UserError
from pipelines.base import BadImageError, BasePipeline, Job, canvas
from pipelines.plan import IN_BOX, KINDS, NEAREST, NOTHING, ViewPlan, from_shrunk, noise_patch
from pipelines.policy import Policy

_NAMES = {number: name for name, number in KINDS.items()}
_WITHOUT_SHARING = "set pipeline.threads=0, which renders in the training process, or pipeline=dali"
_WEIGHS_CHANNELS = ("contrast", "saturation", "grayscale", "hue")


@dataclass
class Task:
    """A job without its source, small enough to send to a worker."""

    paths: list[str]
    sizes: np.ndarray  # (B, 2)
    shrunk: np.ndarray  # (B, 2)
    plans: list[ViewPlan]


class Renderer(Dataset[Any]):
    """Renders tasks, one image at a time; the DataLoader's dataset. A backend gives the image operations.

    An image is whatever the backend likes, RGB uint8.
    """

    def __init__(self, policy: Policy, normalize: Normalize) -> None:
        self.policy = policy
        red, green, blue = normalize.mean
        self._mean = (float(round(red)), float(round(green)), float(round(blue)))

    # What a backend gives

    def decode(self, data: np.ndarray) -> Any:
        """The stored pixels of an encoded image, whatever its EXIF orientation.

        Raises:
            Exception: of any kind, if it cannot be decoded.
        """
        raise NotImplementedError

    def size(self, image: Any) -> tuple[int, int]:
        """Height and width."""
        raise NotImplementedError

    def resize(self, image: Any, size: tuple[int, int], antialias: bool) -> Any:
        """To (height, width); bilinear or, if the policy says so, by the nearest neighbour."""
        raise NotImplementedError

    def flip(self, image: Any) -> Any:
        """Left to right."""
        raise NotImplementedError

    def warp(self, image: Any, matrix: np.ndarray, size: tuple[int, int], fill: tuple[float, ...], near: bool) -> Any:
        """By a source-to-destination matrix in corner-origin coordinates."""
        raise NotImplementedError

    def swap(self, image: Any) -> Any:
        """Red and blue exchanged."""
        raise NotImplementedError

    def color(self, image: Any, name: str, value: float) -> Any:
        """One of `pipelines.policy.COLOR_OPS`."""
        raise NotImplementedError

    def cut(self, image: Any, box: np.ndarray) -> Any:
        """The part left, top, right, bottom."""
        raise NotImplementedError

    def paste(self, image: Any, patch: Any, top: int, left: int) -> Any:
        """A patch, an image or a (height, width, 3) uint8 array, over a copy of the image."""
        raise NotImplementedError

    def erase(self, image: Any, boxes: np.ndarray, fill: tuple[float, ...]) -> Any:
        """Rows top, left, height, width of `boxes` filled, in a copy."""
        raise NotImplementedError

    def write(self, image: Any, out: Tensor) -> None:
        """Into a (3, height, width) uint8 tensor."""
        raise NotImplementedError

    # The same for all

    def __getitem__(self, task: Task) -> list[Tensor] | Exception:
        try:
            return _shared(self._render(task))
        except (BadImageError, UserError) as error:
            return error

    def _render(self, task: Task) -> list[Tensor]:
        count = len(task.paths)
        batches = [torch.zeros(count, 3, *canvas(plan), dtype=torch.uint8) for plan in task.plans]
        unshrink = from_shrunk(task.sizes, task.shrunk)
        for row, path in enumerate(task.paths):
            image = self._read(path, task.sizes[row])
            shrunk = (int(task.shrunk[row, 0]), int(task.shrunk[row, 1]))
            if shrunk != self.size(image):
                image = self.resize(image, shrunk, True)
            for plan, batch in zip(task.plans, batches, strict=True):
                height, width = plan.sizes[row]
                self.write(self._view(image, plan, row, unshrink[row]), batch[row, :, :height, :width])
        return batches

    def _read(self, path: str, size: np.ndarray) -> Any:
        try:
            data = read_picture(path)
        except OSError as error:
            raise BadImageError(error.strerror or "cannot be read") from None
        try:
            image = self.decode(data)
        except Exception:
            raise BadImageError("cannot be decoded") from None
        height, width = self.size(image)
        if (height, width) != tuple(size):
            raise BadImageError(f"it is {width}x{height}, but the annotations say {size[1]}x{size[0]}")
        return image

    def _colors(self, image: Any, plan: ViewPlan, row: int) -> Any:
        for kind, value in zip(plan.kinds[row], plan.values[row], strict=True):
            name = _NAMES[int(kind)]
            if name == "identity":
                continue
            swapped = self.policy.color_channels == "bgr" and name in _WEIGHS_CHANNELS
            image = self.color(self.swap(image) if swapped else image, name, float(value))
            image = self.swap(image) if swapped else image
        return image

    def _geometry(self, image: Any, plan: ViewPlan, row: int, kind: int, fill: tuple[float, ...]) -> Any:
        if kind == NOTHING:
            return image
        if kind == IN_BOX:
            box = plan.regions[row]
            cut = self.cut(image, box)
            cut = self.warp(cut, plan.region_affine[row], self.size(cut), fill, False)
            return self.paste(image, cut, int(box[1]), int(box[0]))
        return self.warp(image, plan.affine[row], self.size(image), fill, kind == NEAREST)

    def _view(self, image: Any, plan: ViewPlan, row: int, unshrink: np.ndarray) -> Any:
        view = plan.policy
        fill, nearest = view.fill or self._mean, self.policy.interpolation == "nearest"
        firsts, before, after = plan.geometry(self.policy.color_at)
        size = (int(plan.sizes[row, 0]), int(plan.sizes[row, 1]))
        at_source = self.policy.color_at == "source"
        if at_source:
            image = self._colors(image, plan, row)
        composite = plan.has_affine[row] and before[row] + after[row] == NOTHING
        if view.zoom is not None or composite:
            image = self.warp(image, firsts[row] @ unshrink, size, fill, nearest)
        else:
            if size != self.size(image):
                image = self.resize(image, size, False)
            if firsts[row, 0, 0] < 0:
                image = self.flip(image)
        image = self._geometry(image, plan, row, int(before[row]), fill)
        if not at_source:
            image = self._colors(image, plan, row)
            image = self._geometry(image, plan, row, int(after[row]), fill)
        for step in plan.erase:
            if step.noise is None:
                image = self.erase(image, step.boxes[row], view.erase_fill or self._mean)
                continue
            for box, offset in zip(step.boxes[row], step.noise[row], strict=True):
                if box[2]:
                    image = self.paste(image, noise_patch(box, offset), int(box[0]), int(box[1]))
        return image


def _shared(batches: list[Tensor]) -> list[Tensor]:
    """Moves a worker's images into shared memory where it can be said that there is none.

    The queue to the training process would do so too late: it prints a traceback and never delivers.
    """
    if get_worker_info() is not None:
        try:
            for batch in batches:
                batch.share_memory_()
        except RuntimeError as error:
            raise UserError(f"the workers have no shared memory left ({error}): {_WITHOUT_SHARING}") from error
    return batches


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


class LoaderPipeline(BasePipeline):
    """See `pipelines.base.BasePipeline`; `threads` are worker processes, 0 renders in this one."""

    renderer: type[Renderer]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._renderer = self.renderer(self.policy, self.normalize)
        step = -1 if self.normalize.bgr else 1
        self._mean = torch.tensor(self.normalize.mean[::step], device=self.device)[:, None, None]
        self._scale = 1.0 / torch.tensor(self.normalize.std[::step], device=self.device)[:, None, None]

    def _normalized(self, job: Job, batches: list[Tensor]) -> list[Tensor]:
        """Float images, 0 outside their valid size."""
        result = []
        for plan, batch in zip(job.plans, batches, strict=True):
            pixels = batch.to(self.device, non_blocking=True)
            images = (pixels.flip(1) if self.normalize.bgr else pixels).float()
            images.sub_(self._mean).mul_(self._scale)
            for image, (height, width) in zip(images, plan.sizes.tolist(), strict=True):
                image[:, height:] = 0
                image[:, :, width:] = 0
            result.append(images)
        return result

    def _task(self, job: Job) -> Task:
        return Task(job.paths, job.stored_sizes, job.shrunk, job.plans)

    def _render(self, jobs: Iterator[Job]) -> Generator[list[Tensor] | Exception, None, None]:
        first = next(jobs, None)
        if first is None:
            return
        self._require_shared_memory(first)
        waiting: list[Job] = []

        def tasks() -> Iterator[Task]:
            for job in itertools.chain([first], jobs):
                waiting.append(job)
                yield self._task(job)

        loader: DataLoader[Any] = DataLoader(
            self._renderer,
            sampler=tasks(),
            batch_size=None,
            num_workers=self.threads,
            prefetch_factor=self.prefetch if self.threads else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            collate_fn=_unchanged,
        )
        for batches in _of_workers(loader):
            job = waiting.pop(0)
            if isinstance(batches, UserError):
                raise batches
            with stage("hand-over"):
                rendered = batches if isinstance(batches, Exception) else self._normalized(job, batches)
            yield rendered

    def _require_shared_memory(self, job: Job) -> None:
        """Checks, by one job, that what the workers hold ready has room between them and this process."""
        if self.threads:
            pixels = sum(len(job) * 3 * math.prod(canvas(plan)) for plan in job.plans)
            what = f"pipeline.threads={self.threads} of pipeline={self.name}"
            require_shared_memory(pixels * self.threads * self.prefetch, what, _WITHOUT_SHARING)

    def _render_now(self, job: Job) -> list[Tensor] | Exception:
        batches = self._renderer[self._task(job)]
        return batches if isinstance(batches, Exception) else self._normalized(job, batches)


def _unchanged(item: Any) -> Any:
    return item


def _of_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """What the workers give.

    Raises:
        RuntimeError: a worker has ended; torch itself says so unless it ended while it handed something over.
    """
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(
            f"DataLoader worker has ended while it handed images over ({type(error).__name__})"
        ) from error
