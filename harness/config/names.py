"""Names of runs, and of the options that they chose."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from harness.config import sections
from harness.core.escape import file_name


def group_name(cfg: DictConfig, group: str) -> str:
    """The name of a group's chosen option."""
    return str(cfg[group].get("name", group))


def cell_name(cfg: DictConfig) -> str:
    """A run's name: data, method, split and seed, in [A-Za-z0-9_.-] only.

    Somebody else's pseudo labels make another method, and so does a variant of a suite: labeller and variant are named,
    so that no folder is shared.
    """
    labeller = OmegaConf.select(cfg, "method.offline.labeller")
    method = [group_name(cfg, "method"), *([str(labeller)] if labeller is not None else [])]
    variant = cfg.get("variant")
    method += [str(variant)] if variant is not None else []
    words = [group_name(cfg, "data"), *method, sections.split_options(cfg).label, f"seed{cfg.seed}"]
    return file_name("_".join(words))
