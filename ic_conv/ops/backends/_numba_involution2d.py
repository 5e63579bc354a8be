# SPDX-License-Identifier: Apache-2.0
"""Numba kernels of involution for float32 on a CPU. Imports Numba, so import this file only to run them.

All channels of a group share a position's weights, so a vector register holds some of these channels
(lanes) for one position, and a tap is one multiply-add of a scalar weight. Image sizes, strides, dilations
and borders then never touch the vector code. Where channels are not the last dimension in memory, rows are
first copied to that order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import types
from numpy.lib.stride_tricks import as_strided

from ic_conv.ops.backends._numba_lanes import add_taps, dot, store, transpose4, zeros


@numba.njit(nogil=True)
def _steps(array):  # type: ignore[no-untyped-def]
    """Strides in elements."""
    return [s // 4 for s in array.strides]


@numba.njit(nogil=True)
def _flat(array):  # type: ignore[no-untyped-def]
    """The array for our own indices alone, which count from its start; so that all arrays have one type."""
    return as_strided(array, (1,), (4,))


@numba.njit(nogil=True)
def _channels_last(image, first_channel, channels, top, bottom):  # type: ignore[no-untyped-def]
    """Rows top to bottom - 1 of some channels of image (C, H, W), in an array whose channels are neighbours.

    This is the image itself if its channels are, else a copy. Also the index of row 0, even where that is not
    copied, and the steps of a row and of a column.
    """
    c_step, row_step, column_step = _steps(image)
    if c_step == 1:
        return _flat(image), first_channel, row_step, column_step
    width = image.shape[2]
    flat = np.empty((bottom - top) * width * channels, np.float32)
    whole = width // 4 * 4 if column_step == 1 else 0
    for row in range(top, bottom):
        line = (row - top) * width * channels
        for c in range(0, channels, 4):
            start = (first_channel + c) * c_step + row * row_step
            for column in range(0, whole, 4):
                transpose4(image, start + column, c_step, flat, line + column * channels + c, channels)
        for column in range(whole, width):
            for c in range(channels):
                flat[line + column * channels + c] = image[first_channel + c, row, column]
    return _flat(flat), -top * width * channels, width * channels, channels


@numba.njit(nogil=True)
def _channels_first(flat, channels, image, first_channel, row):  # type: ignore[no-untyped-def]
    """Writes flat (W, channels) to a row of some channels of image (C, H, W)."""
    width = image.shape[2]
    c_step, row_step, column_step = _steps(image)
    whole = width // 4 * 4 if column_step == 1 else 0
    for c in range(0, channels, 4):
        start = (first_channel + c) * c_step + row * row_step
        for column in range(0, whole, 4):
            transpose4(flat, column * channels + c, channels, image, start + column, c_step)
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


@numba.njit(nogil=True)
def _alike(columns, j):  # type: ignore[no-untyped-def]
    """Whether target columns j to j + 3 have the same number of taps."""
    if j + 3 >= len(columns):
        return False
    count = columns[j, 0]
    return columns[j + 1, 0] == count and columns[j + 2, 0] == count and columns[j + 3, 0] == count


@numba.njit(nogil=True)
def _starts(columns, j, tap, tap_steps, pixel, pixel_step):  # type: ignore[no-untyped-def]
    """Of target column j: the first tap, and the pixel under it."""
    _, v, column, position = columns[j]
    return tap + v * tap_steps[0] + position * tap_steps[1], pixel + column * pixel_step


def _define(width: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two kernels for channels per group that are multiples of `width`.

    Both work on target lines `begin` to `end - 1`; lines count the rows of all groups of all images. `rows`
    and `columns` are (G, positions, 4) as `numba_involution2d.Axis` says, their steps (G, 3).
    """

    @numba.njit(nogil=True)
    def window(weight, taps, jumps, ahead, source, pixels, pixel_jumps, counts):  # type: ignore[no-untyped-def]
        """The sums over the windows of some positions, a register for each."""
        sums = zeros(width, taps)
        for k in range(counts[0]):
            tap, pixel = k * jumps[0], k * pixel_jumps[0]
            for _ in range(counts[1]):
                sums = add_taps(sums, weight, taps, tap, ahead, source, pixels, pixel)
                tap += jumps[1]
                pixel += pixel_jumps[1]
        return sums

    @numba.njit(nogil=True)
    def gather_line(  # type: ignore[no-untyped-def]
        columns,
        row_count,
        weight,
        tap,
        tap_steps,
        jumps,
        ahead,
        source,
        pixel,
        pixel_step,
        pixel_jumps,
        out,
        here,
        step,
    ):
        """Target columns of one row: four at a time where their windows are alike, else one."""
        j = 0
        while j < len(columns):
            counts = row_count, columns[j, 0]
            t0, p0 = _starts(columns, j, tap, tap_steps, pixel, pixel_step)
            if _alike(columns, j):
                t1, p1 = _starts(columns, j + 1, tap, tap_steps, pixel, pixel_step)
                t2, p2 = _starts(columns, j + 2, tap, tap_steps, pixel, pixel_step)
                t3, p3 = _starts(columns, j + 3, tap, tap_steps, pixel, pixel_step)
                taps, pixels = (t0, t1, t2, t3), (p0, p1, p2, p3)
                sums = window(weight, taps, jumps, ahead, source, pixels, pixel_jumps, counts)
                store(sums, out, here + j * step, step)
                j += 4
            else:
                alone = window(weight, (t0,), jumps, ahead, source, (p0,), pixel_jumps, counts)
                store(alone, out, here + j * step, step)
                j += 1

    def gather(source, weight, target, rows, row_steps, columns, column_steps, begin, end):  # type: ignore[no-untyped-def]
        groups, height = weight.shape[1], target.shape[2]
        channels = source.shape[1] // groups
        n_step, g_step, u_step, v_step, i_step, j_step = _steps(weight)
        target_n, target_c, target_row, target_column = _steps(target)
        sums = np.empty(target.shape[3] * width, np.float32)
        out, step = (_flat(target), target_column) if target_c == 1 else (_flat(sums), width)
        line = begin
        while line < end:
            unit, first = divmod(line, height)
            last = min(height, first + end - line)
            line += last - first
            n, g = divmod(unit, groups)
            tap_step, source_step, position_step = row_steps[g]
            top, bottom = _source_rows(rows[g, first:last], source_step)
            pixels, origin, pixel_row, pixel_step = _channels_last(
                source[n], g * channels, channels, top, bottom
            )
            row_jumps = tap_step * u_step + position_step * i_step, source_step * pixel_row
            tap_step, source_step, position_step = column_steps[g]
            jumps = row_jumps[0], tap_step * v_step + position_step * j_step
            pixel_jumps = row_jumps[1], source_step * pixel_step
            across = columns[g]
            for i in range(first, last):
                row_count, u, row, position = rows[g, i]
                tap = n * n_step + g * g_step + u * u_step + position * i_step
                for c in range(0, channels, width):
                    pixel = origin + row * pixel_row + c
                    here = n * target_n + g * channels + c + i * target_row if target_c == 1 else 0
                    gather_line(
                        *(across, row_count, weight, tap, (v_step, j_step), jumps, i_step),
                        *(pixels, pixel, pixel_step, pixel_jumps, out, here, step),
                    )
                    if target_c != 1:
                        _channels_first(sums, width, target[n], g * channels + c, i)

    def grad_weight(source, grad, target, rows, row_steps, columns, column_steps, begin, end):  # type: ignore[no-untyped-def]
        groups, height = target.shape[1], grad.shape[2]
        channels = source.shape[1] // groups
        n_step, g_step, u_step, v_step, i_step, j_step = _steps(target)
        line = begin
        while line < end:
            unit, first = divmod(line, height)
            last = min(height, first + end - line)
            line += last - first
            n, g = divmod(unit, groups)
            top, bottom = _source_rows(rows[g, first:last], row_steps[g, 1])
            pixels, origin, pixel_row, pixel_step = _channels_last(
                source[n], g * channels, channels, top, bottom
            )
            grads, grad_origin, grad_row, grad_step = _channels_last(
                grad[n], g * channels, channels, first, last
            )
            pixel_jump = column_steps[g, 1] * pixel_step
            for i in range(first, last):
                row_count, u, row, _ = rows[g, i]
                if row_count < target.shape[2]:
                    target[n, g, :, :, i, :] = 0
                for k in range(row_count):
                    row_tap = n * n_step + g * g_step + (u + k) * u_step + i * i_step
                    row_pixel = origin + (row + k * row_steps[g, 1]) * pixel_row
                    for j in range(grad.shape[3]):
                        count, v, column, _ = columns[g, j]
                        if count < target.shape[3]:
                            target[n, g, u + k, :, i, j] = 0
                        tap = row_tap + v * v_step + j * j_step
                        pixel = row_pixel + column * pixel_step
                        here = grad_origin + i * grad_row + j * grad_step
                        for _ in range(count):
                            total = np.float32(0)
                            for c in range(0, channels, width):
                                total += dot(width, pixels, pixel + c, grads, here + c)
                            store((total,), target, tap, 0)
                            tap += v_step
                            pixel += pixel_jump

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
