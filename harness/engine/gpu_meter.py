"""What a GPU did meanwhile, by NVML: how busy it was, how much memory it held, what energy it took.

Needs the package nvidia-ml-py (`pip install 'ssodbench[nvml]'`) and a GPU; without either nothing is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_SECONDS = 0.1  # between looks


class GpuMeter:
    """Looks at a GPU now and then."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._busy: list[float] = []
        self._memory = 0.0
        self._begin = self._energy()
        self._joules: float | None = None

    def look(self) -> None:
        """Takes note of how busy the GPU is."""
        self._busy.append(float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
        self._memory = max(self._memory, self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**20)

    def end(self) -> None:
        """Nothing more is measured."""
        now = self._energy()
        self._joules = now - self._begin if now is not None and self._begin is not None else None

    def result(self) -> dict[str, float]:
        """`utilization` (0..1, mean), `memory_mb` (largest, of all processes) and, where counted, `joules`."""
        busy = sum(self._busy) / len(self._busy) / 100 if self._busy else 0.0
        found = {"utilization": busy, "memory_mb": self._memory}
        return found if self._joules is None else {**found, "joules": self._joules}

    def _energy(self) -> float | None:
        """Joules since the driver was loaded; None for a GPU that does not count them."""
        with suppress(self._nvml.NVMLError):
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        return None


class _NoMeter:
    def result(self) -> None:
        """Nothing was measured."""


@contextmanager
def metered(device: torch.device) -> Iterator[GpuMeter | _NoMeter]:
    """Measures a GPU during a block; nothing on a CPU, or without NVML."""
    meter = _open(device)
    if meter is None:
        yield _NoMeter()
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS):
            meter.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        ended.set()
        thread.join()
        meter.end()


def _open(device: torch.device) -> GpuMeter | None:
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return GpuMeter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity))
    except Exception:  # not installed, no driver, an old one: of many kinds, and no reason not to measure the rest
        return None
