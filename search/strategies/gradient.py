# SPDX-License-Identifier: Apache-2.0
"""Search without a supernet: where would a trained plain network grow, if its kernels were larger?

Its 3x3 kernels are thought of as large ones that are zero outside. The gradient of the task's loss on the
zeros says how much a channel would gain from taps there. It is the correlation of a layer's input with the
gradient of its output, so the network runs as it is, forward and backward, and nothing is trained.

Legend: N images, O output channels, G groups, c input channels of a group, K size of the large kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ic_conv.convert import apply_pattern
from ic_conv.pattern import PLAIN, DilationPattern, LayerPattern
from search._correlator import Correlator, phases_of
from search.assign import unit_errors
from search.space import DilationSpace
from search.strategies.base import PlainTask, SearchTask, Strategy

DEFAULT_SHARES = (0.5,)
SHARES = (0.0, 0.25, 0.5, 0.75)  # that a validation tries
MERGED_IMAGES = 32  # whose maps are correlated together
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Gains:
    """What the units of a layer would gain.

    Attributes:
        gain: (units, candidates): squared gradient on a candidate's taps, times the channel's squared norm,
            which together do not depend on the scale that a batch norm removes.
        size: of the output map, by which layers form stages.
    """

    gain: NDArray[np.float64]
    size: tuple[int, int]


class GradientStrategy(Strategy):
    """Moves a share of the units of each layer to that dilation on whose taps the loss has most gradient.

    Moved are the units with most to gain; the others stay plain.

    Args:
        shares: of moved units; one for all stages, or one for each. A stage is the layers whose outputs have
            one size.
        validation_steps: instead of taking `shares` as they are, choose them: `SHARES` are tried for all
            stages together, then the neighbours of the best for one stage after the other. A trial trains the
            network with its pattern for so many steps and takes the loss on the last quarter of the batches.

    Raises:
        ValueError: a share does not lie between 0 and 1, there is none, or the steps are negative.
    """

    name = "gradient"
    needs_plain = True

    def __init__(self, shares: Sequence[float] = DEFAULT_SHARES, validation_steps: int = 0) -> None:
        self.shares, self.validation_steps = tuple(shares), validation_steps
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

    def search(self, task: SearchTask) -> DilationPattern:
        if task.plain is None:
            raise ValueError("the strategy gradient needs a trained plain network, got none")
        gains = measure_gains(task.plain, task.space, task.units)
        stages = list(dict.fromkeys(gain.size for gain in gains.values()))
        losses: dict[tuple[float, ...], float] = {}
        if self.validation_steps:
            shares = self._chosen(task, gains, stages, losses)
        elif len(self.shares) in (1, len(stages)):
            shares = self.shares * (len(stages) // len(self.shares))
        else:
            raise ValueError(f"shares must be one, or {len(stages)} for the stages; got {len(self.shares)}")
        meta: dict[str, Any] = {"moved_shares": list(shares)}
        if losses:
            tried = sorted(losses.items(), key=lambda item: item[1])
            meta["validation_loss"] = [[*map(float, key), round(loss, 6)] for key, loss in tried]
        return replace(moved(task.space, gains, stages, shares), meta=meta)

    def _chosen(
        self,
        task: SearchTask,
        gains: Mapping[str, Gains],
        stages: list[tuple[int, int]],
        losses: dict[tuple[float, ...], float],
    ) -> tuple[float, ...]:
        """The shares of least validation loss; `losses` takes all that were tried."""
        assert task.plain is not None
        plain = task.plain

        def loss_of(shares: tuple[float, ...]) -> float:
            if shares not in losses:
                pattern = moved(task.space, gains, stages, shares)
                losses[shares] = validation_loss(plain, pattern, self.validation_steps, task.seed)
            return losses[shares]

        best = min(((share,) * len(stages) for share in SHARES), key=loss_of)
        for stage in range(len(stages)):
            place = SHARES.index(best[stage])
            near = [SHARES[i] for i in (place, place - 1, place + 1) if 0 <= i < len(SHARES)]
            best = min(((*best[:stage], share, *best[stage + 1 :]) for share in near), key=loss_of)
        return best


def measure_gains(plain: PlainTask, space: DilationSpace, units: Mapping[str, int]) -> dict[str, Gains]:
    """The gains of every layer, from one forward and backward pass per batch.

    Raises:
        ValueError: there is no batch, a layer is not run, or an involution is among the layers.
    """
    layers: dict[str, nn.Conv2d] = {}
    for name in units:
        layer = plain.network.get_submodule(name)
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(f"{name}: the strategy gradient is for convolutions, got {type(layer).__name__}")
        layers[name] = layer
    sums: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, int]] = {}
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(name: str) -> None:
        x, gradient = (torch.cat(parts) for parts in zip(*waiting.pop(name), strict=True))
        layer = layers[name]
        stride, groups = (layer.stride[0], layer.stride[1]), layer.groups
        shape = space.kernel**2, groups, layer.out_channels // groups, layer.in_channels // groups
        sizes[name] = gradient.shape[2], gradient.shape[3]
        correlator = Correlator(phases_of(x, stride), gradient, space.kernel // 2, groups)
        correlator.add_cross(sums.setdefault(name, x.new_zeros(shape)), space.kernel, stride)

    for batch in plain.samples():
        for name, x, gradient in _gradients(plain, layers, batch):
            # A correlation costs nearly the same for any number of images.
            held = waiting.get(name)
            if held and (held[0][0].shape[1:] != x.shape[1:] or len(held) * len(x) >= MERGED_IMAGES):
                add(name)
            waiting.setdefault(name, []).append((x, gradient))
    for name in list(waiting):
        add(name)
    for name in units:
        if name not in sums:
            raise ValueError(f"{name}: no batch of the calibration data ran this layer")
    return {name: Gains(_gain(sums[name], layers[name], space, units[name]), sizes[name]) for name in units}


def _gain(gradient: Tensor, layer: nn.Conv2d, space: DilationSpace, units: int) -> NDArray[np.float64]:
    """(K * K, G, O / G, c) -> (units, candidates)"""
    power = gradient.double().square().sum(3).flatten(1).T.cpu()  # (O, K * K)
    norm = layer.weight.detach().double().square().sum((1, 2, 3)).cpu()
    taken = power[:, space.taps].sum(2) - power[:, space.kernel**2 // 2, None]  # all share the centre
    # Rounding differs between machines by an ulp or so; ties must not.
    found = unit_errors(taken * norm[:, None], units)
    return np.round(found / max(found.max(), np.finfo(np.float64).tiny), 9)


def moved(
    space: DilationSpace,
    gains: Mapping[str, Gains],
    stages: Sequence[tuple[int, int]],
    shares: Sequence[float],
) -> DilationPattern:
    """The pattern that moves the share of its stage in every layer."""
    layers = []
    dilated = [index for index, dilation in enumerate(space.candidates) if dilation != PLAIN]
    for name, gain in gains.items():
        best = gain.gain[:, dilated].argmax(1)
        worth = gain.gain[:, dilated].max(1)
        count = round(shares[stages.index(gain.size)] * len(worth))
        chosen = set(np.argsort(-worth, kind="stable")[:count].tolist())
        assignment = [
            space.candidates[dilated[index]] if unit in chosen else PLAIN for unit, index in enumerate(best)
        ]
        layers.append(LayerPattern.from_assignment(assignment, name))
    return DilationPattern(tuple(layers), space.kernel, space.base_kernel)


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


def _gradients(
    plain: PlainTask, layers: Mapping[str, nn.Conv2d], batch: Any
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, input and gradient of the output of each run of a layer, in evaluation mode."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def keep(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()  # a frozen stage's
            seen.append((name, inputs[0].detach(), output))
            return output.clone()  # what follows may change it in place

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    modes = {module: module.training for module in plain.model.modules()}
    plain.model.eval()
    try:
        with torch.enable_grad():
            loss = plain.loss(plain.model, batch)
            outputs = [output for *_, output in seen]
            found = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return [
        (name, x, gradient.detach())
        for (name, x, _), gradient in zip(seen, found, strict=True)
        if gradient is not None
    ]
