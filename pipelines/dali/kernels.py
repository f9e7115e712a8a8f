"""Compiled inner loops of the CPU graph: warping, and normalising into the padded batch.

Arrays in, arrays out, and no Python inside, so that DALI's threads run them side by side (`pipelines.dali.operators`).
Images are (H, W, 3) uint8 of a source and (h, w, 3) of a view. Matrices are 3x3 and affine, source to view, in
corner-origin coordinates: pixel i covers [i, i + 1]. Interpolation is bilinear; results are rounded to whole levels, as
views are made of bytes, and nothing depends on the processor's vector width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, float32, float64, int32, njit, types, uint8, uint64

# A loop becomes vector code only if LLVM can tell cheaply that its arrays do not overlap. So loops over a row are
# functions of their own with few arrays each, and those that look pixels up, which LLVM cannot follow, only copy.
# `max` has the number that is known first: with NaN, of a matrix that has no inverse, it gives the first.


@njit(cache=True, nogil=True)
def _packed(image: Any, fill: Any, replicate: bool) -> Any:
    """(H + 3, W + 3) int32, one pixel per number, in a frame of the fill or, with `replicate`, of the nearest pixels.

    The frame is one pixel wide above and to the left and two below and to the right: what lies up to a pixel outside is
    interpolated with it, as in every usual warp, and no look-up needs a test.
    """
    height, width = image.shape[:2]
    packed = np.empty((height + 3, width + 3), dtype=np.int32)
    outside = int32(fill[0]) | (int32(fill[1]) << int32(8)) | (int32(fill[2]) << int32(16))
    for y in range(height):
        source, row = image[y], packed[y + 1]
        for x in range(width):
            row[x + 1] = int32(source[x, 0]) | (int32(source[x, 1]) << int32(8)) | (int32(source[x, 2]) << int32(16))
        row[0] = row[1] if replicate else outside
        row[width + 1 :] = row[width] if replicate else outside
    for y in (0, height + 1, height + 2):
        if replicate:
            packed[y] = packed[min(max(y, 1), height)]
        else:
            packed[y] = outside
    return packed


@njit(cache=True, nogil=True)
def _inverse(matrix: Any) -> Any:
    """(2, 3) float64: view pixels to source pixels."""
    a, b, x = float64(matrix[0, 0]), float64(matrix[0, 1]), float64(matrix[0, 2])
    c, d, y = float64(matrix[1, 0]), float64(matrix[1, 1]), float64(matrix[1, 2])
    area = a * d - b * c
    return np.array([[d, -b, b * y - d * x], [-c, a, c * x - a * y]]) / area


@njit(cache=True, nogil=True)
def _columns(scale: Any, shift: Any, width: int, index: Any, weight: Any) -> None:
    """Where the pixels of a row lie between the columns of a packed image of so many source columns."""
    for x in range(len(index)):
        at = min(max(0.0, scale * (x + 0.5) + shift + 0.5), width + 1.0)
        index[x] = int32(at)
        weight[x] = float32(at - np.floor(at))


@njit(cache=True, nogil=True)
def _look_up_two(row: Any, index: Any, left: Any, right: Any) -> None:
    for x in range(len(index)):
        i = uint64(index[x])
        left[x], right[x] = row[i], row[i + uint64(1)]


@njit(cache=True, nogil=True)
def _look_up_four(flat: Any, stride: int, index: Any, picked: Any) -> None:
    a, b, c, d = picked
    for x in range(len(index)):
        i = uint64(index[x])
        a[x], b[x] = flat[i], flat[i + uint64(1)]
        i += uint64(stride)
        c[x], d[x] = flat[i], flat[i + uint64(1)]


@njit(cache=True, nogil=True)
def _between_columns(left: Any, right: Any, weight: Any, shift: Any, out: Any) -> None:
    """One channel of a source row at the view's columns."""
    for x in range(len(out)):
        a, b = float32((left[x] >> shift) & int32(255)), float32((right[x] >> shift) & int32(255))
        out[x] = a + weight[x] * (b - a)


@njit(cache=True, nogil=True)
def _between_rows(above: Any, below: Any, weight: Any, out: Any) -> None:
    """Whole levels between two rows."""
    for x in range(len(out)):
        out[x] = np.floor(above[x] + weight * (below[x] - above[x]) + float32(0.5))


@njit(cache=True, nogil=True)
def _between_rows_normalized(above: Any, below: Any, weight: Any, mean: Any, factor: Any, out: Any) -> None:
    """`_between_rows`, normalised."""
    for x in range(len(out)):
        out[x] = (np.floor(above[x] + weight * (below[x] - above[x]) + float32(0.5)) - mean) * factor


@njit(cache=True, nogil=True)
def _between_four(picked: Any, weight: Any, shift: Any, out: Any) -> None:
    """One channel in whole levels between four pixels each."""
    a, b, c, d = picked
    u, v = weight
    for x in range(len(out)):
        p, q = float32((a[x] >> shift) & int32(255)), float32((b[x] >> shift) & int32(255))
        r, s = float32((c[x] >> shift) & int32(255)), float32((d[x] >> shift) & int32(255))
        p += u[x] * (q - p)
        r += u[x] * (s - r)
        out[x] = np.floor(p + v[x] * (r - p) + float32(0.5))


@njit(cache=True, nogil=True)
def _between_four_normalized(picked: Any, weight: Any, shift: Any, mean: Any, factor: Any, out: Any) -> None:
    """`_between_four`, normalised."""
    a, b, c, d = picked
    u, v = weight
    for x in range(len(out)):
        p, q = float32((a[x] >> shift) & int32(255)), float32((b[x] >> shift) & int32(255))
        r, s = float32((c[x] >> shift) & int32(255)), float32((d[x] >> shift) & int32(255))
        p += u[x] * (q - p)
        r += u[x] * (s - r)
        out[x] = (np.floor(p + v[x] * (r - p) + float32(0.5)) - mean) * factor


@njit(cache=True, nogil=True)
def _places(step: Any, start: Any, limit: Any, stride: Any, index: Any, weight: Any) -> None:
    """Where the pixels of a row lie in a packed image, taken as one row: the pixel up and left of it, and how far off.

    Args:
        step, start: x and y of the move from pixel to pixel, and of the first one.
        limit: largest x and y.
        stride: length of a packed row.
    """
    dx, dy = step
    x0, y0 = start
    u, v = weight
    for x in range(int32(len(index))):
        along_x = min(max(float32(0), dx * float32(int32(x)) + x0), limit[0])
        along_y = min(max(float32(0), dy * float32(int32(x)) + y0), limit[1])
        i, j = int32(along_x), int32(along_y)
        u[x], v[x] = along_x - float32(i), along_y - float32(j)
        index[x] = j * stride + i


@njit(cache=True, nogil=True)
def _scratch(width: int) -> Any:
    """Buffers for one row of a view, and for the two source rows last used."""
    index, weight = np.empty(width, dtype=np.int32), np.empty((2, width), dtype=np.float32)
    picked, lines = np.empty((4, width), dtype=np.int32), np.empty((2, 3, width), dtype=np.float32)
    return index, weight, picked, lines, np.full(2, -1)


@njit(cache=True, nogil=True)
def _source_rows(y: int, packed: Any, inverse: Any, scratch: Any) -> Any:
    """The two source rows that row y of a view with parallel rows lies between, resampled once and kept.

    Returns:
        The rows above and below, (3, w) float32 each, and how far row y is from the upper one.
    """
    index, weight, picked, lines, held = scratch
    if y == 0:
        _columns(inverse[0, 0], inverse[0, 2], packed.shape[1] - 3, index, weight[0])
    at = min(max(0.0, inverse[1, 1] * (y + 0.5) + inverse[1, 2] + 0.5), packed.shape[0] - 2.0)
    top = int(at)
    for row in (top, top + 1):
        if held[row % 2] != row:
            held[row % 2] = row
            _look_up_two(packed[row], index, picked[0], picked[1])
            for c in range(3):
                _between_columns(picked[0], picked[1], weight[0], int32(8 * c), lines[row % 2, c])
    return lines[top % 2], lines[1 - top % 2], float32(at - top)


@njit(cache=True, nogil=True)
def _look_up_row(y: int, packed: Any, inverse: Any, scratch: Any) -> Any:
    """The four source pixels about each pixel of row y of any other view, and where it lies between them."""
    index, weight, picked, _, _ = scratch
    first = inverse[:, 0] * 0.5 + inverse[:, 1] * (y + 0.5) + inverse[:, 2] + 0.5
    _places(
        (float32(inverse[0, 0]), float32(inverse[1, 0])),
        (float32(first[0]), float32(first[1])),
        (float32(packed.shape[1] - 2), float32(packed.shape[0] - 2)),
        int32(packed.shape[1]),
        index,
        (weight[0], weight[1]),
    )
    four = (picked[0], picked[1], picked[2], picked[3])
    _look_up_four(packed.reshape(-1), packed.shape[1], index, four)
    return four, (weight[0], weight[1])


@njit(cache=True, nogil=True)
def _draw_row(levels: Any, y: int, packed: Any, inverse: Any, scratch: Any) -> None:
    """Row y of a view as (3, w) float32 whole levels."""
    if inverse[0, 1] == 0.0 and inverse[1, 0] == 0.0:
        above, below, weight = _source_rows(y, packed, inverse, scratch)
        for c in range(3):
            _between_rows(above[c], below[c], weight, levels[c])
    else:
        four, between = _look_up_row(y, packed, inverse, scratch)
        for c in range(3):
            _between_four(four, between, int32(8 * c), levels[c])


@njit(cache=True, nogil=True)
def _interleave(red: Any, green: Any, blue: Any, out: Any) -> None:
    for x in range(len(red)):
        out[x, 0], out[x, 1], out[x, 2] = uint8(int32(red[x])), uint8(int32(green[x])), uint8(int32(blue[x]))


@njit(cache=True, nogil=True)
def _normalize_row(levels: Any, mean: Any, factor: Any, out: Any) -> None:
    for x in range(len(levels)):
        out[x] = (float32(levels[x]) - mean) * factor


@njit(cache=True, nogil=True)
def warp(out: Any, image: Any, matrix: Any, fill: Any, replicate: bool) -> None:
    """Renders a view.

    Args:
        out: (h, w, 3) uint8, written.
        image: (H, W, 3) uint8.
        matrix: (3, 3) source to view.
        fill: (3,) whole levels for what the source does not cover.
        replicate: the source's nearest pixels instead of the fill.
    """
    packed, inverse = _packed(image, fill, replicate), _inverse(matrix)
    scratch, levels = _scratch(out.shape[1]), np.empty((3, out.shape[1]), dtype=np.float32)
    for y in range(out.shape[0]):
        _draw_row(levels, y, packed, inverse, scratch)
        _interleave(levels[0], levels[1], levels[2], out[y])


@njit(cache=True, nogil=True)
def warp_normalized(out: Any, image: Any, matrix: Any, size: Any, patches: Any, colors: Any, replicate: bool) -> None:
    """Renders a view, erases patches and normalises, in one go: `warp`, then `normalize`.

    Args:
        out: (3, >= h, >= w) float32, written; 0 outside the view.
        image: (H, W, 3) uint8.
        matrix: (3, 3) source to view.
        size: (2,) h, w.
        patches: (2, 2N) top and left, then height and width, of N rectangles.
        colors: (4, 3) mean, standard deviation, fill, and fill of the patches, in levels.
        replicate: see `warp`.
    """
    height, width = min(int(size[0]), out.shape[1]), min(int(size[1]), out.shape[2])
    packed, inverse = _packed(image, colors[2], replicate), _inverse(matrix)
    scratch = _scratch(width)
    factor, straight = float32(1.0) / colors[1], inverse[0, 1] == 0.0 and inverse[1, 0] == 0.0
    for y in range(height):
        if straight:
            above, below, weight = _source_rows(y, packed, inverse, scratch)
            for c in range(3):
                row = out[c, y, :width]
                _between_rows_normalized(above[c], below[c], weight, colors[0, c], factor[c], row)
        else:
            four, between = _look_up_row(y, packed, inverse, scratch)
            for c in range(3):
                row = out[c, y, :width]
                _between_four_normalized(four, between, int32(8 * c), colors[0, c], factor[c], row)
        for c in range(3):
            out[c, y, width:] = 0
    for c in range(3):
        out[c, height:] = 0
        erased = (colors[3, c] - colors[0, c]) * factor[c]
        for n in range(0, patches.shape[1], 2):
            top, left = int(patches[0, n]), int(patches[0, n + 1])
            out[c, top : top + int(patches[1, n]), left : left + int(patches[1, n + 1])] = erased


@njit(cache=True, nogil=True)
def normalize(out: Any, image: Any, colors: Any) -> None:
    """Bytes to normalised floats.

    Args:
        out: (3, >= h, >= w) float32, written; 0 outside the image.
        image: (h, w, 3) uint8.
        colors: (>= 2, 3) mean and standard deviation in levels.
    """
    height, width = image.shape[:2]
    factor = float32(1.0) / colors[1]
    for c in range(3):
        for y in range(height):
            _normalize_row(image[y, :, c], colors[0, c], factor[c], out[c, y, :width])
            out[c, y, width:] = 0
        out[c, height:] = 0


@njit(cache=True, nogil=True)
def mix_channels(out: Any, image: Any, matrix: Any) -> None:
    """Every pixel multiplied by a matrix, rounded and clipped.

    Args:
        out: (H, W, 3) uint8, written.
        image: (H, W, 3) uint8.
        matrix: (3, 3) float32.
    """
    pixels, target, half = image.reshape(-1), out.reshape(-1), float32(0.5)
    a, b, c = matrix[0, 0], matrix[0, 1], matrix[0, 2]
    d, e, f = matrix[1, 0], matrix[1, 1], matrix[1, 2]
    g, h, i = matrix[2, 0], matrix[2, 1], matrix[2, 2]
    low, high = float32(0), float32(255)
    for n in range(image.shape[0] * image.shape[1]):
        x, y, z = float32(pixels[3 * n]), float32(pixels[3 * n + 1]), float32(pixels[3 * n + 2])
        target[3 * n] = uint8(int32(min(max(a * x + b * y + c * z + half, low), high)))
        target[3 * n + 1] = uint8(int32(min(max(d * x + e * y + f * z + half, low), high)))
        target[3 * n + 2] = uint8(int32(min(max(g * x + h * y + i * z + half, low), high)))


# The same for DALI's operator of compiled functions, which passes arrays of pointers to outputs, inputs and shapes.
# They are in this file because numba compiles again only what has changed in a function's own file. Nothing here raises
# but for a lack of memory, which numba would print and DALI not notice.

_ADDRESSES = types.CPointer(types.voidptr)
_SHAPES = types.CPointer(types.CPointer(types.int64))
_RUN = types.void(_ADDRESSES, _SHAPES, types.voidptr, int32, _ADDRESSES, _SHAPES, types.voidptr, int32)
_SETUP = types.void(_SHAPES, types.voidptr, int32, _SHAPES, types.voidptr, int32, int32)


@njit(cache=True, nogil=True)
def _volume(addresses: Any, shapes: Any, number: int, dtype: Any) -> Any:
    shape = shapes[number]
    return carray(addresses[number], (shape[0], shape[1], shape[2]), dtype)


@njit(cache=True, nogil=True)
def _table(addresses: Any, shapes: Any, number: int) -> Any:
    shape = shapes[number]
    return carray(addresses[number], (shape[0], shape[1]), np.float32)


@cfunc(_SETUP, cache=True)
def image_like_first(outs: Any, _a: Any, _b: Any, ins: Any, _c: Any, _d: Any, samples: int) -> None:
    """Shape (h, w, 3) where the first input's is (h, w, ...)."""
    for n in range(samples):
        outs[n][0], outs[n][1], outs[n][2] = ins[n][0], ins[n][1], 3


@cfunc(_SETUP, cache=True)
def planes_like_first(outs: Any, _a: Any, _b: Any, ins: Any, _c: Any, _d: Any, samples: int) -> None:
    """Shape (3, h, w) where the first input's is (h, w, ...)."""
    for n in range(samples):
        outs[n][0], outs[n][1], outs[n][2] = 3, ins[n][0], ins[n][1]


@cfunc(_RUN, cache=True)
def run_warp(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: extent, image, matrix, (2, 3) fill and whether to replicate."""
    options = _table(ins, shapes, 3)
    warp(
        _volume(outs, out_shapes, 0, np.uint8),
        _volume(ins, shapes, 1, np.uint8),
        _table(ins, shapes, 2),
        options[0],
        options[1, 0] != 0,
    )


@cfunc(_RUN, cache=True)
def run_warp_normalized(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: canvas, image, matrix, (1, 2) size, patches, (5, 3) colors and whether to replicate."""
    colors = _table(ins, shapes, 5)
    warp_normalized(
        _volume(outs, out_shapes, 0, np.float32),
        _volume(ins, shapes, 1, np.uint8),
        _table(ins, shapes, 2),
        _table(ins, shapes, 3)[0],
        _table(ins, shapes, 4),
        colors,
        colors[4, 0] != 0,
    )


@cfunc(_RUN, cache=True)
def run_normalize(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: canvas, image, (2, 3) colors."""
    normalize(_volume(outs, out_shapes, 0, np.float32), _volume(ins, shapes, 1, np.uint8), _table(ins, shapes, 2))


@cfunc(_RUN, cache=True)
def run_mix_channels(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: image, image, matrix."""
    mix_channels(_volume(outs, out_shapes, 0, np.uint8), _volume(ins, shapes, 1, np.uint8), _table(ins, shapes, 2))
