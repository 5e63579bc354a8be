# SPDX-License-Identifier: Apache-2.0
"""What a hook that changes the network finds in a running training, and changes there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast_object_list
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from torch import nn


def unwrapped(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model


def backbone_of(model: nn.Module) -> nn.Module:
    whole = unwrapped(model)
    return getattr(whole, "backbone", whole)


def averages_of(runner: Any) -> list[Any]:
    return [
        hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook) and hasattr(hook, "ema_model")
    ]


def backbones_of(runner: Any) -> list[nn.Module]:
    """The trained one, and those of averaged models."""
    return [
        backbone_of(model) for model in (runner.model, *(average.module for average in averages_of(runner)))
    ]


def optimizers_of(runner: Any) -> list[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return [each.optimizer for each in wrapper.values()]
    return [wrapper.optimizer] if isinstance(wrapper, OptimWrapper) else []  # none yet in a test


def progress_of(runner: Any) -> tuple[str, int, int]:
    """What the training counts, how many are done, and how many there are."""
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        return "iterations", runner.iter, runner.max_iters
    return "epochs", runner.epoch, runner.max_epochs


def save_again(runner: Any) -> None:
    """Writes the checkpoint of what is done anew, after the training's last step."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            step = runner.epoch if hook.by_epoch else runner.iter
            hook._save_checkpoint_with_step(runner, step, {"epoch": runner.epoch, "iter": runner.iter})


def agreed(found: Any) -> Any:
    """What the first process found, in all of them."""
    box = [found]
    broadcast_object_list(box)
    return box[0]


@contextmanager
def undisturbed() -> Iterator[None]:
    """The training's random numbers go on as if nothing had been drawn within the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (pipelines draw from it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def change_backbones(
    runner: Any,
    change: Callable[[nn.Module], object],
    moves: Callable[[nn.Module], nn.Module] | None = None,
) -> None:
    """Changes the backbone, in averaged models too, and all that holds its parameters.

    Args:
        runner: of the training or test.
        change: of a backbone, in place.
        moves: what it does to the elements of parameters; by default the optimizer's state is dropped.
    """
    from search.in_training import element_places, follow

    backbone = backbone_of(runner.model)
    places = None if moves is None else element_places(backbone, moves)
    before = dict(backbone.named_parameters())
    for each in backbones_of(runner):
        change(each)
    for optimizer in optimizers_of(runner):
        follow(optimizer, before, dict(backbone.named_parameters()), places)
    for average in averages_of(runner):
        own = average.module.state_dict() if average.update_buffers else average.module.named_parameters()
        average.avg_parameters = dict(own)
    if is_model_wrapper(runner.model):  # it knows the old parameters, and takes the first process's values
        runner.model = runner.model.module
        runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), runner.model)
