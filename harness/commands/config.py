"""`ssodbench config`: the configuration that a command would use."""

from __future__ import annotations

import errno
import os
import sys

import yaml
from omegaconf import DictConfig, OmegaConf

from harness.config import sources


def run(cfg: DictConfig) -> int:
    """Prints the configuration as YAML; gives the exit code.

    Raises:
        OSError: the caller has closed the output.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "the standard output")
    print(OmegaConf.to_yaml(cfg, resolve=True), end="")
    return 0


def run_with_sources(cfg: DictConfig) -> int:
    """Prints every key with its value and where that comes from, a line each; gives the exit code."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    found = sources.sources_of(cfg)
    for key, value in sources.leaves(plain):
        if key in found:
            shown = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
            print(f"{key}: {shown.removesuffix(chr(10)).removesuffix('...').strip()}  # {found[key]}")
    return 0
