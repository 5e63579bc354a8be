# SPDX-License-Identifier: Apache-2.0
"""Involution in CUDA kernels, compiled by CuPy at first use (optional extra `cuda`).

The source, involution2d.cu, is compiled once for each dtype, kernel size and plan, and CuPy keeps the result
on disk.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ic_conv.ops import _involution2d_call as _call

if TYPE_CHECKING:
    from ic_conv.ops._involution2d_call import Geometry, InvolutionCall
    from ic_conv.ops.checks import Pair

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("involution2d.cu")
SCALARS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
INT_LIMIT = 2**31 - 1
# Threads that keep a large GPU busy; with fewer, each thread gets less work.
ENOUGH_THREADS = 2**16


class Plan(NamedTuple):
    """The macros of involution2d.cu: what one thread computes."""

    channels: int
    rows: int
    taps: int


class CupyInvolution2d:
    """The kernels of the table's backends `cupy` and `cupy_plain`.

    Args:
        plain: one thread per output, the published way; slower, and kept as the baseline of benchmarks.
    """

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain

    def why_not(self, call: InvolutionCall | None) -> str | None:
        if call is None:
            return _cupy_missing() or (None if torch.cuda.is_available() else "no CUDA GPU")
        if call.x.device.type != "cuda":
            return f"needs CUDA tensors, got {call.x.device}"
        if (reason := _cupy_missing()) is not None:
            _warn_once(reason)
            return reason
        if call.x.dtype not in SCALARS:
            return f"needs float32, float16 or bfloat16, got {call.x.dtype}"
        return None

    def forward(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return self._gather("forward", x, weight, geometry, geometry.out_size)

    def grad_input(self, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return self._gather("grad_input", grad, weight, geometry, geometry.size)

    def grad_weight(self, grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        g = geometry
        taps = 1 if self.plain else g.kernel[1]
        result = x.new_empty((x.shape[0], g.groups, *g.kernel, *g.out_size))
        units = x.shape[0] * g.groups * (g.kernel[0] * g.kernel[1] // taps)
        slots = g.out_size[0] * g.out_size[1]
        _launch("grad_weight", Plan(1, 1, taps), (grad.contiguous(), x.contiguous(), result), g, units, slots)
        return result

    def _gather(self, name: str, source: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> Tensor:
        batch, channels = source.shape[:2]
        target = source.new_empty((batch, channels, *size))
        plan = self._plan(target.numel(), channels // geometry.groups, geometry)
        # Rows of one thread are a dilation apart, so each dilation's last rows are rounded up.
        row_slots = max(-(-size[0] // (dy * plan.rows)) * dy for dy, _ in geometry.dilation)
        units, slots = batch * channels // plan.channels, row_slots * size[1]
        _launch(name, plan, (source.contiguous(), weight.contiguous(), target), geometry, units, slots)
        return target.contiguous(memory_format=_call.memory_format(source))

    def _plan(self, outputs: int, group_channels: int, geometry: Geometry) -> Plan:
        """As much work for each thread as leaves enough threads."""
        if self.plain:
            return Plan(1, 1, 1)
        channels = next(c for c in (16, 8, 4, 2, 1) if group_channels % c == 0)
        rows = 4 if geometry.stride[0] == 1 else 1
        while rows > 1 and outputs // (channels * rows) < ENOUGH_THREADS:
            rows //= 2
        while channels > 4 and outputs // (channels * rows) < ENOUGH_THREADS:
            channels //= 2
        return Plan(channels, rows, 1)


def _launch(
    name: str, plan: Plan, tensors: tuple[Tensor, Tensor, Tensor], geometry: Geometry, units: int, slots: int
) -> None:
    """Runs a kernel on PyTorch's current stream of the tensors' device."""
    import cupy

    g, x = geometry, tensors[0]
    if max(tensor.numel() for tensor in tensors) == 0:
        return
    threads = min(128, -(-slots // 32) * 32)
    blocks = units * -(-slots // threads)
    wide = max(tensor.numel() for tensor in tensors) > INT_LIMIT
    group_channels = x.shape[1] // g.groups
    with (
        cupy.cuda.Device(x.device.index),
        cupy.cuda.ExternalStream(torch.cuda.current_stream(x.device).cuda_stream, x.device.index),
    ):
        kernel = _module(x.dtype, g.kernel, plan, wide).get_function(name)
        pointers = [tensor.data_ptr() for tensor in (*tensors, _on_device(g.padding, g.dilation, x.device))]
        sizes = (g.groups, group_channels, *g.size, *g.out_size, *g.stride, slots)
        kernel((blocks,), (threads,), (*pointers, *sizes))


@lru_cache(maxsize=256)
def _module(dtype: torch.dtype, kernel: Pair, plan: Plan, wide: bool) -> Any:
    """The compiled source; CuPy loads it into each GPU that uses it."""
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(), options=options(dtype, kernel, plan, wide))


def options(dtype: torch.dtype, kernel: Pair, plan: Plan, wide: bool) -> tuple[str, ...]:
    """The compiler's options: the macros of involution2d.cu."""
    macros = {
        "SCALAR": SCALARS[dtype],
        "WIDE": int(wide),
        "KH": kernel[0],
        "KW": kernel[1],
        "CHANNELS": plan.channels,
        "ROWS": plan.rows,
        "TAPS": plan.taps,
    }
    return tuple(f"-D{name}={value}" for name, value in macros.items())


@lru_cache(maxsize=256)
def _on_device(padding: tuple[Pair, ...], dilation: tuple[Pair, ...], device: torch.device) -> Tensor:
    """dy, dx, py, px of each group."""
    rows = [(*d, *p) for d, p in zip(dilation, padding, strict=True)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache
def _cupy_missing() -> str | None:
    try:
        import cupy  # noqa: F401
    except Exception as error:  # a CuPy that does not fit the CUDA libraries fails in many ways
        return f"CuPy cannot be imported ({error}); pip install 'ic-conv[cuda]'"
    return None


@lru_cache
def _warn_once(reason: str) -> None:
    logger.warning("involution2d runs on CUDA without its fast kernels: %s", reason)
