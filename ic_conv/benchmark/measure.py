# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of functions that do the same work, measured in turn."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 2**20
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measurement:
    """Median and quickest time of one call in milliseconds; peak memory above what was there, in MiB."""

    median_ms: float
    best_ms: float
    peak_mib: float | None


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 10, warmup: int = 2
) -> dict[str, Measurement]:
    """Measures all functions in the same run.

    Each round calls every function once, so that a change of the machine's load meets all of them.

    Args:
        functions: by name; each is called without arguments.
        device: on which they compute.
        rounds: timed calls of each.
        warmup: calls before, in which kernels are compiled and caches fill.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, device) * 1000)
    return {
        name: Measurement(
            statistics.median(times[name]), min(times[name]), _in_mib(peak_memory(function, device))
        )
        for name, function in functions.items()
    }


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that a call holds beyond those held before, its result included.

    On a CPU these are the process's resident bytes, whoever allocated them; None where Linux does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back freed memory, which the function could fill unseen
        _RESET.write_text("5")  # sets the peak to what is resident now
    except (OSError, AttributeError):
        return None
    before = _resident_peak()
    function()
    return _resident_peak() - before


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _in_mib(size: int | None) -> float | None:
    return None if size is None else size / MIB
