"""The GPU graph: it can be defined for every policy anywhere, and agrees with the CPU graph where there is a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.core.types import Normalize, Views
from pipelines.dali.graph import Graph, define
from pipelines.policy import Policy

POLICIES = sorted(p.stem for p in (Path(__file__).parents[2] / "harness" / "conf" / "augment").glob("*.yaml"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", POLICIES)
def test_gpu_graphs_can_be_defined(name: str, policy_config: Callable[..., Any]) -> None:
    """Devices of operations and their arguments are checked when a graph is defined, which needs no driver."""
    policy = Policy.from_config(policy_config(name))
    for color_at in ("view", "source"):
        changed = Policy.from_config(policy_config(name, color_at=color_at))
        graph = Graph(changed, Normalize(bgr=True), gpu=True)
        pipeline = define(graph, list(policy.views.values()), batch_size=2, num_threads=1, device_id=0)
        pipeline._build_graph()
        stored, *views = pipeline._graph_outputs
        assert stored.device == "cpu"
        assert [view.device for view in views] == ["gpu"] * len(policy.views)


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", POLICIES)
def test_gpu_agrees_with_cpu(
    name: str, policy_config: Callable[..., Any], training: Any, build: Any, photos: Any
) -> None:
    """Decoders and resampling differ by a few grey levels; sizes, matrices and boxes are equal."""
    config = policy_config(name)
    views = Policy.from_config(config).views
    labeled = ("labeled",) if "labeled" in views else ("weak", "strong")
    unlabeled = tuple(v for v in ("weak", "strong") if v in views)
    arguments = training(4, 4 if unlabeled else 0, Views(labeled, unlabeled))
    arguments["unlabeled"] = photos
    devices = {d: build("dali", config, **arguments, device=d).batches() for d in ("cpu", "cuda")}
    for on_cpu, on_gpu in itertools.islice(zip(devices["cpu"], devices["cuda"], strict=True), 3):
        assert on_cpu.labeled_ids.tolist() == on_gpu.labeled_ids.tolist()
        for part in ("labeled", "unlabeled"):
            for view, a in getattr(on_cpu, part).items():
                b = getattr(on_gpu, part)[view]
                assert b.images.is_cuda
                assert torch.equal(a.to_view, b.to_view.cpu())
                assert torch.equal(a.sizes, b.sizes.cpu())
                assert all(torch.equal(x.boxes, y.boxes.cpu()) for x, y in zip(a.targets, b.targets, strict=True))
                close = ((a.images - b.images.cpu()).abs().amax(1) <= 8).float().mean((1, 2))
                assert close.median() > 0.95
                for image, (height, width) in zip(b.images, a.sizes.tolist(), strict=True):
                    assert not image[:, height:].any()
                    assert not image[:, :, width:].any()
