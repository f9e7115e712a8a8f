"""What every backend shares: from drawn images to jobs, from rendered images to batches, and how bad files are met.

A backend only renders jobs: it reads and decodes every image of a job once and returns the pixels of each view.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from harness.core.draws import image_keys
from harness.core.stages import stage
from harness.core.types import Batch, ImageSource, MicroBatch, Normalize, Sampler, Target, UnusableImages, View, Views
from harness.core.validate import Limits, Threads
from pipelines.plan import ViewPlan, boxes_through, plan_view, shrunk_sizes
from pipelines.policy import Policy

logger = logging.getLogger(__name__)

PAD = 32  # view sizes are multiples of this
MAX_BAD_SHARE, MIN_BAD_IMAGES = 0.01, 10  # the run stops when more are bad


class BadImageError(Exception):
    """A file that cannot be read or decoded, or is not what the annotations say."""


@dataclass
class Job:
    """B images to render, and how."""

    source: ImageSource
    positions: np.ndarray  # (B,) int64 in the source
    keys: np.ndarray  # (B,) int64
    plans: list[ViewPlan]  # one per view
    shrunk: np.ndarray  # (B, 2) int64 size to shrink to before all views
    rows: np.ndarray  # (M,) int64 rows of the source's boxes, image after image
    counts: np.ndarray  # (B,) int64 boxes per image

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views."""
        return tuple(plan.policy.name for plan in self.plans)

    @property
    def paths(self) -> list[str]:
        """Files of the images."""
        return [self.source.paths[position] for position in self.positions]

    @property
    def stored_sizes(self) -> np.ndarray:
        """(B, 2) int64 height, width that the source states."""
        return self.source.sizes[self.positions]


def canvas(plan: ViewPlan) -> tuple[int, int]:
    """Common padded size of a view's images."""
    height, width = (-(-plan.sizes.max(0) // PAD) * PAD).tolist()
    return height, width


def make_job(policy: Policy, views: Sequence[str], source: ImageSource, positions: np.ndarray, keys: np.ndarray) -> Job:
    """Plans all views of the images at `positions`."""
    starts = source.offsets[positions]
    counts = source.offsets[positions + 1] - starts
    rows = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    sizes, boxes = source.sizes[positions], source.boxes[rows]
    plans = [plan_view(policy.view(name), keys, sizes, boxes, counts) for name in views]
    return Job(source, positions, keys, plans, shrunk_sizes(policy, plans, sizes), rows, counts)


def view_targets(job: Job, plan: ViewPlan) -> list[Target]:
    """The source's boxes in view pixels: through the same matrix as the pixels, clipped, filtered."""
    image = np.repeat(np.arange(len(job)), job.counts)
    hulls = boxes_through(plan.to_view[image], job.source.boxes[job.rows].astype(np.float64))
    limit = plan.sizes[image][:, [1, 0, 1, 0]]
    boxes = np.clip(hulls, 0, limit)
    sides, full = boxes[:, 2:] - boxes[:, :2], hulls[:, 2:] - hulls[:, :2]
    keep = (sides > 0).all(1) & (sides >= plan.policy.min_side).all(1)
    keep &= sides.prod(1) >= plan.policy.min_visible * full.prod(1)
    rows, kept = job.rows[keep], np.bincount(image[keep], minlength=len(job)).tolist()
    parts = (
        torch.from_numpy(boxes[keep].astype(np.float32)).split(kept),
        torch.from_numpy(job.source.labels[rows].astype(np.int64)).split(kept),
        torch.from_numpy(job.source.scores[rows].astype(np.float32)).split(kept),
    )
    return [Target(*part) for part in zip(*parts, strict=True)]


class BasePipeline:
    """The `harness.core.types.Pipeline` of every backend.

    Args:
        policy: augmentation policy.
        normalize: what the network expects.
        views: the views that training needs; with `sampler` and `labeled` it makes `batches` possible.
        sampler: which images a step draws.
        labeled: labelled images, with boxes.
        unlabeled: unlabelled images; boxes only if they are pseudo labels made offline.
        device: where the batches go, cpu or cuda[:n].
        rank: this process among `world_size`, each of which gets its share of the micro-batches.
        world_size: number of processes.
        threads: CPU threads per stream of images.
        prefetch: batches prepared ahead.
        eval_batch: images per batch of `images`.
        on_bad_image: "skip" replaces a bad image by the next good one of the list, warns and counts; "error" stops.
        known_bad: files of the two lists that are known to be bad, with the reason: replaced in training without being
            tried. They stay in their list, so that what a step draws does not depend on them.
    """

    name = "base"

    def __init__(
        self,
        policy: Policy,
        normalize: Normalize,
        *,
        views: Views | None = None,
        sampler: Sampler | None = None,
        labeled: ImageSource | None = None,
        unlabeled: ImageSource | None = None,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        threads: Threads = 1,
        prefetch: Annotated[int, Limits(ge=0, le=1000)] = 2,
        eval_batch: int = 8,
        on_bad_image: Literal["skip", "error"] = "skip",
        known_bad: Mapping[str, str] | None = None,
    ) -> None:
        self.policy, self.normalize, self.device = policy, normalize, torch.device(device)
        self.rank, self.world_size, self.threads, self.prefetch = rank, world_size, threads, max(1, prefetch)
        self.eval_batch, self.on_bad_image = eval_batch, on_bad_image
        self._views, self._sampler, self._labeled, self._unlabeled = views, sampler, labeled, unlabeled
        self._drawn = [torch.zeros(len(s) if s is not None else 0, dtype=torch.bool) for s in (labeled, unlabeled)]
        self._open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
        self._known_bad = dict(known_bad or {})
        self.bad_images: dict[str, str] = {}  # file -> what is wrong with it; those that were met
        for name in (*views.labeled, *views.unlabeled) if views else ():
            policy.view(name)

    # What a backend implements

    def _render(self, jobs: Iterator[Job]) -> Generator[list[Tensor] | Exception, None, None]:
        """Images (B, 3, H, W) of each view of each job, in order; in their place the error if a job's image is bad."""
        raise NotImplementedError

    def _render_now(self, job: Job) -> list[Tensor] | Exception:
        """The same for one job, at once, beside the jobs that are under way."""
        raise NotImplementedError

    def close(self) -> None:
        """Free threads and memory; the pipeline is unusable afterwards, and so are iterators that it gave."""
        for generator in list(self._open):
            generator.close()

    def _start(self, jobs: Generator[Job, None, None]) -> Generator[list[Tensor] | Exception, None, None]:
        """Renders jobs until exhausted or closed."""
        results = self._render(jobs)
        self._open.add(results)
        return results

    # Training

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Endless micro-batches of this rank, from the first one of `start_step` on.

        Raises:
            UnusableImages: if too many images are bad, or one is and `on_bad_image` is "error".
        """
        assert self._views is not None
        assert self._sampler is not None
        waiting: deque[tuple[int, dict[str, Job]]] = deque()

        def jobs() -> Generator[Job, None, None]:
            assert self._sampler is not None
            for micro in self._sampler.stream(start_step, self.rank, self.world_size):
                with stage("feed"):
                    parts = self._parts(micro)
                waiting.append((micro.index, parts))
                yield from parts.values()

        results = self._start(jobs())
        for first in results:
            lane, parts = waiting.popleft()
            rendered = [first, *itertools.islice(results, len(parts) - 1)]
            resolved = [self._resolve(job, result) for job, result in zip(parts.values(), rendered, strict=True)]
            with stage("hand-over"):
                batch = self._batch(lane, dict(zip(parts, resolved, strict=True)))
            yield batch

    def batch_of(self, micro: MicroBatch) -> Batch:
        """One micro-batch at once, beside those that are under way; `state` is as it was before.

        Raises:
            UnusableImages: as `batches`.
        """
        drawn, bad = [known.clone() for known in self._drawn], dict(self.bad_images)
        try:
            parts = self._parts(micro)
            return self._batch(
                micro.index, {name: self._resolve(job, self._render_now(job)) for name, job in parts.items()}
            )
        finally:
            self.bad_images = bad
            for known, before in zip(self._drawn, drawn, strict=True):
                known.copy_(before)

    def _parts(self, micro: MicroBatch) -> dict[str, Job]:
        """Jobs of the labelled and the unlabelled images of a micro-batch, where it has any."""
        assert self._views is not None
        assert self._sampler is not None
        parts = {}
        for number, (name, source, views, positions, slots) in enumerate(
            (
                ("labeled", self._labeled, self._views.labeled, micro.labeled, micro.labeled_slots),
                ("unlabeled", self._unlabeled, self._views.unlabeled, micro.unlabeled, micro.unlabeled_slots),
            )
        ):
            if source is None or not views or not len(positions):
                continue
            self._drawn[number][torch.from_numpy(positions)] = True
            keys = image_keys(self._sampler.seed, micro.step, slots)
            parts[name] = make_job(self.policy, views, source, self._good(source, positions), keys)
        return parts

    def _batch(self, lane: int, parts: dict[str, tuple[Job, list[Tensor]]]) -> Batch:
        none = torch.zeros(0, dtype=torch.int64)
        views: dict[str, dict[str, View]] = {"labeled": {}, "unlabeled": {}}
        ids = {"labeled": none, "unlabeled": none}
        keys = {name: none.to(self.device) for name in views}
        for name, (job, images) in parts.items():
            views[name] = dict(zip(job.views, self._assemble(job, images), strict=True))
            ids[name] = torch.from_numpy(job.source.ids[job.positions])
            keys[name] = torch.from_numpy(job.keys).to(self.device, non_blocking=True)
        return Batch(
            labeled=views["labeled"],
            unlabeled=views["unlabeled"],
            labeled_ids=ids["labeled"],
            unlabeled_ids=ids["unlabeled"],
            labeled_keys=keys["labeled"],
            unlabeled_keys=keys["unlabeled"],
            lane=lane,
        )

    def _assemble(self, job: Job, images: list[Tensor]) -> list[View]:
        result = []
        for plan, pixels in zip(job.plans, images, strict=True):
            targets = [t.to(self.device) for t in view_targets(job, plan)] if job.source.annotated else None
            to_view = torch.from_numpy(plan.to_view.astype(np.float32)).to(self.device, non_blocking=True)
            sizes = torch.from_numpy(plan.sizes).to(self.device, non_blocking=True)
            result.append(View(pixels, sizes, to_view, targets))
        return result

    # Evaluation

    def images(self, source: ImageSource, view: str = "test") -> Iterator[tuple[View, Tensor]]:
        """(View, image ids), every image of `source` exactly once over all ranks.

        A batch holds images whose views are padded to the same size alone, so that what a network sees of an image does
        not depend on `eval_batch`; images of one size come in the order of `source`. Targets are the source's boxes, if
        it is annotated. A bad image comes as an empty (all 0) view.

        Raises:
            UnusableImages: if an image is bad and `on_bad_image` is "error".
        """
        waiting: deque[Job] = deque()

        def jobs() -> Generator[Job, None, None]:
            for positions in self._eval_batches(source, view):
                job = make_job(self.policy, (view,), source, positions, image_keys(0, 0, source.ids[positions]))
                waiting.append(job)
                yield job

        for rendered in self._start(jobs()):
            job = waiting.popleft()
            if isinstance(rendered, Exception):
                rendered = self._render_now(job)
            images = rendered if isinstance(rendered, list) else self._blank_bad(job, rendered)
            (result,) = self._assemble(job, images)
            yield result, torch.from_numpy(source.ids[job.positions])

    def _eval_batches(self, source: ImageSource, view: str) -> Iterator[np.ndarray]:
        """Positions of this rank's images in batches, each of images whose padded views have one size."""
        plan = plan_view(self.policy.view(view), image_keys(0, 0, source.ids), source.sizes)
        padded = -(-plan.sizes // PAD)
        order = np.lexsort((padded[:, 1], padded[:, 0]))  # stable
        mine = order[self.rank :: self.world_size]
        changes = np.flatnonzero((np.diff(padded[mine], axis=0) != 0).any(1)) + 1
        for alike in np.split(mine, changes):
            for start in range(0, len(alike), self.eval_batch):
                yield alike[start : start + self.eval_batch]

    def render(self, source: ImageSource, view: str, positions: np.ndarray, keys: np.ndarray) -> View:
        """One view of the images at `positions`, drawn by `keys`, with their boxes: for looking at.

        Args:
            source: images and boxes.
            view: name in the policy.
            positions: (B,) int64.
            keys: (B,) int64 of `harness.core.draws.image_keys`.
        """
        job = make_job(self.policy, (view,), source, positions, keys)
        job, images = self._resolve(job, self._render_now(job))
        (result,) = self._assemble(job, images)
        return result

    def _blank_bad(self, job: Job, error: Exception) -> list[Tensor]:
        """Renders a job image by image, with zeros for those that fail."""
        images = [torch.zeros(len(job), 3, *canvas(plan), device=self.device) for plan in job.plans]
        failed = 0
        for row in range(len(job)):
            one = self._only(job, row)
            rendered = self._render_now(one)
            if isinstance(rendered, Exception):
                failed += 1
                self._mark_bad(one, rendered)
                continue
            for whole, single in zip(images, rendered, strict=True):
                whole[row, :, : single.shape[2], : single.shape[3]] = single[0]
        if not failed:
            raise error
        return images

    # Bad images

    def _only(self, job: Job, row: int) -> Job:
        rows = slice(row, row + 1)
        return make_job(self.policy, job.views, job.source, job.positions[rows], job.keys[rows])

    def _good(self, source: ImageSource, positions: np.ndarray) -> np.ndarray:
        """Positions with known bad images replaced by the next good one of the list."""
        if not self.bad_images and not self._known_bad:
            return positions
        positions = positions.copy()
        for row, position in enumerate(positions):
            steps = 0
            while source.paths[position] in self.bad_images or source.paths[position] in self._known_bad:
                position, steps = (position + 1) % len(source), steps + 1
                if steps > len(source):
                    raise UnusableImages(
                        f"every image of the list is bad, as {source.paths[position]}: put the files there again, or "
                        "set data.root"
                    )
            positions[row] = position
        return positions

    def _mark_bad(self, job: Job, error: Exception) -> None:
        """Counts the one image of a job as bad."""
        path = job.paths[0]
        if self.on_bad_image == "error":
            raise UnusableImages(
                f"{path}: {error}; repair it or take it off the annotations, or set pipeline.on_bad_image=skip"
            ) from error
        if path not in self.bad_images:
            logger.warning("bad image skipped: %s: %s", path, error)
            self.bad_images[path] = str(error)

    def _resolve(self, job: Job, rendered: list[Tensor] | Exception) -> tuple[Job, list[Tensor]]:
        """The job and its images; where an image is bad, with another one in its place.

        Decoders do not say which image of a batch they could not read, so each is tried alone.
        """
        if isinstance(rendered, Exception):
            rendered = self._render_now(job)  # another batch's error may have broken this one
        if not isinstance(rendered, Exception):
            return job, rendered
        before = dict(self.bad_images)
        try:
            return self._replace_bad(job, rendered)
        except UnusableImages:
            self.bad_images = before  # a folder that went away is whole when it is back
            raise

    def _replace_bad(self, job: Job, rendered: list[Tensor] | Exception) -> tuple[Job, list[Tensor]]:
        while isinstance(rendered, Exception):
            known = len(self.bad_images)
            replaced = self._good(job.source, job.positions)
            if (replaced == job.positions).all():
                for row in range(len(job)):
                    one = self._only(job, row)
                    alone = self._render_now(one)
                    if isinstance(alone, Exception):
                        self._mark_bad(one, alone)
                if len(self.bad_images) == known:
                    raise rendered  # not an image's fault
                self._check_share()
                replaced = self._good(job.source, job.positions)
            job = make_job(self.policy, job.views, job.source, replaced, job.keys)
            rendered = self._render_now(job)
        return job, rendered

    @property
    def drawn(self) -> int:
        """Distinct images drawn for training so far, by this rank."""
        return sum(int(drawn.sum()) for drawn in self._drawn)

    def _check_share(self) -> None:
        bad = len(self.bad_images)
        if bad >= MIN_BAD_IMAGES and bad > MAX_BAD_SHARE * self.drawn:
            path, reason = next(iter(self.bad_images.items()))
            raise UnusableImages(
                f"{bad} of {self.drawn} images drawn so far are bad, as {path}: {reason}; check data.root"
            )

    def state(self) -> dict[str, Any]:
        """What resuming needs beside the step number: the bad images, and which images were drawn."""
        return {"bad_images": dict(self.bad_images), "drawn": [drawn.clone() for drawn in self._drawn]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up the counts of `state`."""
        self.bad_images = dict(state["bad_images"])
        for mine, saved in zip(self._drawn, state["drawn"], strict=True):
            mine |= saved
