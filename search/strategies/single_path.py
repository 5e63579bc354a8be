# SPDX-License-Identifier: Apache-2.0
"""Single-path one-shot search (Guo et al., ECCV 2020): a supernet learns one random path per step, and Optuna
looks for the path of least validation loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ic_conv.pattern import DilationPattern, LayerPattern
from search.progress import bar
from search.space import DilationSpace
from search.strategies._training import batches_after, fit, grown_copy, held_out, loss_on
from search.strategies.base import SearchTask, Strategy


class OnePath(nn.Module):
    """Keeps of a large kernel the taps that each unit's candidate has.

    Attributes:
        choice: index of each unit's candidate.
    """

    def __init__(self, space: DilationSpace, units: int) -> None:
        super().__init__()
        self.choice = torch.zeros(units, dtype=torch.int64)
        self.masks: Tensor
        self.register_buffer("masks", space.tap_masks())

    def forward(self, weight: Tensor) -> Tensor:
        masks = self.masks[self.choice.to(self.masks.device)]
        return weight * masks.repeat_interleave(len(weight) // len(masks), 0)[:, None]


class SinglePathStrategy(Strategy):
    """A layer's units are cut into parts of one dilation each; a path is a choice for every part.

    Args:
        steps: of the supernet's training, which starts from the plain network's weights.
        trials: paths whose validation loss Optuna (TPE) looks at.
        parts: of each layer.
        progress: show how far training and trials are.

    Raises:
        ValueError: a value is not positive.
    """

    name = "single-path"
    needs_plain = True

    def __init__(self, steps: int = 200, trials: int = 50, parts: int = 4, progress: bool = False) -> None:
        if min(steps, trials, parts) < 1:
            raise ValueError(f"steps, trials and parts must be positive, got {steps}, {trials} and {parts}")
        self.steps, self.trials, self.parts, self.progress = steps, trials, parts, progress

    def search(self, task: SearchTask) -> DilationPattern:
        from search.study import StudyOptions, finished, open_study, work_on

        if task.plain is None:
            raise ValueError("the strategy single-path needs a trained plain network, got none")
        plain, candidates = task.plain, task.space.candidates
        validation = held_out(plain)
        model, layers = grown_copy(task, plain)
        paths = {name: OnePath(task.space, task.units[name]) for name in layers}
        for name, layer in layers.items():
            register_parametrization(layer, "weight", paths[name].to(layer.weight.device))
        rng = task.rng(len(paths))

        def take(choices: dict[str, Any]) -> None:
            for name, path in paths.items():
                path.choice = torch.from_numpy(self._dealt(choices[name], task.units[name]))

        def draw(step: int) -> None:
            take({name: rng.integers(len(candidates), size=self.parts) for name in paths})

        batches = batches_after(plain, len(validation))
        fit(model, plain, batches, self.steps, seed=task.seed, before_step=draw, progress=self.progress)

        def loss_of(trial: Any) -> tuple[float]:
            take({name: self._choices(trial, name, len(candidates)) for name in paths})
            return (loss_on(model, plain, validation),)

        options = StudyOptions(name=self.name, sampler="tpe", trials=self.trials)
        study = open_study(options, ("minimize",), {}, task.seed)
        with bar("trial", self.trials, self.progress) as report:
            work_on(study, loss_of, options, {}, report)
        take({name: [study.best_params[f"{name}.{part}"] for part in range(self.parts)] for name in paths})
        found = (
            LayerPattern.from_assignment([candidates[i] for i in path.choice.tolist()], name)
            for name, path in paths.items()
        )
        meta = {
            "search_steps": self.steps,
            "validation_loss": round(study.best_value, 6),
            "trials": finished(study),
        }
        return DilationPattern(tuple(found), task.space.kernel, task.space.base_kernel, meta)

    def _choices(self, trial: Any, name: str, count: int) -> list[int]:
        return [trial.suggest_categorical(f"{name}.{part}", range(count)) for part in range(self.parts)]

    def _dealt(self, choices: Any, units: int) -> np.ndarray:
        """The choice of each unit: parts are as equal as can be."""
        return np.asarray(choices, np.int64)[np.arange(units) * self.parts // units]
