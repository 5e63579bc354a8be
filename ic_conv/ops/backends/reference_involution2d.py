# SPDX-License-Identifier: Apache-2.0
"""Involution by unfolding, as first published: K*K times the input's memory, on any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.ops._involution2d_call import sum_dtype
from ic_conv.ops.dispatch import Backend

if TYPE_CHECKING:
    from ic_conv.ops._involution2d_call import Geometry, InvolutionCall
    from ic_conv.ops.checks import Pair


def involution2d(call: InvolutionCall) -> Tensor:
    """y (N, C, Ho, Wo); autograd derives the gradients. Half precision is summed in float32."""
    x, weight, geometry = call.x, call.weight, call.geometry
    wide = sum_dtype(x.dtype)
    per_group = x.unflatten(1, (geometry.groups, -1)).to(wide)
    parts = []
    for groups, padding, dilation in geometry.runs():
        kernels = weight[:, groups].to(wide)
        windows = _unfold(per_group[:, groups].flatten(1, 2), geometry, padding, dilation)
        windows = windows.unflatten(1, (kernels.shape[1], -1))
        inside = _unfold(x.new_ones((1, 1, *geometry.size), dtype=wide), geometry, padding, dilation) > 0
        # A tap in the padding adds nothing, whatever its weight: 0 * nan would be nan.
        kernels = torch.where(inside, kernels.unsqueeze(2), 0)
        parts.append((windows * kernels).sum((3, 4)).flatten(1, 2))
    return torch.cat(parts, 1).to(x.dtype)


def _unfold(x: Tensor, geometry: Geometry, padding: Pair, dilation: Pair) -> Tensor:
    """Windows (N, C, Kh, Kw, Ho, Wo) of x (N, C, H, W)."""
    windows = F.unfold(x, geometry.kernel, dilation, padding, geometry.stride)
    return windows.view(x.shape[0], x.shape[1], *geometry.kernel, *geometry.out_size)


BACKEND: Backend[InvolutionCall] = Backend("reference", lambda call: None, involution2d)
