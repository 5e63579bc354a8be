# SPDX-License-Identifier: Apache-2.0
"""How each method of the comparison finds its pattern, for a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ic_conv.pattern import DilationPattern, LayerPattern
from search.assign import best_candidates
from search.assignment import BranchLimits
from search.compare.setting import (
    IMAGES,
    PLAIN,
    SUPERNET,
    CompareOptions,
    calibration,
    calibration_samples,
    slim_resnet,
    task_of,
    trained,
)
from search.criteria import DEFAULT_CRITERION
from search.data import ScatteredDigits, build_loader
from search.space import DilationSpace
from search.strategies import (
    STRATEGIES,
    EDOStrategy,
    GradientStrategy,
    HistogramStrategy,
    PlainTask,
    SearchTask,
    Strategy,
)
from search.supernet import convert_to_supernet
from search.tasks import Task

SEARCH_STEPS = 200  # of the peers, which search while a network trains
PatternMaker = Callable[[CompareOptions, int], DilationPattern]


def shuffled(pattern: DilationPattern, seed: int) -> DilationPattern:
    """The same dilations dealt out anew over all layers: keeps the mix, loses the place."""
    pool = [dilation for layer in pattern.layers for dilation, count in layer.branches for _ in range(count)]
    order = np.random.default_rng([seed, 1]).permutation(len(pool))
    cards = iter(pool[index] for index in order)
    layers = (
        LayerPattern.from_assignment([next(cards) for _ in range(layer.units)], layer.name)
        for layer in pattern.layers
    )
    return replace(pattern, layers=tuple(layers))


def by_edo(
    options: CompareOptions, seed: int, criterion: str = DEFAULT_CRITERION, supernet: str = SUPERNET
) -> DilationPattern:
    batches = calibration(seed)
    network = trained(options, seed, supernet).network
    task = replace(SearchTask.of(network, seed=seed), batches=lambda: batches)
    return EDOStrategy(criterion).search(task)


@dataclass(frozen=True)
class Towards:
    """Narrows a supernet to a pattern that is given: candidates near a channel's dilation stay longest."""

    pattern: DilationPattern

    def narrowed(self, task: SearchTask, count: int) -> dict[str, NDArray[np.bool_]]:
        candidates = np.array(task.space.candidates)
        kept = {}
        for layer in self.pattern.layers:
            goal = np.array(layer.dilations)
            distance = np.abs(goal[:, None] - candidates).sum(2).astype(float)
            kept[str(layer.name)] = best_candidates(distance, count, layer.name)
        return kept


def towards(make: PatternMaker, options: CompareOptions, seed: int) -> Towards:
    return Towards(make(options, seed))


def by_strategy(options: CompareOptions, seed: int, name: str) -> DilationPattern:
    task = SearchTask.of(convert_to_supernet(slim_resnet(), options.kernel), seed=seed)
    return STRATEGIES[name]().search(task)


def plain(options: CompareOptions, seed: int) -> DilationPattern:
    pattern = by_strategy(options, seed, "uniform")
    layers = (LayerPattern.plain(layer.units, layer.name) for layer in pattern.layers)
    return replace(pattern, layers=tuple(layers))


def by_gradient(options: CompareOptions, seed: int, images: int, share: float) -> DilationPattern:
    return grown(trained(options, seed, PLAIN), options, seed, images, share)


def grown(
    task: Task,
    options: CompareOptions,
    seed: int,
    images: int,
    share: float = 0.5,
    limits: BranchLimits | None = None,
) -> DilationPattern:
    batches = calibration_samples(seed, images)
    return GradientStrategy((share,), limits=limits).search(_plain_task(task, lambda: batches, options, seed))


def by_peer(strategy: Callable[..., Strategy], fresh_steps: int | None = None) -> PatternMaker:
    """By a strategy that trains a copy of the trained plain network, or for some steps that of a new one."""

    def find(options: CompareOptions, seed: int) -> DilationPattern:
        torch.manual_seed(seed)
        task = task_of(slim_resnet()) if fresh_steps else trained(options, seed, PLAIN)
        finder = strategy(steps=fresh_steps or SEARCH_STEPS)
        return finder.search(_plain_task(task, _other_images(seed), options, seed))

    return find


def by_histogram(options: CompareOptions, seed: int) -> DilationPattern:
    torch.manual_seed(seed)
    task = trained(options, seed, SUPERNET)
    plain = PlainTask(task, task.network, _other_images(seed), _loss)
    return HistogramStrategy().search(replace(SearchTask.of(task.network, seed=seed), plain=plain))


def _other_images(seed: int) -> Callable[[], Iterable[Any]]:
    images = ScatteredDigits(seed=seed + 1000)
    return lambda: build_loader(images, IMAGES)


def _plain_task(
    task: Task, samples: Callable[[], Iterable[Any]], options: CompareOptions, seed: int
) -> SearchTask:
    task_of_plain = PlainTask(task, task.network, samples, _loss)
    return SearchTask.of_plain(task_of_plain, DilationSpace(options.kernel), seed)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch, mode="loss")["loss"]
