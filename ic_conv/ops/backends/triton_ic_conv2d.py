# SPDX-License-Identifier: Apache-2.0
"""Inception convolution in one launch for all branches on a GPU, through Triton."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ic_conv.ops._involution2d_call import memory_format

if TYPE_CHECKING:
    from ic_conv.ops._ic_conv2d_call import Branches, ICConv2dCall
    from ic_conv.ops.checks import Pair

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAST = torch.channels_last
STEPS = 64  # blocks of 64 pixels that one program adds up for the weight's gradient
# Output channels of a tile, and the share of the GPU's speed that it reaches (estimated, not measured):
# narrow tiles waste less on small branches, wide ones reuse more of what they load.
TILE_WIDTHS = {16: 0.35, 32: 0.6, 64: 0.85, 128: 1.0}


def why_not(call: ICConv2dCall | None) -> str | None:
    if (reason := _triton_missing()) is not None or call is None:
        return reason
    if call.x.device.type != "cuda" and not _interpreted():
        return f"needs CUDA tensors, got {call.x.device}"
    if call.x.dtype not in DTYPES:
        return f"needs float32, float16 or bfloat16, got {call.x.dtype}"
    if call.groups > 1:
        return f"needs groups=1, got {call.groups}"
    if not call.x.numel():
        return "needs pixels, got an empty input"
    if call.relu and call.needs_grad:
        return "computes relu for inference only"
    return "one branch is one plain convolution" if len(call.branches) == 1 else None


def forward(call: ICConv2dCall) -> Tensor:
    """y (N, C_out, Ho, Wo) in the memory format of x."""
    x, weight = call.x.contiguous(memory_format=LAST), call.weight.contiguous(memory_format=LAST)
    y = _empty_last(x, call.out_shape)
    width = _tile_width(call.branches)
    tiles, total = _tiles(call.branches, width, x.device), y.numel() // y.shape[1]
    _kernels().forward[-(-total // 128), len(tiles)](
        *(x, weight, call.bias, y, tiles, total), *_sizes(x, y), *call.stride, *call.kernel,
        M=128, N=width, K=32, BIAS=call.bias is not None, RELU=call.relu, **_precision(x),
    )  # fmt: skip
    return y.contiguous(memory_format=memory_format(call.x))


def grad_input(grad: Tensor, weight: Tensor, size: Pair, branches: Branches, stride: Pair) -> Tensor:
    """Gradient by x (N, C_in, H, W) from grad (N, C_out, Ho, Wo), in the memory format of grad."""
    layout = memory_format(grad)
    grad, weight = grad.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
    grad_x = _empty_last(grad, (grad.shape[0], weight.shape[1], *size))
    tiles, total = _tiles(branches, 32, grad.device), grad_x.numel() // grad_x.shape[1]
    _kernels().grad_input[-(-total // 128), -(-grad_x.shape[1] // 64)](
        *(grad, weight, grad_x, tiles, total), *_sizes(grad_x, grad), *stride, *weight.shape[2:],
        M=128, N=64, K=32, TILES=len(tiles), **_precision(grad),
    )  # fmt: skip
    return grad_x.contiguous(memory_format=layout)


def grad_weight(grad: Tensor, x: Tensor, kernel: Pair, branches: Branches, stride: Pair) -> Tensor:
    """Gradient by weight (C_out, C_in, Kh, Kw), contiguous."""
    grad, x = grad.contiguous(memory_format=LAST), x.contiguous(memory_format=LAST)
    total, taps = grad.numel() // grad.shape[1], kernel[0] * kernel[1]
    steps = min(STEPS, 1 << (-(-total // 64) - 1).bit_length())
    shares = -(-total // (steps * 64))
    grad_w = x.new_empty((shares, grad.shape[1], *kernel, x.shape[1]), dtype=torch.float32)
    tiles = _tiles(branches, 32, grad.device)
    _kernels().grad_weight[len(tiles), -(-x.shape[1] // 64), taps * shares](
        *(grad, x, grad_w, tiles, total), *_sizes(x, grad), *stride, *kernel,
        M=32, N=64, K=64, STEPS=steps, **_precision(x),
    )  # fmt: skip
    return grad_w.sum(0).to(x.dtype).permute(0, 3, 1, 2).contiguous()


@lru_cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a Triton that does not fit the driver fails in many ways
        return f"Triton cannot be imported ({error})"
    if not torch.cuda.is_available() and not _interpreted():
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _empty_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAST)


def _kernels() -> Any:
    from ic_conv.ops.backends import _triton_ic_conv2d

    return _triton_ic_conv2d


def _sizes(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """H, W, C, Ho, Wo, Co."""
    return (*x.shape[2:], x.shape[1], *y.shape[2:], y.shape[1])


def _precision(x: Tensor) -> dict[str, Any]:
    """How numbers are multiplied: float32 as PyTorch's own convolutions on a GPU are set to do it."""
    tf32 = x.is_cuda and torch.backends.cudnn.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": not x.is_cuda and x.dtype == torch.bfloat16}


@lru_cache(maxsize=1024)
def _tile_width(branches: Branches) -> int:
    def cost(width: int) -> float:
        return sum(-(-count // width) * width for _, count in branches) / TILE_WIDTHS[width]

    return min(TILE_WIDTHS, key=cost)


@lru_cache(maxsize=1024)
def _tiles(branches: Branches, width: int, device: torch.device) -> Tensor:
    """The kernels' table: int32 (tiles, 4) with first channel, number of channels, dy and dx."""
    rows, start = [], 0
    for (dy, dx), count in branches:
        rows += [(start + at, min(width, count - at), dy, dx) for at in range(0, count, width)]
        start += count
    return torch.tensor(rows, dtype=torch.int32, device=device)
