"""`ssodbench config`: the configuration that a command would use."""

from __future__ import annotations

import errno
import os
import sys

from omegaconf import DictConfig, OmegaConf


def run(cfg: DictConfig) -> int:
    """Prints the configuration as YAML; gives the exit code.

    Raises:
        OSError: the caller has closed the output.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "the standard output")
    print(OmegaConf.to_yaml(cfg, resolve=True), end="")
    return 0
