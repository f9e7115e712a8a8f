"""Whether a training could work here: what the machine and the installation offer, tried rather than read off."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
import torchvision
from omegaconf import DictConfig

from harness.core import files
from harness.core.types import UserError

State = Literal["ok", "note", "fails"]  # a note: it works, but something is missing or tight

_PYTHONS = ((3, 11), (3, 14))  # from, below
_LITTLE_MEMORY, _LITTLE_DISK, _NO_DISK = 4 * 2**30, 5 * 2**30, 200 * 2**20  # bytes
_FEW_FILES = 1024  # open files; workers share tensors through them
_PATIENCE = 120  # seconds for DALI, which compiles on its first start
_JPEG = """
import sys, numpy, tempfile, os
from PIL import Image
from harness.core.types import ImageSource
from pipelines.dali import operators
from pipelines.dali.pipeline import DecodeOnly
path = os.path.join(tempfile.mkdtemp(), "a.jpg")
Image.fromarray(numpy.full((48, 64, 3), 90, numpy.uint8)).save(path)
none, ones = numpy.zeros(0, numpy.int64), numpy.ones(1, numpy.int64)
boxes, sizes = numpy.zeros((0, 4), numpy.float32), numpy.array([[48, 64]])
source = ImageSource([path], ones, sizes, boxes, none, none.astype(numpy.float32), numpy.zeros(2, numpy.int64))
decoder = DecodeOnly(source, 2, 1, sys.argv[1])
decoder.run(2)
decoder.close()
os.unlink(path)
os.rmdir(os.path.dirname(path))
"""


@dataclass(frozen=True)
class Outcome:
    """What one check found."""

    what: str
    state: State
    said: str
    remedy: str = ""


def examine(cfg: DictConfig, run_dir: Path | None = None) -> Iterator[Outcome]:
    """Every check, one after the other; nothing is changed, and what is written for a try is removed.

    Args:
        cfg: the configuration whose training is meant: `device`, `pipeline`, `launcher`, `cache_dir`, `runs_dir`.
        run_dir: a folder on a mount that is tried too.
    """
    checks: list[Callable[[], Outcome]] = [
        _python,
        _packages,
        _torch,
        lambda: _gpu(cfg.device),
        lambda: _dali(str(cfg.pipeline.name), "cpu"),
        _cores,
        _memory,
        _shared_memory,
        _open_files,
        lambda: _folder("cache_dir", Path(cfg.cache_dir)),
        lambda: _folder("runs_dir", Path(cfg.runs_dir)),
        _numba,
        lambda: _slurm(cfg.launcher.name),
    ]
    if torch.cuda.is_available():
        checks.insert(5, lambda: _dali(str(cfg.pipeline.name), "cuda"))
    if run_dir is not None:
        checks.append(lambda: mount(run_dir))
    for check in checks:
        yield check()


def _python() -> Outcome:
    version = platform.python_version()
    said = f"{version} at {sys.executable}, {platform.platform()}"
    if _PYTHONS[0] <= sys.version_info[:2] < _PYTHONS[1]:
        return Outcome("Python", "ok", said)
    return Outcome("Python", "fails", said, "install ssodbench under Python 3.11, 3.12 or 3.13")


def _packages() -> Outcome:
    names = ("ssodbench", "torch", "torchvision", "numpy", "pillow", "pycocotools", "hydra-core")
    said = ", ".join(f"{name} {_version(name)}" for name in names)
    return Outcome("packages", "ok", said)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> Outcome:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.1], [9.0, 9.0, 12.0, 12.0]])
    try:
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
        torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8, requires_grad=True), torch.ones(4, 3, 3, 3)).sum().backward()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        remedy = "install torch and torchvision of the same release and for the same CUDA version"
        return Outcome("torch", "fails", f"an operator does not work ({_line(error)})", remedy)
    if kept != [0, 2]:
        return Outcome("torch", "fails", f"torchvision's NMS kept boxes {kept} instead of 0 and 2", "install both anew")
    return Outcome("torch", "ok", f"operators of torch and torchvision work, {torch.get_num_threads()} threads")


def _gpu(device: str) -> Outcome:
    driver = _driver()
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        said = ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})" for p in found)
        said += f"; CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
        try:
            torch.ones(64, 64, device="cuda").square().sum().item()
        except RuntimeError as error:
            return Outcome("GPU", "fails", f"{said}: {_line(error)}", "device=cpu, or a torch built for this GPU")
        return Outcome("GPU", "ok", said)
    if driver:
        said = f"there is driver {driver}, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"
        remedy = "update the driver, or install a torch for its CUDA version; until then device=cpu"
        return Outcome("GPU", "fails" if device == "cuda" else "note", said, remedy)
    if device == "cuda":
        return Outcome("GPU", "fails", "device=cuda, but there is none", "device=cpu")
    return Outcome("GPU", "note", "none: the CPU trains, for which preset=small is made")


def _driver() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()
        return next(word for word in words if word[0].isdigit())
    except (OSError, IndexError, StopIteration):
        return None


def _dali(pipeline: str, device: str) -> Outcome:
    what, needed = f"DALI on the {'GPU' if device == 'cuda' else 'CPU'}", pipeline == "dali"
    state: State = "fails" if needed else "note"
    other = "pipeline=torchvision does without"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return Outcome(what, state, "not installed", f"pip install 'ssodbench[cu13]' (or [cu12]); {other}")
    version = next((v for n in ("130", "120") if (v := _version(f"nvidia-dali-cuda{n}")) != "not installed"), "unknown")
    begin = time.perf_counter()
    try:
        subprocess.run(
            [sys.executable, "-c", _JPEG, device], check=True, capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return Outcome(what, state, f"version {version}: no picture decoded within {_PATIENCE} s", other)
    except subprocess.CalledProcessError as error:
        why = next(
            (line for line in reversed(error.stderr.splitlines()) if line.strip()), f"ended by {error.returncode}"
        )
        return Outcome(what, state, f"version {version}: decoding a picture fails ({why[:200]})", other)
    return Outcome(
        what, "ok", f"version {version}, decoded a picture ({time.perf_counter() - begin:.1f} s with its start)"
    )


def _numba() -> Outcome:
    folder = os.environ.get("NUMBA_CACHE_DIR")
    place = Path(folder) if folder else Path(importlib.util.find_spec("pipelines").submodule_search_locations[0])  # type: ignore[union-attr,index]
    if os.access(place if place.exists() else place.parent, os.W_OK):
        return Outcome("numba cache", "ok", f"compiled code is kept ({place})")
    home = files.home_path("~/.cache", "HOME")
    if not folder and os.access(home if os.path.exists(home) else os.path.dirname(home), os.W_OK):
        return Outcome("numba cache", "ok", f"compiled code is kept below {home}")
    remedy = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Outcome("numba cache", "note", f"{place} cannot be written: code is compiled anew in every process", remedy)


def _cores() -> Outcome:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count()
    quota = _quota()
    if quota is not None and quota < usable:
        remedy = f"set threads and pipeline.threads so that processes together use {quota:.1f} cores"
        return Outcome("cores", "note", f"{usable} of {total}, of whose time a container may use {quota:.1f}", remedy)
    return Outcome("cores", "ok", f"{usable} of {total} usable, load {os.getloadavg()[0]:.1f}")


def _quota() -> float | None:
    """Cores that the container may use, by cgroup version 2."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> Outcome:
    memory = psutil.virtual_memory()
    free, said = memory.available, f"{_size(memory.available)} of {_size(memory.total)} free"
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free, said = (
            min(free, limit - used),
            f"{said}; the container may use {_size(limit)}, of which it uses {_size(used)}",
        )
    except (OSError, ValueError):
        pass
    if free < _LITTLE_MEMORY:
        return Outcome("memory", "note", said, "preset=small needs about 2 GiB for each run: run fewer side by side")
    return Outcome("memory", "ok", said)


def _shared_memory() -> Outcome:
    try:
        files.require_shared_memory(64 * 2**20, "the torchvision pipeline", "pipeline.threads=0 does without")
    except UserError as error:
        said, _, remedy = str(error).partition(": ")
        return Outcome("shared memory", "note", said, remedy)
    free = shutil.disk_usage(files.SHARED_MEMORY).free if files.SHARED_MEMORY.is_dir() else 0
    return Outcome("shared memory", "ok", f"{files.SHARED_MEMORY} has {_size(free)} free")


def _open_files() -> Outcome:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{soft:,} at once (at most {hard:,})"
    if 0 <= soft < _FEW_FILES:
        return Outcome("open files", "note", said, f"ulimit -n {min(hard, 4096) if hard > 0 else 4096} before training")
    return Outcome("open files", "ok", said)


def _folder(key: str, path: Path) -> Outcome:
    """Whether a folder can be written, without making it, and how much room there is."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Outcome(key, "fails", f"{path}: {existing} cannot be written", f"give another folder by {key}=DIR")
    free = shutil.disk_usage(existing).free
    said = f"{path}, {_size(free)} free"
    if free < _NO_DISK:
        return Outcome(key, "fails", said, f"free space there, or give another folder by {key}=DIR")
    if free < _LITTLE_DISK:
        return Outcome(key, "note", said, "checkpoints of preset=paper are 1 GB each: free space, or keep fewer")
    return Outcome(key, "ok", said)


def _slurm(launcher: str) -> Outcome:
    commands = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name)]
    job = os.environ.get("SLURM_JOB_ID")
    if not commands:
        state: State = "fails" if launcher == "slurm" else "ok"
        return Outcome("Slurm", state, "not here", "launcher=local" if state == "fails" else "")
    said = f"{', '.join(commands)} found{f', this is job {job}' if job else ''}"
    return Outcome("Slurm", "ok", said)


def mount(run_dir: Path) -> Outcome:
    """Whether a run could live in a folder: its file system has locks, replaces files in one move, and keeps them.

    Whatever is made for it is removed.
    """
    what, remedy = "run_dir", "give a folder on a local disk, or on a file system with POSIX locks"
    existing = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    begin, step = time.perf_counter(), "making a folder"
    try:
        with tempfile.TemporaryDirectory(prefix=".ssodbench-doctor-", dir=existing) as name:
            folder = Path(name)
            step = "locking"
            _try_lock(folder / "lock")
            step = "replacing a file"
            for content in (b"old", b"new"):
                files.write_atomically(folder / "file", content)
            if (folder / "file").read_bytes() != b"new":
                raise OSError("the old content is still there")
            step = "fsync of the folder"
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        return Outcome(what, "fails", f"{existing}: {step} does not work ({error.strerror or error})", remedy)
    took = 1000 * (time.perf_counter() - begin)
    return Outcome(what, "ok", f"{existing}: locks, replacing files and fsync work ({took:.0f} ms together)")


def _try_lock(path: Path) -> None:
    """Takes a lock, and sees that it keeps another one out."""
    with path.open("w") as first, path.open("w") as second:
        files.take_lock(first, wait=False)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        raise OSError("two processes can have the same lock")


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
