"""`ssodbench profile`: throughput of the pipelines."""

from __future__ import annotations

from omegaconf import DictConfig

from harness.config.extras import check_extras


def run(cfg: DictConfig) -> int:
    """Measures and prints; gives the exit code."""
    check_extras(cfg, pipelines=[*cfg.profile.pipelines, "dali"])  # whose decoder gives the ceiling
    from harness.engine import profile

    profile.run(cfg)
    return 0
