# SPDX-License-Identifier: Apache-2.0
"""Inception convolution: the table of backends, and the fused ones as PyTorch operators.

The operators let autograd and torch.compile see one opaque call with a known output. A convolution is linear
in x and in weight, so the three operators are each other's derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ic_conv.ops._ic_conv2d_call import Branches, ICConv2dCall, checked_call
from ic_conv.ops._involution2d_call import memory_format
from ic_conv.ops.backends import packed_ic_conv2d, split_ic_conv2d, triton_ic_conv2d
from ic_conv.ops.dispatch import Backend, BackendTable

__all__ = ["IC_CONV2D", "Branches", "ICConv2dCall", "checked_call", "ic_conv2d"]

# Each has the functions forward, grad_input and grad_weight.
WITH_GRADIENTS: dict[str, Any] = {"triton": triton_ic_conv2d, "numba": packed_ic_conv2d}


def ic_conv2d(call: ICConv2dCall, wanted: str | None = None) -> Tensor:
    """y (N, C_out, Ho, Wo) from the first backend that can run the call, or from the wanted one.

    What is traced, exported or watched (by a FLOP counter, say) consists of PyTorch's own operations.
    """
    if not torch.compiler.is_compiling():
        if wanted != "split" and _is_watched():
            return split_ic_conv2d.ic_conv2d(call)
        return IC_CONV2D.choose(call, wanted).run(call)
    # Sizes may be symbols here, which only a condition makes known.
    aligned = True if call.x.shape[1] % packed_ic_conv2d.LANES == 0 else False  # noqa: SIM210
    name = _choose_for_graph(
        call.x.device, call.x.dtype, aligned, call.branches, call.groups, call.relu, call.needs_grad, wanted
    )
    return split_ic_conv2d.ic_conv2d(call) if name == "split" else _run_operator(name, call)


def _is_watched() -> bool:
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _choose_for_graph(
    device: torch.device,
    dtype: torch.dtype,
    aligned: bool,
    branches: Branches,
    groups: int,
    relu: bool,
    needs_grad: bool,
    wanted: str | None,
) -> str:
    """The backend's name. A compiler cannot trace probes and logging, so it runs this once, for one pixel."""
    if getattr(torch.compiler, "is_exporting", lambda: True)():
        return "split"
    channels = groups * packed_ic_conv2d.LANES if aligned else groups
    units = sum(count for _, count in branches)
    x = torch.empty((1, channels, 1, 1), device=device, dtype=dtype)
    weight = torch.empty((units, channels // groups, 1, 1), device=device, dtype=dtype)
    with torch.set_grad_enabled(needs_grad):
        call = ICConv2dCall(x, weight.requires_grad_(needs_grad), None, branches, (1, 1), groups, relu)
        return IC_CONV2D.choose(call, wanted).name


# What torch.compiler.assume_constant_result sets; to call that would import the compiler with this module.
_choose_for_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run_numba(call: ICConv2dCall) -> Tensor:
    return _run_operator("numba", call) if call.needs_grad else packed_ic_conv2d.forward(call)


def _run_operator(name: str, call: ICConv2dCall) -> Tensor:
    return _forward(call.x, call.weight, call.bias, _flat(call.branches), call.stride, call.relu, name)


def _flat(branches: Branches) -> list[int]:
    return [number for dilation, count in branches for number in (*dilation, count)]


def _branches(flat: Sequence[int]) -> Branches:
    return tuple(((dy, dx), n) for dy, dx, n in zip(flat[::3], flat[1::3], flat[2::3], strict=True))


IC_CONV2D: BackendTable[ICConv2dCall] = BackendTable(
    "ic_conv2d",
    (
        Backend("triton", triton_ic_conv2d.why_not, lambda call: _run_operator("triton", call)),
        Backend("numba", packed_ic_conv2d.why_not, _run_numba),
        packed_ic_conv2d.PACKED,
        split_ic_conv2d.BACKEND,
    ),
)


@torch.library.custom_op("ic_conv::ic_conv2d", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[int],
    stride: Sequence[int],
    relu: bool,
    backend: str,
) -> Tensor:
    call = ICConv2dCall(x, weight, bias, _branches(branches), (stride[0], stride[1]), 1, relu)
    return WITH_GRADIENTS[backend].forward(call)


@torch.library.custom_op("ic_conv::ic_conv2d_grad_input", mutates_args=())
def _grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    branches: Sequence[int],
    stride: Sequence[int],
    backend: str,
) -> Tensor:
    options = (size[0], size[1]), _branches(branches), (stride[0], stride[1])
    grad_x = WITH_GRADIENTS[backend].grad_input(grad, weight, *options)
    return grad_x.contiguous(memory_format=memory_format(grad))


@torch.library.custom_op("ic_conv::ic_conv2d_grad_weight", mutates_args=())
def _grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    branches: Sequence[int],
    stride: Sequence[int],
    backend: str,
) -> Tensor:
    options = (kernel[0], kernel[1]), _branches(branches), (stride[0], stride[1])
    grad_weight = WITH_GRADIENTS[backend].grad_weight(grad, x, *options)
    return grad_weight.contiguous(memory_format=memory_format(x))


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, branches: Any, stride: Sequence[int], *_: Any) -> Tensor:
    rows, columns = (-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True))
    shape = x.shape[0], weight.shape[0], rows, columns
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    shape = grad.shape[0], weight.shape[1], size[0], size[1]
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


@_grad_weight.register_fake
def _(grad: Tensor, x: Tensor, kernel: Sequence[int], *_: Any) -> Tensor:
    shape = grad.shape[1], x.shape[1], *kernel
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    branches, stride, _, backend = inputs[3:]
    ctx.options = branches, stride, backend


def _backward_of_forward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    by_x = by_weight = by_bias = None
    if ctx.needs_input_grad[0]:
        by_x = _grad_input(grad, weight, x.shape[2:], *ctx.options)
    if ctx.needs_input_grad[1]:
        by_weight = _grad_weight(grad, x, weight.shape[2:], *ctx.options)
    if ctx.needs_input_grad[2]:
        by_bias = grad.sum((0, 2, 3))
    return by_x, by_weight, by_bias, None, None, None, None


def _save_of_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[3:]


def _backward_of_grad_input(ctx: Any, grad_x: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    by_grad = by_weight = None
    if ctx.needs_input_grad[0]:
        by_grad = _forward_again(grad_x, weight, *ctx.options)
    if ctx.needs_input_grad[1]:
        by_weight = _grad_weight(grad, grad_x, weight.shape[2:], *ctx.options)
    return by_grad, by_weight, None, None, None, None


def _backward_of_grad_weight(ctx: Any, grad_weight: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    by_grad = by_x = None
    if ctx.needs_input_grad[0]:
        by_grad = _forward_again(x, grad_weight, *ctx.options)
    if ctx.needs_input_grad[1]:
        by_x = _grad_input(grad, grad_weight, x.shape[2:], *ctx.options)
    return by_grad, by_x, None, None, None, None


def _forward_again(
    x: Tensor, weight: Tensor, branches: Sequence[int], stride: Sequence[int], backend: str
) -> Tensor:
    return _forward(x, weight, None, branches, stride, False, backend)


_forward.register_autograd(_backward_of_forward, setup_context=_save)
_grad_input.register_autograd(_backward_of_grad_input, setup_context=_save_of_gradient)
_grad_weight.register_autograd(_backward_of_grad_weight, setup_context=_save_of_gradient)
