"""Resampled scores, kept from one report to the next under a hash of all that they depend on.

A name stands for one content for ever, so that nothing here can be out of date: other matches, another number of
resamples or changed code look under another name. What cannot be read, or is damaged, is made again.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from functools import cache
from pathlib import Path

import numba
import numpy as np

from harness.core import checksum, draws
from harness.core.files import write_atomically
from harness.engine import accumulate, matches
from harness.report import bootstrap
from harness.report.bootstrap import Resampled

FOLDER = "resamples"  # in the cache folder


@cache
def _code() -> str:
    """Hash of the code that resamples, and of the libraries whose rounding it takes over."""
    text = "".join(inspect.getsource(module) for module in (bootstrap, accumulate, matches, draws))
    return hashlib.sha256(f"{text} numpy {np.__version__} numba {numba.__version__}".encode()).hexdigest()


def place_of(cache_dir: Path, matches_file: Path, resamples: int, seed: int) -> Path:
    """Where the resampled scores of a file of matches lie.

    Raises:
        OSError: the file cannot be read.
    """
    content = hashlib.sha256(matches_file.read_bytes()).hexdigest()
    name = json.dumps([content, resamples, seed, _code()])
    return cache_dir / FOLDER / f"{hashlib.sha256(name.encode()).hexdigest()}.npz"


def read_resampled(path: Path) -> Resampled | None:
    """What `write_resampled` wrote; None where it is not there, or damaged."""
    try:
        content = path.read_bytes()
        checksum.verify(path)
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        names = arrays["names"].tolist()
        return Resampled(
            arrays["image_ids"],
            int(arrays["seed"]),
            dict(zip(names, arrays["point"].tolist(), strict=True)),
            dict(zip(names, arrays["draws"], strict=True)),
            arrays["class_point"],
            arrays["class_draws"],
        )
    except Exception:  # numpy and zipfile raise many kinds for a damaged archive
        return None


def write_resampled(path: Path, made: Resampled) -> None:
    """Keeps scores for the next report; does nothing where the folder cannot be written."""
    content = io.BytesIO()
    np.savez(
        content,
        names=np.array(list(made.point), dtype=np.str_),
        point=np.array(list(made.point.values())),
        draws=np.stack([made.draws[name] for name in made.point]),
        image_ids=made.image_ids,
        seed=np.int64(made.seed),
        class_point=made.class_point,
        class_draws=made.class_draws,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, checksum.sealed(content.getvalue()), durable=False)
    except OSError:
        return
