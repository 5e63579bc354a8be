# SPDX-License-Identifier: Apache-2.0
"""The checked call of an inception convolution.

Dimension letters: N batch, C_in, C_out channels, G groups, H x W input size, Kh x Kw kernel, Ho x Wo output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ic_conv.ops import checks
from ic_conv.ops.checks import Pair

Branches = Sequence[tuple[Pair, int]]


class ICConv2dCall(NamedTuple):
    """Checked arguments of one inception convolution.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in / G, Kh, Kw), output channels ordered by branch.
        bias: (C_out,) or None.
        branches: dilation (dy, dx) and number of units; a unit is an output channel, or a group if G > 1.
        stride: vertical, horizontal.
        groups: G.
        relu: whether negative results become 0.
        packs: None, or where a backend keeps the weights in an order of its own, since they do not change.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    branches: Branches
    stride: Pair
    groups: int
    relu: bool = False
    packs: dict[Any, Any] | None = None

    @property
    def kernel(self) -> Pair:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(N, C_out, Ho, Wo)."""
        rows, columns = (-(-size // step) for size, step in zip(self.x.shape[2:], self.stride, strict=True))
        return self.x.shape[0], self.weight.shape[0], rows, columns

    @property
    def needs_grad(self) -> bool:
        tensors = (self.x, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def padding(self, dilation: Pair) -> Pair:
        """Zeros on each side for a branch, so that all branches have one output size."""
        return checks.same_padding(self.kernel, dilation)


def checked_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Branches,
    stride: int | Pair,
    groups: int,
    relu: bool = False,
    packs: dict[Any, Any] | None = None,
) -> ICConv2dCall:
    """The call with every option normalised; ValueError names the broken rule and both values."""
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            "ic_conv2d needs x (N, C_in, H, W) and weight (C_out, C_in / groups, Kh, Kw);"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if (dtype := checks.autocast_dtype(x)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not _alike(x, weight) or (bias is not None and not _alike(x, bias)) or not x.is_floating_point():
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
    # Symbols of compilers and tracers must not get into a cache.
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    check = _check_branches if watched else _check_branches_once
    check(branches if isinstance(branches, tuple) else tuple(branches), weight.shape[0], groups)
    stride = checks.as_pair(stride, "stride")
    return ICConv2dCall(x, weight, bias, tuple(branches), stride, groups, relu, packs)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _check_branches(branches: Branches, channels: int, groups: int) -> None:
    for dilation, count in branches:
        if min(dilation) < 1 or count < 1:
            raise ValueError(f"dilations and counts must be positive; got {dilation} and {count}")
    units = channels if groups == 1 else groups
    if (total := sum(count for _, count in branches)) != units:
        kind = "output channels" if groups == 1 else "groups"
        raise ValueError(f"the branches' counts must sum to {units} {kind}; got {total}")


_check_branches_once = lru_cache(maxsize=1024)(_check_branches)
