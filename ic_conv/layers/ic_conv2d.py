# SPDX-License-Identifier: Apache-2.0
"""The inception convolution as a layer: a convolution whose output channels have their own dilations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ic_conv.ops.checks import Pair, as_pair, odd_kernel, same_padding
from ic_conv.ops.ic_conv2d import IC_CONV2D, checked_call, ic_conv2d
from ic_conv.pattern import Dilation, LayerPattern


class ICConv2d(nn.Conv2d):
    """Inception convolution (Liu et al., "Inception Convolution with Efficient Dilation Search", CVPR 2021).

    A convolution with as many parameters and FLOPs as `torch.nn.Conv2d`, in which each output channel has a
    dilation of its own. Channels of one dilation stand together, in the order of the pattern's branches.
    Each branch is padded by dilation * (kernel_size - 1) / 2, so that all have one output size.

    N batch, C_in and C_out channels, G groups, H x W input size, Kh x Kw kernel.

    Args:
        in_channels, out_channels: C_in and C_out.
        kernel_size: odd, an int or (Kh, Kw).
        stride: an int or (vertical, horizontal).
        padding: 'same', or what it means at dilation 1: (kernel_size - 1) / 2. Nothing else fits.
        dilation: 1; the pattern holds the dilations.
        groups: G; with G > 1 the pattern counts groups, each of C_out / G output channels.
        bias: adds a learnable bias.
        padding_mode: 'zeros'.
        device, dtype: of the parameters.
        pattern: output channels (or groups) per dilation (dy, dx), ``{(1, 1): 48, (1, 4): 16}``, or a
            LayerPattern. Its assignment, if it has one, is for `ic_conv.apply_pattern` and not followed here.
        backend: name of an implementation; None takes the fastest that can run.

    Shape:
        input (N, C_in, H, W), output (N, C_out, Ho, Wo) with Ho = ceil(H / stride).

    Attributes:
        weight: (C_out, C_in / G, Kh, Kw), in branch order, as is bias (C_out,).
        branches: int64 (branches, 3), a row (dy, dx, count) for each, so that a checkpoint tells its pattern.
        relu: whether negative outputs become 0, as `ic_conv.fuse` sets it; False.
        output_order: None, or int64 (C_out,): output channel c is channel output_order[c] in branch order.
        input_order: None, or int64 (C_in,), the same for the input of a grouped layer.

    State dicts load from this layer, from a plain convolution (its channels are taken to be in branch order),
    and from the published layout, in which each branch was a convolution (``conv_list.0.weight``, ...). One
    that was saved with another pattern is refused.

    Raises:
        ValueError: an option breaks a rule; the message says the rule and both values.

    Example:
        >>> layer = ICConv2d(64, 64, 3, stride=2, pattern={(1, 1): 48, (1, 4): 12, (3, 1): 4})
        >>> layer(torch.rand(1, 64, 15, 15)).shape
        torch.Size([1, 64, 8, 8])
    """

    stride: Pair
    branches: Tensor
    output_order: Tensor | None
    input_order: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        padding: str | int | Pair = "same",
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        pattern: LayerPattern | Mapping[Dilation, int],
        backend: str | None = None,
    ) -> None:
        kernel = odd_kernel(as_pair(kernel_size, "kernel_size"))
        same = same_padding(kernel, (1, 1))
        if padding != "same" and (isinstance(padding, str) or as_pair(padding, "padding", 0) != same):
            raise ValueError(
                f"padding must be 'same' or {same}, each branch is padded by its dilation; got {padding!r}"
            )
        if as_pair(dilation, "dilation") != (1, 1):
            raise ValueError(f"dilation must be 1, since the pattern holds the dilations; got {dilation!r}")
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros'; got {padding_mode!r}")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide the channels; got {groups} for {in_channels} and {out_channels} channels"
            )
        layer = pattern if isinstance(pattern, LayerPattern) else LayerPattern.from_counts(pattern)
        units = out_channels if groups == 1 else groups
        if layer.units != units:
            where = f"{layer.name}: " if layer.name else ""
            kind = "output channels" if groups == 1 else "groups"
            raise ValueError(f"{where}counts must sum to {units} {kind}; got {layer.units}")
        super().__init__(
            in_channels, out_channels, kernel, as_pair(stride, "stride"), same, 1, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.backend = IC_CONV2D.check_name(backend)
        self.pattern = layer
        self.relu = False
        self._packs: Packs | None = None
        # What forward reads is the tuple: a tensor's values would break torch.compile's graph.
        self.write_branches()
        for name in _ORDERS:
            self.register_buffer(name, None)

    def write_branches(self) -> None:
        """Makes the buffer `branches` from the pattern, on the weight's device."""
        self.register_buffer("branches", torch.tensor(_rows(self.pattern), device=self.weight.device))

    def freeze(self) -> None:
        """Parameters are constants from now on: backends may keep them in an order of their own."""
        self.requires_grad_(False)
        self._packs = Packs()

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.input_order is not None:
            input = _reorder(input, self.input_order)
        out = _ic_conv2d(
            input,
            weight,
            bias,
            self.pattern.branches,
            self.stride,
            self.groups,
            self.relu,
            self._packs,
            self.backend,
        )
        return out if self.output_order is None else _reorder(out, self.output_order)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"pattern={self.pattern.counts}"]
        if self.output_order is not None or self.input_order is not None:
            parts.append("reordered=True")
        if self.relu:
            parts.append("relu=True")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # `state_dict` is load_state_dict's own copy: its keys may change. `rest` ends with its errors.
        told = {name: state_dict.pop(prefix + name, None) for name in ("branches", *_ORDERS)}
        parts = _pop_conv_list(state_dict, prefix)
        problem = self._mismatch(told, parts.get("weight"))
        if problem is not None:
            rest[-1].append(prefix + problem)
            return
        if parts or told["branches"] is not None:
            # The state of an inception convolution says how its channels stand; a plain one's does not.
            for name in _ORDERS:
                order = told[name]
                setattr(self, name, None if order is None else order.to(self.branches.device, copy=True))
        orders = {prefix + name: order for name in _ORDERS if (order := getattr(self, name)) is not None}
        joined = {prefix + name: torch.cat(tensors) for name, tensors in parts.items()}
        branches = torch.tensor(_rows(self.pattern), device="cpu")
        state_dict.update(orders | joined | {f"{prefix}branches": branches})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _mismatch(self, told: Mapping[str, Tensor | None], parts: list[Tensor] | None) -> str | None:
        """What a state dict tells about branches and orders that contradicts this layer."""
        rows, taps = _rows(self.pattern), tuple(self.weight.shape[1:])
        if parts is not None:
            size = self.out_channels // self.pattern.units
            wanted = [(count * size, *taps) for *_, count in rows]
            got = [tuple(part.shape) for part in parts]
            if got != wanted:
                return f"conv_list: the weights must have the shapes {wanted}; got {got}"
        if (branches := told["branches"]) is not None and branches.tolist() != rows:
            return f"branches: must be {rows} (dy, dx, count); got {branches.tolist()}"
        for name, channels in zip(_ORDERS, (self.out_channels, self.in_channels), strict=True):
            order = told[name]
            if order is not None and sorted(order.tolist()) != list(range(channels)):
                return f"{name}: must hold each of {channels} channels once; got {order.tolist()}"
        return None


class Packs(dict[Any, Any]):
    """What backends keep of a frozen layer's weights. Copies and pickles start empty."""

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        return Packs, ()


_ORDERS = ("output_order", "input_order")

# torch.fx keeps these calls whole, as it keeps a plain convolution: they look at shapes and formats.
fx.wrap("_ic_conv2d")
fx.wrap("_reorder")


def _ic_conv2d(*call: Any) -> Tensor:
    *arguments, backend = call
    return ic_conv2d(checked_call(*arguments), backend)


def _rows(pattern: LayerPattern) -> list[list[int]]:
    return [[dy, dx, count] for (dy, dx), count in pattern.branches]


def _pop_conv_list(state_dict: dict[str, Any], prefix: str) -> dict[str, list[Tensor]]:
    """Takes out the published layout's tensors, in which each branch is a convolution: weights and biases."""
    parts: dict[str, list[Tensor]] = {}
    for name in ("weight", "bias"):
        while (key := f"{prefix}conv_list.{len(parts.get(name, []))}.{name}") in state_dict:
            parts.setdefault(name, []).append(state_dict.pop(key))
    return parts


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Channels of x in a new order, in the memory format of x."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).index_select(3, order).permute(0, 3, 1, 2)
    return x.index_select(1, order)
