"""`ssodbench suite`: methods x label ratios x folds, then the report."""

from __future__ import annotations

from omegaconf import DictConfig

from harness.suite import suite


def run(cfg: DictConfig) -> int:
    """See `harness.suite.suite.run`."""
    return suite.run(cfg)
