# SPDX-License-Identifier: Apache-2.0
"""IC-ResNets beside the plain network and beside the published form of their layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ic_conv.benchmark.measure import measure
from ic_conv.convert import replace_modules
from ic_conv.fuse import fuse
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.models.resnet import ARCHITECTURES, ic_resnet
from ic_conv.ops import checks
from ic_conv.pattern import DilationPattern

PASSES = ("inference", "training")
STEP = 16  # output channels that oneDNN computes at once with AVX-512


class PublishedLayer(nn.Module):
    """The published form of a layer: a list of plain convolutions, and a concatenation."""

    def __init__(self, layer: ICConv2d) -> None:
        super().__init__()
        self.grouped = layer.groups > 1
        self.convs = nn.ModuleList()
        branches, rows = layer.pattern.branches, layer.out_channels // layer.pattern.units
        weights = layer.weight.detach().split([count * rows for _, count in branches])
        for (dilation, count), weight in zip(branches, weights, strict=True):
            conv = nn.Conv2d(
                layer.in_channels * count // layer.groups if self.grouped else layer.in_channels,
                count * rows,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,
                checks.same_padding((weight.shape[2], weight.shape[3]), dilation),
                dilation,
                count if self.grouped else 1,
                bias=False,
            )
            conv.weight = nn.Parameter(weight.clone())
            self.convs.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [conv.in_channels for conv in self.convs]
        inputs = x.split(sizes, 1) if self.grouped else [x] * len(sizes)
        return torch.cat([conv(part) for conv, part in zip(self.convs, inputs, strict=True)], 1)


@dataclass(frozen=True)
class Row:
    """One measured network.

    Args:
        pattern, network, passes, batch: what was measured.
        median_ms, best_ms: time of a call.
        to_plain: median time as a multiple of the plain network's in the same run.
        speedup: of the published form's median time over this one's.
        steps: convolution work of the 3x3 layers when each branch is rounded up to `STEP` channels, as a
            multiple of the plain layers' (mean over layers; None for grouped layers).
        difference: largest difference of an output from the published form's, relative to the largest output.
    """

    pattern: str
    passes: str
    batch: int
    network: str
    median_ms: float
    best_ms: float
    to_plain: float
    speedup: float
    steps: float | None = None
    difference: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def arch_of(name: str) -> str:
    """The architecture that a pattern file's name tells; ValueError if it tells none."""
    found = [arch for arch in ARCHITECTURES if arch in name]
    if not found:
        raise ValueError(f"{name}: the name must contain one of {', '.join(ARCHITECTURES)}")
    return found[0]


def step_cost(pattern: DilationPattern, step: int = STEP) -> float:
    """Work with branches rounded up to `step` channels, relative to that without (mean over layers)."""
    costs = [sum(-(-n // step) * step for _, n in layer.branches) / layer.units for layer in pattern.layers]
    return sum(costs) / len(costs)


def benchmark(
    patterns: Iterable[Path],
    device: torch.device,
    batches: Iterable[int] = (1, 8),
    passes: Iterable[str] = PASSES,
    size: int = 224,
    rounds: int = 10,
    layout: torch.memory_format = torch.channels_last,
) -> Iterator[Row]:
    """Measures, for each pattern file, all forms of the network in turn, in float32.

    The networks: plain; published (module list and concatenation); ours; and, for inference, the plain one
    and ours with folded batch norms.

    Args:
        patterns: files whose names contain the architecture, such as ic_resnet50.
        batches: numbers of images.
        passes: of "inference" and "training" (forward, backward and an SGD step).
        size: of the images, in pixels.
        rounds: timed calls of each.
        layout: of images and weights.
    """
    batches, passes = tuple(batches), tuple(passes)
    for path in patterns:
        pattern, arch = DilationPattern.load(path), arch_of(path.name)
        for kind in passes:
            networks = _networks(arch, pattern, device, layout, fused=kind == "inference")
            for batch in batches:
                images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
                difference = _difference(networks["ours"], networks["published"], images)
                measured = measure(_functions(networks, images, kind == "training"), device, rounds)
                for name, m in measured.items():
                    yield Row(
                        *(path.stem, kind, batch, name, m.median_ms, m.best_ms),
                        to_plain=m.median_ms / measured["plain"].median_ms,
                        speedup=measured["published"].median_ms / m.median_ms,
                        steps=step_cost(pattern) if name == "published" and "resnext" not in arch else None,
                        difference=difference if name == "ours" else None,
                    )


def _networks(
    arch: str, pattern: DilationPattern, device: torch.device, layout: torch.memory_format, fused: bool
) -> dict[str, nn.Module]:
    # The published form has no assignment; without one, no network has to put channels back in order.
    unassigned = tuple(replace(layer, assignment=None) for layer in pattern.layers)
    ours: nn.Module = ic_resnet(arch, pattern=replace(pattern, layers=unassigned))
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, ICConv2d)}
    published = replace_modules(
        copy.deepcopy(ours), {name: PublishedLayer(layer) for name, layer in layers.items()}
    )
    networks = {"plain": ic_resnet(arch), "published": published, "ours": ours}
    for network in networks.values():
        network.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    if fused:
        networks |= {f"{name}, fused": fuse(networks[name]) for name in ("plain", "ours")}
    return networks


def _functions(
    networks: Mapping[str, nn.Module], images: Tensor, train: bool
) -> dict[str, Callable[[], object]]:
    functions: dict[str, Callable[[], object]] = {}
    for name, network in networks.items():
        network.train(train)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4) if train else None
        functions[name] = (
            partial(_train, network, images, optimizer) if optimizer else partial(_infer, network, images)
        )
    return functions


def _difference(network: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    outputs = [_infer(n.eval(), images) for n in (network, other)]
    return float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())


@torch.inference_mode()
def _infer(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)


def _train(network: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of stochastic gradient descent."""
    optimizer.zero_grad()
    loss = F.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long, device=images.device))
    loss.backward()
    optimizer.step()
