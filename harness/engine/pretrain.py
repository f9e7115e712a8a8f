"""The small backbone's first weights: trained once per machine on generated patches, shared by every run.

They stand in for the ImageNet weights of published numbers. The patches show one object each, of classes that the
shapes dataset does not have, so that no label of the benchmark is used; `description` is the sentence that declares
this in records and reports.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from detectors.backbones import SmallBackbone
from harness.core.console import STDERR
from harness.data.cache import build_once
from harness.data.drawing import GENERATOR_VERSION, OTHER_CLASSES, render

VERSION = 1  # raise it whenever the code below gives other weights
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    patches: int = 6000
    size: int = 40  # height and width of a patch, px
    epochs: int = 8
    batch: int = 64
    lr: float = 1.2e-2  # peak of the one-cycle schedule
    weight_decay: float = 0.02
    seed: int = 77
    channels: tuple[int, int, int, int] = (24, 32, 64, 96)  # of `SmallBackbone`


DEFAULT = Recipe()


def description(recipe: Recipe = DEFAULT) -> str:
    """One sentence for records and reports that says where the backbone's weights come from."""
    return (
        f"small backbone pre-trained on {recipe.patches} generated patches of {len(OTHER_CLASSES)} shape classes that "
        "no dataset here has, in place of ImageNet weights"
    )


def backbone_weights(cache_dir: Path, recipe: Recipe = DEFAULT, *, progress: bool = True) -> dict[str, Tensor]:
    """The pre-trained backbone, trained first if the cache does not have it.

    Training takes one thread whatever torch is set to, and leaves torch's thread count and global random state as
    they were; the weights are the same bits on every call.

    Args:
        cache_dir: they lie in the sub-folder `backbones`, once per recipe.
        recipe: how to train.
        progress: show a progress bar on stderr where that is a terminal.

    Returns:
        State of `SmallBackbone(recipe.channels)`.

    Raises:
        UserError: if the cache cannot be written.
    """
    folder = build_once(_root(cache_dir), _parameters(recipe), lambda to: _build(to, recipe, progress))
    weights: dict[str, Tensor] = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    return weights


def _root(cache_dir: Path) -> Path:
    return Path(cache_dir) / "backbones"


def _parameters(recipe: Recipe) -> dict[str, Any]:
    return {**asdict(recipe), "channels": list(recipe.channels), "version": VERSION, "generator": GENERATOR_VERSION}


def _build(folder: Path, recipe: Recipe, progress: bool) -> None:
    """Writes weights.pt and info.json (final training accuracy 0..1, CPU seconds)."""
    start = time.process_time()
    with (
        _one_thread(),
        Progress(console=STDERR, transient=True, disable=not (progress and STDERR.is_terminal)) as bar,
    ):
        task = bar.add_task("pre-training the backbone: patches", total=recipe.patches)
        images, boxes, labels = make_patches(recipe, lambda: bar.advance(task))
        bar.update(task, visible=False)
        task = bar.add_task("pre-training the backbone", total=_steps(recipe))
        weights, accuracy = train_classifier(images, boxes, labels, recipe, lambda: bar.advance(task))
    seconds = time.process_time() - start
    torch.save(weights, folder / "weights.pt")
    (folder / "info.json").write_text(json.dumps({"accuracy": accuracy, "cpu_seconds": seconds}))
    _log.info("pre-trained the backbone in %.0f CPU s, training accuracy %.3f", seconds, accuracy)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread, which makes its sums the same on every call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_patches(recipe: Recipe, advance: Callable[[], object] = lambda: None) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the patches: (N, 3, S, S) uint8, (N, 4) boxes xyxy as fractions of the side, (N,) labels from 0."""
    images = np.empty((recipe.patches, recipe.size, recipe.size, 3), dtype=np.uint8)
    boxes = np.empty((recipe.patches, 4), dtype=np.float32)
    labels = np.empty(recipe.patches, dtype=np.int64)
    for index in range(recipe.patches):
        generator = np.random.default_rng([recipe.seed, index])
        images[index], box, label = render(generator, recipe.size, OTHER_CLASSES, max_objects=1, distractors=(0, 2))
        boxes[index], labels[index] = box[0] / recipe.size, label[0] - 1
        advance()
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(boxes), torch.from_numpy(labels)


def train_classifier(
    images: Tensor, boxes: Tensor, labels: Tensor, recipe: Recipe, advance: Callable[[], object] = lambda: None
) -> tuple[dict[str, Tensor], float]:
    """Class and box of each patch from the pooled features of all stages.

    Args:
        images: (N, 3, S, S) uint8.
        boxes: (N, 4) xyxy, fractions of the side.
        labels: (N,) int64 from 0.
        recipe: how to train.
        advance: called after each step.

    Returns:
        State of the backbone, and the accuracy 0..1 on the augmented patches of the last epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        backbone = SmallBackbone(recipe.channels)
        head = nn.Linear(sum(backbone.out_channels), len(OTHER_CLASSES) + 4)
    backbone.train().to(memory_format=torch.channels_last)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=_steps(recipe), pct_start=0.15)
    generator = torch.Generator().manual_seed(recipe.seed)
    correct = seen = 0
    for _ in range(recipe.epochs):
        correct = seen = 0
        for rows in torch.randperm(len(images), generator=generator).split(recipe.batch)[: _steps(recipe, epochs=1)]:
            x, box = augment(images[rows], boxes[rows], generator)
            features = backbone(x.contiguous(memory_format=torch.channels_last))
            output = head(torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1))
            scores, corners = output.split((len(OTHER_CLASSES), 4), dim=1)
            loss = F.cross_entropy(scores, labels[rows]) + 4.0 * F.smooth_l1_loss(corners, box, beta=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            correct += int((scores.argmax(dim=1) == labels[rows]).sum())
            seen += len(rows)
            advance()
    return {name: value.contiguous() for name, value in backbone.state_dict().items()}, correct / seen


def _steps(recipe: Recipe, epochs: int | None = None) -> int:
    """Training steps; the incomplete batch at the end of an epoch is left out, unless it is the only one."""
    return max(recipe.patches // recipe.batch, 1) * (recipe.epochs if epochs is None else epochs)


def augment(images: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flips, permutes the colour channels, and changes gain and offset of each.

    Args:
        images: (B, 3, S, S) uint8.
        boxes: (B, 4) xyxy, fractions of the side.
        generator: source of every random number.

    Returns:
        (B, 3, S, S) float32, normalised, and the boxes.
    """
    count = len(images)
    flip = torch.rand(count, generator=generator) < 0.5
    order = torch.rand(count, 3, generator=generator).argsort(dim=1)
    gain = 0.6 + 0.8 * torch.rand(count, 3, 1, 1, generator=generator)
    offset = torch.rand(count, 3, 1, 1, generator=generator) - 0.5
    x = images[torch.arange(count)[:, None], order].float().sub_(120.0).div_(60.0)
    x = torch.where(flip[:, None, None, None], x.flip(3), x).mul_(gain).add_(offset)
    mirrored = boxes[:, [2, 1, 0, 3]] * boxes.new_tensor([-1, 1, -1, 1]) + boxes.new_tensor([1, 0, 1, 0])
    return x, torch.where(flip[:, None], mirrored, boxes)
