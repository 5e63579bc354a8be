# SPDX-License-Identifier: Apache-2.0
"""Measures the layer times that `search.latency` predicts from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ic_conv.convert import apply_pattern, searchable_layers, units_of
from ic_conv.layers import ICConv2d
from ic_conv.pattern import DilationPattern, LayerPattern
from search.latency import Branches, Kind, LatencyTable, Row, device_name


def random_patterns(units: Mapping[str, int], largest: int, seed: int) -> Iterator[DilationPattern]:
    """Patterns of all sorts, one after the other: few and many branches, even and uneven ones.

    Args:
        units: of each layer, by name.
        largest: the largest dilation.
    """
    rng = np.random.default_rng(seed)
    while True:
        most, multiple = int(rng.choice([1, 2, 4, 8, 16])), int(rng.choice([1, 4, 8, 16]))
        reach = int(rng.integers(min(2, largest), largest + 1))
        layers = []
        for name, total in units.items():
            parts = max(1, total // multiple)
            count = min(int(rng.integers((most + 1) // 2, most + 1)), reach**2, parts)
            cuts = np.sort(rng.choice(np.arange(1, parts), count - 1, replace=False))
            sizes = np.diff([0, *cuts, parts]) * multiple
            sizes[0] += total - sizes.sum()
            places = rng.choice(reach**2, count, replace=False)
            counts = {
                (int(p) // reach + 1, int(p) % reach + 1): int(n) for p, n in zip(places, sizes, strict=True)
            }
            layers.append(LayerPattern.from_counts(counts, name))
        yield DilationPattern(tuple(layers), kernel=2 * max(largest, 2) + 1)


def measure_table(
    network: nn.Module,
    patterns: Iterable[DilationPattern],
    device: torch.device,
    name: str,
    *,
    batch_size: int = 1,
    image_size: int = 224,
    rounds: int = 5,
) -> LatencyTable:
    """Measures a plain network with each of the patterns in turn, in evaluation mode and channels_last.

    Args:
        network: its searchable layers get the patterns; it is not changed.
        name: of the network, for people.
        rounds: timed passes with each pattern; the median counts.
    """
    images = _images(batch_size, image_size, device)
    kinds: dict[str, Kind] = {}
    rows, rests = [], []
    for pattern in patterns:
        measured = measure_layers(with_pattern(network, pattern, device), images, rounds)
        kinds = {layer: kind for layer, (kind, _, _) in measured.layers.items()}
        rows += [Row(*values) for values in measured.layers.values()]
        rests.append(measured.total_ms - sum(ms for _, _, ms in measured.layers.values()))
    if not kinds:
        raise ValueError("a latency table needs at least one pattern to measure")
    rest = statistics.median(rests)
    threads = torch.get_num_threads()
    return LatencyTable(device_name(device), name, threads, batch_size, image_size, kinds, rest, tuple(rows))


def check_table(
    table: LatencyTable,
    network: nn.Module,
    patterns: Iterable[DilationPattern],
    device: torch.device,
    rounds: int = 5,
) -> Iterator[dict[str, float]]:
    """Predicts and measures the network with each of the patterns."""
    images = _images(table.batch_size, table.image_size, device)
    for pattern in patterns:
        measured = measure_network(with_pattern(network, pattern, device), images, rounds)
        predicted = table.predict(pattern)
        yield {
            "branches": sum(len(layer.branches) for layer in pattern.layers),
            "measured_ms": measured,
            "predicted_ms": predicted,
            "error_percent": 100 * (predicted / measured - 1),
        }


class _Measured(NamedTuple):
    total_ms: float
    layers: dict[str, tuple[Kind, Branches, float]]


def with_pattern(network: nn.Module, pattern: DilationPattern, device: torch.device) -> nn.Module:
    """The network as it is measured."""
    changed = apply_pattern(network, pattern).eval().to(device)
    return changed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.inference_mode()
def measure_layers(network: nn.Module, images: Tensor, rounds: int) -> _Measured:
    """Time of the network, and in the same passes of each of its inception convolutions; medians."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, ICConv2d)}
    times: dict[str, list[float]] = {name: [] for name in layers}
    kinds: dict[str, Kind] = {}
    clock = _clock(images.device)

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: times[name].append(-clock())

    def end(name: str) -> Callable[..., None]:
        def hook(layer: ICConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            times[name][-1] += clock()
            kinds[name] = Kind(
                layer.in_channels, layer.out_channels, layer.groups, layer.stride[0], *inputs[0].shape[2:]
            )

        return hook

    totals = []
    with ExitStack() as hooks:
        for name, layer in layers.items():
            for handle in (
                layer.register_forward_pre_hook(begin(name)),
                layer.register_forward_hook(end(name)),
            ):
                hooks.callback(handle.remove)
        for _ in range(2 + rounds):
            totals.append(-clock())
            network(images)
            totals[-1] += clock()
    return _Measured(
        1000 * statistics.median(totals[2:]),
        {
            name: (kinds[name], layer.pattern.branches, 1000 * statistics.median(times[name][2:]))
            for name, layer in layers.items()
        },
    )


@torch.inference_mode()
def measure_network(network: nn.Module, images: Tensor, rounds: int = 5) -> float:
    """Median milliseconds of a forward pass."""
    clock, totals = _clock(images.device), []
    for _ in range(2 + rounds):
        totals.append(-clock())
        network(images)
        totals[-1] += clock()
    return 1000 * statistics.median(totals[2:])


@dataclass(frozen=True)
class MeasuredLatency:
    """Measures a pattern on the supernet's device; the weights are the supernet's own, cropped.

    Args:
        supernet: made by `convert_to_supernet`.
        batch_size, image_size: of the images, image_size in pixels.
    """

    supernet: nn.Module
    batch_size: int = 1
    image_size: int = 224

    def __call__(self, pattern: DilationPattern) -> float:
        device = next(self.supernet.parameters()).device
        images = _images(self.batch_size, self.image_size, device)
        return measure_network(with_pattern(self.supernet, pattern, device), images)


def layer_units(network: nn.Module) -> dict[str, int]:
    """Units of the searchable layers of a plain network, by name."""
    return {name: units_of(layer) for name, layer in searchable_layers(network).items()}


def _images(batch_size: int, image_size: int, device: torch.device) -> Tensor:
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    return images.contiguous(memory_format=torch.channels_last)


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
