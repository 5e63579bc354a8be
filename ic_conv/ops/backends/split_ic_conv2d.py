# SPDX-License-Identifier: Apache-2.0
"""Inception convolution as one plain dilated convolution per branch, on any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.ops.dispatch import Backend

if TYPE_CHECKING:
    from ic_conv.ops.ic_conv2d import ICConv2dCall


def ic_conv2d(call: ICConv2dCall) -> Tensor:
    """y (N, C_out, Ho, Wo); autograd derives the gradients."""
    counts = [count for _, count in call.branches]
    if len(counts) == 1:
        dilation = call.branches[0][0]
        padding = call.padding(dilation)
        return F.conv2d(call.x, call.weight, call.bias, call.stride, padding, dilation, call.groups)

    columns, rows = call.weight.shape[1], call.weight.shape[0] // sum(counts)
    grouped = call.groups > 1
    # A branch of a grouped convolution reads the input channels of its own groups only.
    inputs = call.x.split([n * columns for n in counts], 1) if grouped else [call.x] * len(counts)
    weights = call.weight.split([n * rows for n in counts])
    biases = [None] * len(counts) if call.bias is None else call.bias.split([n * rows for n in counts])
    parts = [
        F.conv2d(x, weight, bias, call.stride, call.padding(dilation), dilation, count if grouped else 1)
        for x, weight, bias, (dilation, count) in zip(inputs, weights, biases, call.branches, strict=True)
    ]
    return torch.cat(parts, 1)


BACKEND: Backend[ICConv2dCall] = Backend("split", lambda call: None, ic_conv2d)
