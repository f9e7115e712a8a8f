"""The DALI pipeline: file bytes in, every image decoded once, one branch per view, normalised batches out.

The graph is in `pipelines.dali.graph`. Jobs are fed explicitly and run ahead on DALI's own threads.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from collections.abc import Generator, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline
from torch import Tensor

from harness.core.stages import stage
from harness.core.types import ImageSource, UserError
from pipelines.base import BadImageError, BasePipeline, Job, canvas
from pipelines.dali.graph import Graph, define, define_decode
from pipelines.plan import NOTHING, ViewPlan, from_shrunk, noise_patch
from pipelines.policy import COLOR_OPS, ViewPolicy


def _patches(plan: ViewPlan) -> np.ndarray:
    """(B, 2, 2N) top and left, then height and width, of the patches of constant fill."""
    boxes = [erase.boxes for erase in plan.erase if erase.noise is None]
    if not boxes:
        return np.zeros((len(plan.sizes), 2, 0))
    drawn = np.concatenate(boxes, axis=1)
    return np.stack([drawn[:, :, :2], drawn[:, :, 2:]], axis=1).reshape(len(drawn), 2, -1)


def _steps(plan: ViewPlan) -> np.ndarray:
    """(B, K, 2) kind, by the kernels' numbers, and value of each colour operation."""
    return np.stack([_kernel_kinds()[plan.kinds], plan.values], axis=-1)


@functools.cache
def _kernel_kinds() -> np.ndarray:
    kernels = import_module("pipelines.dali.kernels")
    return np.array([getattr(kernels, name.upper()) for name in COLOR_OPS])


def _replicates(plan: ViewPlan, moved: np.ndarray) -> np.ndarray:
    """(B,) bool: the first warp only resizes and flips, and nothing of the view lies outside the image.

    Args:
        plan: the view.
        moved: (B,) bool: a geometric operation comes after the first warp.
    """
    return np.full(len(moved), plan.policy.zoom is None) & (~plan.has_affine | moved)


def _inputs_at_once(graph: Graph, plan: ViewPlan, unshrink: np.ndarray) -> dict[str, Any]:
    """The plan as the inputs of `kernels.render`."""
    first, _, after = plan.geometry(graph.policy.color_at)
    count, slots = plan.kinds.shape
    patches = _patches(plan)
    moved = after != NOTHING
    rows = np.zeros((count, 7 + slots + patches.shape[2], 3), dtype=np.float32)
    rows[:, 0:3] = first @ unshrink
    rows[:, 3:6] = np.where(moved[:, None, None], plan.affine, np.eye(3))
    rows[:, 6, :2] = plan.sizes
    rows[:, 6, 2] = _replicates(plan, moved)
    rows[:, 7 : 7 + slots, :2] = _steps(plan)
    rows[:, 7 + slots :: 2, :2] = patches[:, 0].reshape(count, -1, 2)
    rows[:, 8 + slots :: 2, :2] = patches[:, 1].reshape(count, -1, 2)
    # Shapes of outputs are made from shapes of inputs, so a size comes as an empty image.
    return {"extent": np.zeros((count, *canvas(plan), 0), dtype=np.uint8), "plan": rows}


def _view_inputs(graph: Graph, plan: ViewPlan, unshrink: np.ndarray) -> dict[str, Any]:
    """The plan as the graph's inputs."""
    policy = graph.policy
    view, count = plan.policy, len(plan.sizes)
    if graph.renders_at_once(view):
        return {f"{view.name} {key}": value for key, value in _inputs_at_once(graph, plan, unshrink).items()}
    first, before, after = plan.geometry(policy.color_at)
    inputs: dict[str, Any] = {
        "size": _float(plan.sizes),
        "first": _float(first @ unshrink),
        "canvas": np.tile(np.array(canvas(plan), dtype=np.float32), (count, 1)),
    }
    # DALI drops inputs that nothing uses.
    used = {name for slot in view.color_slots for name in slot} - {"identity"}
    if used and graph.kernels is not None:
        inputs["steps"] = _float(_steps(plan))
    if used and graph.kernels is None:
        inputs["kinds"] = plan.kinds.astype(np.int32)
    if used - {"autocontrast", "equalize", "grayscale"} and graph.kernels is None:
        inputs["values"] = _float(plan.values)
    if view.affine is not None:
        if view.zoom is None:
            inputs["composite"] = ~_replicates(plan, before + after != NOTHING)
        if view.affine.nearest or view.affine.in_box_ops or policy.color_at == "view":
            inputs["affine"] = _float(plan.affine)
        if view.affine.nearest or view.affine.in_box_ops:
            inputs["before"] = before.astype(np.int32)
        if policy.color_at == "view":
            inputs["after"] = after.astype(np.int32)
        if view.affine.in_box_ops:
            corners = plan.regions[:, [1, 0, 3, 2]].astype(np.int32)
            inputs |= {"region anchor": corners[:, :2], "region shape": corners[:, 2:] - corners[:, :2]}
            inputs["region affine"] = _float(plan.region_affine)
    if any(erase.noise is None for erase in plan.erase):
        inputs["patches"] = _float(_patches(plan))
    noise = [
        (erase.boxes[:, i], erase.noise[:, i])
        for erase in plan.erase
        if erase.noise is not None
        for i in range(erase.boxes.shape[1])
    ]
    if noise:
        anchors = [np.zeros((count, 2), np.int64), *(boxes[:, :2] for boxes, _ in noise)]
        inputs["noise anchors"] = np.stack(anchors, axis=1).astype(np.int32)
    for number, (boxes, offsets) in enumerate(noise):
        patches = (noise_patch(box, offset) for box, offset in zip(boxes, offsets, strict=True))
        inputs[f"noise {number}"] = [np.ascontiguousarray(patch[:, :, :: graph.step]) for patch in patches]
    return {f"{view.name} {key}": value for key, value in inputs.items()}


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what is wrong, which comes last but for the place in its source."""
    around = ("C++ context", "Current pipeline object", "Critical error", "[frame")
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(around)]
    # The decoder's own words are a number or nothing.
    return "cannot be decoded" if not lines or lines[-1].startswith(("Failed to decode", "nvImageCodec")) else lines[-1]


def _float(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


class _Runner:
    """One built DALI pipeline and the jobs it has under way."""

    def __init__(self, graph: Graph, views: list[ViewPolicy], batch: int, threads: int) -> None:
        self._graph = graph
        self.batch = batch
        # Depth 1 lets `schedule_run` take jobs one at a time; the executor still runs all scheduled jobs ahead.
        self._pipeline: Pipeline | None = define(
            graph,
            views,
            batch_size=batch,
            num_threads=threads,
            device_id=torch.cuda.current_device() if graph.gpu else None,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()
        self._data: deque[list[np.ndarray]] = deque()  # DALI reads the bytes in place

    def submit(self, job: Job) -> Exception | None:
        """Feeds a job; the error if a file cannot be read."""
        assert self._pipeline is not None
        try:
            data = [job.source.read(position) for position in job.positions]
        except OSError as error:
            return BadImageError(error.strerror or "cannot be read")
        if not all(len(d) for d in data):
            return BadImageError("the file is empty")
        inputs: dict[str, Any] = {"data": data}
        unshrink = np.eye(3)[None]
        if self._graph.policy.antialias:
            inputs["shrunk"] = job.shrunk.astype(np.float32)
            inputs["shrinks"] = (job.shrunk != job.stored_sizes).any(1)
            unshrink = from_shrunk(job.stored_sizes, job.shrunk)
        for plan in job.plans:
            inputs |= _view_inputs(self._graph, plan, unshrink)
        for name, value in inputs.items():
            self._pipeline.feed_input(name, value if isinstance(value, list) else np.ascontiguousarray(value))
        self._data.append(data)
        self._pipeline.schedule_run()
        return None

    def collect(self, job: Job) -> list[Tensor] | Exception:
        """Images of each view of the oldest job under way."""
        assert self._pipeline is not None
        try:
            if self._graph.gpu:
                stored, *images = self._pipeline.share_outputs(cuda_stream=torch.cuda.current_stream())
            else:
                stored, *images = self._pipeline.share_outputs()
        except RuntimeError as error:
            return BadImageError(_reason(error))
        finally:
            self._data.popleft()
        shapes = np.asarray(stored.as_tensor())[:, :2]
        tensors = [torch.from_dlpack(view.as_tensor()) for view in images]
        self._pipeline.release_outputs()
        wrong = (shapes != job.stored_sizes).any(1)
        if wrong.any():
            row = int(wrong.argmax())
            height, width = shapes[row]
            stated = job.stored_sizes[row]
            return BadImageError(f"it is {width}x{height}, but the annotations say {stated[1]}x{stated[0]}")
        return tensors

    def close(self) -> None:
        """Stops DALI's threads."""
        self._pipeline = None


class DaliPipeline(BasePipeline):
    """See `pipelines.base.BasePipeline`. Graphs are built once per combination of views and kept."""

    name = "dali"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.threads < 1:
            raise UserError(f"pipeline.threads must be at least 1 with pipeline=dali, got {self.threads}")
        self._graph = Graph(self.policy, self.normalize, self.device.type == "cuda")
        self._idle: dict[tuple[str, ...], list[_Runner]] = {}
        # On the CPU, where threads wait for each other after every operation, jobs alternate between two graphs.
        self._lanes = 1 if self._graph.gpu else min(self.threads, 2, self.prefetch)

    def _borrow(self, job: Job) -> _Runner:
        """A graph for the job's views that nobody uses at the moment."""
        idle = self._idle.setdefault(job.views, [])
        while idle:
            runner = idle.pop()
            if runner.batch >= len(job):
                return runner
        views = [self.policy.view(name) for name in job.views]
        batch = max(len(job), self.eval_batch, self._sampler.micro if self._sampler else 0)
        return _Runner(self._graph, views, batch, self.threads // self._lanes)

    def _render(self, jobs: Iterator[Job]) -> Generator[list[Tensor] | Exception, None, None]:
        runners: dict[tuple[str, ...], deque[_Runner]] = {}
        under_way: deque[tuple[Job, _Runner, Exception | None]] = deque()
        ahead = self.prefetch * 2  # each part of a step is a job of its own
        try:
            for job in jobs:
                lanes = runners.setdefault(job.views, deque())
                if len(lanes) < self._lanes:
                    lanes.appendleft(self._borrow(job))
                runner = lanes[0]
                lanes.rotate(-1)
                with stage("feed"):
                    under_way.append((job, runner, runner.submit(job)))
                if len(under_way) > ahead:
                    yield self._finish(under_way, runners)
            while under_way:
                yield self._finish(under_way, runners)
        finally:
            while under_way and not sys.is_finalizing():
                self._finish(under_way, runners)
            for views, lanes in runners.items():
                self._idle.setdefault(views, []).extend(lanes)

    def _finish(
        self, under_way: deque[tuple[Job, _Runner, Exception | None]], runners: dict[tuple[str, ...], deque[_Runner]]
    ) -> list[Tensor] | Exception:
        job, runner, error = under_way.popleft()
        if error is not None:  # a file could not be read, and the graph was given nothing
            return error
        result = runner.collect(job)
        # DALI says that a pipeline is not valid after an error: what it has under way is tried, new jobs get another.
        if isinstance(result, Exception) and runner in runners[job.views]:
            runners[job.views].remove(runner)
        return result

    def _render_now(self, job: Job) -> list[Tensor] | Exception:
        runner = self._borrow(job)
        error = runner.submit(job)
        result = error or runner.collect(job)
        if error is not None or not isinstance(result, Exception):
            self._idle[job.views].append(runner)
        return result

    def close(self) -> None:
        """Stops DALI's threads and frees its memory."""
        super().close()
        for runner in itertools.chain.from_iterable(self._idle.values()):
            runner.close()
        self._idle.clear()


class DecodeOnly:
    """Reads and decodes files and keeps nothing: the ceiling of every pipeline.

    Args:
        source: images, over and over.
        batch: images at once.
        threads: DALI's.
        device: cpu or cuda[:n].
    """

    def __init__(self, source: ImageSource, batch: int, threads: int, device: str) -> None:
        gpu = torch.device(device).type == "cuda"
        self._source, self._rows, self._batch = source, itertools.cycle(range(len(source))), batch
        self._pipeline: Pipeline | None = define_decode(
            gpu,
            batch_size=batch,
            num_threads=threads,
            device_id=torch.cuda.current_device() if gpu else None,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    def run(self, batches: int) -> int:
        """Decodes so many batches; the number of their images."""
        assert self._pipeline is not None
        data: deque[list[np.ndarray]] = deque()
        for number in range(batches + 2):
            if number < batches:
                data.append([self._source.read(row) for row in itertools.islice(self._rows, self._batch)])
                self._pipeline.feed_input("data", data[-1])
                self._pipeline.schedule_run()
            if number >= 2:
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
                data.popleft()
        return batches * self._batch

    def close(self) -> None:
        """Stops DALI's threads."""
        self._pipeline = None
