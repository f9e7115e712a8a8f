"""Compiled inner loops of the CPU graph: warping, colour, and normalising into the padded batch.

Arrays in, arrays out, and no Python inside, so that DALI's threads run them side by side (`pipelines.dali.operators`).
Images are (H, W, 3) uint8 of a source and (h, w, 3) of a view. Matrices are 3x3 and affine, source to view, in
corner-origin coordinates: pixel i covers [i, i + 1]. Interpolation is bilinear; results are rounded to whole levels, as
views are made of bytes, and nothing depends on the processor's vector width.

Between operations an image is packed: (H + 3, W + 3) int32 with one pixel per number, red (or blue) in the lowest byte,
in a frame that a warp reads: one pixel wide above and to the left, two below and to the right.

All of it is in one file, since numba compiles a function anew only when its own file changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, float32, float64, int32, njit, types, uint8, uint64
from numba.extending import intrinsic

# A loop becomes vector code only if LLVM can tell cheaply that its arrays do not overlap. So loops over a row are
# functions of their own with few arrays each, and those that look pixels up, which LLVM cannot follow, only copy.
# `max` has the number that is known first: with NaN, of a matrix that has no inverse, it gives the first.


@njit(cache=True, nogil=True)
def _pixel(red: Any, green: Any, blue: Any) -> Any:
    return int32(red) | (int32(green) << int32(8)) | (int32(blue) << int32(16))


@njit(cache=True, nogil=True)
def _packed(image: Any) -> Any:
    """An image packed, its frame not yet written."""
    height, width = image.shape[:2]
    packed = np.empty((height + 3, width + 3), dtype=np.int32)
    for y in range(height):
        source, row = image[y], _row(packed, y)
        for x in range(width):
            row[x] = _pixel(source[x, 0], source[x, 1], source[x, 2])
    return packed


@njit(cache=True, nogil=True)
def _row(packed: Any, y: int) -> Any:
    """Row y of the image in the frame. A slice of a row is known to lie in one piece, a row of a slice is not."""
    return packed[y + 1, 1 : packed.shape[1] - 2]


@njit(cache=True, nogil=True)
def _frame(packed: Any, fill: Any, replicate: bool) -> None:
    """Writes the frame: the fill or, with `replicate`, the nearest pixels.

    What lies up to a pixel outside is interpolated with it, as in every usual warp, and no look-up needs a test.
    """
    height, width = packed.shape[0] - 3, packed.shape[1] - 3
    outside = _pixel(fill[0], fill[1], fill[2])
    for y in range(1, height + 1):
        row = packed[y]
        row[0] = row[1] if replicate else outside
        row[width + 1 :] = row[width] if replicate else outside
    for y in (0, height + 1, height + 2):
        if replicate:
            packed[y] = packed[min(max(y, 1), height)]
        else:
            packed[y] = outside


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
def _pack(red: Any, green: Any, blue: Any, out: Any) -> None:
    for x in range(len(out)):
        out[x] = _pixel(red[x], green[x], blue[x])


@njit(cache=True, nogil=True)
def _normalize_row(levels: Any, mean: Any, factor: Any, out: Any) -> None:
    for x in range(len(levels)):
        out[x] = (float32(levels[x]) - mean) * factor


@njit(cache=True, nogil=True)
def _normalize_packed(pixels: Any, shift: Any, mean: Any, factor: Any, out: Any) -> None:
    for x in range(len(out)):
        out[x] = (float32((pixels[x] >> shift) & int32(255)) - mean) * factor


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
    packed, inverse = _packed(image), _inverse(matrix)
    _frame(packed, fill, replicate)
    scratch, levels = _scratch(out.shape[1]), np.empty((3, out.shape[1]), dtype=np.float32)
    for y in range(out.shape[0]):
        _draw_row(levels, y, packed, inverse, scratch)
        _interleave(levels[0], levels[1], levels[2], out[y])


@njit(cache=True, nogil=True)
def _warp_packed(packed: Any, matrix: Any, height: int, width: int) -> Any:
    """`warp` from a packed image to another, whose frame is not yet written."""
    inverse, out = _inverse(matrix), np.empty((height + 3, width + 3), dtype=np.int32)
    scratch, levels = _scratch(width), np.empty((3, width), dtype=np.float32)
    for y in range(height):
        _draw_row(levels, y, packed, inverse, scratch)
        _pack(levels[0], levels[1], levels[2], _row(out, y))
    return out


@njit(cache=True, nogil=True)
def _warp_normalized(out: Any, packed: Any, matrix: Any, height: int, width: int, mean: Any, factor: Any) -> None:
    """Warps a packed image into the upper left part of a batch's planes."""
    inverse, scratch = _inverse(matrix), _scratch(width)
    straight = inverse[0, 1] == 0.0 and inverse[1, 0] == 0.0
    for y in range(height):
        if straight:
            above, below, weight = _source_rows(y, packed, inverse, scratch)
            for c in range(3):
                _between_rows_normalized(above[c], below[c], weight, mean[c], factor[c], out[c, y, :width])
        else:
            four, between = _look_up_row(y, packed, inverse, scratch)
            for c in range(3):
                _between_four_normalized(four, between, int32(8 * c), mean[c], factor[c], out[c, y, :width])


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
    _clear_outside(out, height, width)


@njit(cache=True, nogil=True)
def _clear_outside(out: Any, height: int, width: int) -> None:
    for c in range(3):
        for y in range(height):
            out[c, y, width:] = 0
        out[c, height:] = 0


# Colour operations. Their results are those of DALI's operators to the byte (of OpenCV's, where DALI calls that), but
# for a saturation or a hue half-way between two levels, which may be rounded to the other one.
# Those that look at one channel of one pixel are tables of 256 levels, and successive tables are one.

IDENTITY, BRIGHTNESS, CONTRAST, SATURATION, SHARPNESS, SOLARIZE = 0, 1, 2, 3, 4, 5
POSTERIZE, AUTOCONTRAST, EQUALIZE, HUE, GRAYSCALE, BLUR = 6, 7, 8, 9, 10, 11  # the last is not done here


def _multiply_add(_: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(a, b, c), generate


_fma: Any = intrinsic(_multiply_add)  # a * b + c of float32, rounded once


@njit(cache=True, nogil=True)
def _level(value: Any) -> Any:
    """The nearest level, halves upwards."""
    low = np.floor(value)
    low += float32(1) if value - low >= float32(0.5) else float32(0)
    return int32(min(max(float32(0), low), float32(255)))


@njit(cache=True, nogil=True)
def _gray(pixel: Any, red: Any) -> Any:
    """Luma in OpenCV's fixed point; `red` is the shift of the red channel, 0 or 16."""
    r, g, b = (pixel >> red) & int32(255), (pixel >> int32(8)) & int32(255), (pixel >> (int32(16) - red)) & int32(255)
    return (int32(9798) * r + int32(19235) * g + int32(3735) * b + int32(16384)) >> int32(15)


@njit(cache=True, nogil=True)
def _sum_of_gray(pixels: Any, red: Any) -> Any:
    total = int32(0)
    for x in range(len(pixels)):
        total += _gray(pixels[x], red)
    return total


@njit(cache=True, nogil=True)
def _contrast_table(packed: Any, value: Any, red: Any, table: Any) -> None:
    height, width = packed.shape[0] - 3, packed.shape[1] - 3
    total = 0
    for y in range(height):
        total += _sum_of_gray(_row(packed, y), red)
    mean = np.floor(float32(total) / float32(height * width) + float32(0.5))
    for level in range(256):
        table[:, level] = _level(float32(level) * value + (mean - value * mean))


@njit(cache=True, nogil=True)
def _least(pixels: Any, shift: Any) -> Any:
    found = int32(255)
    for x in range(len(pixels)):
        found = min(found, (pixels[x] >> shift) & int32(255))
    return found


@njit(cache=True, nogil=True)
def _greatest(pixels: Any, shift: Any) -> Any:
    found = int32(0)
    for x in range(len(pixels)):
        found = max(found, (pixels[x] >> shift) & int32(255))
    return found


@njit(cache=True, nogil=True)
def _autocontrast_table(packed: Any, table: Any) -> Any:
    """Whether there is anything to do."""
    low, high = np.full(3, 255, dtype=np.int32), np.zeros(3, dtype=np.int32)
    for y in range(packed.shape[0] - 3):
        for c in range(3):
            low[c] = min(low[c], _least(_row(packed, y), int32(8 * c)))
            high[c] = max(high[c], _greatest(_row(packed, y), int32(8 * c)))
        if low.max() == 0 and high.min() == 255:
            return False  # most photographs have all values in every channel
    for c in range(3):
        flat = low[c] == high[c]  # a channel of one value stays
        start = float32(0) if flat else float32(low[c])
        factor = float32(1) if flat else float32(1) / (float32(high[c] - low[c]) / float32(255))
        for level in range(256):
            # PIL truncates
            table[c, level] = _level((float32(level) - start) * factor - float32(0.4999))
    return True


@njit(cache=True, nogil=True)
def _count_levels(pixels: Any, counts: Any) -> None:
    for x in range(len(pixels)):
        counts[0, pixels[x] & int32(255)] += 1
        counts[1, (pixels[x] >> int32(8)) & int32(255)] += 1
        counts[2, (pixels[x] >> int32(16)) & int32(255)] += 1


@njit(cache=True, nogil=True)
def _equalize_table(packed: Any, table: Any) -> None:
    """OpenCV counts pixels up to a level, PIL those below it: the same of the inverted image, inverted."""
    counts = np.zeros((3, 256), dtype=np.int32)
    for y in range(packed.shape[0] - 3):
        _count_levels(_row(packed, y), counts)
    for c in range(3):
        level = 255
        while counts[c, level] == 0:
            level -= 1
        rest = counts[c].sum() - counts[c, level]
        if rest == 0:
            continue  # a channel of one value stays
        factor, total = float32(255) / float32(rest), 0
        table[c, level:] = 255
        for k in range(level - 1, -1, -1):
            total += counts[c, k]
            table[c, k] = int32(255) - int32(np.rint(float32(total) * factor))


@njit(cache=True, nogil=True)
def _change_table(kind: int, value: Any, table: Any) -> None:
    """One of the operations that need not know the image, after what the table does."""
    mask = int32(256) - int32(np.rint(float32(2.0) ** (float32(8.0) - value)))
    for c in range(3):
        for n in range(256):
            level = table[c, n]
            if kind == BRIGHTNESS:
                table[c, n] = _level(float32(level) * value)
            elif kind == SOLARIZE:
                table[c, n] = int32(255) - level if level >= value else level
            elif kind == POSTERIZE:
                table[c, n] = level & mask


@njit(cache=True, nogil=True)
def _apply_table(pixels: Any, red: Any, green: Any, blue: Any) -> None:
    """The tables have their levels at their channel's place of a packed pixel."""
    for x in range(len(pixels)):
        pixel = pixels[x]
        pixels[x] = red[uint8(pixel)] | green[uint8(pixel >> int32(8))] | blue[uint8(pixel >> int32(16))]


@njit(cache=True, nogil=True)
def _apply_matrix(pixels: Any, matrix: Any) -> None:
    a, b, c = matrix[0, 0], matrix[0, 1], matrix[0, 2]
    d, e, f = matrix[1, 0], matrix[1, 1], matrix[1, 2]
    g, h, i = matrix[2, 0], matrix[2, 1], matrix[2, 2]
    low, high, half = float32(0), float32(255), float32(0.5)
    for n in range(len(pixels)):
        x, y = float32(pixels[n] & int32(255)), float32((pixels[n] >> int32(8)) & int32(255))
        z = float32((pixels[n] >> int32(16)) & int32(255))
        pixels[n] = _pixel(
            min(max(a * x + b * y + c * z + half, low), high),
            min(max(d * x + e * y + f * z + half, low), high),
            min(max(g * x + h * y + i * z + half, low), high),
        )


@njit(cache=True, nogil=True)
def _apply_gray(pixels: Any, red: Any) -> None:
    for x in range(len(pixels)):
        gray = _gray(pixels[x], red)
        pixels[x] = gray | (gray << int32(8)) | (gray << int32(16))


@njit(cache=True, nogil=True)
def _channel(pixels: Any, shift: Any, out: Any) -> None:
    for x in range(len(out)):
        out[x] = float32((pixels[x] >> shift) & int32(255))


@njit(cache=True, nogil=True)
def _sharpen_row(above: Any, middle: Any, below: Any, side: Any, center: Any, out: Any) -> None:
    """One channel of a row but for its ends: 3x3 taps in the order, and with the rounding, of OpenCV's filter."""
    for x in range(len(out)):
        total = side * above[x]
        total = _fma(side, above[x + 1], total)
        total = _fma(side, above[x + 2], total)
        total = _fma(side, middle[x], total)
        total = _fma(center, middle[x + 1], total)
        total = _fma(side, middle[x + 2], total)
        total = _fma(side, below[x], total)
        total = _fma(side, below[x + 1], total)
        total = _fma(side, below[x + 2], total)
        # A sum has no digits behind the point here, so this rounds to the nearest, halves to even.
        nearest = (total + float32(12582912)) - float32(12582912)
        out[x] = min(max(float32(0), nearest), float32(255))


@njit(cache=True, nogil=True)
def _sharpen(packed: Any, value: Any) -> None:
    """PIL's: blended with a smoothed image; the outermost pixels stay."""
    height, width = packed.shape[0] - 3, packed.shape[1] - 3
    if height < 3 or width < 3:
        return
    rest = float32(1) - value
    side, center = float32(1) / float32(13) * rest, value + float32(5) / float32(13) * rest
    lines, levels = np.empty((3, 3, width), dtype=np.float32), np.empty((3, width - 2), dtype=np.float32)
    for y in range(height):
        for c in range(3):
            _channel(_row(packed, y), int32(8 * c), lines[y % 3, c])
        if y < 2:
            continue
        above, middle, below = lines[(y - 2) % 3], lines[(y - 1) % 3], lines[y % 3]
        for c in range(3):
            _sharpen_row(above[c], middle[c], below[c], side, center, levels[c])
        _pack(levels[0], levels[1], levels[2], _row(packed, y - 1)[1 : width - 1])


@njit(cache=True, nogil=True)
def _matrix_of(kind: int, value: Any, weights: Any) -> Any:
    """(3, 3) of a saturation or a hue.

    Args:
        kind, value: the operation.
        weights: (10, 3) luma; then the parts of a turn of the hue that stay, go with the cosine and with the sine.
    """
    if kind == SATURATION:
        matrix = np.empty((3, 3), dtype=np.float32)
        for i in range(3):
            for j in range(3):
                matrix[i, j] = (value if i == j else float32(0)) + weights[0, j] * (float32(1) - value)
        return matrix
    angle = value * float32(2 * np.pi)
    return weights[1:4] + weights[4:7] * np.cos(angle) + weights[7:10] * np.sin(angle)


@njit(cache=True, nogil=True)
def _recolor(packed: Any, steps: Any, weights: Any, red: Any) -> None:
    """Operations one after the other, in place.

    Args:
        packed: the image; its frame is not written.
        steps: (K, >= 2) kinds and values.
        weights: see `_matrix_of`.
        red: shift of the red channel.
    """
    table = np.empty((3, 256), dtype=np.int32)
    waiting = False  # whether the table holds what is not done yet
    for step in range(len(steps) + 1):
        kind = IDENTITY if step == len(steps) else int(steps[step, 0])
        value = float32(0) if step == len(steps) else steps[step, 1]
        if kind in (IDENTITY, BLUR) and step < len(steps):
            continue
        knows_nothing = kind in (BRIGHTNESS, SOLARIZE, POSTERIZE)
        if waiting and not knows_nothing:
            for y in range(packed.shape[0] - 3):
                _apply_table(_row(packed, y), table[0], table[1] << 8, table[2] << 16)
            waiting = False
        if not waiting:
            for level in range(256):
                table[:, level] = level
        if kind == SHARPNESS:
            _sharpen(packed, value)
        elif kind == GRAYSCALE:
            for y in range(packed.shape[0] - 3):
                _apply_gray(_row(packed, y), red)
        elif kind in (SATURATION, HUE):
            matrix = _matrix_of(kind, value, weights)
            for y in range(packed.shape[0] - 3):
                _apply_matrix(_row(packed, y), matrix)
        else:
            waiting = kind != IDENTITY
            if kind == CONTRAST:
                _contrast_table(packed, value, red, table)
            elif kind == AUTOCONTRAST:
                waiting = _autocontrast_table(packed, table)
            elif kind == EQUALIZE:
                _equalize_table(packed, table)
            else:
                _change_table(kind, value, table)


@njit(cache=True, nogil=True)
def _unpack(pixels: Any, out: Any) -> None:
    for x in range(len(pixels)):
        pixel = pixels[x]
        out[x, 0], out[x, 1], out[x, 2] = uint8(pixel), uint8(pixel >> int32(8)), uint8(pixel >> int32(16))


@njit(cache=True, nogil=True)
def recolor(out: Any, image: Any, steps: Any, weights: Any, red: Any) -> None:
    """Colour operations.

    Args:
        out: (H, W, 3) uint8, written.
        image: (H, W, 3) uint8.
        steps, weights, red: see `_recolor`.
    """
    packed = _packed(image)
    _recolor(packed, steps, weights, red)
    for y in range(image.shape[0]):
        _unpack(_row(packed, y), out[y])


@njit(cache=True, nogil=True)
def render(out: Any, image: Any, plan: Any, slots: int, colors: Any) -> None:
    """A whole view: warp, colour operations, second warp, erased patches, normalisation.

    Args:
        out: (3, >= h, >= w) float32, written; 0 outside the view.
        image: (H, W, 3) uint8.
        plan: (7 + slots + 2N, 3): a matrix from source to view; one that follows the colour operations, the identity
            for none; h, w, and whether the source's nearest pixels fill what it does not cover; kind and value of each
            colour operation; top and left, then height and width, of N patches.
        slots: number of colour operations.
        colors: (15, 3): mean, standard deviation, fill, and fill of the patches, in levels; whether colour comes before
            the first warp, and the shift of the red channel; weights as in `_matrix_of`.
    """
    first, after, steps = plan[0:3], plan[3:6], plan[7 : 7 + slots]
    height, width = min(int(plan[6, 0]), out.shape[1]), min(int(plan[6, 1]), out.shape[2])
    mean, factor, fill, replicate = colors[0], float32(1.0) / colors[1], colors[2], plan[6, 2] != 0
    at_source, red, weights = colors[4, 0] != 0, int32(colors[4, 1]), colors[5:15]
    packed = _packed(image)
    if at_source:
        _recolor(packed, steps, weights, red)
    _frame(packed, fill, replicate)
    follows = not _is_identity(after)
    if follows or (not at_source and _changes(steps)):
        packed = _warp_packed(packed, first, height, width)
        if not at_source:
            _recolor(packed, steps, weights, red)
        if follows:
            _frame(packed, fill, False)
            _warp_normalized(out, packed, after, height, width, mean, factor)
        else:
            for y in range(height):
                for c in range(3):
                    _normalize_packed(_row(packed, y), int32(8 * c), mean[c], factor[c], out[c, y, :width])
    else:
        _warp_normalized(out, packed, first, height, width, mean, factor)
    _clear_outside(out, height, width)
    for n in range(7 + slots, len(plan), 2):
        top, left = int(plan[n, 0]), int(plan[n, 1])
        for c in range(3):
            erased = (colors[3, c] - mean[c]) * factor[c]
            out[c, top : top + int(plan[n + 1, 0]), left : left + int(plan[n + 1, 1])] = erased


@njit(cache=True, nogil=True)
def _is_identity(matrix: Any) -> Any:
    for i in range(2):
        for j in range(3):
            if matrix[i, j] != (1.0 if i == j else 0.0):
                return False
    return True


@njit(cache=True, nogil=True)
def _changes(steps: Any) -> Any:
    return len(steps) > 0 and steps[:, 0].max() != IDENTITY


# The same for DALI's operator of compiled functions, which passes arrays of pointers to outputs, inputs and shapes.
# They are in this file because numba compiles again only what has changed in a function's own file. Nothing here raises
# but for a lack of memory, which numba would print and DALI not notice.

_ADDRESSES = types.CPointer(types.voidptr)
_SHAPES = types.CPointer(types.CPointer(types.int64))
RUN = types.void(_ADDRESSES, _SHAPES, types.voidptr, int32, _ADDRESSES, _SHAPES, types.voidptr, int32)
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


@cfunc(RUN, cache=True)
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


@cfunc(RUN, cache=True)
def run_render(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: canvas, image, plan, (15, 3) colors, (1, 1) slots."""
    render(
        _volume(outs, out_shapes, 0, np.float32),
        _volume(ins, shapes, 1, np.uint8),
        _table(ins, shapes, 2),
        int(_table(ins, shapes, 4)[0, 0]),
        _table(ins, shapes, 3),
    )


@cfunc(RUN, cache=True)
def run_normalize(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: canvas, image, (2, 3) colors."""
    normalize(_volume(outs, out_shapes, 0, np.float32), _volume(ins, shapes, 1, np.uint8), _table(ins, shapes, 2))


@cfunc(RUN, cache=True)
def run_recolor(outs: Any, out_shapes: Any, _a: Any, _b: Any, ins: Any, shapes: Any, _c: Any, _d: Any) -> None:
    """Inputs: image, image, (K, 2) kinds and values, (11, 3) shift of the red channel, then weights."""
    options = _table(ins, shapes, 3)
    recolor(
        _volume(outs, out_shapes, 0, np.uint8),
        _volume(ins, shapes, 1, np.uint8),
        _table(ins, shapes, 2),
        options[1:],
        int32(options[0, 0]),
    )
