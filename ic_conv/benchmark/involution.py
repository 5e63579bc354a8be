# SPDX-License-Identifier: Apache-2.0
"""Involution's backends at the layer sizes of RedNet-50 and of a detector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ic_conv.benchmark.measure import measure
from ic_conv.functional import involution2d
from ic_conv.ops.involution2d import INVOLUTION2D, checked_call

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Layer:
    """Sizes of one involution; 16 channels share a kernel, as published."""

    name: str
    batch: int
    channels: int
    size: tuple[int, int]
    stride: int = 1
    kernel: int = 7

    @property
    def groups(self) -> int:
        return self.channels // 16

    @property
    def out_size(self) -> tuple[int, int]:
        return -(-self.size[0] // self.stride), -(-self.size[1] // self.stride)

    @property
    def unfolded(self) -> int:
        """Elements of the input unfolded into windows."""
        return self.batch * self.channels * self.kernel**2 * self.out_size[0] * self.out_size[1]


LAYERS = (
    Layer("stem", 8, 32, (112, 112)),
    Layer("layer1", 8, 64, (56, 56)),
    Layer("layer2.0", 8, 128, (56, 56), stride=2),
    Layer("layer2", 8, 128, (28, 28)),
    Layer("layer3.0", 8, 256, (28, 28), stride=2),
    Layer("layer3", 8, 256, (14, 14)),
    Layer("layer4.0", 8, 512, (14, 14), stride=2),
    Layer("layer4", 8, 512, (7, 7)),
    Layer("detector", 1, 256, (200, 336)),
)


@dataclass(frozen=True)
class Row:
    """One measured backend.

    Args:
        layer, passes, backend: what was measured.
        median_ms, best_ms: time of a call.
        peak_mib: memory beyond that of input and weight, the results included.
        against_tensors: the same as a multiple of input + output + weight.
        speedup: median time of `reference` in the same run, divided by this median; None without a reference.
        note: why something is missing.
    """

    layer: str
    passes: str
    backend: str
    median_ms: float | None = None
    best_ms: float | None = None
    peak_mib: float | None = None
    against_tensors: float | None = None
    speedup: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def benchmark(
    layers: Iterable[Layer],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rounds: int = 10,
    backends: Iterable[str] | None = None,
) -> Iterator[Row]:
    """Measures every backend that can run a layer, forward alone and with both gradients."""
    for layer in layers:
        x = torch.randn(layer.batch, layer.channels, *layer.size, device=device, dtype=dtype)
        kernel = (layer.kernel, layer.kernel)
        weight = torch.randn(layer.batch, layer.groups, *kernel, *layer.out_size, device=device, dtype=dtype)
        call = checked_call(x, weight, layer.stride, None, 1)
        wanted = INVOLUTION2D.names if backends is None else tuple(backends)
        able = [b.name for b in INVOLUTION2D.backends if b.name in wanted and b.why_not(call) is None]
        output = x.numel() // (x[0, 0].numel()) * layer.out_size[0] * layer.out_size[1]
        tensors = (x.numel() + weight.numel() + output) * x.element_size() / 2**20
        for passes in PASSES:
            names, skipped = _that_fit(able, layer, passes, device)
            functions = {name: partial(_run, passes, x, weight, layer.stride, name) for name in names}
            measured = measure(functions, device, rounds)
            reference = measured.get("reference")
            for name, m in measured.items():
                yield Row(
                    layer.name,
                    passes,
                    name,
                    m.median_ms,
                    m.best_ms,
                    m.peak_mib,
                    None if m.peak_mib is None else m.peak_mib / tensors,
                    None if reference is None else reference.median_ms / m.median_ms,
                )
            yield from (Row(layer.name, passes, name, note=note) for name, note in skipped.items())


def _run(passes: str, x: torch.Tensor, weight: torch.Tensor, stride: int, backend: str) -> Any:
    if passes == "forward":
        with torch.no_grad():
            return involution2d(x, weight, stride, backend=backend)
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = involution2d(x, weight, stride, backend=backend)
    return torch.autograd.grad(y, (x, weight), torch.ones_like(y))


def _that_fit(
    names: list[str], layer: Layer, passes: str, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """Without the reference where its unfolded windows and their products would not fit into free memory."""
    copies = 2 if passes == "forward" else 5
    needed, free = copies * layer.unfolded * 4, _free_memory(device)
    if "reference" not in names or free is None or needed < free:
        return names, {}
    note = f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    return [name for name in names if name != "reference"], {"reference": note}


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
