# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the inception convolution. Imports Triton, so import this file only to run them.

Each is one launch for all branches: an implicit matrix product in which a table tells a tile of output
channels its branch. A row of `tiles` is (first channel, number of channels, dy, dx), all of one branch.
Tensors are channels-last: x (N, H, W, C), y and grad (N, Ho, Wo, Co), weight (Co, Kh, Kw, C). Sums are taken
in float32.
"""

# Triton's language has no types that a checker knows.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _positions(pixels, height, width):
    """(image, row, column) of pixels counted through all images."""
    rest = pixels % (height * width)
    return pixels // (height * width), rest // width, rest % width


@triton.jit
def _product(left, right, sums, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """sums + left @ right; WIDEN is for Triton's interpreter, which cannot multiply bfloat16."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def forward(
    x, weight, bias, y, tiles, total, H, W, C: tl.constexpr, Ho, Wo, Co, stride_y, stride_x,
    KH: tl.constexpr, KW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y: M output pixels by N output channels, summed over taps and K input channels at a time."""
    tile = tiles + 4 * tl.program_id(1)
    first, count, dy, dx = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    pixels = tl.program_id(0) * M + tl.arange(0, M)
    image, row, column = _positions(pixels, Ho, Wo)
    real = pixels < total
    outputs = first + tl.arange(0, N)
    wanted = tl.arange(0, N) < count
    inputs = tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    for tap in range(KH * KW):
        i = row * stride_y + (tap // KW - KH // 2) * dy
        j = column * stride_x + (tap % KW - KW // 2) * dx
        inside = real & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        source = ((image.to(tl.int64) * H + i) * W + j) * C
        line = (outputs.to(tl.int64) * (KH * KW) + tap) * C
        for start in range(0, C, K):
            channels = start + inputs
            left = tl.load(
                x + source[:, None] + channels[None, :],
                mask=inside[:, None] & (channels < C)[None, :],
                other=0,
            )
            right = tl.load(
                weight + line[None, :] + channels[:, None],
                mask=wanted[None, :] & (channels < C)[:, None],
                other=0,
            )
            sums = _product(left, right, sums, PRECISION, WIDEN)
    if BIAS:
        sums += tl.load(bias + outputs, mask=wanted, other=0).to(tl.float32)[None, :]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)  # keeps NaN, as torch.relu does
    target = y + pixels.to(tl.int64)[:, None] * Co + outputs[None, :]
    tl.store(target, sums.to(y.dtype.element_ty), mask=real[:, None] & wanted[None, :])


@triton.jit
def grad_input(
    grad, weight, grad_x, tiles, total, H, W, C: tl.constexpr, Ho, Wo, Co, stride_y, stride_x,
    KH: tl.constexpr, KW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad_x: M input pixels by N input channels, summed over all TILES of K output channels and taps."""
    pixels = tl.program_id(0) * M + tl.arange(0, M)
    image, row, column = _positions(pixels, H, W)
    real = pixels < total
    inputs = tl.program_id(1) * N + tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    for index in range(TILES):
        tile = tiles + 4 * index
        first, count, dy, dx = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        outputs = first + tl.arange(0, K)
        wanted = tl.arange(0, K) < count
        for tap in range(KH * KW):
            # The output whose window has this input under this tap, if the stride hits it.
            i = row - (tap // KW - KH // 2) * dy
            j = column - (tap % KW - KW // 2) * dx
            inside = real & (i >= 0) & (i % stride_y == 0) & (j >= 0) & (j % stride_x == 0)
            i, j = i // stride_y, j // stride_x
            inside &= (i < Ho) & (j < Wo)
            source = ((image.to(tl.int64) * Ho + i) * Wo + j) * Co
            line = (outputs.to(tl.int64) * (KH * KW) + tap) * C
            left = tl.load(
                grad + source[:, None] + outputs[None, :], mask=inside[:, None] & wanted[None, :], other=0
            )
            right = tl.load(
                weight + line[:, None] + inputs[None, :],
                mask=wanted[:, None] & (inputs < C)[None, :],
                other=0,
            )
            sums = _product(left, right, sums, PRECISION, WIDEN)
    target = grad_x + pixels.to(tl.int64)[:, None] * C + inputs[None, :]
    tl.store(target, sums.to(grad_x.dtype.element_ty), mask=real[:, None] & (inputs < C)[None, :])


@triton.jit
def grad_weight(
    grad, x, grad_w, tiles, total, H, W, C: tl.constexpr, Ho, Wo, Co, stride_y, stride_x,
    KH: tl.constexpr, KW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    STEPS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad_w: M output channels by N input channels of one tap, for one of several shares of the pixels.

    A share is STEPS times K output pixels; grad_w (shares, Co, Kh, Kw, C) is to be summed over them.
    """
    tile = tiles + 4 * tl.program_id(0)
    first, count, dy, dx = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    tap, share = tl.program_id(2) % (KH * KW), tl.program_id(2) // (KH * KW)
    outputs = first + tl.arange(0, M)
    wanted = tl.arange(0, M) < count
    inputs = tl.program_id(1) * N + tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    for step in range(STEPS):
        pixels = (share * STEPS + step) * K + tl.arange(0, K)
        image, row, column = _positions(pixels, Ho, Wo)
        i = row * stride_y + (tap // KW - KH // 2) * dy
        j = column * stride_x + (tap % KW - KW // 2) * dx
        real = pixels < total
        inside = real & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        source = ((image.to(tl.int64) * H + i) * W + j) * C
        left = tl.load(
            grad + pixels.to(tl.int64)[None, :] * Co + outputs[:, None],
            mask=real[None, :] & wanted[:, None],
            other=0,
        )
        right = tl.load(
            x + source[:, None] + inputs[None, :], mask=inside[:, None] & (inputs < C)[None, :], other=0
        )
        sums = _product(left, right, sums, PRECISION, WIDEN)
    line = (share.to(tl.int64) * Co + outputs) * (KH * KW) + tap
    target = grad_w + line[:, None] * C + inputs[None, :]
    tl.store(target, sums.to(grad_w.dtype.element_ty), mask=wanted[:, None] & (inputs < C)[None, :])
