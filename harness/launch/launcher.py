"""What a launcher is: how the processes of a run are started."""

from __future__ import annotations

from typing import Protocol

from omegaconf import DictConfig

from harness.config.make import make

# What says to libraries how many threads a process may have.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Launcher(Protocol):
    """Starts the processes of a run; the `_target_` of the group `launcher` names one.

    A launcher whose key `nodes` says so starts `devices` processes on each of so many machines. Each process joins the
    others by torchrun's variables and calls `harness.launch.local.run_rank`.
    """

    def run(self, cfg: DictConfig) -> int:
        """Trains as the configuration says, wherever that is.

        Returns:
            Exit code: 0 ok, 1 failed, 2 a mistake of the user's, 128 + n after signal n.

        Raises:
            UserError: the launcher cannot be used here.
            RunError: the processes ended without a result.
        """


def train(cfg: DictConfig) -> int:
    """Trains the run of a configuration by its launcher; see `Launcher.run`."""
    launcher: Launcher = make("launcher", cfg.launcher)
    return launcher.run(cfg)
