# SPDX-License-Identifier: Apache-2.0
"""The methods: where each one's pattern comes from, what its network starts from and what all of it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ic_conv.pattern import DilationPattern
from search.assignment import TARGETS
from search.compare import finders
from search.compare.finders import SEARCH_STEPS, PatternMaker
from search.compare.setting import (
    CALIBRATION,
    IMAGES,
    NARROWED,
    PLAIN,
    SUPERNET,
    CompareOptions,
    training_flops,
)
from search.criteria import CRITERIA, DEFAULT_CRITERION
from search.narrowing import Narrower
from search.strategies import DartsStrategy, EDOStrategy, RFNextStrategy, SinglePathStrategy
from search.tasks import Task

FOUND, REFIT, KEEP = f"edo {DEFAULT_CRITERION}", " + refit", " + keep"
GRADIENT_IMAGES, GROWING_IMAGES = 2048, 256
FRESH_STEPS = 300  # of a search from random weights
NARROWINGS = 2  # searches in the midst of a training, evenly spread
Grow = Callable[[Task, CompareOptions, int], DilationPattern]


@dataclass(frozen=True)
class Method:
    """How a network comes about.

    Args:
        pattern: finds its pattern for a seed; None: it is plain.
        needs: runs that must be finished before.
        steps: of its own training, as a multiple of the comparison's.
        supernet: it is the supernet itself.
        narrow: makes what ranks candidates in searches in the midst of the supernet's training.
        start: the finished network whose weights it starts from: those of a supernet are fitted to the
            pattern, those of the plain network are kept as they are. None: random ones.
        plain_images, supernet_images: that the search sends through either network, forward and backward. A
            pass that collects statistics costs less and counts as much.
        grow: instead of `pattern`, finds one for the network itself when it has learned for an eighth of its
            steps. The search takes its share of them.
    """

    pattern: PatternMaker | None = None
    needs: tuple[str, ...] = ()
    steps: float = 1
    supernet: bool = False
    narrow: Callable[[CompareOptions, int], Narrower] | None = None
    start: str | None = None
    plain_images: int = 0
    supernet_images: int = 0
    grow: Grow | None = None

    def training_steps(self, options: CompareOptions) -> int:
        steps = round(self.steps * options.steps)
        return steps if self.grow is None else max(2, steps - -(-self.plain_images // options.batch_size))

    def flops(self, options: CompareOptions) -> float:
        """Of the search and of its own training, without the runs that it needs."""
        trained = self.training_steps(options) * options.batch_size
        plain, grown = self.plain_images, self.supernet_images
        if self.narrow is not None:
            grown += CALIBRATION * NARROWINGS
        if self.start == PLAIN:
            plain += CALIBRATION  # its batch norms are estimated anew
        elif self.start is not None:
            grown += CALIBRATION  # it is fitted
        if self.supernet:
            grown += trained
        else:
            plain += trained
        return plain * training_flops() + grown * training_flops(options.kernel)


def methods() -> dict[str, Method]:
    """All of them by name."""
    patterned = _with_patterns()
    every = {PLAIN: Method(finders.plain), **patterned}
    grow = partial(finders.grown, images=GROWING_IMAGES)
    grown = Method(steps=2, plain_images=2 * GROWING_IMAGES, grow=grow)
    return {
        SUPERNET: Method(supernet=True),
        PLAIN: Method(),
        # The FLOPs of the growing network, and about its seconds where branches are computed as on a CPU.
        **{f"{PLAIN} x{steps:g} steps": Method(steps=steps) for steps in (2, 2.75)},
        "hand x2 steps": Method(patterned["hand"].pattern, steps=2),
        "gradient grown": grown,
        "gradient grown cpu": replace(grown, grow=partial(grow, limits=TARGETS["cpu"])),
        **patterned,
        **_narrowed(patterned),
        **{
            name + REFIT: replace(method, needs=_both(method.needs, SUPERNET), start=SUPERNET)
            for name, method in every.items()
        },
        **{
            name + KEEP: replace(method, needs=_both(method.needs, PLAIN), start=PLAIN)
            for name, method in every.items()
            if SUPERNET not in method.needs
        },
    }


def _with_patterns() -> dict[str, Method]:
    """Those whose networks start from random weights, with a pattern."""
    gradients = {"gradient": 0.5, "gradient quarter": 0.25}  # shares of moved channels
    peer = finders.by_peer
    return {
        **{
            f"edo {name}": Method(
                partial(finders.by_edo, criterion=name), (SUPERNET,), supernet_images=CALIBRATION
            )
            for name in CRITERIA
        },
        f"{FOUND} shuffled": Method(_shuffle(FOUND), (SUPERNET,), supernet_images=CALIBRATION),
        **{name: Method(partial(finders.by_strategy, name=name)) for name in ("hand", "uniform", "random")},
        # Correlating an image's maps by Fourier transforms costs less than its passes.
        **{
            name: Method(
                partial(finders.by_gradient, images=GRADIENT_IMAGES, share=share),
                (PLAIN,),
                plain_images=2 * GRADIENT_IMAGES,
            )
            for name, share in gradients.items()
        },
        # Two branches in each layer cost less than twice the network.
        "rfnext": Method(peer(RFNextStrategy), (PLAIN,), plain_images=2 * SEARCH_STEPS * IMAGES),
        # The same from random weights, which are not yet used to dilation 1.
        "rfnext fresh": Method(peer(RFNextStrategy, FRESH_STEPS), plain_images=2 * FRESH_STEPS * IMAGES),
        "darts": Method(peer(DartsStrategy), (PLAIN,), supernet_images=SEARCH_STEPS * IMAGES),
        # 50 trials with 4 batches, forward alone
        "single-path": Method(
            peer(SinglePathStrategy), (PLAIN,), supernet_images=(SEARCH_STEPS + 50 * 4 // 3) * IMAGES
        ),
        # Its trials start from the supernet. At most 40 of 40 steps, each with validations on 4 batches.
        "histogram": Method(finders.by_histogram, (SUPERNET,), plain_images=40 * (40 + 4 * 4 // 3) * IMAGES),
    }


def _narrowed(patterned: Mapping[str, Method]) -> dict[str, Method]:
    """The kernels of their supernets shrink in the training: by the search, or to a pattern that is given."""
    found = "edo narrowed"
    by_edo = Method(partial(finders.by_edo, supernet=NARROWED), (NARROWED,), supernet_images=CALIBRATION)
    given = {
        PLAIN: Method(finders.plain),
        "hand": patterned["hand"],
        "random": patterned["random"],
        "shuffled": Method(_shuffle(found), (NARROWED,)),
    }
    methods = {
        NARROWED: Method(supernet=True, narrow=lambda options, seed: EDOStrategy()),
        found: by_edo,
        found + REFIT: replace(by_edo, start=NARROWED),
    }
    for name, method in given.items():
        supernet, pattern = f"{NARROWED} to {name}", method.pattern
        assert pattern is not None
        methods[supernet] = Method(
            needs=method.needs, supernet=True, narrow=partial(finders.towards, pattern)
        )
        methods[f"{name} narrowed{REFIT}"] = Method(pattern, (supernet,), start=supernet)
    return methods


def _both(needs: tuple[str, ...], one: str) -> tuple[str, ...]:
    return needs if one in needs else (*needs, one)


def _shuffle(name: str) -> PatternMaker:
    return lambda options, seed: finders.shuffled(pattern_of(name, seed, options), seed)


def pattern_of(name: str, seed: int, options: CompareOptions) -> DilationPattern:
    """The pattern of a method, found once and kept, with the CPU seconds that it took in its meta."""
    path = options.path(seed, f"{name.removesuffix(REFIT).removesuffix(KEEP)}.json")
    if not path.exists():
        make = methods()[name].pattern
        assert make is not None
        start = time.process_time()
        pattern = make(options, seed)
        seconds = time.process_time() - start
        replace(pattern, meta={**pattern.meta, "search_seconds": round(seconds, 2)}).save(path)
    return DilationPattern.load(path)
