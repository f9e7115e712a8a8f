"""`ssodbench train`: one method on one split, trained and scored."""

from __future__ import annotations

from omegaconf import DictConfig

from harness.config.extras import check_extras


def run(cfg: DictConfig) -> int:
    """Trains where the launcher says; gives the exit code.

    Raises:
        UserError: a mistake in what was given.
        RunError: a job ended without a result.
    """
    check_extras(cfg, logs=True)  # before anything heavy is imported
    from harness.suite.cells import end_with_suite

    end_with_suite()
    from harness.launch import launcher

    return launcher.train(cfg)
