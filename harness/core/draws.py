"""Counter-based random numbers: (seed, step, slot) alone decides every draw of a training.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) used as a
keyed hash: number i of key k is mix(k + (i + 1) * GOLDEN). It needs no state, so the same draws come out whatever the
backend, the world size, the thread count, and whether the run was resumed. NumPy draws feed the pipelines; the same
function in torch feeds samplers and box jitter on the training device. Both give the same bits.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


_MIX_1 = 0xBF58476D1CE4E5B9


_MIX_2 = 0x94D049BB133111EB


_WRAP = 1 << 64


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        return z ^ (z >> np.uint64(31))


def stream_key(name: str) -> int:
    """A number for a named stream of draws, the same in every process."""
    return zlib.crc32(name.encode())


def image_keys(seed: int, step: int, slots: np.ndarray | list[int]) -> np.ndarray:
    """Random key of each image of a step.

    Args:
        seed: the run's seed.
        step: student step, from 0.
        slots: (B,) positions of the images within the step's global batch.

    Returns:
        (B,) int64 keys, for `uniform` and `torch_uniform`.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], dtype=np.int64).astype(np.uint64) + np.uint64(_GOLDEN))
        key = _mix(key + np.uint64((step + 1) * _GOLDEN % _WRAP))
        return _mix(key + (np.asarray(slots, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)).astype(np.int64)


def first_by_hash(ids: np.ndarray, count: int) -> np.ndarray:
    """The ids of smallest SHA-256, at most `count`: images to show that nobody picked, the same every time."""
    ranked = sorted(ids.tolist(), key=lambda number: hashlib.sha256(str(number).encode()).digest())
    return np.array(ranked[:count], np.int64)


def uniform(keys: np.ndarray, count: int, stream: str) -> np.ndarray:
    """Draws `count` numbers per key.

    Args:
        keys: (B,) int64 from `image_keys`.
        count: how many numbers.
        stream: what they are for; another name gives independent numbers.

    Returns:
        (B, count) float64 in [0, 1).
    """
    with np.errstate(over="ignore"):
        start = _mix(np.asarray(keys).astype(np.uint64) ^ np.uint64(stream_key(stream)))
        counters = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        bits = _mix(start[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the same bits as a uint64."""
    return value - _WRAP if value >= _WRAP // 2 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch only shifts arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _torch_mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return z ^ _shift(z, 31)


def torch_uniform(keys: Tensor, count: int, stream: str) -> Tensor:
    """`uniform` on the keys' device.

    Args:
        keys: (B,) int64, as `Batch.labeled_keys`.
        count: how many numbers.
        stream: what they are for.

    Returns:
        (B, count) float32 in [0, 1): the first 24 bits of what `uniform` gives.
    """
    start = _torch_mix(keys ^ stream_key(stream))
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(_GOLDEN)
    bits = _torch_mix(start[:, None] + counters[None, :])
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def torch_normal(keys: Tensor, count: int, stream: str) -> Tensor:
    """(B, count) float32 standard normal numbers, by Box and Muller's transform of `torch_uniform`."""
    pairs = torch_uniform(keys, 2 * count, stream)
    radius = torch.sqrt(-2.0 * torch.log(1.0 - pairs[:, :count]))
    return radius * torch.cos(2.0 * torch.pi * pairs[:, count:])
