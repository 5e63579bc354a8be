# SPDX-License-Identifier: Apache-2.0
"""The operators as functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

from torch import Tensor

from ic_conv.ops import ic_conv2d as _ic_conv2d
from ic_conv.ops import involution2d as _involution2d
from ic_conv.ops.checks import Pair

__all__ = ["ic_conv2d", "involution2d"]


def ic_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: _ic_conv2d.Branches,
    stride: int | Pair = 1,
    groups: int = 1,
    backend: str | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolve with a dilation of its own for each output channel (inception convolution, CVPR 2021).

    N batch, C_in and C_out channels, G groups, H x W input size, Kh x Kw kernel, Ho x Wo output size. Output
    channel c of a branch with dilation (dy, dx) is that of a plain convolution with this dilation and a
    zero padding of (dy * (Kh - 1) / 2, dx * (Kw - 1) / 2).

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in / G, Kh, Kw) with odd Kh and Kw; output channels stand branch by branch.
        bias: (C_out,), or None.
        branches: pairs of dilation (dy, dx) and count, in the order of the output channels. Counts are
            output channels and sum to C_out; with G > 1 they are groups and sum to G.
        stride: step in pixels, one int or (vertical, horizontal).
        groups: G, as in `torch.nn.functional.conv2d`.
        backend: a name of the operator's table, None for the first that can run the call.
        relu: set negative results to 0 in the same pass (for inference).

    Returns:
        (N, C_out, Ho, Wo) with Ho = ceil(H / stride); of the dtype of x, or of autocast.

    Raises:
        ValueError: sizes, dtypes or devices that disagree, an even kernel, an unknown backend.
        BackendUnavailableError: the wanted backend cannot run the call.

    Example:
        >>> x, weight = torch.randn(2, 16, 15, 15), torch.randn(8, 16, 3, 3)
        >>> ic_conv2d(x, weight, None, [((1, 1), 6), ((1, 4), 2)], stride=2).shape
        torch.Size([2, 8, 8, 8])
    """
    call = _ic_conv2d.checked_call(x, weight, bias, branches, stride, groups, relu)
    return _ic_conv2d.ic_conv2d(call, backend)


def involution2d(
    x: Tensor,
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: _involution2d.Dilation = 1,
    backend: str | None = None,
) -> Tensor:
    """Slide one kernel per output position and group over the input (Involution, CVPR 2021, equation 4).

    N batch, C channels, G groups, H x W input size, Kh x Kw kernel, Ho x Wo output size::

        y[n, c, i, j] = sum over u, v of
            weight[n, c // (C / G), u, v, i, j] * x[n, c, i * stride + u * dy - py, j * stride + v * dx - px]

    Taps outside the input add nothing. Half precision is summed in float32.

    Args:
        x: (N, C, H, W).
        weight: (N, G, Kh, Kw, Ho, Wo) with odd Kh and Kw, of the dtype and on the device of x.
        stride: step in pixels, one int or (vertical, horizontal).
        padding: pixels on each side; None pads each group by dilation * (K - 1) / 2, which gives an output
            of ceil(H / stride) x ceil(W / stride).
        dilation: one int, one pair (dy, dx), or a pair for each group.
        backend: a name of the operator's table, None for the first that can run the call. In an ONNX file,
            "shift" is a loop over taps, which takes little memory; any other is a gather and a product.

    Returns:
        (N, C, Ho, Wo) of the dtype of x.

    Raises:
        ValueError: sizes, dtypes or devices that disagree, an even kernel, an unknown backend.
        BackendUnavailableError: the wanted backend cannot run the call.

    Example:
        >>> x, weight = torch.randn(2, 32, 15, 15), torch.randn(2, 2, 7, 7, 8, 8)
        >>> involution2d(x, weight, stride=2).shape
        torch.Size([2, 32, 8, 8])
    """
    call = _involution2d.checked_call(x, weight, stride, padding, dilation)
    return _involution2d.involution2d(call, backend)
