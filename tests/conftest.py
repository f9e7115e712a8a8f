"""Compiles what numba compiles, once and before any test's timeout runs; lets processes hear that a terminal closed."""

import os
import signal
from pathlib import Path

import pytest

import pipelines.dali.operators  # noqa: F401

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, here and in every process that a test starts


@pytest.fixture
def cache_dir(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the test's own, but for the pre-trained backbone, which all tests and their processes share."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "backbones"
    shared.mkdir(exist_ok=True)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "backbones").symlink_to(shared)
    return cache
