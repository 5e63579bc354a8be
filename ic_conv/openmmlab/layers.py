# SPDX-License-Identifier: Apache-2.0
"""The layers under the names that `conv_cfg` takes: ICConv2d, Involution2d, CVolution2d."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from ic_conv._pattern_file import _layer_counts as layer_counts
from ic_conv.layers import CVolution2d, ICConv2d, Involution2d
from ic_conv.ops.checks import Pair, as_pair

INVOLUTION = {"type": "Involution2d", "kernel_size": 7}  # of the published necks and heads


@MODELS.register_module("ICConv2d", force=True)
def build_ic_conv2d(*args: Any, pattern: Mapping[Any, int], **options: Any) -> ICConv2d:
    """ICConv2d from a config, in which a pattern may also have the keys of pattern files.

    Example:
        >>> conv_cfg = dict(type="ICConv2d", pattern={(1, 1): 48, (1, 4): 16})
        >>> conv_cfg = dict(type="ICConv2d", pattern={"(0, 0)": 48, "(0, 3)": 16})  # the same
    """
    if any(isinstance(key, str) for key in pattern):
        pattern = layer_counts(pattern, "conv_cfg.pattern")
    return ICConv2d(*args, pattern=pattern, **options)


class _InPlaceOfConv:
    """Lets MMCV's ConvModule build an involution: the arguments and attributes of a convolution.

    Args:
        in_channels, out_channels: must be equal.
        conv_kernel: of the convolution that it replaces, and its window unless `kernel_size` is given.
        stride, padding, dilation, groups, bias: of that convolution; padding must be 'same', groups 1. An
            involution has no bias of its own.
        kernel_size: size of the window.
        options: those of the layer.

    Raises:
        ValueError: the convolution cannot be replaced.

    Example:
        >>> module = ConvModule(64, 64, 3, padding=1, conv_cfg=dict(type="Involution2d", kernel_size=7))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conv_kernel: int | Pair | None = None,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernel_size: int | Pair | None = None,
        **options: Any,
    ) -> None:
        kind = type(self).__name__.removeprefix("Conv")
        if in_channels != out_channels:
            raise ValueError(
                f"{kind} keeps the number of channels: in_channels must equal out_channels; "
                f"got {in_channels} and {out_channels}"
            )
        if groups != 1:
            raise ValueError(f"{kind} has groups by its group_channels: groups must be 1; got {groups}")
        if conv_kernel is not None and padding is not None:
            kernel, rate = as_pair(conv_kernel, "kernel_size"), as_pair(dilation, "dilation")
            same = tuple(k // 2 * d for k, d in zip(kernel, rate, strict=True))
            if as_pair(padding, "padding", 0) != same:
                raise ValueError(f"{kind} pads by itself: padding must be {same}, 'same'; got {padding!r}")
        window = kernel_size if kernel_size is not None else conv_kernel
        if window is not None:
            options["kernel_size"] = window
        super().__init__(in_channels, stride=stride, dilation=dilation, **options)  # type: ignore[call-arg]
        self.in_channels = self.out_channels = in_channels
        self.padding, self.dilation = padding, dilation
        self.transposed, self.output_padding = False, (0, 0)


@MODELS.register_module("Involution2d", force=True)
class ConvInvolution2d(_InPlaceOfConv, Involution2d):
    __doc__ = _InPlaceOfConv.__doc__


@MODELS.register_module("CVolution2d", force=True)
class ConvCVolution2d(_InPlaceOfConv, CVolution2d):
    __doc__ = _InPlaceOfConv.__doc__

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("kernel_size", "stride", "groups"):
            setattr(self, name, getattr(self.spatial, name))


def in_place_of(conv: nn.Conv2d, cfg: Mapping[str, Any]) -> nn.Module:
    """The layer of a config, with a convolution's channels."""
    return MODELS.build({**cfg, "in_channels": conv.in_channels, "out_channels": conv.out_channels})


def set_output_layers(fpn: Any, cfg: Mapping[str, Any]) -> None:
    """Replaces the 3x3 convolutions that smooth each level of an FPN, MMDetection's or MMSegmentation's."""
    for level in range(len(fpn.lateral_convs)):
        module = fpn.fpn_convs[level]
        layer = in_place_of(module.conv, cfg)
        if module.with_norm or module.with_activation:
            module.conv = layer
        else:  # the published key names
            fpn.fpn_convs[level] = layer
