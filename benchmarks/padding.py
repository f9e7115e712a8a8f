"""Pixels that padding adds to the papers' batches, ungrouped and grouped by aspect ratio, and to evaluation batches.

    python benchmarks/padding.py ANNOTATIONS.json [ANNOTATIONS.json ...] [--images 118287] [--steps 300]

Nothing is decoded: the plans of the papers' policies are made for the batches that the sampler draws, and their areas
counted. With --images so many sizes are drawn, with replacement, from those of the files: an approximation of a large
dataset by a small sample of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from harness.config import compose, sections
from harness.config.step import StepShape
from harness.core.draws import image_keys
from harness.core.types import MicroBatch
from harness.data.sampling import BatchSampler
from pipelines.base import PAD, canvas
from pipelines.plan import plan_view
from pipelines.policy import Policy

METHODS = ("soft_teacher", "mean_teacher", "unbiased_teacher")
VIEWS = {"unbiased_teacher": (("weak", "strong"), ("weak", "strong"))}
SHARE = 0.1  # of labelled images


def sizes_of(files: list[Path]) -> np.ndarray:
    """(N, 2) height and width of the images of COCO annotation files."""
    images = [image for file in files for image in json.loads(file.read_bytes())["images"]]
    return np.array([(image["height"], image["width"]) for image in images], dtype=np.int64)


def areas(
    policy: Policy, seed: int, drawn: MicroBatch, sizes: list[np.ndarray], views: list[tuple[str, ...]]
) -> list[int]:
    """Pixels of the images of a micro-batch in all views, and pixels of their canvases."""
    valid = padded = 0
    parts = ((drawn.labeled, drawn.labeled_slots), (drawn.unlabeled, drawn.unlabeled_slots))
    for (positions, slots), stored, names in zip(parts, sizes, views, strict=True):
        for name in names:
            plan = plan_view(policy.view(name), image_keys(seed, drawn.step, slots), stored[positions])
            height, width = canvas(plan)
            valid += int(plan.sizes.prod(1).sum())
            padded += height * width * len(positions)
    return [valid, padded]


def training(cfg: DictConfig, sizes: list[np.ndarray], group: str | None, steps: int) -> float:
    """Pixels of padding per pixel of image in training batches."""
    batch, policy = cfg.batch, Policy.from_config(sections.group(cfg, "augment"))
    shape = StepShape(batch.labeled, batch.unlabeled, batch.micro, ratio=batch.ratio)
    sampler = BatchSampler(
        len(sizes[0]), len(sizes[1]), shape, seed=1, group=group,
        landscape=(sizes[0][:, 1] > sizes[0][:, 0], sizes[1][:, 1] > sizes[1][:, 0]),
    )  # fmt: skip
    views = list(VIEWS.get(cfg.method.name, (("labeled",), ("weak", "strong"))))
    drawn = [sampler.draw(step, micro) for step in range(steps) for micro in range(sampler.micro_batches)]
    valid, padded = np.sum([areas(policy, 1, one, sizes, views) for one in drawn], axis=0)
    return float(padded / valid - 1)


def evaluation(policy: Policy, sizes: np.ndarray, batch: int) -> dict[str, float]:
    """Pixels of padding per pixel of image in evaluation batches: in file order, and of images padded to one size."""
    plan = plan_view(policy.view("test"), image_keys(0, 0, np.arange(len(sizes))), sizes)
    alone = -(-plan.sizes // PAD) * PAD
    in_order = [
        alone[start : start + batch].max(0).prod() * len(alone[start : start + batch])
        for start in range(0, len(alone), batch)
    ]
    _, counts = np.unique(alone, axis=0, return_counts=True)
    valid = plan.sizes.prod(1).sum()
    return {
        "file order": float(sum(in_order) / valid - 1),
        "alike": float(alone.prod(1).sum() / valid - 1),
        "batches in file order": -(-len(sizes) // batch),
        "batches alike": int((-(-counts // batch)).sum()),
    }


def main() -> None:
    """Prints a line per method and form of grouping."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", nargs="+", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    sizes, rng = sizes_of(given.annotations), np.random.default_rng(0)
    if given.images:
        sizes = sizes[rng.integers(0, len(sizes), given.images)]
    labeled = rng.permutation(len(sizes)) < SHARE * len(sizes)
    parts = [sizes[labeled], sizes[~labeled]]
    print(f"{len(sizes)} images, {(sizes[:, 1] > sizes[:, 0]).mean():.0%} landscape, {labeled.sum()} labelled")
    for method in METHODS:
        cfg = compose.load([f"method={method}", "preset=paper", "data=coco"])
        shares = {group: training(cfg, parts, group, given.steps) for group in (None, "joint", "separate")}
        saved = {g: 1 - (1 + share) / (1 + shares[None]) for g, share in shares.items()}
        print(method, *(f"{g}: +{share:.1%} padding, {saved[g]:.1%} fewer pixels;" for g, share in shares.items()))
    print("evaluation, batches of 8:", evaluation(Policy.from_config(sections.group(cfg, "augment")), sizes, 8))


if __name__ == "__main__":
    main()
