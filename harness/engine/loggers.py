"""Where scalars go beside metrics.jsonl: TensorBoard, W&B or MLflow, each imported only when it is chosen."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from harness.config.make import make
from harness.core.files import write_atomically
from harness.core.types import UserError

SHIPPED = {
    "tensorboard": "harness.engine.loggers.TensorBoardLogger",
    "wandb": "harness.engine.loggers.WandbLogger",
    "mlflow": "harness.engine.loggers.MlflowLogger",
}


class Logger(Protocol):
    """Somewhere else that scalars go; a `_target_` in `logging.loggers` names one.

    Its constructor gets `run_dir`, `title` (the run's name) and `start_step`, and the keys beside its `_target_`.
    """

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes named scalars of a step."""

    def close(self) -> None:
        """Writes what is pending."""


def open_logger(chosen: str | Mapping[str, Any], run_dir: Path, title: str, start_step: int) -> Logger:
    """A logger, its package imported now and not before.

    Args:
        chosen: `tensorboard`, `wandb`, `mlflow`, or a `_target_` with its keys.
        run_dir: folder of the run.
        title: name of the run.
        start_step: first step that will be logged.

    Raises:
        UserError: no such logger, or its package is not installed.
    """
    if isinstance(chosen, str) and chosen not in SHIPPED:
        raise UserError(f"logging.loggers names {chosen!r}, which is none of {', '.join(SHIPPED)}.")
    options = {"_target_": SHIPPED[chosen]} if isinstance(chosen, str) else chosen
    try:
        logger: Logger = make("logging.loggers", options, run_dir=run_dir, title=title, start_step=start_step)
    except ModuleNotFoundError as error:
        name = chosen if isinstance(chosen, str) else str(options.get("_target_"))
        how = f"pip install 'ssodbench[{name}]'" if isinstance(chosen, str) else f"install {error.name}"
        raise UserError(f"logging.loggers names {name}, which is not installed: {how}, or leave it out.") from error
    return logger


def _remembered(path: Path, make: Callable[[], str]) -> str:
    """An identity kept in a file, so that a resumed run goes on in the same place."""
    if not path.exists():
        write_atomically(path, make().encode())
    return path.read_text()


class TensorBoardLogger:
    """Event files in the run folder."""

    def __init__(self, run_dir: Path, title: str, start_step: int) -> None:  # noqa: ARG002
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=start_step or None)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases; project and mode by its own environment variables."""

    def __init__(self, run_dir: Path, title: str, start_step: int) -> None:  # noqa: ARG002
        import wandb

        identity = _remembered(run_dir / "wandb_id", lambda: secrets.token_hex(8))
        self._run = wandb.init(project="ssodbench", name=title, dir=str(run_dir), id=identity, resume="allow")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger:
    """MLflow; the server of MLFLOW_TRACKING_URI, otherwise a folder in the run folder."""

    def __init__(self, run_dir: Path, title: str, start_step: int) -> None:  # noqa: ARG002
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            # Newer MLflow wants a word before it writes to a folder; a database would need packages beyond its core.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((run_dir / "mlflow").resolve().as_uri())
        client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment("ssodbench").experiment_id
        identity = _remembered(run_dir / "mlflow_id", lambda: client.create_run(experiment, run_name=title).info.run_id)
        self._client, self._run_id = client, identity

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
