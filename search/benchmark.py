# SPDX-License-Identifier: Apache-2.0
"""What the search itself costs, without the training: the statistics pass, then criteria and assignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ic_conv.benchmark.measure import measure
from ic_conv.models import ic_resnet50, ic_resnet101
from search.criteria import CRITERIA, needs_correlations, needs_residuals
from search.statistics import collect
from search.strategies import EDOStrategy, SearchTask
from search.supernet import convert_to_supernet, space_of

BATCHES, BATCH_SIZE, IMAGE_SIZE = 8, 16, 64


def benchmark(device: torch.device, rounds: int = 3) -> list[dict[str, Any]]:
    """Time of the search's own work in interleaved rounds, medians.

    The statistics pass stands beside the forward passes of the same supernet, ResNet-50 k9, over 8 batches of
    16 images of 64 px; criteria and assignment are those of ResNet-101 k13 on one thread, moments given.
    """
    supernet = convert_to_supernet(ic_resnet50(out_indices=(0, 1, 2, 3)), 9).to(device).eval()
    supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    space = space_of(supernet)
    batches = [torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, device=device) for _ in range(BATCHES)]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            supernet(batch)

    passes: dict[str, Callable[[], Any]] = {
        "forward passes": forward,
        "statistics": lambda: collect(supernet, batches, space),
        "statistics for mse": lambda: collect(supernet, batches, space, residuals=True),
    }
    return _rows("ResNet-50 k9", passes, device, rounds) + _criteria(rounds)


def _criteria(rounds: int) -> list[dict[str, Any]]:
    large = convert_to_supernet(ic_resnet101(out_indices=(0, 1, 2, 3)), 13)
    task = SearchTask.of(large)
    moments = collect(large, [torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)], task.space)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # mse has its errors already; for refit see search.refit_cost
        work = {
            name: partial(EDOStrategy(name).from_moments, task, moments)
            for name in CRITERIA
            if not needs_residuals(name) and not needs_correlations(name)
        }
        return _rows("ResNet-101 k13, criteria", work, torch.device("cpu"), rounds)
    finally:
        torch.set_num_threads(threads)


def _rows(
    network: str, work: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Each piece of work with its ratio to the first."""
    seconds = {
        name: result.median_ms / 1000 for name, result in measure(work, device, rounds, warmup=1).items()
    }
    first = next(iter(seconds.values()))
    return [
        {"network": network, "work": name, "seconds": spent, "ratio": spent / first}
        for name, spent in seconds.items()
    ]
