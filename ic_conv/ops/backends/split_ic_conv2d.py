# SPDX-License-Identifier: Apache-2.0
"""Inception convolution as one plain dilated convolution per branch, on any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.ops.checks import same_padding
from ic_conv.ops.dispatch import Backend

if TYPE_CHECKING:
    from ic_conv.ops._ic_conv2d_call import ICConv2dCall


def ic_conv2d(call: ICConv2dCall) -> Tensor:
    """y (N, C_out, Ho, Wo); autograd derives the gradients."""
    counts = [count for _, count in call.branches]
    columns, rows = call.weight.shape[1], call.weight.shape[0] // sum(counts)
    grouped, kernel = call.groups > 1, call.kernel
    # A branch of a grouped convolution reads the input channels of its own groups only.
    inputs = _split(call.x, [n * columns for n in counts], 1) if grouped else [call.x] * len(counts)
    weights = _split(call.weight, [n * rows for n in counts])
    biases = [None] * len(counts) if call.bias is None else _split(call.bias, [n * rows for n in counts])
    parts = [
        F.conv2d(
            x, weight, bias, call.stride, same_padding(kernel, dilation), dilation, count if grouped else 1
        )
        for x, weight, bias, (dilation, count) in zip(inputs, weights, biases, call.branches, strict=True)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return torch.relu(y) if call.relu else y


def _split(tensor: Tensor, sizes: list[int], dim: int = 0) -> Sequence[Tensor]:
    """A single part is the tensor itself: nothing appears in traces and profiles that does nothing."""
    return (tensor,) if len(sizes) == 1 else tensor.split(sizes, dim)


BACKEND: Backend[ICConv2dCall] = Backend("split", lambda call: None, ic_conv2d)
