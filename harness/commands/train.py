"""`ssodbench train`: one method on one split, trained and scored."""

from __future__ import annotations

import os

from omegaconf import DictConfig

from harness.config.checks import check_extras
from harness.core.types import UserError


def run(cfg: DictConfig) -> int:
    """Trains where the launcher says; gives the exit code.

    Raises:
        UserError: a mistake in what was given.
        RunError: a job ended without a result.
    """
    check_extras(cfg, logs=True)  # before anything heavy is imported
    from harness.suite.cells import end_with_suite

    end_with_suite()
    if cfg.launcher.name == "slurm":  # before GPUs are looked for: a login node has none
        from harness.launch import slurm

        if "LOCAL_RANK" in os.environ:
            raise UserError("launcher=slurm starts all processes itself: start `ssodbench train`, not torchrun")
        return slurm.submit(cfg)
    from harness.launch import local

    return local.run(cfg)
