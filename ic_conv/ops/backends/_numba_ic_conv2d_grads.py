# SPDX-License-Identifier: Apache-2.0
"""Numba kernels of the inception convolution's gradients for float32 on a CPU. Import it only to run it.

Both gradients are sums of scalars, elements of the output's gradient, times vectors of input channels, which
lie together in channels-last order. A block of up to 4 pixels or output channels by a few vectors stays in
registers while everything that adds to it is read once, whatever branches it comes from.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ic_conv.ops.backends._numba_ic_conv2d import FLOAT, FUSED, HEADER, INT64, LANES, VECTOR, _at, _take

HEIGHT = 4  # targets of a block
WIDTH = 4 if LANES == 16 else 2  # vectors of a block: its sums fit into the registers
BYTES = 4 * LANES  # of a vector
FIELDS = 2 + HEIGHT  # of a record
OUTSIDE = -(2**40)  # a row that no tap reads
INT32 = ir.IntType(32)


@intrinsic(prefer_literal=True)
def _add_up(
    typing: Any,
    height: Any,
    width: Any,
    records: Any,
    count: Any,
    steps: Any,
    shifts: Any,
    targets: Any,
) -> Any:
    """Stores at each of `height` targets the sum over all records of scalars times `width` vectors.

    Args:
        height, width: literals.
        records, count: address of `count` records: a number of terms, the first term's vectors, and the first
            scalar of each target.
        steps: bytes from a term to the next: of the scalars, of the vectors.
        shifts: bytes to add to all addresses: of the scalars, of the vectors and the targets.
        targets: address of the targets' addresses.
    """
    rows, columns = height.literal_value, width.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        _, _, records, count, steps, shifts, targets = args
        scalar_step, vector_step = (builder.extract_value(steps, i) for i in range(2))
        scalar_shift, vector_shift = (builder.extract_value(shifts, i) for i in range(2))
        zero, spread = (
            ir.Constant(VECTOR, [0.0] * LANES),
            ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES),
        )
        totals = [[cgutils.alloca_once(builder, VECTOR) for _ in range(columns)] for _ in range(rows)]
        for total in (t for row in totals for t in row):
            builder.store(zero, total)
        with cgutils.for_range(builder, count, intp=INT64) as record:
            start = builder.add(records, builder.mul(record.index, INT64(8 * FIELDS)))
            terms, vector, *scalars = (
                builder.load(_at(builder, builder.add(start, INT64(8 * i)), INT64)) for i in range(2 + rows)
            )
            vector = builder.add(vector, vector_shift)
            scalars = [builder.add(scalar, scalar_shift) for scalar in scalars]
            with cgutils.for_range(builder, terms, intp=INT64) as term:
                first = builder.add(vector, builder.mul(term.index, vector_step))
                place = builder.mul(term.index, scalar_step)
                values = [
                    builder.load(_at(builder, builder.add(first, INT64(BYTES * i)), VECTOR), align=4)
                    for i in range(columns)
                ]
                for scalar, row in zip(scalars, totals, strict=True):
                    factor = builder.load(_at(builder, builder.add(scalar, place), FLOAT), align=4)
                    lanes = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), factor, INT32(0))
                    lanes = builder.shuffle_vector(lanes, lanes, spread)
                    for value, total in zip(values, row, strict=True):
                        product = builder.fmul(lanes, value, flags=FUSED)
                        builder.store(builder.fadd(builder.load(total), product, flags=FUSED), total)
        for index, row in enumerate(totals):
            target = builder.load(_at(builder, builder.add(targets, INT64(8 * index)), INT64))
            target = builder.add(target, vector_shift)
            for i, total in enumerate(row):
                place = builder.add(target, INT64(BYTES * i))
                builder.store(builder.load(total), _at(builder, place, VECTOR), align=4)

    return types.void(height, width, records, count, steps, shifts, targets), build


def _rows(height: int) -> Any:
    def block(width: int) -> Any:
        @numba.njit(nogil=True, error_model="numpy")
        def sums(records, count, steps, shifts, targets):  # type: ignore[no-untyped-def]
            _add_up(height, width, records, count, steps, shifts, targets)

        return sums

    wide, middle, narrow = block(WIDTH), block(2), block(1)

    @numba.njit(nogil=True, error_model="numpy")
    def rows(width, records, count, steps, shifts, targets):  # type: ignore[no-untyped-def]
        if width == WIDTH:
            wide(records, count, steps, shifts, targets)
        elif width == 2:
            middle(records, count, steps, shifts, targets)
        else:
            narrow(records, count, steps, shifts, targets)

    return rows


_rows4, _rows2, _rows1 = _rows(HEIGHT), _rows(2), _rows(1)


@numba.njit(nogil=True, error_model="numpy")
def _sums(height, width, records, count, steps, shifts, targets):  # type: ignore[no-untyped-def]
    if height == HEIGHT:
        _rows4(width, records, count, steps, shifts, targets)
    elif height == 2:
        _rows2(width, records, count, steps, shifts, targets)
    else:
        _rows1(width, records, count, steps, shifts, targets)


@numba.njit(nogil=True, error_model="numpy")
def _most(left, most):  # type: ignore[no-untyped-def]
    """How many of what is left a block takes."""
    return most if left >= most else min(left, 2)


@numba.njit(nogil=True, error_model="numpy")
def _quotient(value, step):  # type: ignore[no-untyped-def]
    """value / step, and whether that is a whole number; without a slow division for the usual steps."""
    if step == 1:
        return value, True
    quotient = value >> 1 if step == 2 else value // step
    return quotient, quotient * step == value


@numba.njit(nogil=True, error_model="numpy")
def _list_taps(records, places, call):  # type: ignore[no-untyped-def]
    """Writes a record for each tap of each branch that reads one of the pixels; returns their number."""
    grad, weight, zeros, pixel = call[0], call[1], call[3], call[8]
    out_height, out_width, out_channels, stride_y, stride_x, kh, kw = call[9:16]
    count = 0
    for branch in range(call[17]):
        first, channels, dy, dx = call[HEADER + 4 * branch : HEADER + 4 * branch + 4]
        for u in range(kh):
            for v in range(kw):
                met = False
                for j in range(HEIGHT):
                    row, whole_y = _quotient(places[j, 1] - (u - kh // 2) * dy, stride_y)
                    column, whole_x = _quotient(places[j, 2] - (v - kw // 2) * dx, stride_x)
                    read = whole_y and whole_x and 0 <= row < out_height and 0 <= column < out_width
                    place = (places[j, 0] * out_height + row) * out_width + column
                    records[count, 2 + j] = grad + 4 * (place * out_channels + first) if read else zeros
                    met |= read
                records[count, 0] = channels
                records[count, 1] = weight + (first * kh * kw + u * kw + v) * pixel
                count += met
    return count


@numba.njit(nogil=True, error_model="numpy")
def _grad_input(call):  # type: ignore[no-untyped-def]
    """Computes pieces of the gradient by the input until none is left; several threads run it on one call.

    A piece is a span of pixels and some of their channels. Columns that are alike modulo the stride stand
    together, since the same taps meet them.
    """
    grad_x, scratch, batch, height, width, pixel = call[2], call[4], call[5], call[6], call[7], call[8]
    stride_x, kh, kw, span, branches = call[13:18]
    alike = -(-width // stride_x)
    total, per_image = batch * height * alike * stride_x, height * alike * stride_x
    spans = -(-total // span)
    vectors = pixel // BYTES
    blocks = -(-vectors // WIDTH)
    records = np.empty((branches * kh * kw, FIELDS), np.int64)
    places = np.empty((HEIGHT, 3), np.int64)
    targets = np.empty(HEIGHT, np.int64)
    steps = (4, kh * kw * pixel)
    while True:
        block, piece = divmod(_take(call.ctypes.data + 8 * 18), spans)
        if block >= blocks:
            return
        for start in range(piece * span, min(total, (piece + 1) * span), HEIGHT):
            for j in range(HEIGHT):
                n, inside = divmod(start + j, per_image)
                row, column = divmod(inside, alike * stride_x)
                phase, column = divmod(column, alike)
                column = column * stride_x + phase
                real = start + j < total and column < width
                places[j, 0], places[j, 1] = n, row if real else OUTSIDE
                places[j, 2] = column
                targets[j] = grad_x + ((n * height + row) * width + column) * pixel if real else scratch
            count = _list_taps(records, places, call)
            vector, last = block * WIDTH, min(vectors, (block + 1) * WIDTH)
            while vector < last:
                taken, shifts = _most(last - vector, WIDTH), (0, vector * BYTES)
                _sums(HEIGHT, taken, records.ctypes.data, count, steps, shifts, targets.ctypes.data)
                vector += taken


@numba.njit(nogil=True, error_model="numpy")
def _grad_weight(call):  # type: ignore[no-untyped-def]
    """Computes pieces of the gradient by the weight until none is left. A piece is a tap of a branch."""
    grad, x, grad_w, _, _, batch, height, width, pixel = call[:9]
    out_height, out_width, out_channels, stride_y, stride_x, kh, kw, _, branches = call[9:18]
    out_pixel = 4 * out_channels
    records = np.empty((batch * out_height, FIELDS), np.int64)
    targets = np.empty(HEIGHT, np.int64)
    steps, vectors = (out_pixel, stride_x * pixel), pixel // BYTES
    while True:
        branch, tap = divmod(_take(call.ctypes.data + 8 * 18), kh * kw)
        if branch >= branches:
            return
        first, channels, dy, dx = call[HEADER + 4 * branch : HEADER + 4 * branch + 4]
        down, right = (tap // kw - kh // 2) * dy, (tap % kw - kw // 2) * dx
        left = max(0, -(right // stride_x))
        terms = min(out_width, (width - 1 - right) // stride_x + 1) - left
        count = 0
        for n in range(batch):
            for row in range(out_height):
                line = row * stride_y + down
                if terms > 0 and 0 <= line < height:
                    records[count, 0] = terms
                    records[count, 1] = x + ((n * height + line) * width + left * stride_x + right) * pixel
                    for i in range(HEIGHT):
                        place = ((n * out_height + row) * out_width + left) * out_pixel
                        records[count, 2 + i] = grad + place + 4 * (first + i)
                    count += 1
        channel = 0
        while channel < channels:
            rows, vector = _most(channels - channel, HEIGHT), 0
            for i in range(rows):
                targets[i] = grad_w + ((first + channel + i) * kh * kw + tap) * pixel
            while vector < vectors:
                taken, shifts = _most(vectors - vector, WIDTH), (4 * channel, vector * BYTES)
                _sums(rows, taken, records.ctypes.data, count, steps, shifts, targets.ctypes.data)
                vector += taken
            channel += rows


@lru_cache
def kernels() -> tuple[Any, Any]:
    """The compiled kernels, by input and by weight; see `_numba_ic_conv2d.kernel`."""

    def by_input(call):  # type: ignore[no-untyped-def]
        _grad_input(numba.carray(call, numba.carray(call, HEADER)[HEADER - 1]))

    def by_weight(call):  # type: ignore[no-untyped-def]
        _grad_weight(numba.carray(call, numba.carray(call, HEADER)[HEADER - 1]))

    signature, entries = types.void(types.CPointer(types.int64)), (by_input, by_weight)
    try:
        first, second = (numba.cfunc(signature, cache=True)(entry) for entry in entries)
    except RuntimeError:  # no folder to write the cache to
        first, second = (numba.cfunc(signature)(entry) for entry in entries)
    return first, second
