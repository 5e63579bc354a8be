# SPDX-License-Identifier: Apache-2.0
"""Involution as a layer: one generated kernel per position, shared by the channels of a group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ic_conv import functional
from ic_conv.ops.checks import Pair, as_pair, odd_kernel
from ic_conv.ops.involution2d import INVOLUTION2D
from ic_conv.pattern import PLAIN, Dilation, LayerPattern

KERNEL_GENERATIONS = ("bottleneck", "linear")


class Involution2d(nn.Module):
    """Involution (Li et al., "Involution: Inverting the Inherence of Convolution", CVPR 2021, eqs. 4 to 6).

    A small network generates a kernel for each output position and group from the input at that position;
    the kernel weighs the window around it. All channels of a group share the kernel. Groups may differ in
    dilation. The input is padded so that the output has ceil(size / stride) rows and columns.

    N batch, C channels, G = C / group_channels groups, Kh x Kw kernel, H x W input and Ho x Wo output size.

    Args:
        channels: C, of input and output.
        kernel_size: odd size of the window, an int or (Kh, Kw).
        stride: an int or (vertical, horizontal); above 1 the kernels come from the average-pooled input.
        group_channels: channels that share a kernel; `channels` means one kernel for all.
        reduction: channel reduction inside the 'bottleneck' kernel generation.
        kernel_generation: 'bottleneck' (1x1 conv to C / reduction, BN, ReLU, 1x1 conv) or 'linear' (one
            1x1 conv).
        dilation: of every group, an int or (dy, dx).
        pattern: instead of `dilation`, the number of groups per dilation: ``{(1, 1): 3, (1, 2): 1}`` or a
            LayerPattern. Groups take the dilations of its assignment if it has one, else in branch order;
            channels are never reordered.
        backend: name of an implementation; None takes the fastest that can run.
        device, dtype: of the parameters.

    Shape:
        input (N, C, H, W), output (N, C, Ho, Wo) with Ho = ceil(H / stride).

    Attributes:
        dilations: (dy, dx) of each group.
        group_dilations: the same as a tensor (G, 2), or None if all are (1, 1); makes a checkpoint tell its
            pattern. A state dict of another pattern is refused; one without this key, such as a plain or a
            published one, loads under any.
        conv1: the reducing half of the kernel generation (`conv1.conv`, `conv1.bn`); absent from 'linear'.
        conv2: the half that makes the kernels; the Kh * Kw values of group 0 come first in `conv2.conv`'s
            output, then those of group 1. Names and layout are the published checkpoints'.

    Raises:
        ValueError: an option breaks a rule; the message says the rule and both values.

    Example:
        >>> layer = Involution2d(64, kernel_size=7, stride=2)
        >>> layer(torch.rand(1, 64, 15, 15)).shape
        torch.Size([1, 64, 8, 8])
    """

    group_dilations: Tensor | None

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair = 7,
        stride: int | Pair = 1,
        group_channels: int = 16,
        reduction: int = 4,
        kernel_generation: str = "bottleneck",
        dilation: int | Pair = 1,
        pattern: LayerPattern | Mapping[Dilation, int] | None = None,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 1 <= group_channels <= channels or channels % group_channels:
            raise ValueError(f"group_channels must divide channels; got {group_channels} and {channels}")
        if kernel_generation not in KERNEL_GENERATIONS:
            known = ", ".join(KERNEL_GENERATIONS)
            raise ValueError(f"kernel_generation must be one of {known}; got {kernel_generation!r}")
        if kernel_generation == "bottleneck" and not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and channels, {channels}; got {reduction}")
        if pattern is not None and as_pair(dilation, "dilation") != (1, 1):
            raise ValueError(f"dilation and pattern exclude each other; got {dilation!r} and {pattern!r}")
        self.channels = channels
        self.kernel_size = odd_kernel(as_pair(kernel_size, "kernel_size"))
        self.stride = as_pair(stride, "stride")
        self.group_channels = group_channels
        self.groups = channels // group_channels
        self.reduction = reduction
        self.kernel_generation = kernel_generation
        self.backend = INVOLUTION2D.check_name(backend)

        factory = {"device": device, "dtype": dtype}
        # Ceil mode gives odd sizes the ceil(H / stride) of the padded window; even sizes are not affected.
        self.pool = nn.Identity() if self.stride == (1, 1) else nn.AvgPool2d(self.stride, ceil_mode=True)
        hidden = channels
        self.conv1: nn.Module = nn.Identity()
        if kernel_generation == "bottleneck":
            hidden = channels // reduction
            self.conv1 = conv_bn_relu(channels, hidden, 1, **factory)
        taps = self.groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(hidden, taps, 1, **factory)))
        self.reset_parameters()
        self.register_buffer("group_dilations", None)
        self.set_pattern(pattern if pattern is not None else {as_pair(dilation, "dilation"): self.groups})

    def set_pattern(self, pattern: LayerPattern | Mapping[Dilation, int]) -> None:
        """Gives each group its dilation; the parameters stay as they are.

        Raises:
            ValueError: the counts do not sum to the number of groups.
        """
        layer = pattern if isinstance(pattern, LayerPattern) else LayerPattern.from_counts(pattern)
        if layer.units != self.groups:
            where = f"{layer.name}: " if layer.name else ""
            raise ValueError(
                f"{where}counts must sum to {self.groups} groups of {self.group_channels} channels; "
                f"got {layer.units}"
            )
        self.pattern = layer
        # What forward reads is the tuple: a tensor's values would break torch.compile's graph.
        self.dilations: tuple[Dilation, ...] = layer.dilations
        plain = all(dilation == PLAIN for dilation in self.dilations)
        device = next(self.parameters()).device
        self.group_dilations = None if plain else torch.tensor(self.dilations, device=device)

    def reset_parameters(self) -> None:
        """He initialisation by fan-out of the convs, as in the published training; biases are zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def generate_kernel(self, x: Tensor) -> Tensor:
        """The kernels of every output position, (N, G, Kh, Kw, Ho, Wo), from x (N, C, H, W)."""
        if x.dim() != 4 or x.size(1) != self.channels:
            raise ValueError(f"input must be (N, {self.channels}, H, W); got {tuple(x.shape)}")
        kernel = self.conv2(self.conv1(self.pool(x)))
        return kernel.unflatten(1, (self.groups, *self.kernel_size))

    def forward(self, x: Tensor, return_kernel: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The output, or (output, kernels) with `return_kernel`."""
        kernel = self.generate_kernel(x)
        out = functional.involution2d(
            x, kernel, stride=self.stride, dilation=self.dilations, backend=self.backend
        )
        return (out, kernel) if return_kernel else out

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        # `state_dict` is load_state_dict's own copy, so its keys may change.
        key = f"{prefix}group_dilations"
        saved = state_dict.pop(key, None)
        if saved is not None and saved.tolist() != [list(dilation) for dilation in self.dilations]:
            error_msgs.append(f"{key}: must be {list(self.dilations)}; got {saved.tolist()}")
        if self.group_dilations is not None:
            state_dict[key] = torch.tensor(self.dilations)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, kernel_size={self.kernel_size}, groups={self.groups}"]
        if self.stride != (1, 1):
            parts.append(f"stride={self.stride}")
        if self.group_dilations is not None:
            parts.append(f"pattern={self.pattern.counts}")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


def conv_bn_relu(
    channels: int, out_channels: int, kernel_size: int, stride: int = 1, **factory: Any
) -> nn.Sequential:
    """Conv without bias and with 'same' padding, BN, ReLU, under the names of the published checkpoints."""
    conv = nn.Conv2d(channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False, **factory)
    bn = nn.BatchNorm2d(out_channels, **factory)
    return nn.Sequential(OrderedDict(conv=conv, bn=bn, relu=nn.ReLU(inplace=True)))
