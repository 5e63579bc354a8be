# SPDX-License-Identifier: Apache-2.0
"""Run time of whole backbones beside the published one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ic_conv import models
from ic_conv.benchmark.measure import measure
from ic_conv.complexity import count
from ic_conv.pattern import DilationPattern, LayerPattern

BASELINE = "ResNet-50"


@dataclass(frozen=True)
class Row:
    """One network: time of a forward pass in evaluation mode, its ratio to ResNet-50's in the same run.

    published_gpu_ms and published_cpu_ms are the authors' figures, on a TITAN Xp and a Xeon E5-2660 v4.
    """

    network: str
    params_m: float
    flops_g: float
    median_ms: float
    best_ms: float
    peak_mib: float | None
    ratio: float | None
    published_gpu_ms: float | None
    published_cpu_ms: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def spread_pattern(largest: int = 4) -> DilationPattern:
    """A pattern for ResNet-50 that spreads each layer's channels evenly over all dilations: many branches."""
    dilations = [(dy, dx) for dy in range(1, largest + 1) for dx in range(1, largest + 1)]
    widths = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    layers = tuple(LayerPattern.from_counts(dict.fromkeys(dilations, w // len(dilations))) for w in widths)
    return DilationPattern(layers, kernel=2 * largest + 1)


# Each with the published milliseconds on a GPU and on a CPU.
NETWORKS: dict[str, tuple[Callable[[DilationPattern], nn.Module], float | None, float | None]] = {
    "ResNet-50": (lambda pattern: models.ic_resnet50(), 11.4, 895.4),
    "ResNet-101": (lambda pattern: models.ic_resnet101(), 18.9, 967.4),
    "RedNet-38": (lambda pattern: models.rednet38(), 11.4, 156.3),
    "RedNet-50": (lambda pattern: models.rednet50(), 14.3, 211.2),
    "CedNet-50": (lambda pattern: models.cednet50(), None, None),
    "IC-ResNet-50": (lambda pattern: models.ic_resnet50(pattern=pattern), None, None),
}


def benchmark(
    names: Iterable[str],
    device: torch.device,
    batch: int = 8,
    size: int = 224,
    rounds: int = 10,
    channels_last: bool = False,
    pattern: DilationPattern | None = None,
) -> Iterator[Row]:
    """Measures the named networks in turn, in float32.

    Args:
        names: keys of NETWORKS.
        channels_last: memory layout of images and weights.
        pattern: of IC-ResNet-50; None spreads channels evenly over dilations up to 4.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    pattern = pattern or spread_pattern()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    networks = {name: NETWORKS[name][0](pattern).eval().to(device) for name in names}
    for network in networks.values():
        network.to(memory_format=layout)  # type: ignore[call-overload]
    functions = {name: partial(_forward, network, images) for name, network in networks.items()}
    measured = measure(functions, device, rounds)
    for name, m in measured.items():
        cost = count(networks[name], (3, size, size))
        yield Row(
            name,
            cost.params / 1e6,
            cost.flops / 1e9,
            m.median_ms,
            m.best_ms,
            m.peak_mib,
            m.median_ms / measured[BASELINE].median_ms if BASELINE in measured else None,
            *NETWORKS[name][1:],
        )


@torch.inference_mode()
def _forward(network: nn.Module, images: Tensor) -> Any:
    return network(images)
