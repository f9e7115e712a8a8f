"""`ssodbench train`: one method on one split, trained and scored."""

from __future__ import annotations

from omegaconf import DictConfig

from harness.config.extras import check_extras, missing_for_photos


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

    _suggest_photos(cfg)
    return launcher.train(cfg)


def _suggest_photos(cfg: DictConfig) -> None:
    """Says in one line that photographs have a preset of their own, where a CPU trains on them with that for shapes."""
    if str(cfg.data._target_).endswith(".shapes_dataset") or cfg.detector.get("weights") != "generated":
        return
    from harness.core import distributed
    from harness.core.console import STDERR

    if cfg.device == "cpu" or not distributed.resolve_device("auto", 1).startswith("cuda"):
        first = f" ({missing})" if (missing := missing_for_photos()) else ""
        STDERR.say(f"preset=small is made for drawn shapes: for photographs take preset=photos{first}")
