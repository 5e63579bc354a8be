# SPDX-License-Identifier: Apache-2.0
"""C-volution as a layer: an involution whose channels are gated by the global context."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ic_conv.layers.involution2d import Involution2d
from ic_conv.ops.checks import Pair


class CVolution2d(nn.Module):
    """C-volution (PRCV 2023): a spatial branch, different at each position, times a channel branch.

    The spatial branch is an involution with a large window. The channel branch is a squeeze-and-excitation
    gate (Hu et al., CVPR 2018): the mean of each channel, two 1x1 convs, a sigmoid. The authors published no
    code; this choice of channel branch reproduces the published size of CedNet-50.

    N batch, C channels, H x W input and Ho x Wo output size.

    Args:
        channels: C, of input and output.
        kernel_size: odd size of the involution's window.
        stride: an int or (vertical, horizontal).
        channel_reduction: channel reduction inside the gate; None leaves the channel branch out.
        device, dtype: of the parameters.
        spatial: further options of the spatial branch, those of Involution2d.

    Shape:
        input (N, C, H, W), output (N, C, Ho, Wo) with Ho = ceil(H / stride).

    Raises:
        ValueError: an option breaks a rule; the message says the rule and both values.

    Example:
        >>> layer = CVolution2d(64, stride=2, group_channels=16)
        >>> layer(torch.rand(1, 64, 15, 15)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair = 9,
        stride: int | Pair = 1,
        *,
        channel_reduction: int | None = 16,
        device: Any = None,
        dtype: Any = None,
        **spatial: Any,
    ) -> None:
        super().__init__()
        if channel_reduction is not None and not 1 <= channel_reduction <= channels:
            raise ValueError(
                f"channel_reduction must be between 1 and channels, {channels}; got {channel_reduction}"
            )
        factory = {"device": device, "dtype": dtype}
        self.spatial = Involution2d(channels, kernel_size, stride, **spatial, **factory)
        self.channel: nn.Sequential | None = None
        if channel_reduction is not None:
            hidden = channels // channel_reduction
            self.channel = nn.Sequential(
                OrderedDict(
                    pool=nn.AdaptiveAvgPool2d(1),
                    reduce=nn.Conv2d(channels, hidden, 1, **factory),
                    relu=nn.ReLU(inplace=True),
                    expand=nn.Conv2d(hidden, channels, 1, **factory),
                    gate=nn.Sigmoid(),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.spatial(x)
        return out if self.channel is None else out * self.channel(x)
