# SPDX-License-Identifier: Apache-2.0
"""The checked call of an involution, and the geometry that its backends share.

Dimension letters: N batch, C channels, G groups, H x W input size, Kh x Kw kernel, Ho x Wo output size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from ic_conv.ops import checks
from ic_conv.ops.checks import Pair

Dilation = int | Pair | Sequence[Pair]


@dataclass(frozen=True)
class Geometry:
    """Sizes of one involution.

    Args:
        size: H, W of the input.
        out_size: Ho, Wo.
        kernel: Kh, Kw.
        stride: vertical, horizontal.
        padding: pixels outside the input on each side, one pair per group.
        dilation: one pair per group.
    """

    size: Pair
    out_size: Pair
    kernel: Pair
    stride: Pair
    padding: tuple[Pair, ...]
    dilation: tuple[Pair, ...]

    @property
    def groups(self) -> int:
        return len(self.dilation)

    def runs(self) -> Iterator[tuple[slice, Pair, Pair]]:
        """Neighbouring groups of one padding and dilation, as (groups, padding, dilation)."""
        pairs = list(zip(self.padding, self.dilation, strict=True))
        for (padding, dilation), run in groupby(range(self.groups), key=pairs.__getitem__):
            groups = list(run)
            yield slice(groups[0], groups[-1] + 1), padding, dilation


@dataclass(frozen=True)
class InvolutionCall:
    """Checked arguments of one involution: x (N, C, H, W) and weight (N, G, Kh, Kw, Ho, Wo)."""

    x: Tensor
    weight: Tensor
    geometry: Geometry


class Kernels(Protocol):
    """What a backend computes: y, and the gradients of the sum of y * grad.

    Results have the memory format of the first argument; the weight's gradient is contiguous.
    """

    def why_not(self, call: InvolutionCall | None) -> str | None:
        """None, or why the call (None: any call) cannot run here."""

    def forward(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """y (N, C, Ho, Wo)."""

    def grad_input(self, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """Gradient by x (N, C, H, W) from grad (N, C, Ho, Wo)."""

    def grad_weight(self, grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        """Gradient by weight (N, G, Kh, Kw, Ho, Wo)."""


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout of a 4-dimensional tensor's results: channels last if it is so, contiguous otherwise."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: half precision is too coarse for 49 terms."""
    return dtype if dtype == torch.float64 else torch.float32


def checked_call(
    x: Tensor, weight: Tensor, stride: int | Pair, padding: int | Pair | None, dilation: Dilation
) -> InvolutionCall:
    """The call with every option normalised; ValueError names the broken rule and both values."""
    if x.dim() != 4 or weight.dim() != 6:
        raise ValueError(
            "involution2d needs x (N, C, H, W) and weight (N, G, Kh, Kw, Ho, Wo);"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if (dtype := checks.autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    checks.same_device_and_dtype(x=x, weight=weight)
    batch, groups, *kernel = weight.shape[:4]
    if batch != x.shape[0]:
        raise ValueError(f"x and weight must have the same batch size; got {x.shape[0]} and {batch}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"the weight's groups must divide the channels; got {groups} and {x.shape[1]}")
    kernel_size = checks.odd_kernel((kernel[0], kernel[1]))
    dilations = _per_group(dilation, groups)
    if padding is None:
        paddings = tuple(checks.same_padding(kernel_size, pair) for pair in dilations)
    else:
        paddings = (checks.as_pair(padding, "padding", minimum=0),) * groups
    geometry = Geometry(
        size=(x.shape[2], x.shape[3]),
        out_size=(weight.shape[4], weight.shape[5]),
        kernel=kernel_size,
        stride=checks.as_pair(stride, "stride"),
        padding=paddings,
        dilation=dilations,
    )
    _check_output_size(geometry)
    return InvolutionCall(x, weight, geometry)


def _per_group(dilation: Dilation, groups: int) -> tuple[Pair, ...]:
    if isinstance(dilation, int) or all(isinstance(d, int) for d in dilation):
        return (checks.as_pair(dilation, "dilation"),) * groups  # type: ignore[arg-type]
    pairs = tuple(checks.as_pair(pair, "dilation") for pair in dilation)
    if len(pairs) != groups:
        raise ValueError(
            f"dilation must be one pair, or one pair for each of {groups} groups; got {len(pairs)} pairs"
        )
    return pairs


def _check_output_size(geometry: Geometry) -> None:
    g = geometry
    for _, padding, dilation in g.runs():
        expected = checks.output_size(g.size, g.kernel, g.stride, padding, dilation)
        if min(expected) < 1 or expected != g.out_size:
            raise ValueError(
                f"the weight's (Ho, Wo) must be {expected} for an input of {g.size}, kernel {g.kernel},"
                f" stride {g.stride}, padding {padding}, dilation {dilation}; got {g.out_size}"
            )
