# SPDX-License-Identifier: Apache-2.0
"""What a found network scores before any training, its weights copied from the supernet or refitted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ic_conv.pattern import DilationPattern
from search.compare import SUPERNET, CompareOptions, trained
from search.compare.setting import calibration
from search.data import ScatteredDigits
from search.engine import evaluate
from search.refit import warm_start
from search.strategies import EDOStrategy, HandStrategy, RandomStrategy, SearchTask
from search.tasks import Task


def one_shot_scores(
    work_dir: Path, seed: int, images: int, val_images: int = 1000, kernel: int = 9
) -> Iterator[tuple[str, dict[str, float]]]:
    """Scores of a finished supernet of `search.compare`, and of networks with patterns made from it.

    Yields:
        A name, and the figures of `evaluate` with the pattern's share of plain channels.

    Raises:
        ValueError: the supernet is not there.
    """
    task = trained(CompareOptions(work_dir, kernel=kernel), seed, SUPERNET)
    val = ScatteredDigits("val", length=val_images)
    batches = calibration(seed, images)
    search = replace(SearchTask.of(task.network, seed=seed), batches=lambda: batches)
    yield SUPERNET, {**evaluate(task, val, device="cpu"), "plain_share": 1.0}
    for strategy in (EDOStrategy(), EDOStrategy("refit"), RandomStrategy(), HandStrategy()):
        pattern = strategy.search(search)
        name = strategy.name + (f" {strategy.criterion}" if isinstance(strategy, EDOStrategy) else "")
        for init in ("crop", "refit"):
            yield f"{name}, {init}", _score(task, pattern, search, init, val)


def _score(
    task: Task, pattern: DilationPattern, search: SearchTask, init: str, val: ScatteredDigits
) -> dict[str, float]:
    found = copy.deepcopy(task)
    found.network = warm_start(found.network, pattern, search.batches, init=init, inplace=True)  # type: ignore[arg-type]
    share = sum(layer.plain_share for layer in pattern.layers) / len(pattern.layers)
    return {**evaluate(found, val, device="cpu"), "plain_share": share}
