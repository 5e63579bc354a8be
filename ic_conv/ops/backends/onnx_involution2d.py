# SPDX-License-Identifier: Apache-2.0
"""Involution as one gather and one matrix product: the form that ONNX files get.

It takes a dozen operations where a loop over taps takes some for each tap. In return the gathered windows are
K*K times as large as the input; `backend="shift"` exports the loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.ops._involution2d_call import sum_dtype

if TYPE_CHECKING:
    from ic_conv.ops._involution2d_call import InvolutionCall


def gathered(call: InvolutionCall) -> Tensor:
    """y (N, C, Ho, Wo). As in all graphs a weight of nan or infinity spreads from the padding."""
    g = call.geometry
    wide = sum_dtype(call.x.dtype)
    x = call.x.to(wide).unflatten(1, (g.groups, -1))
    taps = call.weight.to(wide).flatten(4).flatten(2, 3).transpose(2, 3).unsqueeze(3)  # (N, G, Ho*Wo, 1, K*K)
    parts = []
    for groups, (py, px), (dy, dx) in g.runs():
        # All channels of a pixel are neighbours here, so a gather copies them as one piece.
        pixels = F.pad(x[:, groups], (px, px, py, py)).flatten(3).transpose(2, 3)
        width = g.size[1] + 2 * px
        corners = _pixels(g.out_size, g.stride, width, x.device)
        window = _pixels(g.kernel, (dy, dx), width, x.device)
        read = (corners.unsqueeze(1) + window).flatten()
        windows = pixels.index_select(2, read).unflatten(2, (-1, g.kernel[0] * g.kernel[1]))
        sums = (taps[:, groups] @ windows).squeeze(3)
        parts.append(sums.transpose(2, 3).flatten(1, 2).unflatten(2, g.out_size))
    return torch.cat(parts, 1).to(call.x.dtype)


def _pixels(count: tuple[int, int], step: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Numbers of the pixels at the points of a grid, in an image whose rows have `width` pixels."""
    rows, columns = (torch.arange(n, device=device) * s for n, s in zip(count, step, strict=True))
    return (rows.unsqueeze(1) * width + columns).flatten()
