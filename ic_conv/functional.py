# SPDX-License-Identifier: Apache-2.0
"""The operators as functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

from torch import Tensor

from ic_conv.ops import involution2d as _involution2d
from ic_conv.ops.checks import Pair

__all__ = ["involution2d"]


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
        backend: a name of the operator's table, None for the first that can run the call.

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
    return _involution2d.INVOLUTION2D.choose(call, backend).run(call)
