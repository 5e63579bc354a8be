# SPDX-License-Identifier: Apache-2.0
"""What a found network scores before any training, its weights copied from the supernet or refitted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ic_conv.pattern import DilationPattern
from search.compare import SUPERNET, slim_resnet
from search.data import ScatteredDigits, build_loader
from search.engine import evaluate
from search.engine.checkpoint import load_checkpoint
from search.refit import warm_start
from search.statistics import images_of
from search.strategies import EDOStrategy, HandStrategy, RandomStrategy, SearchTask
from search.supernet import convert_to_supernet
from search.tasks import Task, wrap


def one_shot_scores(
    work_dir: Path, seed: int, images: int, val_images: int = 1000, kernel: int = 9
) -> Iterator[tuple[str, dict[str, float]]]:
    """Scores of a finished supernet of `search.compare`, and of networks with patterns made from it.

    Yields:
        A name, and the figures of `evaluate` with the pattern's share of plain channels.

    Raises:
        ValueError: the supernet is not there.
    """
    supernet = convert_to_supernet(slim_resnet(), kernel, inplace=True)
    task = wrap(supernet, ScatteredDigits.num_classes)
    load_checkpoint(task, work_dir / f"seed{seed}" / f"{SUPERNET}.result" / "final.pt")
    val = ScatteredDigits("val", length=val_images)
    data = ScatteredDigits(length=images, seed=seed + 1000)
    batches = [images_of(batch) for batch in build_loader(data, 32)]
    search = replace(SearchTask.of(supernet, seed=seed), batches=lambda: batches)
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
