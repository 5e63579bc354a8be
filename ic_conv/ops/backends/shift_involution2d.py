# SPDX-License-Identifier: Apache-2.0
"""Involution as one in-place multiply-add per kernel tap: plain PyTorch, on any device, without copies.

A tap (u, v) adds a shifted part of the input, times that tap's weights, to the part of the output whose
window has this tap inside the input. So padding is never written, and a tap in it adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.ops import _involution2d_call as _call

if TYPE_CHECKING:
    from ic_conv.ops._involution2d_call import Geometry, InvolutionCall

Area = tuple[EllipsisType, slice, slice]


def why_not(call: InvolutionCall | None) -> str | None:
    return None


def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return _gather(x, weight, geometry, geometry.out_size)


def grad_input(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return _gather(grad, weight, geometry, geometry.size, adjoint=True)


def grad_weight(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    g = geometry
    result = x.new_zeros((x.shape[0], g.groups, *g.kernel, *g.out_size))
    grads, source = _wide(grad, g), _wide(x, g)
    for groups, (u, v), out, inside in _taps(g):
        product = grads[:, groups][out] * source[:, groups][inside]
        result[:, groups, u, v][out] = product.sum(2)
    return result


def traced(call: InvolutionCall) -> Tensor:
    """The same without writing in place, for graphs: an exporter knows each step, a compiler fuses them.

    Here the input is padded once. So, unlike elsewhere, a weight of nan or infinity spreads from the padding.
    """
    g = call.geometry
    wide = _call.sum_dtype(call.x.dtype)
    x, weight = call.x.to(wide), call.weight.to(wide)
    parts = []
    for groups, (py, px), (dy, dx) in g.runs():
        source = F.pad(x.unflatten(1, (g.groups, -1))[:, groups], (px, px, py, py))
        rows, columns = (s * (n - 1) + 1 for s, n in zip(g.stride, g.out_size, strict=True))
        sums: Tensor | None = None
        for u in range(g.kernel[0]):
            for v in range(g.kernel[1]):
                down, right = u * dy, v * dx
                shifted = source[..., down : down + rows : g.stride[0], right : right + columns : g.stride[1]]
                product = shifted * weight[:, groups, u, v].unsqueeze(2)
                sums = product if sums is None else sums + product
        assert sums is not None
        parts.append(sums.flatten(1, 2))
    return torch.cat(parts, 1).to(call.x.dtype)


def _gather(
    source: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int], adjoint: bool = False
) -> Tensor:
    target = _zeros(source, size)
    sums, terms = _by_group(target, geometry), _wide(source, geometry)
    for groups, (u, v), out, inside in _taps(geometry):
        write, read = (inside, out) if adjoint else (out, inside)
        tap = weight[:, groups, u, v][out].unsqueeze(2).to(target.dtype)
        sums[:, groups][write].addcmul_(terms[:, groups][read], tap)
    del terms  # of half precision it is a copy, not needed beside the rounded result
    return target.to(source.dtype)


def _taps(geometry: Geometry) -> Iterator[tuple[slice, tuple[int, int], Area, Area]]:
    """Each tap's (groups, (u, v), rows and columns of the output, rows and columns of the input)."""
    g = geometry
    for groups, padding, dilation in g.runs():
        vertical, horizontal = (
            [
                _span(u * dilation[a] - padding[a], g.stride[a], g.size[a], g.out_size[a])
                for u in range(g.kernel[a])
            ]
            for a in (0, 1)
        )
        for u, (out_rows, rows) in enumerate(vertical):
            for v, (out_columns, columns) in enumerate(horizontal):
                yield groups, (u, v), (..., out_rows, out_columns), (..., rows, columns)


def _span(offset: int, stride: int, size: int, out_size: int) -> tuple[slice, slice]:
    """The i below out_size with 0 <= i * stride + offset < size, and these sums; both may be empty."""
    first = max(0, -(offset // stride))
    last = max(first, min(out_size, (size - 1 - offset) // stride + 1))
    start = first * stride + offset
    return slice(first, last), slice(start, start + (last - first) * stride, stride)


def _by_group(x: Tensor, geometry: Geometry) -> Tensor:
    return x.unflatten(1, (geometry.groups, -1))


def _wide(x: Tensor, geometry: Geometry) -> Tensor:
    """x by group; half precision becomes float32, in which sums are taken."""
    return _by_group(x.to(_call.sum_dtype(x.dtype)), geometry)


def _zeros(like: Tensor, size: tuple[int, int]) -> Tensor:
    dtype = _call.sum_dtype(like.dtype)
    shape = (like.shape[0], like.shape[1], *size)
    zeros = torch.empty(shape, dtype=dtype, device=like.device, memory_format=_call.memory_format(like))
    return zeros.zero_()
