# SPDX-License-Identifier: Apache-2.0
"""Involution: the checked call and the table of backends.

Dimension letters: N batch, C channels, G groups, H x W input size, Kh x Kw kernel, Ho x Wo output size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from ic_conv.ops import checks
from ic_conv.ops.backends import reference_involution2d
from ic_conv.ops.checks import Pair
from ic_conv.ops.dispatch import BackendTable

Dilation = int | Pair | Sequence[Pair]


@dataclass(frozen=True)
class InvolutionCall:
    """Checked arguments of one involution.

    Args:
        x: (N, C, H, W).
        weight: (N, G, Kh, Kw, Ho, Wo).
        stride: vertical, horizontal.
        padding: zeros on each side, one pair per group.
        dilation: one pair per group.
    """

    x: Tensor
    weight: Tensor
    stride: Pair
    padding: tuple[Pair, ...]
    dilation: tuple[Pair, ...]

    @property
    def kernel(self) -> Pair:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def out_size(self) -> Pair:
        return self.weight.shape[4], self.weight.shape[5]

    def runs(self) -> Iterator[tuple[slice, Pair, Pair]]:
        """Neighbouring groups that share one geometry, as (groups, padding, dilation)."""
        geometry = list(zip(self.padding, self.dilation, strict=True))
        for (padding, dilation), run in groupby(range(len(geometry)), key=geometry.__getitem__):
            groups = list(run)
            yield slice(groups[0], groups[-1] + 1), padding, dilation


INVOLUTION2D: BackendTable[InvolutionCall] = BackendTable("involution2d", (reference_involution2d.BACKEND,))


def checked_call(
    x: Tensor, weight: Tensor, stride: int | Pair, padding: int | Pair | None, dilation: Dilation
) -> InvolutionCall:
    """The call with every option normalised; ValueError names the broken rule and both values."""
    if x.dim() != 4 or weight.dim() != 6:
        raise ValueError(
            "involution2d needs x (N, C, H, W) and weight (N, G, Kh, Kw, Ho, Wo);"
            f" got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    checks.same_device_and_dtype(x=x, weight=weight)
    batch, groups, *kernel = weight.shape[:4]
    if batch != x.shape[0]:
        raise ValueError(f"x and weight must have the same batch size; got {x.shape[0]} and {batch}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"the weight's groups must divide the channels; got {groups} and {x.shape[1]}")
    checked_kernel = checks.odd_kernel((kernel[0], kernel[1]))
    stride = checks.as_pair(stride, "stride")
    dilations = _per_group(dilation, groups)
    if padding is None:
        paddings = tuple(checks.same_padding(checked_kernel, d) for d in dilations)
    else:
        paddings = (checks.as_pair(padding, "padding", minimum=0),) * groups
    call = InvolutionCall(x, weight, stride, paddings, dilations)
    _check_output_size(call)
    return call


def _per_group(dilation: Dilation, groups: int) -> tuple[Pair, ...]:
    if isinstance(dilation, int) or all(isinstance(d, int) for d in dilation):
        return (checks.as_pair(dilation, "dilation"),) * groups  # type: ignore[arg-type]
    pairs = tuple(checks.as_pair(pair, "dilation") for pair in dilation)
    if len(pairs) != groups:
        raise ValueError(
            f"dilation must be one pair, or one pair per group; got {len(pairs)} for {groups} groups"
        )
    return pairs


def _check_output_size(call: InvolutionCall) -> None:
    size = call.x.shape[2], call.x.shape[3]
    for _, padding, dilation in call.runs():
        expected = checks.output_size(size, call.kernel, call.stride, padding, dilation)
        if min(expected) < 1 or expected != call.out_size:
            raise ValueError(
                f"the weight's (Ho, Wo) must be {expected} for an input of {size}, kernel {call.kernel},"
                f" stride {call.stride}, padding {padding}, dilation {dilation}; got {call.out_size}"
            )
