"""One network to take along: its weights with what rebuilds it, or a graph that runs without this program."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from detectors.detector import Detector
from harness.core.types import UserError, View
from harness.engine import trained
from harness.engine.trained import Description, Trained
from pipelines.base import PAD
from pipelines.policy import Policy

FORMATS = ("safetensors", "pt", "onnx", "pt2")
INPUTS, OUTPUTS = ("image", "size"), ("boxes", "labels", "scores")


class ExportedGraph(nn.Module):
    """A detector with everything between a picture and its boxes, for one picture of at most the canvas's size.

    Args:
        detector: the network; it is set to evaluation.
        score: boxes with at most this score are left out.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector, score: float) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.score = score
        self.bgr = detector.normalize.bgr
        self.register_buffer("mean", torch.tensor(detector.normalize.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(detector.normalize.std)[:, None, None])

    @torch.no_grad()
    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes of one picture, best first.

        Args:
            image: (3, H, W) float32 RGB in 0..255, H and W those of the canvas; the picture lies at the top left.
            size: (2,) int64 height and width of the picture; what lies beyond is not looked at.

        Returns:
            boxes (D, 4) xyxy in pixels of `image`, labels (D,) int64 in 1..C, scores (D,) in 0..1. D is fixed: rows of
            score 0 are none.
        """
        inside = (torch.arange(image.shape[1])[:, None] < size[0]) & (torch.arange(image.shape[2])[None] < size[1])
        pixels = (image - self.mean) / self.std * inside
        pixels = pixels.flip(0) if self.bgr else pixels
        view = View(pixels[None], size[None], torch.eye(3)[None])
        found = self.detector.find(self.detector.features(view.images), view, self.score)
        kept = found.valid[0]
        return found.boxes[0] * kept[:, None], found.labels[0] * kept, found.scores[0] * kept


class Program(msgspec.Struct, kw_only=True):
    """What a graph's file says beside `Description`: how to bring a picture onto its canvas."""

    canvas: list[int]  # height and width that `image` must have
    short: float | None  # the picture is resized so that its short side has this length,
    max: float | None  # or less, if its long side would be longer than this
    score: float


def program(about: Description, size: Sequence[int] | None, score: float) -> Program:
    """How a picture comes onto the canvas of a graph.

    Args:
        about: the network.
        size: (height, width) of the canvas; None: a square with room for every picture that the policy resizes.
        score: see `ExportedGraph`.

    Raises:
        UserError: the policy does not bound the size of pictures.
    """
    resize = Policy.from_config(about.augment).view("test").resize
    longest = None if resize is None or resize.max == float("inf") else resize.max
    if size is None and longest is None:
        raise UserError(
            "export.size=[HEIGHT,WIDTH] is needed for a graph: this network's policy bounds no picture's size"
        )
    sides = size or (longest, longest)
    return Program(
        canvas=[-(-int(side) // PAD) * PAD for side in sides if side is not None],
        short=None if resize is None else resize.short.largest,
        max=longest,
        score=score,
    )


@dataclass
class Export:
    """A file's content and what is worth saying about it."""

    content: bytes
    program: Program | None = None  # of a graph


def export(network: Trained, kind: str, size: Sequence[int] | None = None, score: float = 0.05) -> Export:
    """The content of a file.

    Args:
        network: on the CPU.
        kind: one of `FORMATS`: weights as `safetensors` or `pt`, a graph as `onnx` or `pt2` (`torch.export`).
        size, score: of a graph, see `program` and `ExportedGraph`.

    Raises:
        UserError: the network has operations that a graph cannot hold.
    """
    if kind in ("safetensors", "pt"):
        return Export(trained.encode(network, kind))
    about = program(network.about, size, score)
    said = msgspec.json.encode(msgspec.to_builtins(network.about) | {"program": msgspec.to_builtins(about)}).decode()
    graph = capture(network.detector, about)
    buffer = io.BytesIO()
    if kind == "pt2":
        torch.export.save(graph, buffer, extra_files={"ssodbench.json": said})
        return Export(buffer.getvalue(), about)
    with _quiet():
        onnx = torch.onnx.export(graph, input_names=INPUTS, output_names=OUTPUTS, dynamo=True, verbose=False)
    assert onnx is not None
    onnx.model.metadata_props["ssodbench"] = said
    onnx.model.doc_string = (ExportedGraph.forward.__doc__ or "").strip()
    return Export(onnx.model_proto.SerializeToString(), about)


def capture(detector: Detector, about: Program) -> torch.export.ExportedProgram:
    """A detector as a graph.

    Raises:
        UserError: it decides something in Python by what it sees.
    """
    height, width = about.canvas
    example = (torch.zeros(3, height, width), torch.tensor([height, width]))
    try:
        with _quiet():
            return torch.export.export(ExportedGraph(detector, about.score), example)
    except Exception as error:  # of many kinds
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"the detector {detector.name} cannot be exported as a graph ({first[:200]}): take format=safetensors"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def output_differences(first: Sequence[Any], second: Sequence[Any]) -> tuple[float, float]:
    """The largest difference of a side, and of a score, between two results of an `ExportedGraph` on one picture.

    Raises:
        ValueError: they have other boxes or classes.
    """
    boxes, labels, scores = (torch.as_tensor(part) for part in first)
    other_boxes, other_labels, other_scores = (torch.as_tensor(part) for part in second)
    if boxes.shape != other_boxes.shape or not torch.equal(labels, other_labels):
        raise ValueError("they do not have the same boxes")
    return float((boxes - other_boxes).abs().max()), float((scores - other_scores).abs().max())
