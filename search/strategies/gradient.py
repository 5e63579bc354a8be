# SPDX-License-Identifier: Apache-2.0
"""Search without a supernet: where would a trained plain network grow, if its kernels were larger?

Its 3x3 kernels are thought of as large ones that are zero outside. The gradient of the task's loss on the
zeros says how much a channel would gain from taps there. It is the correlation of a layer's input with the
gradient of its output, so the network runs as it is, forward and backward, and nothing is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from ic_conv.convert import apply_pattern
from ic_conv.pattern import PLAIN, DilationPattern, LayerPattern
from search.assignment import BranchLimits, UnitLimits, solve
from search.gains import Gains, measure_gains
from search.space import DilationSpace
from search.strategies.base import PlainTask, SearchTask, Strategy

DEFAULT_SHARES = (0.5,)
SHARES = (0.0, 0.25, 0.5, 0.75)  # that a validation tries
_LEARNING_RATE = 1e-3


class GradientStrategy(Strategy):
    """Moves a share of the units of each layer to that dilation on whose taps the loss has most gradient.

    Moved are the units with most to gain; the others stay plain.

    Args:
        shares: of moved units; one for all stages, or one for each. A stage is the layers whose outputs have
            one size.
        validation_steps: instead of taking `shares` as they are, choose them: `SHARES` are tried for all
            stages together, then the neighbours of the best for one stage after the other. A trial trains the
            network with its pattern for so many steps and takes the loss on the last quarter of the batches.
        limits: sizes and number of branches that run fast. The plain channels are one of the branches, and as
            many channels move as come nearest to the share.

    Raises:
        ValueError: a share does not lie between 0 and 1, there is none, or the steps are negative.
    """

    name = "gradient"
    needs_plain = True

    def __init__(
        self,
        shares: Sequence[float] = DEFAULT_SHARES,
        validation_steps: int = 0,
        limits: BranchLimits | None = None,
    ) -> None:
        self.shares, self.validation_steps, self.limits = tuple(shares), validation_steps, limits
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares of moved units must lie between 0 and 1, got {list(self.shares)}")
        if validation_steps < 0:
            raise ValueError(f"validation steps must be at least 0, got {validation_steps}")

    def check(self, task: SearchTask) -> None:
        """Torch's reentrant checkpoints, which OpenMMLab's own backbones use, allow no `autograd.grad`."""
        modules = task.plain.network.named_modules() if task.plain else ()
        name = next((name for name, module in modules if getattr(module, "with_cp", False)), None)
        if name is not None:
            raise ValueError(f"{name}: the strategy gradient needs with_cp=False, got True")
        self._unit_limits(task)

    def search(self, task: SearchTask) -> DilationPattern:
        if task.plain is None:
            raise ValueError("the strategy gradient needs a trained plain network, got none")
        gains = measure_gains(task.plain, task.space, task.units)
        stages = list(dict.fromkeys(gain.size for gain in gains.values()))
        limits = self._unit_limits(task)

        def pattern_of(shares: Sequence[float]) -> DilationPattern:
            return moved(task.space, gains, stages, shares, limits)

        losses: dict[tuple[float, ...], float] = {}
        if self.validation_steps:
            shares = self._chosen(task, len(stages), pattern_of, losses)
        elif len(self.shares) in (1, len(stages)):
            shares = self.shares * (len(stages) // len(self.shares))
        else:
            raise ValueError(f"shares must be one, or {len(stages)} for the stages; got {len(self.shares)}")
        meta: dict[str, Any] = {"moved_shares": list(shares)}
        if losses:
            tried = sorted(losses.items(), key=lambda item: item[1])
            meta["validation_loss"] = [[*map(float, key), round(loss, 6)] for key, loss in tried]
        return replace(pattern_of(shares), meta=meta)

    def _chosen(
        self,
        task: SearchTask,
        stages: int,
        pattern_of: Callable[[Sequence[float]], DilationPattern],
        losses: dict[tuple[float, ...], float],
    ) -> tuple[float, ...]:
        """The shares of least validation loss; `losses` takes all that were tried."""
        assert task.plain is not None
        plain = task.plain

        def loss_of(shares: tuple[float, ...]) -> float:
            if shares not in losses:
                losses[shares] = validation_loss(plain, pattern_of(shares), self.validation_steps, task.seed)
            return losses[shares]

        best = min(((share,) * stages for share in SHARES), key=loss_of)
        for stage in range(stages):
            place = SHARES.index(best[stage])
            near = [SHARES[i] for i in (place, place - 1, place + 1) if 0 <= i < len(SHARES)]
            best = min(((*best[:stage], share, *best[stage + 1 :]) for share in near), key=loss_of)
        return best

    def _unit_limits(self, task: SearchTask) -> dict[str, UnitLimits]:
        """The limits in units of each layer; empty where there are none.

        Raises:
            ValueError: a layer is too small for them, or no channel could move beside the plain ones.
        """
        if self.limits is None or self.limits.free or task.plain is None:
            return {}
        if self.limits.max_branches == 1:
            raise ValueError("plain and moved channels take at least 2 branches, got max branches 1")
        network = task.plain.network
        return {
            name: self.limits.of_layer(units, len(network.get_parameter(f"{name}.weight")), name)
            for name, units in task.units.items()
        }


def moved(
    space: DilationSpace,
    gains: Mapping[str, Gains],
    stages: Sequence[tuple[int, int]],
    shares: Sequence[float],
    limits: Mapping[str, UnitLimits] | None = None,
) -> DilationPattern:
    """The pattern that moves the share of its stage in every layer, within the layers' limits."""
    layers = []
    dilated = [dilation for dilation in space.candidates if dilation != PLAIN]
    columns = [space.candidates.index(dilation) for dilation in dilated]
    for name, gain in gains.items():
        offered = gain.gain[:, columns]
        units, rule = len(offered), (limits or {}).get(name)
        share = shares[stages.index(gain.size)]
        count = round(share * units) if rule is None else _count_within(rule, share)
        chosen = np.argsort(-offered.max(1), kind="stable")[:count]
        if rule is None or not count:
            best = offered[chosen].argmax(1)
        else:
            rule = replace(rule, units=count, most=rule.most - 1)
            best = solve(offered.max() - offered[chosen], rule).candidate
        assignment = [PLAIN] * units
        for unit, index in zip(chosen.tolist(), best.tolist(), strict=True):
            assignment[unit] = dilated[index]
        layers.append(LayerPattern.from_assignment(assignment, name))
    return DilationPattern(tuple(layers), space.kernel, space.base_kernel)


def _count_within(rule: UnitLimits, share: float) -> int:
    """How many units move: whole branches that leave the plain ones a whole branch or nothing."""
    counts = [
        count
        for count in range(0, rule.units + 1, rule.multiple)
        if all(size == 0 or size >= rule.least for size in (count, rule.units - count))
    ]
    return min(counts, key=lambda count: abs(count - share * rule.units))


def validation_loss(plain: PlainTask, pattern: DilationPattern, steps: int, seed: int) -> float:
    """Trains a copy of the network with the pattern on three quarters of the batches, and tests on the rest.

    Raises:
        ValueError: there are fewer than four batches.
    """
    batches = list(plain.samples())
    held = len(batches) // 4
    if not held:
        raise ValueError(f"shares are chosen on a quarter of the batches: at least 4, got {len(batches)}")
    model, network = copy.deepcopy((plain.model, plain.network))
    names = set(pattern.names)
    apply_pattern(network, pattern, filter_fn=lambda module, name: name in names, inplace=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
        model.train()
        for batch in islice(cycle(batches[:-held]), steps):
            optimizer.zero_grad()
            plain.loss(model, batch).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(np.mean([float(plain.loss(model, batch)) for batch in batches[-held:]]))
