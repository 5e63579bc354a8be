# SPDX-License-Identifier: Apache-2.0
"""Checks that the operators share: each returns the normalised value, or raises one ValueError."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[int, int]


def as_pair(value: int | Sequence[int], name: str, minimum: int = 1) -> Pair:
    """`value` as (vertical, horizontal); an int stands for both."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= minimum for v in pair):
        raise ValueError(f"{name} must be an int or a pair of ints, at least {minimum}; got {value!r}")
    return pair


def odd_kernel(kernel: Pair) -> Pair:
    """The kernel size itself; 'same' padding is exact for odd sizes only."""
    if any(k < 1 or k % 2 == 0 for k in kernel):
        raise ValueError(f"kernel sizes must be odd; got {tuple(kernel)}")
    return kernel


def same_padding(kernel: Pair, dilation: Pair) -> Pair:
    """Padding that keeps the size at stride 1, and gives ceil(size / stride) otherwise."""
    return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """(Ho, Wo) of a window that slides over an input of (H, W); torch.nn.Conv2d's formula."""
    rows, columns = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return rows, columns


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to where x lies, as it would for a plain convolution; None if it casts nothing."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def same_device_and_dtype(**tensors: Tensor) -> None:
    """All tensors must lie on one device and have one floating-point dtype."""
    for attribute in ("device", "dtype"):
        values = {name: getattr(tensor, attribute) for name, tensor in tensors.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            raise ValueError(f"all tensors must have the same {attribute}; got {listed}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
