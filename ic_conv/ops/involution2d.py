# SPDX-License-Identifier: Apache-2.0
"""Involution: the table of backends, and its kernels as PyTorch operators.

The operators let autograd, torch.compile and autocast see one opaque call with a known output, whatever
computes it. y is linear in x and in weight, so the three operators are each other's derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ic_conv.ops._involution2d_call import (
    Dilation,
    Geometry,
    InvolutionCall,
    Kernels,
    checked_call,
    memory_format,
)
from ic_conv.ops.backends import (
    numba_involution2d,
    onnx_involution2d,
    reference_involution2d,
    shift_involution2d,
)
from ic_conv.ops.backends.cupy_involution2d import CupyInvolution2d
from ic_conv.ops.checks import Pair
from ic_conv.ops.dispatch import Backend, BackendTable

__all__ = ["INVOLUTION2D", "Dilation", "InvolutionCall", "checked_call", "involution2d"]

# In order of preference. `cupy_plain` stands behind `shift`, which runs everything: only a request finds it.
KERNELS: dict[str, Kernels] = {
    "cupy": CupyInvolution2d(),
    "numba": numba_involution2d,
    "shift": shift_involution2d,
    "cupy_plain": CupyInvolution2d(plain=True),
}


# What exporters and compilers see of the others: plain operations, which they know and fuse.
GRAPHS: dict[str, Callable[[InvolutionCall], Tensor]] = {
    "onnx": onnx_involution2d.gathered,
    "shift": shift_involution2d.traced,
    "reference": reference_involution2d.involution2d,
}


def involution2d(call: InvolutionCall, wanted: str | None = None) -> Tensor:
    """y (N, C, Ho, Wo) from the first backend that can run the call, or from the wanted one."""
    if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        return INVOLUTION2D.choose(call, wanted).run(call)
    x = call.x
    name = _choose_for_graph(x.device, x.dtype, x.shape[1] // call.geometry.groups, wanted)
    return GRAPHS[name](call) if name in GRAPHS else _run_operator(name, call)


def _choose_for_graph(device: torch.device, dtype: torch.dtype, channels: int, wanted: str | None) -> str:
    """The backend's name. A compiler cannot trace probes and logging, so it runs this once, for one group.

    Exported graphs hold plain operations only. Before PyTorch 2.7 exporting cannot be told from compiling.
    """
    if torch.onnx.is_in_onnx_export() and wanted != "shift":
        return "onnx"
    if torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", lambda: True)():
        return "shift"
    x = torch.empty((0, channels, 1, 1), device=device, dtype=dtype)
    weight = torch.empty((0, 1, 1, 1, 1, 1), device=device, dtype=dtype)
    return INVOLUTION2D.choose(checked_call(x, weight, 1, None, 1), wanted).name


# What torch.compiler.assume_constant_result sets; to call that would import the compiler with this module.
_choose_for_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run_operator(name: str, call: InvolutionCall) -> Tensor:
    geometry = call.geometry
    padding, dilation = list(chain(*geometry.padding)), list(chain(*geometry.dilation))
    return _forward(call.x, call.weight, geometry.stride, padding, dilation, name)


INVOLUTION2D: BackendTable[InvolutionCall] = BackendTable(
    "involution2d",
    (
        *(
            Backend[InvolutionCall](name, kernels.why_not, partial(_run_operator, name))
            for name, kernels in KERNELS.items()
        ),
        reference_involution2d.BACKEND,
    ),
)


def _geometry(
    size: Sequence[int],
    out_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    """From an operator's arguments, in which the pairs of all groups stand in one list."""
    return Geometry(
        _pair(size),
        _pair(out_size),
        _pair(kernel),
        _pair(stride),
        tuple(zip(padding[::2], padding[1::2], strict=True)),
        tuple(zip(dilation[::2], dilation[1::2], strict=True)),
    )


def _pair(values: Sequence[int]) -> Pair:
    return values[0], values[1]


@torch.library.custom_op("ic_conv::involution2d", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    geometry = _geometry(x.shape[2:], weight.shape[4:], weight.shape[2:4], stride, padding, dilation)
    return KERNELS[backend].forward(x, weight, geometry)


@torch.library.custom_op("ic_conv::involution2d_grad_input", mutates_args=())
def _grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    geometry = _geometry(size, grad.shape[2:], weight.shape[2:4], stride, padding, dilation)
    return KERNELS[backend].grad_input(grad, weight, geometry)


@torch.library.custom_op("ic_conv::involution2d_grad_weight", mutates_args=())
def _grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    geometry = _geometry(x.shape[2:], grad.shape[2:], kernel, stride, padding, dilation)
    return KERNELS[backend].grad_weight(grad, x, geometry)


def _fake_like(tensor: Tensor, size: Sequence[int]) -> Tensor:
    shape = (tensor.shape[0], tensor.shape[1], size[0], size[1])
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor))


@_forward.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _fake_like(x, weight.shape[4:])


@_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    return _fake_like(grad, size)


@_grad_weight.register_fake
def _(grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Any, padding: Sequence[int], *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], len(padding) // 2, *kernel, *grad.shape[2:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward_of_forward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_input(grad, weight, x.shape[2:], *ctx.options)
    if ctx.needs_input_grad[1]:
        grad_weight = _grad_weight(grad, x, weight.shape[2:4], *ctx.options)
    return grad_x, grad_weight, *(None for _ in ctx.options)


def _backward_of_grad_input(ctx: Any, grad_x: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    _, *options = ctx.options
    by_grad = by_weight = None
    if ctx.needs_input_grad[0]:
        by_grad = _forward(grad_x, weight, *options)
    if ctx.needs_input_grad[1]:
        by_weight = _grad_weight(grad, grad_x, weight.shape[2:4], *options)
    return by_grad, by_weight, *(None for _ in ctx.options)


def _backward_of_grad_weight(ctx: Any, grad_weight: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    _, *options = ctx.options
    by_grad = by_x = None
    if ctx.needs_input_grad[0]:
        by_grad = _forward(x, grad_weight, *options)
    if ctx.needs_input_grad[1]:
        by_x = _grad_input(grad, grad_weight, x.shape[2:], *options)
    return by_grad, by_x, *(None for _ in ctx.options)


_forward.register_autograd(_backward_of_forward, setup_context=_save)
_grad_input.register_autograd(_backward_of_grad_input, setup_context=_save)
_grad_weight.register_autograd(_backward_of_grad_weight, setup_context=_save)
