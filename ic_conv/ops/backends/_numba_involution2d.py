# SPDX-License-Identifier: Apache-2.0
"""Numba kernels of involution for float32 on a CPU. Imports Numba, so import this file only to run them.

All channels of a group share a position's weights, so a vector register holds some of these channels
(lanes) for one position, and a tap is one multiply-add of a scalar weight. Image sizes, strides, dilations
and borders then never touch the vector code. Source rows are first copied to channels-last order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

FUSED = ("contract",)  # lets LLVM fuse a multiply and an add; NaN and infinity stay exact
INT32 = ir.IntType(32)


class Lanes(types.Type):
    """A vector register of `width` float32 values."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(f"Lanes({width})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(ir.FloatType(), lanes.width))


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to an element, its index counted from the array's start whatever the array's strides."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder: Any, address: Any, vector: Any) -> Any:
    return builder.load(builder.bitcast(address, vector.as_pointer()), align=4)


@intrinsic(prefer_literal=True)
def _lanes(typing: Any, width: Any, source: Any, index: Any) -> Any:
    """source[index : index + width]."""
    lanes = Lanes(width.literal_value)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, source, args[1], args[2])
        return _load(builder, address, context.get_value_type(lanes))

    return lanes(width, source, index), build


@intrinsic
def _store(typing: Any, values: Any, target: Any, index: Any) -> Any:
    """target[index : index + width] = values, or one scalar."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        address = _address(context, builder, target, args[1], args[2])
        builder.store(args[0], builder.bitcast(address, args[0].type.as_pointer()), align=4)

    return types.void(values, target, index), build


@intrinsic
def _add_tap(typing: Any, sums: Any, weight: Any, tap: Any, source: Any, pixel: Any) -> Any:
    """sums + weight[tap] * source[pixel : pixel + width]."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(sums)
        scalar = builder.load(_address(context, builder, weight, args[1], args[2]))
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, scalar, INT32(0))
        to_all = ir.Constant(ir.VectorType(INT32, sums.width), [0] * sums.width)
        scale = builder.shuffle_vector(first, undefined, to_all)
        values = _load(builder, _address(context, builder, source, args[3], args[4]), vector)
        return builder.fadd(args[0], builder.fmul(scale, values, flags=FUSED), flags=FUSED)

    return sums(sums, weight, tap, source, pixel), build


@intrinsic(prefer_literal=True)
def _dot(typing: Any, width: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
    """Sum of a[i : i + width] * b[j : j + width]."""
    lanes = Lanes(width.literal_value)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(lanes)
        left = _load(builder, _address(context, builder, a, args[1], args[2]), vector)
        right = _load(builder, _address(context, builder, b, args[3], args[4]), vector)
        reduce_type = ir.FunctionType(ir.FloatType(), [ir.FloatType(), vector])
        name = f"llvm.vector.reduce.fadd.v{lanes.width}f32"
        reduce = cgutils.get_or_insert_function(builder.module, reduce_type, name)
        return builder.call(reduce, [ir.FloatType()(0.0), builder.fmul(left, right)], fastmath=("reassoc",))

    return types.float32(width, a, i, b, j), build


@intrinsic
def _transpose4(typing: Any, a: Any, i: Any, a_step: Any, b: Any, j: Any, b_step: Any) -> Any:
    """b[j + c * b_step + r] = a[i + r * a_step + c] for r and c below 4."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        vector = ir.VectorType(ir.FloatType(), 4)

        def mixed(left: Any, right: Any, *order: int) -> Any:
            return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(INT32, 4), order))

        def steps(array: Any, type_: Any, start: Any, step: Any) -> list[Any]:
            addresses = [_address(context, builder, type_, array, start)]
            for _ in range(3):
                addresses.append(builder.gep(addresses[-1], [step]))
            return addresses

        rows = [_load(builder, address, vector) for address in steps(args[0], a, args[1], args[2])]
        low = [mixed(rows[r], rows[r + 1], 0, 4, 1, 5) for r in (0, 2)]
        high = [mixed(rows[r], rows[r + 1], 2, 6, 3, 7) for r in (0, 2)]
        columns = [mixed(*pair, *order) for pair in (low, high) for order in ((0, 1, 4, 5), (2, 3, 6, 7))]
        for column, address in zip(columns, steps(args[3], b, args[4], args[5]), strict=True):
            builder.store(column, builder.bitcast(address, vector.as_pointer()), align=4)

    return types.void(a, i, a_step, b, j, b_step), build


@numba.njit(nogil=True)
def _channels_last(image, first_channel, channels, top, bottom):  # type: ignore[no-untyped-def]
    """Rows top to bottom - 1 of some channels of image (C, H, W), as flat (rows, W, channels)."""
    width = image.shape[2]
    flat = np.empty((bottom - top) * width * channels, np.float32)
    c_step, row_step, column_step = [s // 4 for s in image.strides]
    whole = width // 4 * 4 if column_step == 1 else 0
    for row in range(top, bottom):
        line = (row - top) * width * channels
        for c in range(0, channels, 4):
            start = (first_channel + c) * c_step + row * row_step
            for column in range(0, whole, 4):
                _transpose4(image, start + column, c_step, flat, line + column * channels + c, channels)
        for column in range(whole, width):
            for c in range(channels):
                flat[line + column * channels + c] = image[first_channel + c, row, column]
    return flat


@numba.njit(nogil=True)
def _channels_first(flat, channels, image, first_channel, row):  # type: ignore[no-untyped-def]
    """Writes flat (W, channels) to a row of some channels of image (C, H, W)."""
    width = image.shape[2]
    c_step, row_step, column_step = [s // 4 for s in image.strides]
    whole = width // 4 * 4 if column_step == 1 else 0
    for c in range(0, channels, 4):
        start = (first_channel + c) * c_step + row * row_step
        for column in range(0, whole, 4):
            _transpose4(flat, column * channels + c, channels, image, start + column, c_step)
    for column in range(whole, width):
        for c in range(channels):
            image[first_channel + c, row, column] = flat[column * channels + c]


@numba.njit(nogil=True)
def _source_rows(rows, step):  # type: ignore[no-untyped-def]
    """The source rows that some target rows read, as (first, last + 1)."""
    top, bottom = np.int64(1 << 62), np.int64(0)
    for count, _, start, _ in rows:
        if count:
            end = start + (count - 1) * step
            top, bottom = min(top, start, end), max(bottom, start + 1, end + 1)
    return min(top, bottom), bottom


def _define(width: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two kernels for channels per group that are multiples of `width`.

    Both work on target lines `begin` to `end - 1`; lines count the rows of all groups of all images. `rows`
    and `columns` are (G, positions, 4) as `numba_involution2d.Axis` says, their steps (G, 3).
    """

    def gather(source, weight, target, rows, row_steps, columns, column_steps, begin, end):  # type: ignore[no-untyped-def]
        groups, height, image_width = weight.shape[1], target.shape[2], source.shape[3]
        channels = source.shape[1] // groups
        n_step, g_step, u_step, v_step, i_step, j_step = [s // 4 for s in weight.strides]
        # Sums of a line, in memory: a processor overlaps the short chains of additions of one kernel row.
        sums = np.empty(target.shape[3] * width, np.float32)
        line = begin
        while line < end:
            unit, first = divmod(line, height)
            last = min(height, first + end - line)
            line += last - first
            n, g = divmod(unit, groups)
            tap_step, source_step, position_step = row_steps[g]
            top, bottom = _source_rows(rows[g, first:last], source_step)
            pixels = _channels_last(source[n], g * channels, channels, top, bottom)
            row_jump = tap_step * u_step + position_step * i_step
            pixel_row_jump = source_step * image_width * channels
            tap_step, source_step, position_step = column_steps[g]
            jump = tap_step * v_step + position_step * j_step
            pixel_jump = source_step * channels
            for i in range(first, last):
                row_count, u, row, row_position = rows[g, i]
                row_tap = n * n_step + g * g_step + u * u_step + row_position * i_step
                row_pixel = (row - top) * image_width
                for c in range(0, channels, width):
                    sums[:] = 0
                    for k in range(row_count):
                        for j in range(target.shape[3]):
                            count, v, column, position = columns[g, j]
                            tap = row_tap + k * row_jump + v * v_step + position * j_step
                            pixel = (row_pixel + column) * channels + c + k * pixel_row_jump
                            partial = _lanes(width, sums, j * width)
                            for _ in range(count):
                                partial = _add_tap(partial, weight, tap, pixels, pixel)
                                tap += jump
                                pixel += pixel_jump
                            _store(partial, sums, j * width)
                    _channels_first(sums, width, target[n], g * channels + c, i)

    def grad_weight(source, grad, target, rows, row_steps, columns, column_steps, begin, end):  # type: ignore[no-untyped-def]
        groups, height, image_width = target.shape[1], grad.shape[2], source.shape[3]
        channels, grad_width = source.shape[1] // groups, grad.shape[3]
        n_step, g_step, u_step, v_step, i_step, j_step = [s // 4 for s in target.strides]
        line = begin
        while line < end:
            unit, first = divmod(line, height)
            last = min(height, first + end - line)
            line += last - first
            n, g = divmod(unit, groups)
            row_step, column_step = row_steps[g, 1] * image_width * channels, column_steps[g, 1] * channels
            top, bottom = _source_rows(rows[g, first:last], row_steps[g, 1])
            pixels = _channels_last(source[n], g * channels, channels, top, bottom)
            grads = _channels_last(grad[n], g * channels, channels, first, last)
            for i in range(first, last):
                row_count, u, row, _ = rows[g, i]
                if row_count < target.shape[2]:
                    target[n, g, :, :, i, :] = 0
                for k in range(row_count):
                    row_tap = n * n_step + g * g_step + (u + k) * u_step + i * i_step
                    row_pixel = (row - top) * image_width * channels + k * row_step
                    for j in range(grad_width):
                        count, v, column, _ = columns[g, j]
                        if count < target.shape[3]:
                            target[n, g, u + k, :, i, j] = 0
                        tap = row_tap + v * v_step + j * j_step
                        pixel = row_pixel + column * channels
                        here = ((i - first) * grad_width + j) * channels
                        for _ in range(count):
                            total = np.float32(0)
                            for c in range(0, channels, width):
                                total += _dot(width, pixels, pixel + c, grads, here + c)
                            _store(total, target, tap)
                            tap += v_step
                            pixel += column_step

    return gather, grad_weight


@lru_cache
def kernels(width: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled (gather, grad_weight) for channels per group that are multiples of `width`."""
    image, weight, table = types.float32[:, :, :, :], types.float32[:, :, :, :, :, :], types.int64[:, :, ::1]
    steps, line = types.int64[:, ::1], types.int64
    gather, grad_weight = _define(width)
    tables = (table, steps, table, steps, line, line)
    return (
        _compile(types.void(image, weight, image, *tables), gather),
        _compile(types.void(image, image, weight, *tables), grad_weight),
    )


def _compile(signature: Any, function: Callable[..., None]) -> Callable[..., None]:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder to write the cache to
        return numba.njit(signature, **options)(function)
