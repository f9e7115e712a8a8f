"""The losses of the first steps of a training, for one device beside another."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.config import compose
from harness.config.run import settings_of
from harness.core import distributed
from harness.core.distributed import World
from harness.engine import build


def losses(device: str, steps: int, cache: Path, *overrides: str) -> list[float]:
    """The sum of the losses of each of the first steps of Mean Teacher on generated pictures.

    Args:
        device: cpu or cuda.
        steps: how many.
        cache: folder of the generated pictures.
        overrides: of the configuration.
    """
    small = [
        "data.train_images=80",
        "data.val_images=4",
        "detector.weights=scratch",
        "split.percent=20",
        "pipeline=dali",
    ]
    given = [*small, "method=mean_teacher", "method.burn_in=0", f"device={device}", f"cache_dir={cache}", *overrides]
    settings = settings_of(compose.load(given))
    torch.set_num_threads(1)
    world: World = distributed.join(device)
    run = build.experiment(settings, world, build.data(settings))
    run.method.train()
    found = []
    batches = run.pipeline.batches(0)
    for step in range(steps):
        run.method.before_step(step)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            terms, _ = run.method(next(batches), step)
        total = torch.stack([value.float() for value in terms.values()]).sum()
        run.optimizer.zero_grad()
        total.backward()
        run.optimizer.step()
        run.method.after_step(step)
        found.append(float(total))
    run.pipeline.close()
    return found
