# SPDX-License-Identifier: Apache-2.0
"""Runs of the methods, each made once: finished ones lie as JSON files in the work folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ic_conv.convert import apply_pattern
from ic_conv.pattern import DilationPattern
from search.compare.catalogue import NARROWINGS, Method, methods, pattern_of
from search.compare.grow import GROW_AFTER, train_growing
from search.compare.records import in_processes, kept
from search.compare.setting import (
    PLAIN,
    CompareOptions,
    calibration,
    slim_resnet,
    task_of,
    trained,
)
from search.data import ScatteredDigits
from search.engine import evaluate, train
from search.engine.checkpoint import FINAL, STATE, read_checkpoint
from search.narrowing import NarrowHook, evenly
from search.refit import estimate_batch_norms, warm_start
from search.strategies import SearchTask
from search.supernet import convert_to_supernet
from search.tasks import Task

OTHER_IMAGES = 500  # added to the seed of what is trained on from another network


def run(name: str, seed: int, options: CompareOptions) -> dict[str, float]:
    """The figures of one run, finished before or made now: `evaluate`'s, and the share of plain channels.

    Raises:
        ValueError: it was made with other options.
    """
    path = options.path(seed, f"{name}.result.json")
    return kept(path, options.identity, lambda: _make(name, seed, options))


def with_cost(name: str, seed: int, options: CompareOptions) -> dict[str, float]:
    """A finished run's figures, and what it took with its search and all runs that it needed.

    Returns:
        What `run` does, `flops` (multiply-accumulates), and `seconds` of one core, nan where not recorded.
    """
    flops = seconds = 0.0
    for one in with_needs([name]):
        document = json.loads(options.path(seed, f"{one}.result.json").read_text(encoding="utf-8"))
        flops += methods()[one].flops(options)
        seconds += document.get("seconds") or float("nan")
    return {**run(name, seed, options), "flops": flops, "seconds": seconds}


def compare(
    options: CompareOptions, names: Sequence[str], seeds: Sequence[int], jobs: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Makes the runs of the named methods, and what they need, in `jobs` processes; yields each when done."""
    groups: dict[int, list[str]] = {}
    for name in with_needs(names):
        groups.setdefault(_depth(name), []).append(name)
    runs = [[(name, seed) for seed in seeds for name in groups[depth]] for depth in sorted(groups)]
    return in_processes(run, options, runs, jobs)


def with_needs(names: Sequence[str]) -> list[str]:
    """The names, and after each all that it needs."""
    every: dict[str, None] = {}
    for name in names:
        every |= dict.fromkeys((name, *with_needs(methods()[name].needs)))
    return list(every)


def _depth(name: str) -> int:
    """How many runs must follow one another before this one."""
    return max((1 + _depth(need) for need in methods()[name].needs), default=0)


def _make(name: str, seed: int, options: CompareOptions) -> dict[str, Any]:
    method = methods()[name]
    pattern = None if method.pattern is None else pattern_of(name, seed, options)
    training = options.training(seed, name, method.training_steps(options))
    folder, steps = options.path(seed, f"{name}.result"), method.training_steps(options)
    left = _steps_left(folder, steps)
    start = time.process_time()
    task = _start(name, seed, options, pattern)
    data = ScatteredDigits(seed=seed + OTHER_IMAGES * (method.start is not None))
    if method.grow is None:
        train(task, data, training, _narrowing(method, task, options, seed, steps))
    else:
        grow, at = method.grow, max(1, steps // GROW_AFTER)
        pattern = train_growing(task, data, training, at, lambda plain: grow(plain, options, seed))
    seconds = time.process_time() - start
    made = pattern if method.pattern else None
    search = 0.0 if made is None else made.meta.get("search_seconds")
    score = evaluate(task, ScatteredDigits("val", length=options.val_images), device="cpu")
    shares = [1.0] if pattern is None else [layer.plain_share for layer in pattern.layers]
    return {
        "result": {**score, "plain_share": sum(shares) / len(shares)},
        # Of an interrupted training only the last part was timed.
        "seconds": round(search + seconds * steps / left, 1) if left and search is not None else None,
    }


def _narrowing(
    method: Method, task: Task, options: CompareOptions, seed: int, steps: int
) -> list[NarrowHook]:
    """The searches in the midst of a supernet's training."""
    if method.narrow is None:
        return []
    batches = calibration(seed)
    at = evenly(steps, NARROWINGS + 1)
    return [NarrowHook(at, method.narrow(options, seed), SearchTask.of(task.network, batches, seed))]


def _steps_left(folder: Path, steps: int) -> int:
    """Of a training that may have been interrupted."""
    if (folder / FINAL).exists():
        return 0
    state = folder / STATE
    return steps - read_checkpoint(state)["step"] if state.exists() else steps


def _start(name: str, seed: int, options: CompareOptions, pattern: DilationPattern | None) -> Task:
    """The task before its training."""
    method = methods()[name]
    if method.start is not None:
        assert pattern is not None
        task, batches = trained(options, seed, method.start), calibration(seed)
        if method.start == PLAIN:
            task.network = apply_pattern(task.network, pattern, inplace=True)
            estimate_batch_norms(task.network, batches)
        else:
            task.network = warm_start(task.network, pattern, lambda: batches, inplace=True)
        return task
    torch.manual_seed(seed)
    network = slim_resnet()
    if method.supernet:
        network = convert_to_supernet(network, options.kernel, inplace=True)
    elif pattern is not None:
        network = apply_pattern(network, pattern, inplace=True)
    return task_of(network)
