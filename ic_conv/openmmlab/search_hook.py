# SPDX-License-Identifier: Apache-2.0
"""The dilation search as a part of the training: of a detector, segmenter, pose estimator or classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from ic_conv.checkpoint import pattern_of, without_prefix
from ic_conv.convert import apply_pattern, searchable_layers
from ic_conv.layers import ICConv2d
from ic_conv.openmmlab._runner_parts import (
    agreed,
    backbone_of,
    backbones_of,
    change_backbones,
    length_of,
    optimizers_of,
    undisturbed,
    unwrapped,
)
from ic_conv.pattern import PLAIN, DilationPattern, LayerPattern

if TYPE_CHECKING:
    from search import SearchTask
    from search.on_task import TaskBatches
    from search.refit import Init

KEPT = "dilation_candidates"  # in checkpoints: what the searches so far have left


@HOOKS.register_module()
class DilationSearchHook(Hook):
    """Searches a pattern while a network trains, and goes on with the network that has it.

    At the last search the backbone's layers become `ICConv2d`, with the weights that they have; momentum and
    whatever else the optimizer keeps per weight goes along, and so do averaged models. Pattern and meta go to
    the work folder, ``pattern.json``.

    The backbone is a supernet. Of several searches the earlier ones leave each channel a share of its
    candidates, and taps that none of them reads stay zero from then on. Or it is any plain network with 3x3
    convolutions, for the strategy gradient, which searches once: half of the channels move to a dilation and
    keep their weights. Frozen layers stay plain.

    A training that goes on from a checkpoint, and a test, take up the layers that the checkpoint has.

    Args:
        at: epochs after which to search, in ascending order, or iterations of a training that counts these;
            by default the end of the training. A plain network has one search, early: an eighth of the
            training is what was measured.
        strategy: a name of `search.STRATEGIES`; it says whether the backbone must be plain or a supernet.
        criterion: of the strategy edo.
        init: of a supernet's layers: ``"refit"`` fits the kept taps to its output, ``"crop"`` copies them.
            Batch norms are estimated anew in any case.
        calibration_batches: of the training data, as its pipeline makes them.
        seed: of their choice, and of the strategy.
        kernel_size: of the large kernels that hold a plain network's dilations, by default 9; 9 gives 16
            candidate dilations, 13 gives 36. A supernet has its own.

    Raises:
        ValueError: an option is unknown or out of range, or the backbone is not what the strategy needs.

    Example:
        >>> custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
        >>> custom_hooks = [dict(type="DilationSearchHook", at=[4, 8])]  # with a SuperResNet
        >>> custom_hooks = [dict(type="DilationSearchHook", strategy="gradient", at=2)]  # with an ICResNet
    """

    priority = "ABOVE_NORMAL"  # before EMAHook, whose model must change before it loads or averages

    def __init__(
        self,
        at: int | Sequence[int] | None = None,
        strategy: str = "edo",
        criterion: str = "energy",
        init: Init = "refit",
        calibration_batches: int = 32,
        seed: int = 0,
        kernel_size: int | None = None,
    ) -> None:
        from search import DilationSpace
        from search.criteria import criterion as known_criterion
        from search.strategies import STRATEGIES

        self.at = None if at is None else (at,) if isinstance(at, int) else tuple(at)
        self.strategy, self.criterion, self.init = strategy, criterion, init
        self.calibration_batches, self.seed = calibration_batches, seed
        self.kept: dict[str, np.ndarray] = {}
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
        known_criterion(criterion)
        if init not in ("crop", "refit"):
            raise ValueError(f"init must be one of crop, refit; got {init!r}")
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {calibration_batches}")
        if self.at is not None and (not self.at or min(self.at) < 1 or sorted(set(self.at)) != [*self.at]):
            raise ValueError(f"at must name epochs or iterations from 1 on, ascending; got {list(self.at)}")
        self.space: DilationSpace | None = None  # a supernet has its own
        if STRATEGIES[strategy].needs_plain:
            self.space = DilationSpace(9 if kernel_size is None else kernel_size)
            if self.at is None or len(self.at) > 1:
                raise ValueError(f"the strategy {strategy} searches once: at must name when, got {at}")
        elif kernel_size is not None:
            raise ValueError(
                f"a supernet has its own kernel_size, got {kernel_size} for the strategy {strategy}"
            )
        if len(self.at or ()) > 1 and strategy != "edo":
            raise ValueError(f"searches on the way rank candidates, as the strategy edo does; got {strategy}")

    def before_run(self, runner: Any) -> None:
        """Whatever cannot work is said before the first step."""
        backbone = backbone_of(runner.model)
        training = isinstance(runner._train_loop, BaseLoop)
        if not self._searchable(backbone):
            found = any(isinstance(module, ICConv2d) for module in backbone.modules())
            if found and not (training and runner.iter == 0):
                return  # a test of what was trained in this process
            needed = "a supernet (type='SuperResNet')"
            if self.space is not None:
                needed = f"a plain network (type='ICResNet' without pattern) for the strategy {self.strategy}"
            got = type(backbone).__name__ + " with a pattern" * found
            raise ValueError(f"DilationSearchHook: model.backbone must be {needed}, got {got}")
        if training:
            unit, last = length_of(runner)
            if self.at is not None and self.at[-1] > last:
                raise ValueError(
                    f"DilationSearchHook: at must lie within the training's {last} {unit}, got {self.at[-1]}"
                )
            self._finder().check(self._task(runner))

    def before_train(self, runner: Any) -> None:
        unit, _ = length_of(runner)
        done = runner.epoch if unit == "epochs" else runner.iter
        if self.at is not None and self.at[-1] <= done and self._searchable(backbone_of(runner.model)):
            runner.logger.warning(
                f"DilationSearchHook: the last search was due after {self.at[-1]} {unit}, {done} are done; "
                "the network stays as it is"
            )

    def after_train_epoch(self, runner: Any) -> None:
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            self._search(runner, runner.epoch + 1)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self._search(runner, runner.iter + 1)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if self.kept:
            checkpoint[KEPT] = {name: torch.from_numpy(kept) for name, kept in self.kept.items()}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Makes the layers that the checkpoint's weights are for, before these are loaded."""
        backbone = backbone_of(runner.model)
        if not (layers := self._searchable(backbone)):
            return
        from search.supernet import space_of

        state = checkpoint.get("state_dict", checkpoint)
        found = pattern_of(without_prefix(state, f"{next(iter(layers))}.weight"))
        if found is not None:
            space = self.space or space_of(backbone)
            pattern = replace(found, kernel=space.kernel, base_kernel=space.base_kernel)
            change_backbones(runner, self._change(pattern))
            self.kept = {}
        elif KEPT in checkpoint:
            self._shrink(runner, {name: kept.cpu().numpy() for name, kept in checkpoint[KEPT].items()})

    def _search(self, runner: Any, done: int) -> None:
        """Called after each epoch or iteration, of which so many are done."""
        unit, last = length_of(runner)
        at = self.at or (last,)
        if done not in at or not self._searchable(backbone_of(runner.model)):
            return
        from search.in_training import kept_counts

        runner.logger.info(f"dilation search after {done} {unit}, on {self.calibration_batches} batches")
        with undisturbed():
            task = self._task(runner)
            count = kept_counts(len(task.space.candidates), len(at))[at.index(done)]
            if count > 1:
                self._narrow(runner, task, count)
            else:
                self._finish(runner, task, {unit: done})

    def _narrow(self, runner: Any, task: SearchTask, count: int) -> None:
        from search.refit import estimate_batch_norms
        from search.strategies import EDOStrategy

        finder = self._finder()
        assert isinstance(finder, EDOStrategy)
        self._shrink(runner, agreed(finder.narrowed(task, count)))
        for backbone in backbones_of(runner):
            estimate_batch_norms(backbone, task.batches())
        runner.logger.info(f"each channel keeps {count} of {len(task.space.candidates)} dilations")

    def _finish(self, runner: Any, task: SearchTask, when: Mapping[str, int]) -> None:
        from search.refit import estimate_batch_norms, warm_start

        pattern = agreed(self._finder().search(task))
        pattern = replace(pattern, meta=self._provenance(runner, when) | dict(pattern.meta))
        if self.space is not None:
            pattern = _without_frozen(pattern, self._searchable(backbone_of(runner.model)))
        change = self._change(pattern)

        def start(backbone: nn.Module) -> None:
            if self.space is None:
                warm_start(backbone, pattern, task.batches, init=self.init, inplace=True)
            else:
                estimate_batch_norms(change(backbone), task.batches())

        change_backbones(runner, start, change)
        self.kept = {}
        path = Path(runner.work_dir) / "pattern.json"
        if is_main_process():
            pattern.save(path)
        runner.logger.info(f"{pattern.summary()}\nthe training goes on with the pattern {path}")

    def _searchable(self, backbone: nn.Module) -> dict[str, Any]:
        """The layers whose dilations are open, by name: none after the last search."""
        from search.supernet import super_layers

        grown = super_layers(backbone)
        if self.space is None:
            return grown
        return {} if grown else searchable_layers(backbone, self.space.base_kernel)

    def _change(self, pattern: DilationPattern) -> Callable[[nn.Module], nn.Module]:
        """What gives a backbone the pattern, in place."""
        from search.refit import crop

        if self.space is None:
            return partial(crop, pattern=pattern)
        return partial(apply_pattern, pattern=pattern, inplace=True)

    def _finder(self) -> Any:
        from search.strategies import STRATEGIES, EDOStrategy

        if self.strategy == EDOStrategy.name:
            return EDOStrategy(self.criterion, kept=self.kept)
        return STRATEGIES[self.strategy]()

    def _task(self, runner: Any) -> SearchTask:
        from search.on_task import search_task

        return search_task(backbone_of(runner.model), self._batches(runner), self.seed, self.space)

    def _batches(self, runner: Any) -> TaskBatches:
        from search.on_task import TaskBatches

        live = runner.train_dataloader
        size = live.batch_sampler.batch_size

        def loader() -> DataLoader[Any]:
            """The training's own loader may be in use, and its order moves on."""
            order = RandomSampler(live.dataset, generator=torch.Generator().manual_seed(self.seed))
            return DataLoader(
                live.dataset,
                size,
                sampler=order,
                num_workers=live.num_workers,
                collate_fn=live.collate_fn,
                worker_init_fn=live.worker_init_fn,
            )

        count = min(self.calibration_batches, -(-len(live.dataset) // size))
        return TaskBatches(unwrapped(runner.model), loader, count, self.seed)

    def _provenance(self, runner: Any, when: Mapping[str, int]) -> dict[str, Any]:
        from importlib.metadata import version

        loader, name = runner.train_dataloader, runner.cfg.filename
        backbone = backbone_of(runner.model)
        return {
            "architecture": Path(name).stem if name else type(backbone).__name__,
            "strategy": self.strategy,
            "data": type(loader.dataset).__name__,
            "seed": self.seed,
            "versions": {name: version(name) for name in ("ic-conv", "torch", "numpy")},
            **({"init": self.init} if self.space is None else {}),
            "calibration_batches": self.calibration_batches,
            "training": dict(when),
        }

    def _shrink(self, runner: Any, kept: dict[str, np.ndarray]) -> None:
        from search.in_training import mask_weight, tap_mask
        from search.supernet import space_of

        self.kept = kept
        for backbone in backbones_of(runner):
            space = space_of(backbone)
            for name, layer in self._searchable(backbone).items():
                mask = tap_mask(space, torch.from_numpy(kept[name]), layer.out_channels)
                mask_weight(layer.weight, mask, optimizers_of(runner))


def _without_frozen(pattern: DilationPattern, layers: Mapping[str, nn.Module]) -> DilationPattern:
    """Weights that do not train cannot learn to use another dilation."""
    return replace(
        pattern,
        layers=tuple(
            layer
            if next(layers[str(layer.name)].parameters()).requires_grad
            else LayerPattern.from_assignment([PLAIN] * layer.units, layer.name)
            for layer in pattern.layers
        ),
    )
