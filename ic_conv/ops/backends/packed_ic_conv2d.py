# SPDX-License-Identifier: Apache-2.0
"""Float32 on a CPU: branches write into their slices of one channels-last output.

oneDNN computes output channels in steps of a vector register: one channel takes the time of 16. So `numba`
has oneDNN compute whole steps only, and a kernel of ours (optional extra `cpu`) what is left over of all
branches; the gradients are kernels of ours, too. `packed` leaves everything to oneDNN, for layers that
`ic_conv.fuse` has frozen. The weights of such layers are brought into oneDNN's order once; others may change,
so oneDNN orders them in each call.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ic_conv.ops._involution2d_call import memory_format
from ic_conv.ops.dispatch import Backend

if TYPE_CHECKING:
    from ic_conv.ops._ic_conv2d_call import Branches, ICConv2dCall
    from ic_conv.ops.checks import Pair

STEP = 16  # output channels of a register with AVX-512; a multiple of other registers' 4 and 8
LEFT_OVER = 12  # more channels than this are a whole step: the kernel would take longer
# Multiply-adds per thread for which oneDNN, quicker once it runs, is worth its call: with kept weights, and
# where it has to order them first.
LARGE, LARGE_UNORDERED = 8e6, 1e8
LANES = 16  # input channels that the kernel reads at once
SPAN = 48  # output pixels of one branch that a thread computes before it asks for more work
SHARE = 32  # output channels whose weights' gradients a thread computes, for one tap, before it asks

Part = tuple[int, int, "Pair"]  # first output channel, number, dilation


def _why_not(left_over: bool, call: ICConv2dCall | None) -> str | None:
    reason = _kernel_missing() if left_over else _onednn_missing()
    if reason is not None or call is None:
        return reason
    if call.x.device.type != "cpu" or call.x.dtype != torch.float32:
        return f"needs float32 on a CPU, got {call.x.dtype} on {call.x.device}"
    if call.needs_grad and not left_over:
        return "computes no gradients"
    if call.needs_grad and call.relu:
        return "computes relu for inference only"
    if call.groups > 1:
        return f"needs groups=1, got {call.groups}"
    if not call.x.numel():
        return "needs pixels, got an empty input"
    if not left_over:
        return None if call.packs is not None else "needs weights that do not change (ic_conv.fuse)"
    if len(call.branches) == 1 if call.needs_grad else not _plan(call.branches, _work(call))[1]:
        return "finds nothing that oneDNN does not do better"
    channels = call.x.shape[1]
    return f"needs input channels in multiples of {LANES}, got {channels}" if channels % LANES else None


def _work(call: ICConv2dCall) -> float:
    """Multiply-adds of one output channel for each thread, relative to what oneDNN's call is worth."""
    batch, _, rows, columns = call.out_shape
    large = LARGE_UNORDERED if call.packs is None else LARGE
    return batch * rows * columns * math.prod(call.weight.shape[1:]) / torch.get_num_threads() / large


@lru_cache
def _kernel_missing() -> str | None:
    try:
        import numba  # noqa: F401
    except Exception as error:  # a Numba that does not fit NumPy fails in many ways
        return f"Numba cannot be imported ({error}); pip install 'ic-conv[cpu]'"
    return None if _openmp() is not None else "PyTorch brings no OpenMP with GNU's entry points"


@lru_cache
def _onednn_missing() -> str | None:
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return None
    return "PyTorch was built without oneDNN"


@lru_cache
def _openmp() -> Callable[..., None] | None:
    """OpenMP's way to run a C function on all threads, of the library that PyTorch itself has loaded.

    Threads of our own would compete with PyTorch's, which wait for their next work spinning.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (OSError, TypeError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _run(left_over: bool, call: ICConv2dCall) -> Tensor:
    whole, rest = _plan(call.branches, _work(call) if left_over else None)
    x = _last(call.x)
    y = torch.empty(call.out_shape, memory_format=torch.channels_last)
    for part in whole:
        first, count, _ = part
        y[:, first : first + count] = _convolution(call, x, part)
    if rest:
        _run_kernel(call, x, y, rest)
    if call.relu:
        y.relu_()
    return y.contiguous(memory_format=memory_format(call.x))


@lru_cache(maxsize=1024)
def _plan(branches: Branches, work: float | None) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The output channels that oneDNN computes, and those left to the kernel: none if `work` is None."""
    whole: list[Part] = []
    rest: list[Part] = []
    start = 0
    for dilation, count in branches:
        extra = 0 if work is None else count % STEP
        if work is not None and count * work < 1 and len(branches) > 1:
            extra = count
        elif extra > LEFT_OVER:
            extra = 0
        if count > extra:
            whole.append((start, count - extra, dilation))
        if extra:
            rest.append((start + count - extra, extra, dilation))
        start += count
    return tuple(whole), tuple(rest)


def _convolution(call: ICConv2dCall, x: Tensor, part: Part) -> Tensor:
    first, count, dilation = part
    rows = slice(first, first + count)
    weight, bias = call.weight[rows], None if call.bias is None else call.bias[rows]
    padding = call.padding(dilation)
    if call.packs is None:
        return F.conv2d(x, weight, bias, call.stride, padding, dilation)
    options = list(padding), list(call.stride), list(dilation), 1
    order = partial(torch.ops.mkldnn._reorder_convolution_weight, weight, *options, list(x.shape))
    packed = _kept(call, part, x.shape, order)
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *options, "none", [], "")


def _kept(call: ICConv2dCall, name: Any, shape: Any, make: Callable[[], Tensor]) -> Tensor:
    """What a frozen layer's `packs` hold under a name; made anew if the shape or the weight changed."""
    if call.packs is None:
        return make()
    version = None if call.weight.is_inference() else call.weight._version
    key = call.weight.data_ptr(), version, shape
    known, kept = call.packs.get(name, (None, None))
    if known != key:
        kept = make()
        call.packs[name] = key, kept
    return kept


def _run_kernel(call: ICConv2dCall, x: Tensor, y: Tensor, rest: tuple[Part, ...]) -> None:
    from ic_conv.ops.backends import _numba_ic_conv2d

    weight = _kept(call, "last", None, partial(call.weight.contiguous, memory_format=torch.channels_last))
    bias = None if call.bias is None else call.bias.contiguous()
    zeros = x.new_zeros(x.shape[1])
    _launch(_numba_ic_conv2d.kernel(), (x, weight, bias, y, zeros), x, y, call.stride, call.kernel, rest)


def grad_input(grad: Tensor, weight: Tensor, size: Pair, branches: Branches, stride: Pair) -> Tensor:
    """Gradient by input (N, C_in, *size)."""
    from ic_conv.ops.backends import _numba_ic_conv2d_grads

    grad, weight = _last(grad), _last(weight)
    grad_x = torch.empty(len(grad), weight.shape[1], *size, memory_format=torch.channels_last)
    tensors = grad, weight, grad_x, grad.new_zeros(grad.shape[1]), grad.new_empty(weight.shape[1])
    kernel, parts = (weight.shape[2], weight.shape[3]), _parts(branches, grad.shape[1])
    _launch(_numba_ic_conv2d_grads.kernels()[0], tensors, grad_x, grad, stride, kernel, parts)
    return grad_x


def grad_weight(grad: Tensor, x: Tensor, kernel: Pair, branches: Branches, stride: Pair) -> Tensor:
    """Gradient by weight (C_out, C_in, Kh, Kw)."""
    from ic_conv.ops.backends import _numba_ic_conv2d_grads

    grad, x = _last(grad), _last(x)
    grad_w = torch.empty(grad.shape[1], x.shape[1], *kernel, memory_format=torch.channels_last)
    tensors, parts = (grad, x, grad_w, None, None), _parts(branches, SHARE)
    _launch(_numba_ic_conv2d_grads.kernels()[1], tensors, x, grad, stride, kernel, parts)
    return grad_w


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=1024)
def _parts(branches: Branches, most: int) -> tuple[Part, ...]:
    """All output channels, at most so many in a part."""
    parts: list[Part] = []
    start = 0
    for dilation, count in branches:
        parts += [(start + at, min(most, count - at), dilation) for at in range(0, count, most)]
        start += count
    return tuple(parts)


def _launch(
    kernel: Any,
    tensors: Sequence[Tensor | None],
    x: Tensor,
    y: Tensor,
    stride: Pair,
    size: Pair,
    parts: tuple[Part, ...],
) -> None:
    """Runs a kernel on all threads.

    Args:
        kernel: compiled; reads the fields that are written here.
        tensors: what it works on, by its own count.
        x, y: tensors of the input's and the output's shape.
        size: of the convolution's kernel.
        parts: output channels to work on.
    """
    batch, channels, height, width = x.shape
    header = [
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(batch, height, width, 4 * channels, *y.shape[2:], y.shape[1], *stride, *size),
        *(SPAN, len(parts), 0),
    ]
    header.append(len(header) + 1 + 4 * len(parts))
    branches = [number for first, count, dilation in parts for number in (first, count, *dilation)]
    fields = np.array(header + branches, np.int64)
    parallel: Any = _openmp()
    parallel(kernel.address, fields.ctypes.data, torch.get_num_threads(), 0)


forward: Callable[[ICConv2dCall], Tensor] = partial(_run, True)
why_not: Callable[[ICConv2dCall | None], str | None] = partial(_why_not, True)
PACKED: Backend[ICConv2dCall] = Backend("packed", partial(_why_not, False), partial(_run, False))
