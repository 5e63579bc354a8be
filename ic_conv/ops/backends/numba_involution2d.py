# SPDX-License-Identifier: Apache-2.0
"""Involution in fused float32 loops on a CPU, through Numba (optional extra `cpu`).

The first call of a process compiles for some seconds; later processes read the result from Numba's cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ic_conv.ops import _involution2d_call as _call

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ic_conv.ops._involution2d_call import Geometry, InvolutionCall

WIDTHS = (16, 8, 4)


class Axis(NamedTuple):
    """Which taps a target position has along one axis, for all groups.

    Args:
        positions: (G, positions, 4): number of taps inside the source, the first of them, the source position
            under it, and the position in the weight under it.
        steps: (G, 3): how tap, source position and weight position change from one such tap to the next.
    """

    positions: NDArray[np.int64]
    steps: NDArray[np.int64]


def why_not(call: InvolutionCall | None) -> str | None:
    if (reason := _numba_missing()) is not None or call is None:
        return reason
    if call.x.device.type != "cpu":
        return f"needs CPU tensors, got {call.x.device}"
    if call.x.dtype != torch.float32:
        return f"needs float32, got {call.x.dtype}"
    channels = call.x.shape[1] // call.geometry.groups
    if channels % WIDTHS[-1]:
        return f"needs channels per group in multiples of {WIDTHS[-1]}, got {channels}"
    return None


def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    y = _empty(x, geometry.out_size)
    gather, _ = _kernels(x, geometry)
    _run(gather, (x, weight, y), _windows(geometry), geometry.out_size[0])
    return y


def grad_input(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    grad_x = _empty(grad, geometry.size)
    gather, _ = _kernels(grad, geometry)
    _run(gather, (grad, weight, grad_x), _windows_of_input(geometry), geometry.size[0])
    return grad_x


def grad_weight(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    g = geometry
    result = x.new_empty((x.shape[0], g.groups, *g.kernel, *g.out_size))
    _, kernel = _kernels(x, g)
    _run(kernel, (x, grad, result), _windows(g), g.out_size[0])
    return result


@lru_cache
def _numba_missing() -> str | None:
    try:
        import numba  # noqa: F401
    except Exception as error:  # a Numba that does not fit NumPy fails in many ways
        return f"Numba cannot be imported ({error}); pip install 'ic-conv[cpu]'"
    return None


def _kernels(x: Tensor, geometry: Geometry) -> tuple[Callable[..., None], Callable[..., None]]:
    from ic_conv.ops.backends import _numba_involution2d

    channels = x.shape[1] // geometry.groups
    return _numba_involution2d.kernels(next(width for width in WIDTHS if channels % width == 0))


def _empty(like: Tensor, size: tuple[int, int]) -> Tensor:
    shape = (like.shape[0], like.shape[1], *size)
    return torch.empty(shape, dtype=like.dtype, memory_format=_call.memory_format(like))


def _run(
    kernel: Callable[..., None], tensors: tuple[Tensor, Tensor, Tensor], axes: tuple[Axis, Axis], height: int
) -> None:
    """Spreads the kernel's lines over as many threads as PyTorch uses."""
    arrays = [tensor.detach().numpy() for tensor in tensors]
    lines = tensors[0].shape[0] * len(axes[0].steps) * height
    threads = max(1, min(torch.get_num_threads(), lines))
    shares = list(pairwise(lines * t // threads for t in range(threads + 1)))
    pool = _pool(os.getpid(), threads)
    waiting = [pool.submit(kernel, *arrays, *axes[0], *axes[1], *share) for share in shares[1:]]
    kernel(*arrays, *axes[0], *axes[1], *shares[0])
    for future in waiting:
        future.result()


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Idle helpers of this process; a forked child gets its own, because threads do not survive a fork.

    Numba's own thread pools are no choice: one aborts when two threads call it, one when it forks.
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="involution2d")


@lru_cache(maxsize=256)
def _windows(geometry: Geometry) -> tuple[Axis, Axis]:
    """For each output position the taps inside the input."""
    g = geometry

    def axis(a: int) -> Axis:
        positions, steps = [], []
        for padding, dilation in zip(g.padding, g.dilation, strict=True):
            position, tap = np.ogrid[: g.out_size[a], : g.kernel[a]]
            source = position * g.stride[a] + tap * dilation[a] - padding[a]
            inside = (source >= 0) & (source < g.size[a])
            positions.append(_first_taps(inside, source, np.broadcast_to(position, source.shape)))
            steps.append((1, dilation[a], 0))
        return Axis(np.stack(positions), np.array(steps, np.int64))

    return axis(0), axis(1)


@lru_cache(maxsize=256)
def _windows_of_input(geometry: Geometry) -> tuple[Axis, Axis]:
    """For each input position the taps through which outputs read it: the source is the output's gradient."""
    g = geometry

    def axis(a: int) -> Axis:
        positions, steps = [], []
        for padding, dilation in zip(g.padding, g.dilation, strict=True):
            position, tap = np.ogrid[: g.size[a], : g.kernel[a]]
            source, rest = np.divmod(position + padding[a] - tap * dilation[a], g.stride[a])
            inside = (rest == 0) & (source >= 0) & (source < g.out_size[a])
            positions.append(_first_taps(inside, source, source))
            common = math.gcd(g.stride[a], dilation[a])
            steps.append((g.stride[a] // common, -dilation[a] // common, -dilation[a] // common))
        return Axis(np.stack(positions), np.array(steps, np.int64))

    return axis(0), axis(1)


def _first_taps(
    inside: NDArray[np.bool_], source: NDArray[np.int64], position: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(positions, 4) of `Axis` from (positions, taps)."""
    first = inside.argmax(1)
    each = np.arange(len(first))
    columns = (inside.sum(1), first, source[each, first], position[each, first])
    return np.stack(columns, 1).astype(np.int64)
