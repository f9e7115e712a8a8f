"""The antialiased shrink of the CPU graph, compiled; to the byte that of DALI's `fn.resize`.

Arrays in, arrays out, as in `pipelines.dali.kernels`. A triangle filter as wide as the shrink, in corner-origin
coordinates: a new pixel is the weighted mean of the old ones around its centre, along one axis and then along the
other. Sums are float32 in a fixed order, so that nothing depends on the processor's vector width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, float32, int32, njit, types, uint8
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines.dali.kernels import RUN

BLOCK = 16  # what DALI's vector code, which rounds halves to even, takes at a time; the rest has halves rounded up


@njit(cache=True, nogil=True)
def _triangle(place: Any) -> Any:
    """Height at a place of the triangle over [0, 2] that is 1 at 1."""
    if place < float32(0) or place >= float32(2):
        return float32(0)
    return place if place < float32(1) else float32(1) - (place - float32(1))


@njit(cache=True, nogil=True)
def _taps(length: int, size: int) -> Any:
    """What each of `size` new pixels is made of, out of `length` old ones.

    Returns:
        (size,) int64 the first old pixel, which may lie outside; (size, K) float32 weights, of sum 1.
    """
    step = float32(length) / float32(size)
    rate = float32(1) / max(float32(1), step)  # where it enlarges, the filter is two pixels wide
    reach = float32(1) / rate
    count = int(np.ceil(float32(2) / rate))
    origin = float32(0.5) * step - float32(0.5) - reach
    starts, weights = np.empty(size, dtype=np.int64), np.empty((size, count), dtype=np.float32)
    for x in range(size):
        edge = float32(x) * step + origin
        starts[x] = int(np.ceil(edge))
        offset, total = float32(starts[x]) - edge, float32(0)
        for k in range(count):
            weights[x, k] = _triangle((offset + float32(k)) * rate)
            total += weights[x, k]
        for k in range(count):
            weights[x, k] /= total
    return starts, weights


@njit(cache=True, nogil=True)
def _rows_first(height: int, width: int, down: Any, across: Any) -> Any:
    """Whether rows are combined before columns, which rounds differently now and then: what DALI takes for cheaper.

    It counts 3 for a number between the passes, 1 for a weight of a row and 1.4 for one of a column.
    """
    rows, columns, both = width * len(down), height * len(across), len(down) * len(across)
    cost = (3.0 + down.shape[1]) * rows + 1.4 * across.shape[1] * both
    return cost <= (3.0 + 1.4 * across.shape[1]) * columns + down.shape[1] * both


def _weigh_pixels(_: Any, line: Any, start: Any, weights: Any, out: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        four, number = ir.VectorType(ir.FloatType(), 4), ir.IntType(32)
        arrays = [context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 2, 3)]
        source, weight, target = (array.data for array in arrays)
        count = builder.extract_value(arrays[1].shape, 0)
        total = cgutils.alloca_once_value(builder, ir.Constant(four, [0.0] * 4))
        with cgutils.for_range(builder, count) as loop:
            place = builder.add(arguments[1], builder.mul(loop.index, ir.Constant(count.type, 3)))
            pixel = builder.load(builder.bitcast(builder.gep(source, [place]), four.as_pointer()), align=4)
            first = builder.load(builder.gep(weight, [loop.index]))
            first = builder.insert_element(ir.Constant(four, ir.Undefined), first, ir.Constant(number, 0))
            same = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(number, 4), [0] * 4))
            builder.store(builder.fadd(builder.load(total), builder.fmul(same, pixel)), total)
        place = builder.bitcast(builder.gep(target, [arguments[4]]), four.as_pointer())
        builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return types.void(line, start, weights, out, at), generate


# out[at : at + 4] = the sum over k of weights[k] * line[start + 3k : start + 3k + 4]: the three channels of a pixel and
# one number to spare, since a vector has four.
_weigh: Any = intrinsic(_weigh_pixels)


@njit(cache=True, nogil=True)
def _combine_columns(line: Any, starts: Any, weights: Any, out: Any) -> None:
    """One row at its new columns.

    Args:
        line: (3 * (K + W + K) + 1,) float32: a row between K pixels on each side, which are written.
        starts, weights: see `_taps`.
        out: (3 * w + 1,) float32, written.
    """
    count = weights.shape[1]
    first, end = 3 * count, len(line) - 1 - 3 * count
    for x in range(0, first, 3):
        for c in range(3):
            line[x + c] = line[first + c]
            line[end + x + c] = line[end - 3 + c]
    for x in range(len(starts)):
        _weigh(line, 3 * (starts[x] + count), weights[x], out, 3 * x)


@njit(cache=True, nogil=True)
def _add_row(line: Any, row: Any, weight: Any) -> None:
    for x in range(len(line)):
        line[x] += weight * float32(row[x])


@njit(cache=True, nogil=True)
def _add_four(line: Any, rows: Any, weights: Any) -> None:
    a, b, c, d = rows
    s, t, u, v = weights
    for x in range(len(line)):
        total = line[x] + s * float32(a[x]) + t * float32(b[x])
        line[x] = total + u * float32(c[x]) + v * float32(d[x])


@njit(cache=True, nogil=True)
def _combine_rows(rows: Any, places: Any, weights: Any, line: Any) -> None:
    """line = the sum over k of weights[k] * rows[places[k]], added in that order."""
    line[:] = 0
    fours = len(places) // 4 * 4
    for k in range(0, fours, 4):
        four = (rows[places[k]], rows[places[k + 1]], rows[places[k + 2]], rows[places[k + 3]])
        _add_four(line, four, (weights[k], weights[k + 1], weights[k + 2], weights[k + 3]))
    for k in range(fours, len(places)):
        _add_row(line, rows[places[k]], weights[k])


# A mean of levels is none below 0 or above 255, so nothing is clipped.


@njit(cache=True, nogil=True)
def _round_up(line: Any, out: Any) -> None:
    for x in range(len(out)):
        out[x] = uint8(int32(line[x] + float32(0.5)))


@njit(cache=True, nogil=True)
def _round_even(line: Any, out: Any) -> None:
    for x in range(len(out)):
        out[x] = uint8(int32(np.rint(line[x])))


@njit(cache=True, nogil=True)
def _round(line: Any, even: Any, out: Any) -> None:
    """Whole levels, halves to even in a range and else upwards."""
    start, end = even
    _round_up(line[:start], out[:start])
    _round_even(line[start:end], out[start:end])
    _round_up(line[end:], out[end:])


@njit(cache=True, nogil=True)
def _even_columns(starts: Any, count: int, width: int) -> Any:
    """Range of a row's numbers in which DALI rounds halves to even if columns come last: blocks of inner pixels."""
    first, end = 0, len(starts)
    while first < end and starts[first] < 0:
        first += 1
    while end > first and starts[end - 1] + count > width:
        end -= 1
    return 3 * first, 3 * (first + (end - first) // BLOCK * BLOCK)


@njit(cache=True, nogil=True)
def _shrink_rows_first(out: Any, image: Any, tops: Any, down: Any, lefts: Any, across: Any) -> None:
    height, width, count = len(image), image.shape[1] // 3, across.shape[1]
    line, row = np.zeros(3 * (width + 2 * count) + 1, dtype=np.float32), np.empty(out.shape[1] + 1, dtype=np.float32)
    even = _even_columns(lefts, count, width)
    for y in range(len(out)):
        places = np.minimum(np.maximum(np.arange(down.shape[1]) + tops[y], 0), height - 1)
        _combine_rows(image, places, down[y], line[3 * count : 3 * (count + width)])
        _combine_columns(line, lefts, across, row)
        _round(row, even, out[y])


@njit(cache=True, nogil=True)
def _shrink_columns_first(out: Any, image: Any, tops: Any, down: Any, lefts: Any, across: Any) -> None:
    height, width, count = len(image), image.shape[1] // 3, across.shape[1]
    line, row = np.zeros(3 * (width + 2 * count) + 1, dtype=np.float32), np.empty(out.shape[1], dtype=np.float32)
    even = 0, out.shape[1] // BLOCK * BLOCK
    taps = down.shape[1]
    kept, held = np.empty((taps, out.shape[1] + 1), dtype=np.float32), np.full(taps, -1)  # the last rows, each once
    for y in range(len(out)):
        places = np.minimum(np.maximum(np.arange(taps) + tops[y], 0), height - 1)
        for source in places:
            if held[source % taps] != source:
                held[source % taps] = source
                line[3 * count : 3 * (count + width)] = image[source]
                _combine_columns(line, lefts, across, kept[source % taps])
        _combine_rows(kept, places % taps, down[y], row)
        _round(row, even, out[y])


@njit(cache=True, nogil=True)
def shrink(out: Any, image: Any) -> None:
    """Resizes an image with an antialiasing filter.

    Args:
        out: (h, w, 3) uint8, written.
        image: (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    tops, down = _taps(height, out.shape[0])
    lefts, across = _taps(width, out.shape[1])
    pixels, levels = image.reshape(height, 3 * width), out.reshape(out.shape[0], 3 * out.shape[1])
    if _rows_first(height, width, down, across):
        _shrink_rows_first(levels, pixels, tops, down, lefts, across)
    else:
        _shrink_columns_first(levels, pixels, tops, down, lefts, across)


@cfunc(RUN, cache=True)
def run_shrink(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: extent, image; for DALI's operator of compiled functions as in `pipelines.dali.kernels`."""
    new, old = out_shapes[0], shapes[1]
    shrink(carray(outs[0], (new[0], new[1], 3), np.uint8), carray(ins[1], (old[0], old[1], 3), np.uint8))
