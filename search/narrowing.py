# SPDX-License-Identifier: Apache-2.0
"""A supernet's kernels shrink while it trains, so that its weights suit the pattern that it ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from mmengine.hooks import Hook
from numpy.typing import NDArray

from search.in_training import kept_counts, shrink
from search.strategies.base import SearchTask
from search.supernet import open_candidates, super_layers


class Narrower(Protocol):
    """Ranks candidates: `EDOStrategy` by a criterion."""

    def narrowed(self, task: SearchTask, count: int) -> dict[str, NDArray[np.bool_]]:
        """The `count` best candidates of each unit, bool (units, candidates) by layer."""


def evenly(steps: int, searches: int) -> tuple[int, ...]:
    """The steps after which to search in the midst of a training, so that the last search follows its end.

    Raises:
        ValueError: there are too few steps.

    Example:
        >>> evenly(600, 3)
        (200, 400)
    """
    if searches > steps:
        raise ValueError(f"each search needs a training step before it: {searches} searches, {steps} steps")
    return tuple(steps * number // searches for number in range(1, searches))


class NarrowHook(Hook):
    """Searches in the midst of a training: each search leaves a channel its best candidates, and zeros on the
    taps that none of them reads.

    Zeros stay zeros, so that a checkpoint says itself what is left; the search after the training, the last
    one, keeps to it.

    Args:
        at: steps after which to search, ascending.
        finder: ranks the candidates, as EDOStrategy does.
        task: of the supernet that trains.
    """

    priority = "LOW"  # before the state is saved

    def __init__(self, at: Sequence[int], finder: Narrower, task: SearchTask) -> None:
        self.at, self.finder, self.task = tuple(at), finder, task

    def __repr__(self) -> str:
        return f"searches after {', '.join(map(str, self.at))}"

    def before_train(self, runner: Any) -> None:
        """A resumed training keeps the zeros that its state has."""
        if runner.iter >= self.at[0]:
            assert self.task.supernet is not None
            layers = super_layers(self.task.supernet)
            self._shrink(runner, {name: open_candidates(layer) for name, layer in layers.items()})

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if (step := batch_idx + 1) in self.at:
            count = kept_counts(len(self.task.space.candidates), len(self.at) + 1)[self.at.index(step)]
            with torch.random.fork_rng():  # the training goes on as if nothing had been drawn
                self._shrink(runner, self.finder.narrowed(self.task, count))
            runner.logger.info(f"step {step}: each channel keeps {count} dilations")

    def _shrink(self, runner: Any, kept: Mapping[str, NDArray[np.bool_]]) -> None:
        assert self.task.supernet is not None
        shrink(self.task.supernet, kept, [runner.optim_wrapper.optimizer])
