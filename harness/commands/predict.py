"""`ssodbench predict`: a trained network on pictures, to look at and as COCO results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.commands import usage
from harness.core import distributed
from harness.core.console import STDERR, Console, counted
from harness.core.files import require_writable
from harness.core.types import UserError
from harness.engine import predict, trained

_EVERY = 10.0  # seconds between lines of progress
_SHOWN = 5  # skipped pictures that are named


def run(cfg: DictConfig) -> int:
    """Detects in the pictures that `images` names and draws what is found; gives the exit code.

    Raises:
        UserError: a key is missing or cannot be used, or there is no network or no picture.
    """
    given = usage.refuse_unused(cfg, "predict")
    usage.require_network("predict", given)
    if cfg.images is None:
        raise UserError("predict needs pictures: say images=FILE, images=FOLDER or images='photos/*.jpg'")
    out = Path(cfg.out) if cfg.out else _beside(cfg)
    require_writable(out, "out", folder=True)
    pictures = predict.find_pictures(cfg.images, out)
    world = distributed.join(distributed.resolve_device(cfg.device, 1))
    torch.set_num_threads(int(cfg.threads))
    network = trained.open_trained(cfg, world.device)
    workers = len(os.sched_getaffinity(0))
    feed = network.pipeline(cfg, world)
    try:
        with _progress(len(pictures)) as advance:
            found = predict.predict(network, pictures, feed, out, float(cfg.predict.score), workers, advance)
    finally:
        feed.close()
    _tell(found, network.about, out, float(cfg.predict.score))
    return 0


def _beside(cfg: DictConfig) -> Path:
    return Path(cfg.model).parent / "predictions" if cfg.model else Path(cfg.run_dir) / "predictions"


def _tell(found: predict.Found, about: trained.Description, out: Path, score: float) -> None:
    console = Console()
    for name in sorted(found.skipped)[:_SHOWN]:
        STDERR.say(f"skipped: {name}: {found.skipped[name]}")
    if len(found.skipped) > _SHOWN:
        STDERR.say(f"skipped: {len(found.skipped) - _SHOWN} more, named in {out / 'images.json'}")
    rate = 60 * len(found.images) / max(found.seconds, 1e-9)
    console.say(
        f"{counted(len(found.rows), 'box')} above {score:g} in {counted(len(found.images), 'picture')}, by the "
        f"{about.network} of {about.cell} (step {about.step:,}); {found.seconds:.1f} s, {rate:,.0f} pictures a minute"
    )
    console.say(f"look at {out / 'contact_sheet.jpg'} and {out / 'pictures'}; boxes in {out / 'predictions.json'}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere, such as in a log file, a line now and then."""
    if not STDERR.is_terminal:
        yield _Lines(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=STDERR, transient=True) as bar:
        task = bar.add_task("pictures", total=total)
        yield lambda done: bar.advance(task, done)


class _Lines:
    """Says every `_EVERY` seconds how far it is, and when it will be done."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._begun = self._told = time.monotonic()

    def __call__(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._told >= _EVERY and self._done < self._total:
            self._told = now
            left = timedelta(seconds=round((now - self._begun) * (self._total / self._done - 1)))
            STDERR.say(f"{self._done:,} of {self._total:,} pictures, ETA {left}")
