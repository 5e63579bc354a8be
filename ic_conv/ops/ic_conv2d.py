# SPDX-License-Identifier: Apache-2.0
"""Inception convolution: the checked call and the table of backends.

Dimension letters: N batch, C_in, C_out channels, G groups, H x W input size, Kh x Kw kernel, Ho x Wo output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ic_conv.ops import checks
from ic_conv.ops.backends import split_ic_conv2d
from ic_conv.ops.checks import Pair
from ic_conv.ops.dispatch import BackendTable

Branches = Sequence[tuple[Pair, int]]


@dataclass(frozen=True)
class ICConv2dCall:
    """Checked arguments of one inception convolution.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in / G, Kh, Kw), output channels ordered by branch.
        bias: (C_out,) or None.
        branches: dilation (dy, dx) and number of units; a unit is an output channel, or a group if G > 1.
        stride: vertical, horizontal.
        groups: G.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    branches: Branches
    stride: Pair
    groups: int

    def padding(self, dilation: Pair) -> Pair:
        """Zeros on each side for a branch, so that all branches have one output size."""
        return checks.same_padding((self.weight.shape[2], self.weight.shape[3]), dilation)


IC_CONV2D: BackendTable[ICConv2dCall] = BackendTable("ic_conv2d", (split_ic_conv2d.BACKEND,))


def checked_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Branches, stride: int | Pair, groups: int
) -> ICConv2dCall:
    """The call with every option normalised; ValueError names the broken rule and both values."""
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            "ic_conv2d needs x (N, C_in, H, W) and weight (C_out, C_in / groups, Kh, Kw);"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        # Here once for all backends and branches, as autocast does it for a plain convolution.
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    checks.same_device_and_dtype(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    checks.odd_kernel((weight.shape[2], weight.shape[3]))
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the output channels; got {groups} and {weight.shape[0]}")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x must have {weight.shape[1] * groups} channels for a weight of shape {tuple(weight.shape)}"
            f" and {groups} groups; got {x.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    for dilation, count in branches:
        if min(dilation) < 1 or count < 1:
            raise ValueError(f"dilations and counts must be positive; got {dilation} and {count}")
    units = weight.shape[0] if groups == 1 else groups
    if (total := sum(count for _, count in branches)) != units:
        kind = "output channels" if groups == 1 else "groups"
        raise ValueError(f"the branches' counts must sum to {units} {kind}; got {total}")
    return ICConv2dCall(x, weight, bias, branches, checks.as_pair(stride, "stride"), groups)
