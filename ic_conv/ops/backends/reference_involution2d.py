# SPDX-License-Identifier: Apache-2.0
"""Involution by unfolding, as first published: K*K times the input's memory, on any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.ops.dispatch import Backend

if TYPE_CHECKING:
    from ic_conv.ops.involution2d import InvolutionCall


def involution2d(call: InvolutionCall) -> Tensor:
    """y (N, C, Ho, Wo); autograd derives both gradients. Half precision is summed in float32."""
    x, weight = call.x, call.weight
    wide = torch.promote_types(x.dtype, torch.float32)
    per_group = x.unflatten(1, (weight.shape[1], -1)).to(wide)
    parts = []
    for groups, padding, dilation in call.runs():
        windows = _unfold(per_group[:, groups].flatten(1, 2), call, padding, dilation)
        inside = _unfold(x.new_ones((1, 1, *x.shape[2:]), dtype=wide), call, padding, dilation) > 0
        kernels = weight[:, groups].to(wide)
        windows = windows.unflatten(1, (kernels.shape[1], -1))
        # A tap in the padding adds nothing, whatever its weight: 0 * nan would be nan.
        parts.append(torch.where(inside, windows * kernels.unsqueeze(2), 0).sum((3, 4)).flatten(1, 2))
    return torch.cat(parts, 1).to(x.dtype)


def _unfold(x: Tensor, call: InvolutionCall, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Windows (N, C, Kh, Kw, Ho, Wo) of x (N, C, H, W)."""
    windows = F.unfold(x, call.kernel, dilation, padding, call.stride)
    return windows.view(x.shape[0], x.shape[1], *call.kernel, *call.out_size)


BACKEND: Backend[InvolutionCall] = Backend("reference", lambda call: None, involution2d)
