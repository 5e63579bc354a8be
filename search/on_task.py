# SPDX-License-Identifier: Apache-2.0
"""Search on the task itself: the supernet that an OpenMMLab config trained, on that config's own data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn

from ic_conv.openmmlab._backbone import read_checkpoint
from ic_conv.openmmlab._blame import explain
from ic_conv.openmmlab.runner import load_config
from search.engine.checkpoint import load_weights
from search.options import SearchOptions
from search.run import Prepared
from search.space import DilationSpace
from search.strategies import PlainTask, SearchTask
from search.supernet import super_layers


def prepare_task(options: SearchOptions) -> Prepared:
    """Builds a task config's model with its trained weights, and its training data for calibration.

    Raises:
        ValueError: the config cannot be built, has no supernet, or the checkpoint does not fit.
    """
    path, checkpoint = str(options.task_config), options.checkpoint
    if checkpoint is None:
        raise ValueError(
            f"{path} describes a whole task: train it first with `python tools/train.py {path}`, "
            "then name its weights with --checkpoint"
        )
    config = load_config(path)
    init_default_scope(config.default_scope)
    with _explained(config, path):
        model = MODELS.build(config.model)
        loader = _loader(config, options)
        images = min(options.calibration_images, len(loader.dataset))
        count = -(-images // loader.batch_sampler.batch_size)
        batches = TaskBatches(model, lambda: loader, count, options.train.seed)
    backbone = getattr(model, "backbone", model)
    if not super_layers(backbone) and not options.finder.needs_plain:
        raise ValueError(
            f"{path}: model.backbone must be a supernet (type='SuperResNet'), got {type(backbone).__name__}"
        )
    load_weights(model, read_checkpoint(checkpoint), checkpoint)
    space = options.space if options.finder.needs_plain else None
    search = search_task(backbone, batches, options.train.seed, space)
    options.finder.check(search)
    dataset = loader.dataset
    origin = f"data: {type(dataset).__name__}, {len(dataset)} images\ntask: {path}"
    return Prepared(model, dataset, search, origin)


def backbone_config(path: str | os.PathLike[str], pattern: Path, weights: Path | None = None) -> str:
    """The supernet's config turned into that of the network with the found pattern, and weights if given."""
    backbone = dict(load_config(path).model.backbone)
    options = {key: value for key, value in backbone.items() if key not in ("type", "kernel_size")}
    arguments = {"_delete_": True, "type": "ICResNet", **options, "pattern": str(pattern)}
    if weights is not None:
        arguments["init_cfg"] = {"type": "Pretrained", "checkpoint": str(weights)}
    return f"dict({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def search_task(
    backbone: nn.Module, batches: TaskBatches, seed: int, space: DilationSpace | None = None
) -> SearchTask:
    """The task of finding the pattern of a supernet, or of a plain network within a search space."""
    if space is None:
        return SearchTask.of(backbone, batches, seed)
    plain = PlainTask(batches.model, backbone, batches.samples, _loss)
    return replace(SearchTask.of_plain(plain, space, seed), batches=lambda: batches)


class TaskBatches(Iterable[Tensor]):
    """Batches as the training pipeline gives them to the network, the same ones in every pass.

    Args:
        model: its preprocessor makes images of them.
        loader: gives the data loader of a pass, in an order that is always the same.
        batches: how many of it are taken.
        seed: of what the pipeline draws.
    """

    def __init__(
        self, model: BaseModel, loader: Callable[[], Iterable[Any]], batches: int, seed: int
    ) -> None:
        self.model, self.loader, self.batches, self.seed = model, loader, batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.samples():
            yield self.model.data_preprocessor(batch, False)["inputs"]

    def samples(self) -> Iterator[Any]:
        """Batches as the data loader gives them, with targets."""
        set_random_seed(self.seed)  # crops and flips are drawn as in the training
        yield from islice(self.loader(), self.batches)


def _loader(config: Config, options: SearchOptions) -> Any:
    settings = config.train_dataloader.copy()
    settings.persistent_workers = False
    # an InfiniteSampler would be used up after one pass
    settings.sampler = {"type": "DefaultSampler", "shuffle": True}
    settings.batch_size = options.train.batch_size or settings.batch_size
    return Runner.build_dataloader(settings, seed=options.train.seed)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    assert isinstance(model, BaseModel)
    return model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))[0]


@contextmanager
def _explained(config: Config, path: str) -> Iterator[None]:
    """What goes wrong in the libraries becomes one line that names the config and its key."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError, ImportError) as error:
        raise ValueError(f"{path}: {explain(config.to_dict(), error)}") from error
