"""CPU time of one training step of each method in the CPU preset: 16 + 16 images of 64 px, one thread.

Methods are those of `harness/conf/method`, each with the first of the small detectors that it can train; Mean Teacher,
which trains them all, also with the others.

The peer is torchvision's own Faster R-CNN around the same backbone, pyramid, heads and numbers. Times are CPU times
(`--benchmark-timer` has no say), since that is what a step costs whatever else the machine does.
"""

from __future__ import annotations

import time
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from benchmarks import methods
from detectors.faster_rcnn import FasterRcnn
from detectors.methods.method import Method
from harness.core.draws import image_keys
from harness.core.types import Batch, Target, View, Views

IMAGES, SIZE, CLASSES, WARM_UP = 16, 64, 4, 150

pytestmark = pytest.mark.benchmark(timer=time.process_time, group="training step")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_view(generator: torch.Generator) -> View:
    """Noise with one to five plain rectangles, coloured by class."""
    images, targets = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator) * 0.3, []
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    for image in images:
        count = int(torch.randint(1, 6, (1,), generator=generator))
        sides = torch.rand(count, 2, generator=generator) * 20 + 10
        corner = torch.rand(count, 2, generator=generator) * (SIZE - sides)
        target = Target(
            torch.cat([corner, corner + sides], 1),
            torch.randint(1, CLASSES + 1, (count,), generator=generator),
            torch.ones(count),
        )
        for (x1, y1, x2, y2), label in zip(target.boxes.int().tolist(), target.labels.tolist(), strict=True):
            image[:, y1:y2, x1:x2] = colours[label - 1][:, None, None]
        targets.append(target)
    return View(images, torch.full((IMAGES, 2), SIZE), torch.eye(3).repeat(IMAGES, 1, 1), targets)


def make_batch(seed: int, views: Views) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labeled, strong = make_view(generator), make_view(generator)
    noise = 0.05 * torch.randn(strong.images.shape, generator=generator)
    weak = View(strong.images + noise, strong.sizes, strong.to_view)
    keys = torch.from_numpy(image_keys(0, seed, list(range(2 * IMAGES))))
    ids = torch.arange(2 * IMAGES)
    return Batch(
        dict.fromkeys(views.labeled, labeled), {name: weak if name == "weak" else strong for name in views.unlabeled},
        ids[:IMAGES], ids[IMAGES:], keys[:IMAGES], keys[IMAGES:],
    )  # fmt: skip


class Training:
    """A method or a torchvision model with its optimiser; every call is one step."""

    def __init__(self, network: nn.Module, trainable: nn.Module) -> None:
        self.network = network
        self.optimizer = torch.optim.AdamW(trainable.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
        views = network.views if isinstance(network, Method) else Views(("labeled",), ("weak", "strong"))
        self.batches = [make_batch(seed, views) for seed in range(16)]
        self.step = 0

    def __call__(self) -> None:
        batch = self.batches[self.step % len(self.batches)]
        if isinstance(self.network, Method):
            self.network.before_step(self.step)
            losses, _ = self.network(batch, self.step)
        else:
            losses = self.network(batch.labeled["labeled"])
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        if isinstance(self.network, Method):
            self.network.after_step(self.step)
            observed = {name: value[None] for name, value in self.network.observe().items()}
            if observed:
                self.network.absorb(self.step, observed)
        self.step += 1


def run(benchmark, training: Training) -> None:
    for _ in range(WARM_UP):  # until there are pseudo labels
        training()
    benchmark.pedantic(training, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize(("name", "detector"), methods.pairs())
def test_step(benchmark, name: str, detector: str) -> None:
    method = methods.make_method(name, methods.make_detector(detector, CLASSES), WARM_UP)
    run(benchmark, Training(method, method.trainable()))


class Peer(nn.Module):
    """torchvision's Faster R-CNN of the same shape, without its own resizing."""

    def __init__(self, ours: FasterRcnn) -> None:
        super().__init__()

        class Backbone(nn.Module):
            out_channels = ours.backbone.out_channels

            def __init__(self) -> None:
                super().__init__()
                self.inner = ours.backbone

            def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
                return OrderedDict((str(i), level) for i, level in enumerate(self.inner(images)))

        class Predictor(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.classes, self.boxes = ours.roi.head.classes, ours.roi.head.boxes

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.classes(x), self.boxes(x)

        rpn, roi = ours.rpn.settings, ours.roi.settings
        pool = MultiScaleRoIAlign(
            ["0", "1", "2"], roi.output, roi.sampling_ratio,
            canonical_scale=roi.canonical_scale, canonical_level=roi.canonical_level,
        )  # fmt: skip
        before, after = rpn.train_proposals
        self.model = FasterRCNN(
            Backbone(),
            rpn_anchor_generator=AnchorGenerator(((12,), (18,), (28,)), ((1.0,),) * 3),
            rpn_head=ours.rpn.head,
            rpn_pre_nms_top_n_train=before,
            rpn_post_nms_top_n_train=after,
            rpn_fg_iou_thresh=rpn.positive_iou,
            rpn_bg_iou_thresh=rpn.negative_iou,
            rpn_batch_size_per_image=rpn.batch,
            box_roi_pool=pool,
            box_head=nn.Sequential(nn.Flatten(1), *ours.roi.head.layers),
            box_predictor=Predictor(),
            box_batch_size_per_image=roi.batch,
            box_positive_fraction=roi.positive_fraction,
        )
        self.model.transform = nn.Identity()

    def forward(self, view: View) -> dict[str, Tensor]:
        assert view.targets is not None
        targets = [{"boxes": t.boxes, "labels": t.labels} for t in view.targets]
        features = self.model.backbone(view.images)
        images = ImageList(view.images, [(SIZE, SIZE)] * len(view))
        proposals, rpn_losses = self.model.rpn(images, features, targets)
        _, roi_losses = self.model.roi_heads(features, proposals, images.image_sizes, targets)
        return {**rpn_losses, **roi_losses}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_torchvision_peer(benchmark, memory_format: torch.memory_format) -> None:
    ours = methods.make_detector("small", CLASSES)
    assert isinstance(ours, FasterRcnn)
    peer = Peer(ours).train().to(memory_format=memory_format)
    run(benchmark, Training(peer, peer))
