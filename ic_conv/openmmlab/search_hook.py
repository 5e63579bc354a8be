# SPDX-License-Identifier: Apache-2.0
"""The dilation search as a part of the training: of a detector, segmenter, pose estimator or classifier."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from ic_conv.checkpoint import pattern_of, without_prefix
from ic_conv.layers import ICConv2d

if TYPE_CHECKING:
    from search import SearchTask
    from search.on_task import TaskBatches
    from search.refit import Init

KEPT = "dilation_candidates"  # in checkpoints: what the searches so far have left


@HOOKS.register_module()
class DilationSearchHook(Hook):
    """Searches a pattern while a supernet trains, and goes on with the network that has it.

    At the last search the backbone's grown layers become `ICConv2d`, with the supernet's weights; momentum
    and whatever else the optimizer keeps per weight goes along, and so do averaged models. Pattern and meta
    go to the work folder, ``pattern.json``. Of several searches the earlier ones leave each channel a share
    of its candidates, and taps that none of them reads stay zero from then on.

    A training that goes on from a checkpoint, and a test, take up the layers that the checkpoint has.

    Args:
        at: epochs after which to search, in ascending order, or iterations of a training that counts these;
            by default the end of the training.
        strategy: a name of `search.STRATEGIES` that needs no network but the supernet.
        criterion: of the strategy edo.
        init: ``"refit"`` fits the kept taps to the supernet's output, ``"crop"`` copies them. Batch norms are
            estimated anew either way.
        calibration_batches: of the training data, as its pipeline makes them.
        seed: of their choice, and of the strategy.

    Raises:
        ValueError: an option is unknown or out of range, or the backbone is no supernet.

    Example:
        >>> custom_imports = dict(imports=["ic_conv.openmmlab"], allow_failed_imports=False)
        >>> custom_hooks = [dict(type="DilationSearchHook", at=[4, 8])]
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
    ) -> None:
        from search.criteria import criterion as known_criterion
        from search.strategies import STRATEGIES

        self.at = None if at is None else (at,) if isinstance(at, int) else tuple(at)
        self.strategy, self.criterion, self.init = strategy, criterion, init
        self.calibration_batches, self.seed = calibration_batches, seed
        self.kept: dict[str, np.ndarray] = {}
        usable = [name for name, kind in STRATEGIES.items() if not kind.needs_plain]
        if strategy not in usable:
            raise ValueError(f"strategy must be one of {', '.join(usable)}; got {strategy!r}")
        known_criterion(criterion)
        if init not in ("crop", "refit"):
            raise ValueError(f"init must be one of crop, refit; got {init!r}")
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {calibration_batches}")
        if self.at is not None and (not self.at or min(self.at) < 1 or sorted(set(self.at)) != [*self.at]):
            raise ValueError(f"at must name epochs or iterations from 1 on, ascending; got {list(self.at)}")
        if len(self.at or ()) > 1 and strategy != "edo":
            raise ValueError(f"searches on the way rank candidates, as the strategy edo does; got {strategy}")

    def before_run(self, runner: Any) -> None:
        """Whatever cannot work is said before the first step."""
        backbone = _backbone(runner.model)
        if not _grown(backbone):
            if any(isinstance(module, ICConv2d) for module in backbone.modules()):
                return  # a test of what was trained in this process
            raise ValueError(
                "DilationSearchHook: model.backbone must be a supernet (type='SuperResNet'), "
                f"got {type(backbone).__name__}"
            )
        if isinstance(runner._train_loop, BaseLoop):
            unit, last = _length(runner)
            if self.at is not None and self.at[-1] > last:
                raise ValueError(
                    f"DilationSearchHook: at must lie within the training's {last} {unit}, got {self.at[-1]}"
                )
            self._finder().check(self._task(runner))

    def before_train(self, runner: Any) -> None:
        unit, _ = _length(runner)
        done = runner.epoch if unit == "epochs" else runner.iter
        if self.at is not None and self.at[-1] <= done and _grown(_backbone(runner.model)):
            runner.logger.warning(
                f"DilationSearchHook: the last search was due after {self.at[-1]} {unit}, {done} are done; "
                "the network stays a supernet"
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
        from search.refit import crop
        from search.supernet import space_of

        backbone = _backbone(runner.model)
        if not (grown := _grown(backbone)):
            return
        state = checkpoint.get("state_dict", checkpoint)
        found = pattern_of(without_prefix(state, f"{next(iter(grown))}.weight"))
        if found is not None:
            space = space_of(backbone)
            pattern = replace(found, kernel=space.kernel, base_kernel=space.base_kernel)
            self._switch(runner, partial(crop, pattern=pattern))
        elif KEPT in checkpoint:
            self._shrink(runner, {name: kept.cpu().numpy() for name, kept in checkpoint[KEPT].items()})

    def _search(self, runner: Any, done: int) -> None:
        """Called after each epoch or iteration, of which so many are done."""
        unit, last = _length(runner)
        at = self.at or (last,)
        if done not in at or not _grown(_backbone(runner.model)):
            return
        from search.in_training import kept_counts

        runner.logger.info(f"dilation search after {done} {unit}, on {self.calibration_batches} batches")
        with _undisturbed():
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
        self._shrink(runner, _agreed(finder.narrowed(task, count)))
        for backbone in _backbones(runner):
            estimate_batch_norms(backbone, task.batches())
        runner.logger.info(f"each channel keeps {count} of {len(task.space.candidates)} dilations")

    def _finish(self, runner: Any, task: SearchTask, when: Mapping[str, int]) -> None:
        from search.refit import crop, warm_start

        pattern = _agreed(self._finder().search(task))
        pattern = replace(pattern, meta=self._provenance(runner, when) | dict(pattern.meta))
        start = partial(
            warm_start,
            pattern=pattern,
            batches=task.batches,
            init=self.init,
            inplace=True,
        )
        self._switch(runner, start, partial(crop, pattern=pattern))
        path = Path(runner.work_dir) / "pattern.json"
        if is_main_process():
            pattern.save(path)
        runner.logger.info(f"{pattern.summary()}\nthe training goes on with the pattern {path}")

    def _finder(self) -> Any:
        from search.strategies import STRATEGIES, EDOStrategy

        if self.strategy == EDOStrategy.name:
            return EDOStrategy(self.criterion, kept=self.kept)
        return STRATEGIES[self.strategy]()

    def _task(self, runner: Any) -> SearchTask:
        from search import SearchTask

        return SearchTask.of(_backbone(runner.model), self._batches(runner), self.seed)

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
        return TaskBatches(_unwrapped(runner.model), loader, count, self.seed)

    def _provenance(self, runner: Any, when: Mapping[str, int]) -> dict[str, Any]:
        from importlib.metadata import version

        loader, name = runner.train_dataloader, runner.cfg.filename
        backbone = _backbone(runner.model)
        return {
            "architecture": Path(name).stem if name else type(backbone).__name__,
            "strategy": self.strategy,
            "data": type(loader.dataset).__name__,
            "seed": self.seed,
            "versions": {name: version(name) for name in ("ic-conv", "torch", "numpy")},
            "init": self.init,
            "calibration_batches": self.calibration_batches,
            "training": dict(when),
        }

    def _shrink(self, runner: Any, kept: dict[str, np.ndarray]) -> None:
        from search.in_training import mask_weight, tap_mask
        from search.supernet import space_of

        self.kept = kept
        for backbone in _backbones(runner):
            space = space_of(backbone)
            for name, layer in _grown(backbone).items():
                mask = tap_mask(space, torch.from_numpy(kept[name]), layer.out_channels)
                mask_weight(layer.weight, mask, _optimizers(runner))

    def _switch(
        self,
        runner: Any,
        change: Callable[[nn.Module], nn.Module],
        moves: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        """Changes the backbone, in averaged models too, and all that holds its parameters.

        Args:
            change: of a backbone, in place.
            moves: what it does to the elements of parameters; by default the optimizer's state is dropped.
        """
        from search.in_training import element_places, follow

        backbone = _backbone(runner.model)
        places = None if moves is None else element_places(backbone, moves)
        before = dict(backbone.named_parameters())
        for each in _backbones(runner):
            change(each)
        self.kept = {}
        for optimizer in _optimizers(runner):
            follow(optimizer, before, dict(backbone.named_parameters()), places)
        for average in _averages(runner):
            own = average.module.state_dict() if average.update_buffers else average.module.named_parameters()
            average.avg_parameters = dict(own)
        if is_model_wrapper(
            runner.model
        ):  # it knows the old parameters, and takes the first process's values
            runner.model = runner.model.module
            runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), runner.model)


def _unwrapped(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model


def _backbone(model: nn.Module) -> nn.Module:
    whole = _unwrapped(model)
    return getattr(whole, "backbone", whole)


def _grown(backbone: nn.Module) -> dict[str, Any]:
    from search.supernet import super_layers

    return super_layers(backbone)


def _averages(runner: Any) -> list[Any]:
    return [
        hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook) and hasattr(hook, "ema_model")
    ]


def _backbones(runner: Any) -> list[nn.Module]:
    """The trained one, and those of averaged models."""
    return [_backbone(model) for model in (runner.model, *(average.module for average in _averages(runner)))]


def _optimizers(runner: Any) -> list[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return [each.optimizer for each in wrapper.values()]
    return [wrapper.optimizer] if isinstance(wrapper, OptimWrapper) else []  # none yet in a test


def _length(runner: Any) -> tuple[str, int]:
    """What the training counts, and how many."""
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        return "iterations", runner.max_iters
    return "epochs", runner.max_epochs


def _agreed(found: Any) -> Any:
    """What the first process found, in all of them."""
    box = [found]
    broadcast_object_list(box)
    return box[0]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The training's random numbers go on as if nothing had been drawn within the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (pipelines draw from it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
