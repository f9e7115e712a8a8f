"""Where scalars go beside metrics.jsonl: TensorBoard, W&B or MLflow, each imported only when it is chosen."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from harness.core.files import write_atomically
from harness.core.types import UserError


class Logger(Protocol):
    """Somewhere else that scalars go."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes named scalars of a step."""

    def close(self) -> None:
        """Writes what is pending."""


def open_logger(name: str, run_dir: Path, title: str, start_step: int) -> Logger:
    """The logger of that name, its package imported now and not before.

    Raises:
        UserError: no such logger, or its package is not installed.
    """
    makers: dict[str, Callable[[Path, str, int], Logger]] = {
        "tensorboard": TensorBoardLogger,
        "wandb": WandbLogger,
        "mlflow": MlflowLogger,
    }
    if name not in makers:
        raise UserError(f"loggers names {name!r}, which is none of {', '.join(makers)}.")
    try:
        return makers[name](run_dir, title, start_step)
    except ModuleNotFoundError as error:
        raise UserError(
            f"loggers names {name}, which is not installed: pip install 'ssodbench[{name}]', or leave it out."
        ) from error


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
