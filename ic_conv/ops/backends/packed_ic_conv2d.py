# SPDX-License-Identifier: Apache-2.0
"""Inference in float32 on a CPU: branches write into their slices of one channels-last output.

oneDNN computes output channels in steps of a vector register: one channel takes the time of 16. So `numba`
has oneDNN compute whole steps only, and a kernel of ours (optional extra `cpu`) what is left over of all
branches. `packed` leaves everything to oneDNN, for layers that `ic_conv.fuse` has frozen. The weights of such
layers are brought into oneDNN's order once; others may change, so oneDNN orders them in each call.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
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
LARGE = 8e6  # multiply-adds per thread for which oneDNN, quicker once it runs, is worth its call
LANES = 16  # input channels that the kernel reads at once
SPAN = 48  # output pixels of one branch that a thread computes before it asks for more work

Part = tuple[int, int, "Pair"]  # first output channel, number, dilation


def _why_not(left_over: bool, call: ICConv2dCall | None) -> str | None:
    reason = _kernel_missing() if left_over else _onednn_missing()
    if reason is not None or call is None:
        return reason
    if call.x.device.type != "cpu" or call.x.dtype != torch.float32:
        return f"needs float32 on a CPU, got {call.x.dtype} on {call.x.device}"
    if call.needs_grad:
        return "computes no gradients"
    if call.groups > 1:
        return f"needs groups=1, got {call.groups}"
    if not call.x.numel():
        return "needs pixels, got an empty input"
    if not left_over:
        return None if call.packs is not None else "needs weights that do not change (ic_conv.fuse)"
    if not _plan(call.branches, _work(call))[1]:
        return "finds nothing that oneDNN does not do better"
    channels = call.x.shape[1]
    return f"needs input channels in multiples of {LANES}, got {channels}" if channels % LANES else None


def _work(call: ICConv2dCall) -> float:
    """Multiply-adds of one output channel for each thread."""
    batch, _, rows, columns = call.out_shape
    return batch * rows * columns * math.prod(call.weight.shape[1:]) / torch.get_num_threads()


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
    x = call.x.contiguous(memory_format=torch.channels_last)
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
        if work is not None and count * work < LARGE and len(branches) > 1:
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
    zeros = x.new_zeros(x.shape[1])
    bias = None if call.bias is None else call.bias.contiguous()
    batch, channels, height, width = x.shape
    header = [
        *(0 if tensor is None else tensor.data_ptr() for tensor in (x, weight, bias, y, zeros)),
        *(batch, height, width, 4 * channels, *y.shape[2:], y.shape[1], *call.stride, *weight.shape[2:]),
        *(SPAN, len(rest), 0),
    ]
    header.append(len(header) + 1 + 4 * len(rest))
    branches = [number for first, count, dilation in rest for number in (first, count, *dilation)]
    fields = np.array(header + branches, np.int64)
    parallel: Any = _openmp()
    parallel(_numba_ic_conv2d.kernel().address, fields.ctypes.data, torch.get_num_threads(), 0)


NUMBA: Backend[ICConv2dCall] = Backend("numba", partial(_why_not, True), partial(_run, True))
PACKED: Backend[ICConv2dCall] = Backend("packed", partial(_why_not, False), partial(_run, False))
