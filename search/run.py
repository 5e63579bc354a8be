# SPDX-License-Identifier: Apache-2.0
"""The whole search: network -> supernet -> training -> calibration -> pattern file, meta file, picture."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from ic_conv.checkpoint import read_weights
from ic_conv.pattern import DilationPattern
from search.arch import build_network
from search.data import FolderImages, ScatteredDigits, build_loader
from search.engine import train
from search.engine.checkpoint import FINAL, STATE, load_weights, write_checkpoint
from search.engine.options import resolve_device
from search.engine.train import _processes
from search.narrowing import NarrowHook, evenly
from search.options import DIGITS, SearchOptions
from search.refit import warm_start
from search.report import draw_pattern
from search.statistics import images_of
from search.strategies import EDOStrategy, ParetoStrategy, PlainTask, SearchTask
from search.supernet import convert_to_supernet
from search.tasks import Task, wrap


@dataclass(frozen=True)
class Prepared:
    """A supernet, or a plain network, in its task, with the data to train and calibrate it.

    Attributes:
        task: a Task, or the whole model of a task config.
        dataset: what it learns from.
        search: the supernet or plain network, and its calibration data.
        origin: data and task in words, a line each.
    """

    task: BaseModel
    dataset: Dataset[Any]
    search: SearchTask
    origin: str


def prepare(options: SearchOptions) -> Prepared:
    """Checks everything that can be checked before work starts, and builds the supernet.

    Raises:
        ValueError: network, data, sizes or checkpoint do not fit.
        OSError: the pattern file's folder cannot be written.
    """
    _check_output(options)
    if options.task_config is not None:
        from search.on_task import prepare_task  # needs OpenMMLab

        return prepare_task(options)
    space = options.space
    folder = options.data != DIGITS
    dataset = _dataset(options)
    num_classes: int = dataset.num_classes
    torch.manual_seed(options.train.seed)
    network = build_network(options.arch, num_classes if folder else None)
    batches = _Calibration(dataset, options)
    if options.finder.needs_plain:
        task = wrap(network, num_classes, options.image_size)
        if options.checkpoint is not None:
            load_plain(task, options.checkpoint)
        plain = PlainTask(task, network, batches.samples, _loss)
        search = SearchTask.of_plain(plain, space, options.train.seed)
    else:
        supernet = convert_to_supernet(network, space.kernel, base_kernel=space.base_kernel, inplace=True)
        if options.checkpoint is not None:
            load_supernet(supernet, options.checkpoint)
        task = wrap(supernet, num_classes, options.image_size)
        search = SearchTask.of(supernet, seed=options.train.seed)
    search = replace(search, batches=lambda: batches)
    options.finder.check(search)
    origin = (
        f"data: {options.data}, {options.image_size} px, {len(dataset)} images\n"
        f"task: {type(task).__name__}, {num_classes} classes"
    )
    return Prepared(task, dataset, search, origin)


def _dataset(options: SearchOptions, split: str = "train") -> FolderImages | ScatteredDigits:
    size, seed = options.image_size, options.train.seed
    if options.data == DIGITS:
        # They are drawn as they are asked for, so any number could be validated on.
        images = {} if split == "train" else {"length": options.calibration_images}
        return ScatteredDigits(split, image_size=size, seed=seed, **images)
    return FolderImages(options.data, split, image_size=size, seed=seed, skip_bad=options.skip_bad)


def processes(options: SearchOptions) -> AbstractContextManager[None]:
    """Within the block torchrun's processes know of each other: they share training and statistics."""
    return _processes(options.train.launcher, resolve_device(options.train.device))


def train_network(options: SearchOptions, prepared: Prepared) -> None:
    """Trains the network that the strategy needs, if one; makes all of several searches but the last."""
    if not options.trains:
        return
    assert isinstance(prepared.task, Task)  # the model of a task config comes with a checkpoint
    hooks = []
    if options.searches > 1:
        assert isinstance(options.finder, EDOStrategy)
        at = evenly(options.train.read_config().train_cfg.max_iters, options.searches)
        hooks.append(NarrowHook(at, options.finder, prepared.search))
    train(prepared.task, prepared.dataset, options.train, hooks)


def search_pattern(options: SearchOptions, prepared: Prepared) -> DilationPattern:
    """The pattern of the trained network, with its provenance."""
    prepared.task.to(resolve_device(options.train.device))
    if isinstance(options.finder, ParetoStrategy):
        return _search_front(options, options.finder, prepared)
    pattern = options.finder.search(prepared.search)
    return replace(pattern, meta=_provenance(options, prepared) | dict(pattern.meta))


def _search_front(options: SearchOptions, finder: ParetoStrategy, prepared: Prepared) -> DilationPattern:
    """The knee of the front; the front's files go to a folder beside the pattern file."""
    from search.front import FineTuned, search_front

    score = None
    if options.finetune_steps:
        if not isinstance(prepared.task, Task):
            raise ValueError("scores after fine-tuning are for the tool's own data, not for a task's config")
        short = replace(options.train, steps=options.finetune_steps)
        score = FineTuned(prepared.task, prepared.dataset, _dataset(options, "val"), short)
    meta = _provenance(options, prepared)
    pattern = search_front(finder, prepared.search, score, options.front_path, meta)
    return replace(pattern, meta=meta | dict(pattern.meta))


def write_results(pattern: DilationPattern, path: Path) -> Path:
    """Writes the pattern, its meta file and its picture; returns the picture's path."""
    pattern.save(path)
    picture = path.with_suffix(".png")
    draw_pattern(pattern, picture)
    return picture


def write_weights(options: SearchOptions, prepared: Prepared, pattern: DilationPattern) -> Path:
    """Writes a state dict of the network with the pattern, which starts from the trained one; changes that.

    Returns:
        The file. `ic_resnet50(pattern_path=..., weights=...)` and a Pretrained init_cfg take it.
    """
    source, space = prepared.search.supernet, prepared.search.space
    if prepared.search.plain is not None:
        source = convert_to_supernet(
            prepared.search.plain.network, space.kernel, base_kernel=space.base_kernel, init="inflate"
        )
    assert source is not None
    network = warm_start(source, pattern, prepared.search.batches, init=options.init, inplace=True)
    meta = {"init": options.init, "pattern": options.pattern_path.name}
    if is_main_process():
        write_checkpoint(options.weights_path, {"state_dict": network.state_dict(), "meta": meta})
    return options.weights_path


def load_plain(task: Task, path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint of a plain network: of `search.engine`, or the state dict of one with its own head.

    Raises:
        ValueError: the file cannot be read, belongs to another network, or lacks the head.
    """
    weights, source = read_weights(path)
    if any(key.startswith("network.") for key in weights):
        load_weights(task, weights, source)
        return
    load_weights(task.network, weights, source)
    if len(task.state_dict()) > len(weights):
        raise ValueError(
            f"{source} holds a network without the head that it was trained with, so that there is no loss; "
            f"give the {FINAL} of a training, or no checkpoint"
        )


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()}, mode="loss")["loss"]


def load_supernet(supernet: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint of `search.engine`, or a plain state dict of the supernet.

    Raises:
        ValueError: the file cannot be read, or belongs to another network or kernel size.
    """
    weights, source = read_weights(path)
    inner = {
        key.removeprefix("network."): value for key, value in weights.items() if key.startswith("network.")
    }
    load_weights(supernet, inner or weights, source)


class _Calibration(Iterable[Tensor]):
    """The calibration images, the same ones in every pass, made anew each time."""

    def __init__(self, dataset: Dataset[Any], options: SearchOptions) -> None:
        self.dataset, self.options = dataset, options

    def __len__(self) -> int:
        images = min(self.options.calibration_images, len(self.dataset))  # type: ignore[arg-type]
        return -(-images // self._batch_size())

    def __iter__(self) -> Iterator[Tensor]:
        return map(images_of, self.samples())

    def samples(self) -> Iterator[Any]:
        """Whole batches, labels included."""
        batch_size = self._batch_size()
        loader = build_loader(self.dataset, batch_size, seed=self.options.train.seed, sampler=self._spread())
        return islice(loader, len(self))

    def _batch_size(self) -> int:
        return self.options.train.batch_size or 8

    def _spread(self) -> Any:
        """Image folders are sorted by class, so the calibration images are drawn from all over the data."""
        generator = torch.Generator().manual_seed(self.options.train.seed)
        return torch.utils.data.RandomSampler(self.dataset, generator=generator)  # type: ignore[arg-type]


def _provenance(options: SearchOptions, prepared: Prepared) -> dict[str, Any]:
    """Where a pattern comes from: plain values, the same for the same run."""
    meta: dict[str, Any] = {
        "architecture": options.name if options.task_config else options.arch,
        "strategy": options.strategy,
        "data": _data_name(options),
        "seed": options.train.seed,
        "versions": {name: version(name) for name in ("ic-conv", "torch", "numpy")},
    }
    if options.task_config is None:
        meta["image_size"] = options.image_size
    if options.init != "scratch":
        meta["init"] = options.init
    plain = prepared.search.plain
    network, kind = (prepared.search.supernet, "supernet") if plain is None else (plain.network, "plain")
    if network is not None and (options.trains or options.finder.needs_supernet or plain):
        config = options.train.read_config()
        meta["calibration_images"] = options.calibration_images
        meta["training"] = (
            {
                "steps": config.train_cfg.max_iters,
                "batch_size": config.train_dataloader.batch_size,
                **({"searches": options.searches} if options.searches > 1 else {}),
            }
            if options.trains
            else {"checkpoint": Path(str(options.checkpoint)).name}
        )
        meta[f"{kind}_sha256"] = weights_hash(network)
    return meta


def _data_name(options: SearchOptions) -> str:
    if options.task_config is not None:
        return Path(options.task_config).name
    return "scattered digits" if options.data == DIGITS else Path(options.data).name


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over names and values of a network's state, which a file's bytes would not give."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_output(options: SearchOptions) -> None:
    """That the result can be written, and that no unfinished training is lost."""
    path = options.pattern_path
    if path.suffix != ".json":
        raise ValueError(f"a pattern file's name must end in .json, got {path}")
    state = Path(options.train.work_dir) / STATE
    if state.exists() and not options.train.resume and options.trains:
        raise ValueError(
            f"{state} is an unfinished training: go on with --resume, or choose another --work-dir"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"the output folder must be writable: {path.parent}: {error.strerror}") from error
