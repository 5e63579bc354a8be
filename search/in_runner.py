# SPDX-License-Identifier: Apache-2.0
"""What a search does in a running training of MMEngine: `DilationSearchHook` says when."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from ic_conv.checkpoint import pattern_of, without_prefix
from ic_conv.convert import apply_pattern, searchable_layers
from ic_conv.openmmlab._runner_parts import (
    agreed,
    backbone_of,
    backbones_of,
    change_backbones,
    optimizers_of,
    undisturbed,
    unwrapped,
)
from ic_conv.pattern import DilationPattern
from search.criteria import criterion as known_criterion
from search.in_training import kept_counts, plain_where_frozen, shrink
from search.on_task import TaskBatches, search_task
from search.refit import Init, crop, estimate_batch_norms, warm_start
from search.space import DilationSpace
from search.strategies import STRATEGIES, EDOStrategy, SearchTask, Strategy
from search.supernet import open_candidates, space_of, super_layers

VALIDATED = ("single-path", "histogram")  # strategies that hold a quarter of the batches out


@dataclass
class BackboneSearch:
    """Finds a pattern for the backbone of a running training, and goes on with the network that has it.

    Args:
        strategy, criterion, init, calibration_batches, seed, kernel_size, options: see `DilationSearchHook`.

    Attributes:
        space: in which a plain network is searched; None: the backbone is a supernet, which has its own.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    strategy: str
    criterion: str
    init: Init
    calibration_batches: int
    seed: int
    kernel_size: int | None
    options: Mapping[str, Any]
    space: DilationSpace | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {self.strategy!r}")
        known_criterion(self.criterion)
        self._finder()
        if self.init not in ("crop", "refit"):
            raise ValueError(f"init must be one of crop, refit; got {self.init!r}")
        if self.calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {self.calibration_batches}")
        if STRATEGIES[self.strategy].needs_plain:
            self.space = DilationSpace(9 if self.kernel_size is None else self.kernel_size)
        elif self.kernel_size is not None:
            raise ValueError(
                f"a supernet has its own kernel_size, got {self.kernel_size} for the strategy {self.strategy}"
            )

    @property
    def needs(self) -> str:
        """The backbone, in words."""
        if self.space is None:
            return "a supernet (type='SuperResNet')"
        return f"a plain network (type='ICResNet' without pattern) for the strategy {self.strategy}"

    def open_layers(self, runner: Any) -> dict[str, Any]:
        """The layers whose dilations are open, by name: none after the last search."""
        backbone = backbone_of(runner.model)
        grown = super_layers(backbone)
        if self.space is None:
            return grown
        return {} if grown else searchable_layers(backbone, self.space.base_kernel)

    def check(self, runner: Any) -> None:
        """Called before the first step; raises ValueError if the search could not be made."""
        task, batches = self._task(runner)
        if len(batches) < 4 and (self.strategy in VALIDATED or self.options.get("validation_steps")):
            raise ValueError(
                f"the strategy {self.strategy} holds a quarter of its batches out: calibration_batches and "
                f"the training data must give at least 4, got {len(batches)}"
            )
        self._finder().check(task)

    def narrow(self, runner: Any, number: int, searches: int) -> None:
        """The first, second, ... of several searches: leaves each channel its best candidates."""
        with undisturbed():
            task, batches = self._task(runner)
            count = kept_counts(len(task.space.candidates), searches)[number - 1]
            finder = self._finder()
            assert isinstance(finder, EDOStrategy)
            self._shrink(runner, agreed(finder.narrowed(task, count)))
            for backbone in backbones_of(runner):
                estimate_batch_norms(backbone, batches)
        runner.logger.info(f"each channel keeps {count} of {len(task.space.candidates)} dilations")

    def finish(self, runner: Any, when: Mapping[str, int]) -> None:
        """Finds the pattern, writes it, and switches the network to it."""
        with undisturbed():
            task, batches = self._task(runner)
            pattern = agreed(self._finder().search(task))
            pattern = replace(pattern, meta=self._provenance(runner, when) | dict(pattern.meta))
            if self.space is not None:
                pattern = plain_where_frozen(pattern, backbone_of(runner.model))
            change = self._change(pattern)

            def start(backbone: nn.Module) -> None:
                if self.space is None:
                    warm_start(backbone, pattern, lambda: batches, init=self.init, inplace=True)
                else:
                    estimate_batch_norms(change(backbone), batches)

            change_backbones(runner, start, change)
        path = Path(runner.work_dir) / "pattern.json"
        if is_main_process():
            pattern.save(path)
        runner.logger.info(f"{pattern.summary()}\nthe training goes on with the pattern {path}")

    def take_up(self, runner: Any, state: Mapping[str, Tensor]) -> None:
        """Makes the layers that a checkpoint's weights are for."""
        if not (layers := self.open_layers(runner)):
            return
        found = pattern_of(without_prefix(state, f"{next(iter(layers))}.weight"))
        if found is not None:
            space = self.space or space_of(backbone_of(runner.model))
            pattern = replace(found, kernel=space.kernel, base_kernel=space.base_kernel)
            change_backbones(runner, self._change(pattern))

    def stay_narrow(self, runner: Any) -> None:
        """A training that goes on keeps the zeros that earlier searches have left."""
        layers = self.open_layers(runner)
        self._shrink(runner, {name: open_candidates(layer) for name, layer in layers.items()})

    def _shrink(self, runner: Any, kept: Mapping[str, NDArray[np.bool_]]) -> None:
        for backbone in backbones_of(runner):
            shrink(backbone, kept, optimizers_of(runner))

    def _change(self, pattern: DilationPattern) -> Callable[[nn.Module], nn.Module]:
        """What gives a backbone the pattern, in place."""
        if self.space is None:
            return partial(crop, pattern=pattern)
        return partial(apply_pattern, pattern=pattern, inplace=True)

    def _finder(self) -> Strategy:
        kind = STRATEGIES[self.strategy]
        own = {"criterion": self.criterion} if kind is EDOStrategy else {}
        try:
            usual = kind()
            given = {
                name: replace(getattr(usual, name), **value) if isinstance(value, Mapping) else value
                for name, value in self.options.items()
            }
            return kind(**own, **given)
        except (TypeError, AttributeError) as error:
            known = ", ".join(name for name in inspect.signature(kind).parameters if name not in own)
            raise ValueError(
                f"the strategy {self.strategy} has {f'the options {known}' if known else 'no options'}, "
                f"got {dict(self.options)}: {error}"
            ) from error

    def _task(self, runner: Any) -> tuple[SearchTask, TaskBatches]:
        batches = training_batches(runner, self.calibration_batches, self.seed)
        return search_task(backbone_of(runner.model), batches, self.seed, self.space), batches

    def _provenance(self, runner: Any, when: Mapping[str, int]) -> dict[str, Any]:
        name = runner.cfg.filename
        options = json.loads(json.dumps(self.options, default=lambda value: type(value).__name__))
        return {
            "architecture": Path(name).stem if name else type(backbone_of(runner.model)).__name__,
            "strategy": self.strategy,
            **({"options": options} if options else {}),
            "data": type(runner.train_dataloader.dataset).__name__,
            "seed": self.seed,
            "versions": {name: version(name) for name in ("ic-conv", "torch", "numpy")},
            **({"init": self.init} if self.space is None else {}),
            "calibration_batches": self.calibration_batches,
            "training": dict(when),
        }


def training_batches(runner: Any, most: int, seed: int) -> TaskBatches:
    """Batches of the training data as its pipeline makes them, chosen by the seed."""
    live = runner.train_dataloader
    size = live.batch_sampler.batch_size

    def loader() -> DataLoader[Any]:
        """The training's own loader may be in use, and its order moves on."""
        order = RandomSampler(live.dataset, generator=torch.Generator().manual_seed(seed))
        return DataLoader(
            live.dataset,
            size,
            sampler=order,
            num_workers=live.num_workers,
            collate_fn=live.collate_fn,
            worker_init_fn=live.worker_init_fn,
        )

    count = min(most, -(-len(live.dataset) // size))
    return TaskBatches(unwrapped(runner.model), loader, count, seed)
