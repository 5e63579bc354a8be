# SPDX-License-Identifier: Apache-2.0
"""The methods: where each one's pattern comes from, what its network starts from and what all of it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ic_conv.pattern import DilationPattern, LayerPattern
from search.compare.setting import (
    CALIBRATION,
    IMAGES,
    PLAIN,
    SUPERNET,
    CompareOptions,
    calibration,
    calibration_samples,
    slim_resnet,
    task_of,
    trained,
    training_flops,
)
from search.criteria import CRITERIA, DEFAULT_CRITERION
from search.data import ScatteredDigits, build_loader
from search.space import DilationSpace
from search.strategies import (
    STRATEGIES,
    DartsStrategy,
    EDOStrategy,
    GradientStrategy,
    HistogramStrategy,
    PlainTask,
    RFNextStrategy,
    SearchTask,
    SinglePathStrategy,
    Strategy,
)
from search.supernet import convert_to_supernet
from search.tasks import Task

FOUND, REFIT = f"edo {DEFAULT_CRITERION}", " + refit"
GRADIENT_IMAGES, GROWING_IMAGES = 2048, 256
SEARCH_STEPS, FRESH_STEPS = 200, 300  # of the peers, which search while a network trains
PatternMaker = Callable[[CompareOptions, int], DilationPattern]
Grow = Callable[[Task, CompareOptions, int], DilationPattern]


@dataclass(frozen=True)
class Method:
    """How a network comes about.

    Args:
        pattern: finds its pattern for a seed; None: it is plain.
        needs: runs that must be finished before.
        steps: of its own training, as a multiple of the comparison's.
        supernet: it is the supernet itself.
        refit: its weights start from the supernet's, fitted to the pattern.
        plain_images, supernet_images: that the search sends through either network, forward and backward. A
            pass that collects statistics costs less and counts as much.
        grow: instead of `pattern`, finds one for the network itself when it has learned for an eighth of its
            steps. The search takes its share of them.
    """

    pattern: PatternMaker | None = None
    needs: tuple[str, ...] = ()
    steps: float = 1
    supernet: bool = False
    refit: bool = False
    plain_images: int = 0
    supernet_images: int = 0
    grow: Grow | None = None

    def training_steps(self, options: CompareOptions) -> int:
        steps = round(self.steps * options.steps)
        return steps if self.grow is None else max(2, steps - -(-self.plain_images // options.batch_size))

    def flops(self, options: CompareOptions) -> float:
        """Of the search and of its own training, without the runs that it needs."""
        trained = self.training_steps(options) * options.batch_size
        plain = self.plain_images + (0 if self.supernet else trained)
        grown = self.supernet_images + CALIBRATION * self.refit + (trained if self.supernet else 0)
        return plain * training_flops() + grown * training_flops(options.kernel)


def methods() -> dict[str, Method]:
    """All of them by name."""
    patterned = {
        **{
            f"edo {name}": Method(partial(_by_edo, criterion=name), (SUPERNET,), supernet_images=CALIBRATION)
            for name in CRITERIA
        },
        f"{FOUND} shuffled": Method(_shuffled, (SUPERNET,), supernet_images=CALIBRATION),
        **{name: Method(partial(_by_strategy, name=name)) for name in ("hand", "uniform", "random")},
        # Correlating an image's maps by Fourier transforms costs less than its passes.
        **{
            name: Method(partial(_by_gradient, share=share), (PLAIN,), plain_images=2 * GRADIENT_IMAGES)
            for name, share in (("gradient", 0.5), ("gradient quarter", 0.25))
        },
    }
    patterned |= {
        # Two branches in each layer cost less than twice the network.
        "rfnext": Method(_peer(RFNextStrategy), (PLAIN,), plain_images=2 * SEARCH_STEPS * IMAGES),
        # The same from random weights, which are not yet used to dilation 1.
        "rfnext fresh": Method(_peer(RFNextStrategy, FRESH_STEPS), plain_images=2 * FRESH_STEPS * IMAGES),
        "darts": Method(_peer(DartsStrategy), (PLAIN,), supernet_images=SEARCH_STEPS * IMAGES),
        # 50 trials with 4 batches, forward alone
        "single-path": Method(
            _peer(SinglePathStrategy), (PLAIN,), supernet_images=(SEARCH_STEPS + 50 * 4 // 3) * IMAGES
        ),
    }
    # Its trials start from the supernet. At most 40 of 40 steps, each with validations on 4 batches.
    patterned["histogram"] = Method(_by_histogram, (SUPERNET,), plain_images=40 * (40 + 4 * 4 // 3) * IMAGES)
    refitted = {
        name + REFIT: replace(method, needs=tuple({SUPERNET, *method.needs}), refit=True)
        for name, method in {PLAIN: Method(_plain), **patterned}.items()
    }
    grown = Method(steps=2, plain_images=2 * GROWING_IMAGES, grow=partial(_grown, images=GROWING_IMAGES))
    return {
        SUPERNET: Method(supernet=True),
        PLAIN: Method(),
        # The FLOPs of the growing network, and about its seconds where branches are computed as on a CPU.
        **{f"{PLAIN} x{steps:g} steps": Method(steps=steps) for steps in (2, 2.75)},
        "gradient grown": grown,
        **patterned,
        **refitted,
    }


def pattern_of(name: str, seed: int, options: CompareOptions) -> DilationPattern:
    """The pattern of a method, found once and kept, with the CPU seconds that it took in its meta."""
    path = options.path(seed, f"{name.removesuffix(REFIT)}.json")
    if not path.exists():
        make = methods()[name].pattern
        assert make is not None
        start = time.process_time()
        pattern = make(options, seed)
        seconds = time.process_time() - start
        replace(pattern, meta={**pattern.meta, "search_seconds": round(seconds, 2)}).save(path)
    return DilationPattern.load(path)


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


def _by_edo(options: CompareOptions, seed: int, criterion: str = DEFAULT_CRITERION) -> DilationPattern:
    batches = calibration(seed)
    network = trained(options, seed, SUPERNET).network
    task = replace(SearchTask.of(network, seed=seed), batches=lambda: batches)
    return EDOStrategy(criterion).search(task)


def _shuffled(options: CompareOptions, seed: int) -> DilationPattern:
    return shuffled(pattern_of(FOUND, seed, options), seed)


def _by_strategy(options: CompareOptions, seed: int, name: str) -> DilationPattern:
    task = SearchTask.of(convert_to_supernet(slim_resnet(), options.kernel), seed=seed)
    return STRATEGIES[name]().search(task)


def _plain(options: CompareOptions, seed: int) -> DilationPattern:
    pattern = _by_strategy(options, seed, "uniform")
    layers = (LayerPattern.plain(layer.units, layer.name) for layer in pattern.layers)
    return replace(pattern, layers=tuple(layers))


def _by_gradient(options: CompareOptions, seed: int, share: float) -> DilationPattern:
    return _grown(trained(options, seed, PLAIN), options, seed, GRADIENT_IMAGES, share)


def _grown(
    task: Task, options: CompareOptions, seed: int, images: int, share: float = 0.5
) -> DilationPattern:
    batches = calibration_samples(seed, images)
    return GradientStrategy((share,)).search(_plain_task(task, lambda: batches, options, seed))


def _peer(strategy: Callable[..., Strategy], fresh_steps: int | None = None) -> PatternMaker:
    """By a strategy that trains a copy of the trained plain network, or for some steps that of a new one."""

    def find(options: CompareOptions, seed: int) -> DilationPattern:
        torch.manual_seed(seed)
        task = task_of(slim_resnet()) if fresh_steps else trained(options, seed, PLAIN)
        finder = strategy(steps=fresh_steps or SEARCH_STEPS)
        return finder.search(_plain_task(task, _other_images(seed), options, seed))

    return find


def _by_histogram(options: CompareOptions, seed: int) -> DilationPattern:
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
    plain = PlainTask(task, task.network, samples, _loss)
    return SearchTask.of_plain(plain, DilationSpace(options.kernel), seed)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch, mode="loss")["loss"]
