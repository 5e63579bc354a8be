# SPDX-License-Identifier: Apache-2.0
"""Numba kernel of the inception convolution for float32 on a CPU. Imports Numba, so import it only to run it.

A vector register holds 16 input channels of one pixel, which lie together in channels-last order. So neither
a branch's few output channels nor the image's width, the stride or the border leave lanes unused. A block of
6 pixels and up to 4 output channels keeps its sums in registers over all taps; lanes are added up at its end.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FUSED = ("contract",)  # lets LLVM fuse a multiply and an add; NaN and infinity stay exact
PIXELS = 6
# Sums that fit into the registers: 32 of 16 lanes with AVX-512, else 16 of 8 lanes.
LANES, ROWS = (16, 4) if binding.get_host_cpu_features().get("avx512f", False) else (8, 2)
HEADER = 20  # the fields that `_convolve` unpacks, before the branches

FLOAT, INT64, BYTES = ir.FloatType(), ir.IntType(64), ir.IntType(8).as_pointer()
VECTOR = ir.VectorType(FLOAT, LANES)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def _take(typing: Any, address: Any) -> Any:
    """The int64 at an address, which grows by one for the next thread that asks."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, args[0], INT64), INT64(1), "monotonic")

    return types.int64(address), build


@intrinsic
def _read(typing: Any, address: Any) -> Any:
    """The float32 at an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_at(builder, args[0], FLOAT), align=4)

    return types.float32(address), build


@intrinsic
def _write(typing: Any, address: Any, value: Any) -> Any:
    """Stores a float32 at an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        builder.store(args[1], _at(builder, args[0], FLOAT), align=4)

    return types.void(address, value), build


@intrinsic(prefer_literal=True)
def _block(
    typing: Any, rows: Any, taps: Any, count: Any, weight: Any, row_step: Any, channels: Any, sums: Any
) -> Any:
    """sums[pixel * rows + row] = sum over taps and channels of weight times pixel.

    Args:
        rows: number of output channels, a literal.
        taps, count: address of `count` records: a tap's offset in a row of the weight, and where each
            pixel's channels start under this tap.
        weight, row_step: address of the first row, and bytes to the next one.
        channels: bytes of a pixel.
        sums: address of the result, room for two vectors.
    """
    height = rows.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        _, taps, count, weight, row_step, channels, sums = args
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        totals = [cgutils.alloca_once(builder, VECTOR) for _ in range(PIXELS * height)]
        for total in totals:
            builder.store(zero, total)
        with cgutils.for_range(builder, count, intp=INT64) as tap:
            record = builder.add(taps, builder.mul(tap.index, INT64(8 * (PIXELS + 1))))
            offset, *starts = (
                builder.load(_at(builder, builder.add(record, INT64(8 * i)), INT64))
                for i in range(PIXELS + 1)
            )
            first = builder.add(weight, offset)
            lines = [builder.add(first, builder.mul(row_step, INT64(row))) for row in range(height)]
            left = [builder.inttoptr(line, BYTES) for line in lines]
            right = [builder.inttoptr(start, BYTES) for start in starts]
            with cgutils.for_range_slice(builder, INT64(0), channels, INT64(4 * LANES), INT64) as (at, _):

                def load(start: Any, at: Any = at) -> Any:
                    return builder.load(
                        builder.bitcast(builder.gep(start, [at]), VECTOR.as_pointer()), align=4
                    )

                factors = [load(line) for line in left]
                for pixel, start in enumerate(right):
                    values = load(start)
                    for factor, total in zip(factors, totals[pixel * height :], strict=False):
                        product = builder.fmul(factor, values, flags=FUSED)
                        builder.store(builder.fadd(builder.load(total), product, flags=FUSED), total)
        done = [builder.load(total) for total in totals]
        for group in range(0, len(done), LANES):
            part = done[group : group + LANES]
            result = _lane_sums(builder, part + [zero] * (LANES - len(part)))
            target = _at(builder, builder.add(sums, INT64(4 * group)), VECTOR)
            builder.store(result, target, align=4)

    return types.void(rows, taps, count, weight, row_step, channels, sums), build


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """One vector whose lane i is the sum over the lanes of vectors[i]: halves are added, pair by pair."""
    half = LANES // 2
    while len(vectors) > 1:
        segments = [range(start, start + half) for start in range(0, 2 * LANES, 2 * half)]
        low = [lane for segment in segments for lane in segment]
        orders = low, [lane + half for lane in low]
        vectors = [
            builder.fadd(*(_mixed(builder, first, second, order) for order in orders))
            for first, second in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        half //= 2
    return vectors[0]


def _mixed(builder: Any, first: Any, second: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), LANES), order))


def _rows(height: int) -> Any:
    @numba.njit(nogil=True, error_model="numpy")
    def block(taps, count, weight, row_step, channels, sums):  # type: ignore[no-untyped-def]
        _block(height, taps, count, weight, row_step, channels, sums)

    return block


_block1, _block2, _block3, _block4 = (_rows(height) for height in (1, 2, 3, 4))


@numba.njit(nogil=True, error_model="numpy")
def _sums(height, taps, count, weight, row_step, channels, sums):  # type: ignore[no-untyped-def]
    if height == 1:
        _block1(taps, count, weight, row_step, channels, sums)
    elif height == 2:
        _block2(taps, count, weight, row_step, channels, sums)
    elif height == 3:
        _block3(taps, count, weight, row_step, channels, sums)
    else:
        _block4(taps, count, weight, row_step, channels, sums)


@numba.njit(nogil=True, error_model="numpy")
def _list_taps(taps, places, call, dy, dx):  # type: ignore[no-untyped-def]
    """Writes a record for each tap that meets the image at some pixel; returns their number."""
    x, zeros, height, width, pixel, kh, kw = call[0], call[4], call[6], call[7], call[8], call[14], call[15]
    count = 0
    for u in range(kh):
        for v in range(kw):
            down, right = (u - kh // 2) * dy, (v - kw // 2) * dx
            met = False
            for j in range(PIXELS):
                row, column = places[j, 1] + down, places[j, 2] + right
                inside = 0 <= row < height and 0 <= column < width
                place = x + ((places[j, 0] * height + row) * width + column) * pixel
                taps[count, 1 + j] = place if inside else zeros
                met |= inside
            taps[count, 0] = (u * kw + v) * pixel
            count += met
    return count


@numba.njit(nogil=True, error_model="numpy")
def _convolve(call):  # type: ignore[no-untyped-def]
    """Computes pieces of the output until none is left; several threads run it on one call."""
    _, weight, bias, y, _, batch, _, _, pixel, out_height, out_width, out_channels = call[:12]
    stride_y, stride_x, kh, kw, span, branches = call[12:18]
    total, per_image = batch * out_height * out_width, out_height * out_width
    row_step = kh * kw * pixel
    taps = np.empty((kh * kw, PIXELS + 1), np.int64)
    places = np.empty((PIXELS, 3), np.int64)
    sums = np.empty(2 * LANES, np.float32)
    while True:
        piece, branch = divmod(_take(call.ctypes.data + 8 * 18), branches)
        if piece * span >= total:
            return
        first, channels, dy, dx = call[HEADER + 4 * branch : HEADER + 4 * branch + 4]
        end = min(total, (piece + 1) * span)
        for start in range(piece * span, end, PIXELS):
            for j in range(PIXELS):
                place = min(start + j, end - 1)
                n, inside = divmod(place, per_image)
                row, column = divmod(inside, out_width)
                places[j, 0], places[j, 1], places[j, 2] = n, row * stride_y, column * stride_x
            count = _list_taps(taps, places, call, dy, dx)
            for c in range(first, first + channels, ROWS):
                height = min(ROWS, first + channels - c)
                _sums(
                    height, taps.ctypes.data, count, weight + c * row_step, row_step, pixel, sums.ctypes.data
                )
                for j in range(min(PIXELS, end - start)):
                    out = y + 4 * ((start + j) * out_channels + c)
                    for r in range(height):
                        value = sums[j * height + r]
                        _write(out + 4 * r, value + _read(bias + 4 * (c + r)) if bias else value)


@lru_cache
def kernel() -> Any:
    """The compiled kernel, for OpenMP's threads: `address` is that of a C function of the call's address."""

    def entry(call):  # type: ignore[no-untyped-def]
        _convolve(numba.carray(call, numba.carray(call, HEADER)[HEADER - 1]))

    signature = types.void(types.CPointer(types.int64))
    try:
        return numba.cfunc(signature, cache=True)(entry)
    except RuntimeError:  # no folder to write the cache to
        return numba.cfunc(signature)(entry)
