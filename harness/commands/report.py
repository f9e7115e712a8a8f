"""`ssodbench report`: records to tables and plots."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from harness.report import report


def run(cfg: DictConfig) -> int:
    """Writes the report of all records below `runs_dir` and prints where it is; gives the exit code."""
    runs_dir = Path(cfg.runs_dir)
    out = Path(cfg.out) if cfg.out else runs_dir / "report"
    print(report.run(runs_dir, out, cfg.report.resamples, cfg.report.gallery, Path(cfg.cache_dir)))
    return 0
