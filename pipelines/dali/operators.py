"""`pipelines.dali.kernels` as operators of a DALI graph on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction

from harness.core.types import UserError
from pipelines.dali import kernels
from pipelines.dali.shrink import run_shrink

Node = Any  # nvidia.dali.data_node.DataNode
_TYPES = {"bytes": types.DALIDataType.UINT8, "floats": types.DALIDataType.FLOAT}


if not all(hasattr(NumbaFunction, name) for name in ("_get_run_fn_cpu", "_get_setup_fn_cpu")):
    raise UserError("this version of DALI calls compiled functions in another way; install nvidia-dali 2.4")


class _Compiled(NumbaFunction):
    """DALI's operator of compiled functions, for functions that numba keeps on disk.

    DALI would compile its own wrapper around each of them for each graph, which takes seconds.
    """

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> int:
        return run_fn.address

    def _get_setup_fn_cpu(self, setup_fn: Any) -> int:
        return setup_fn.address


def _call(run: Any, setup: Any, out: str, *tables: Node) -> Node:
    """An operator whose inputs are an image that gives the size of its output, an image, and tables of floats."""
    operator = _Compiled(
        run_fn=run,
        setup_fn=setup,
        out_types=[_TYPES[out]],
        outs_ndim=[3],
        in_types=[_TYPES["bytes"]] * 2 + [_TYPES["floats"]] * (len(tables) - 2),
        ins_ndim=[3, 3] + [2] * (len(tables) - 2),
    )
    return operator(*tables)


def _extent(size: Node) -> Node:
    """(h, w, 0) bytes: shapes of outputs are made from shapes of inputs, so a size comes as an empty image."""
    empty = types.Constant(np.zeros((1, 1, 0), dtype=np.uint8), device="cpu")
    return fn.crop(empty, crop=size, out_of_bounds_policy="pad")


def _rows(*rows: list[float]) -> Node:
    return types.Constant(np.array(rows, dtype=np.float32), device="cpu")


def _image(run: Any, *tables: Node) -> Node:
    """An operator that makes an image of its first input's size."""
    return fn.reshape(_call(run, kernels.image_like_first, "bytes", *tables), layout="HWC")


def shrink(image: Node, size: Node) -> Node:
    """See `pipelines.dali.shrink.shrink`."""
    return _image(run_shrink, _extent(size), image)


def warp(image: Node, matrix: Node, size: Node, fill: list[float], replicate: bool) -> Node:
    """See `kernels.warp`."""
    options = _rows(fill, [float(replicate)] * 3)
    return _image(kernels.run_warp, _extent(size), image, matrix, options)


def render(image: Node, extent: Node, plan: Node, slots: int, colors: np.ndarray) -> Node:
    """See `kernels.render`; `extent` is an empty image of the batch's size."""
    table = types.Constant(colors.astype(np.float32), device="cpu")
    return _call(kernels.run_render, kernels.planes_like_first, "floats", extent, image, plan, table, _rows([slots]))


def normalize(image: Node, canvas: Node, mean: list[float], std: list[float]) -> Node:
    """See `kernels.normalize`."""
    setup = kernels.planes_like_first
    return _call(kernels.run_normalize, setup, "floats", _extent(canvas), image, _rows(mean, std))


def recolor(image: Node, steps: Node, weights: np.ndarray, red: int) -> Node:
    """See `kernels.recolor`."""
    options = np.concatenate([np.full((1, 3), red), weights]).astype(np.float32)
    return _image(kernels.run_recolor, image, image, steps, types.Constant(options, device="cpu"))
