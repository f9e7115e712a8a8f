"""`ssodbench view`: pages to look at, of what a policy draws and of what a run's teacher teaches."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from harness.commands import usage
from harness.config.extras import check_extras
from harness.core import distributed
from harness.core.console import Console
from harness.core.files import require_writable
from harness.core.types import UserError
from harness.engine import look

_OF_A_RUN = ("run_dir", "view", "device", "threads", "cache_dir", "out")


def run(cfg: DictConfig) -> int:
    """Writes `view.html` and `view.png`: with `run_dir` of a run's pseudo labels, else of a policy's views.

    Raises:
        UserError: a key cannot be used, there is no such run, or its method labels nothing.
    """
    given = usage.refuse_unused(cfg, "view")
    of_run = "run_dir" in given
    for key in sorted(given):
        if of_run and key.split(".")[0] not in _OF_A_RUN:
            raise UserError(
                f"view run_dir=DIR shows that run's own data and method, so that {key} cannot be used: leave it out"
            )
    out = Path(cfg.out or (Path(cfg.run_dir) / "view" if of_run else "view"))
    if out.suffix in (".html", ".png"):
        raise UserError(f"out={out} names a file, where view writes view.html and view.png into a folder: say out=DIR")
    require_writable(out, "out", folder=True)
    if not of_run:
        check_extras(cfg)
    world = distributed.join(distributed.resolve_device(cfg.device, 1))
    torch.set_num_threads(int(cfg.threads))
    page = look.pseudo_labels(Path(cfg.run_dir), cfg, world) if of_run else look.views(cfg, world)
    console = Console()
    for path in look.write(page, out):
        console.say(f"wrote {path}")
    return 0
