# SPDX-License-Identifier: Apache-2.0
"""A soft choice of dilations, after DARTS (Liu et al., ICLR 2019): its shares learn with the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ic_conv.pattern import DilationPattern, LayerPattern
from search.space import DilationSpace
from search.strategies._training import LEARNING_RATE, batches_after, fit, grown_copy
from search.strategies.base import SearchTask, Strategy


class SoftTaps(nn.Module):
    """Scales the taps of a large kernel by the share of the candidates that keep them.

    Legend: U units, D candidates, K kernel.

    Attributes:
        logits: (U, D); their softmax gives a unit's shares.
    """

    def __init__(self, space: DilationSpace, units: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(units, len(space.candidates)))
        self.masks: Tensor
        self.register_buffer("masks", space.tap_masks().float())

    def forward(self, weight: Tensor) -> Tensor:
        shares = torch.einsum("ud,dij->uij", self.logits.softmax(1), self.masks)
        return weight * shares.repeat_interleave(len(weight) // len(shares), 0)[:, None]


class DartsStrategy(Strategy):
    """Grows a copy of the plain network, trains it with a softmax over each unit's candidates, and takes each
    unit's largest share. First order: weights and shares learn from the same batches.

    Args:
        steps: of the training.
        lr: learning rate of the softmax's logits, that of the weights being 0.001.
        progress: show how far the training is.

    Raises:
        ValueError: a value is not positive.
    """

    name = "darts"
    needs_plain = True

    def __init__(self, steps: int = 200, lr: float = 0.02, progress: bool = False) -> None:
        if steps < 1 or lr <= 0:
            raise ValueError(f"steps and learning rate must be positive, got {steps} and {lr}")
        self.steps, self.lr, self.progress = steps, lr, progress

    def search(self, task: SearchTask) -> DilationPattern:
        if task.plain is None:
            raise ValueError("the strategy darts needs a trained plain network, got none")
        model, layers = grown_copy(task, task.plain)
        taps = {name: SoftTaps(task.space, task.units[name]) for name in layers}
        for name, layer in layers.items():
            register_parametrization(layer, "weight", taps[name].to(layer.weight.device))
        logits = [soft.logits for soft in taps.values()]
        chosen = {id(logit) for logit in logits}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in chosen], "lr": LEARNING_RATE},
            {"params": logits, "lr": self.lr, "weight_decay": 0.0},
        ]
        batches = batches_after(task.plain, 0)
        fit(model, task.plain, batches, self.steps, seed=task.seed, groups=groups, progress=self.progress)
        candidates = task.space.candidates
        found = (
            LayerPattern.from_assignment([candidates[i] for i in soft.logits.argmax(1).tolist()], name)
            for name, soft in taps.items()
        )
        meta = {"search_steps": self.steps}
        return DilationPattern(tuple(found), task.space.kernel, task.space.base_kernel, meta)
