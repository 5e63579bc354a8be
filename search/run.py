# SPDX-License-Identifier: Apache-2.0
"""The whole search: network -> supernet -> training -> calibration -> pattern file, meta file, picture."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ic_conv.pattern import DilationPattern
from search.arch import build_network, file_stem
from search.assignment import BranchLimits
from search.criteria import DEFAULT_CRITERION
from search.data import FolderImages, ScatteredDigits, build_loader
from search.engine import TrainOptions, train
from search.engine.checkpoint import STATE, load_weights
from search.engine.options import resolve_device
from search.report import draw_pattern
from search.space import DilationSpace
from search.statistics import images_of
from search.strategies import STRATEGIES, EDOStrategy, SearchTask, Strategy
from search.supernet import convert_to_supernet
from search.tasks import Task, wrap

DIGITS = "digits"


@dataclass(frozen=True)
class SearchOptions:
    """What to search for, on which network and data.

    Args:
        train: how the supernet is trained, and the work folder.
        kernel: size of the supernet's kernels.
        base_kernel: size of the kernels that are dilated.
        arch: see `search.arch.build_network`.
        strategy: a name of `search.STRATEGIES`.
        criterion: a name of `search.criteria.CRITERIA`, for the strategy edo.
        limits: sizes and number of a layer's branches, for the strategy edo.
        data: ``digits``, or a folder with one folder of images per class.
        image_size: side of the images in pixels.
        calibration_images: images in the statistics pass.
        checkpoint: weights of a trained supernet; nothing is trained then.
        output: the pattern file; by default it lies in the work folder.
        skip_bad: leave out images that cannot be read instead of stopping.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    train: TrainOptions
    kernel: int = 9
    base_kernel: int = 3
    arch: str = "ic_resnet50"
    strategy: str = "edo"
    criterion: str = DEFAULT_CRITERION
    limits: BranchLimits = field(default_factory=BranchLimits)
    data: str = DIGITS
    image_size: int = 96
    calibration_images: int = 512
    checkpoint: str | None = None
    output: Path | None = None
    skip_bad: bool = False
    finder: Strategy = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}; known ones: {', '.join(STRATEGIES)}")
        made = EDOStrategy(
            self.criterion, self.limits
        )  # says which criteria there are, whatever the strategy
        if self.strategy != made.name and not self.limits.free:
            raise ValueError(f"limits of the branches are for the strategy edo, got {self.strategy}")
        finder = made if self.strategy == made.name else STRATEGIES[self.strategy]()
        object.__setattr__(self, "finder", finder)
        if self.calibration_images < 1:
            raise ValueError(f"calibration images must be at least 1, got {self.calibration_images}")
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise ValueError(f"the checkpoint must exist, got {self.checkpoint}")

    @property
    def space(self) -> DilationSpace:
        return DilationSpace(self.kernel, self.base_kernel)

    @property
    def pattern_path(self) -> Path:
        return self.output or Path(self.train.work_dir) / f"{file_stem(self.arch, self.kernel)}.json"


@dataclass(frozen=True)
class Prepared:
    """A supernet in its task, with the data to train and calibrate it."""

    task: Task
    dataset: Dataset[Any]
    search: SearchTask


def prepare(options: SearchOptions) -> Prepared:
    """Checks everything that can be checked before work starts, and builds the supernet.

    Raises:
        ValueError: network, data, sizes or checkpoint do not fit.
        OSError: the pattern file's folder cannot be written.
    """
    _check_output(options)
    space = options.space
    folder = options.data != DIGITS
    dataset: Dataset[Any]
    if folder:
        dataset = FolderImages(
            options.data,
            image_size=options.image_size,
            seed=options.train.seed,
            skip_bad=options.skip_bad,
        )
    else:
        dataset = ScatteredDigits(image_size=options.image_size, seed=options.train.seed)
    num_classes: int = dataset.num_classes
    torch.manual_seed(options.train.seed)
    network = build_network(options.arch, num_classes if folder else None)
    supernet = convert_to_supernet(network, space.kernel, base_kernel=space.base_kernel, inplace=True)
    if options.checkpoint is not None:
        load_supernet(supernet, options.checkpoint)
    task = wrap(supernet, num_classes, options.image_size)
    batches = _Calibration(dataset, options)
    search = replace(SearchTask.of(supernet, seed=options.train.seed), batches=lambda: batches)
    options.finder.check(search)
    return Prepared(task, dataset, search)


def search_pattern(options: SearchOptions, prepared: Prepared) -> DilationPattern:
    """Trains the supernet where the strategy needs one, and returns the pattern with its provenance."""
    trained = options.finder.needs_supernet and options.checkpoint is None
    if trained:
        train(prepared.task, prepared.dataset, options.train)
    prepared.task.to(resolve_device(options.train.device))
    pattern = options.finder.search(prepared.search)
    return replace(pattern, meta=_provenance(options, prepared, trained) | dict(pattern.meta))


def write_results(pattern: DilationPattern, path: Path) -> Path:
    """Writes the pattern, its meta file and its picture; returns the picture's path."""
    pattern.save(path)
    picture = path.with_suffix(".png")
    draw_pattern(pattern, picture)
    return picture


def load_supernet(supernet: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint of `search.engine`, or a plain state dict of the supernet.

    Raises:
        ValueError: the file cannot be read, or belongs to another network or kernel size.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is none of its own
        raise ValueError(
            f"not a checkpoint that torch can read: {path}: {str(error).splitlines()[0]}"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    inner = {
        key.removeprefix("network."): value for key, value in weights.items() if key.startswith("network.")
    }
    load_weights(supernet, inner or weights, path)


class _Calibration(Iterable[Tensor]):
    """The calibration images, the same ones in every pass, made anew each time."""

    def __init__(self, dataset: Dataset[Any], options: SearchOptions) -> None:
        self.dataset, self.options = dataset, options

    def __len__(self) -> int:
        images = min(self.options.calibration_images, len(self.dataset))  # type: ignore[arg-type]
        return -(-images // self._batch_size())

    def __iter__(self) -> Iterator[Tensor]:
        batch_size = self._batch_size()
        loader = build_loader(self.dataset, batch_size, seed=self.options.train.seed, sampler=self._spread())
        return (images_of(batch) for batch in islice(loader, len(self)))

    def _batch_size(self) -> int:
        return self.options.train.batch_size or 8

    def _spread(self) -> Any:
        """Image folders are sorted by class, so the calibration images are drawn from all over the data."""
        generator = torch.Generator().manual_seed(self.options.train.seed)
        return torch.utils.data.RandomSampler(self.dataset, generator=generator)  # type: ignore[arg-type]


def _provenance(options: SearchOptions, prepared: Prepared, trained: bool) -> dict[str, Any]:
    """Where a pattern comes from: plain values, the same for the same run."""
    meta: dict[str, Any] = {
        "architecture": options.arch,
        "strategy": options.strategy,
        "data": "scattered digits" if options.data == DIGITS else Path(options.data).name,
        "image_size": options.image_size,
        "seed": options.train.seed,
        "versions": {name: version(name) for name in ("ic-conv", "torch", "numpy")},
    }
    if options.finder.needs_supernet:
        config = options.train.read_config()
        meta["calibration_images"] = options.calibration_images
        meta["training"] = (
            {"steps": config.train_cfg.max_iters, "batch_size": config.train_dataloader.batch_size}
            if trained
            else {"checkpoint": Path(str(options.checkpoint)).name}
        )
        meta["supernet_sha256"] = weights_hash(prepared.task.network)
    return meta


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
    if (
        state.exists()
        and not options.train.resume
        and options.finder.needs_supernet
        and not options.checkpoint
    ):
        raise ValueError(
            f"{state} is an unfinished training: go on with --resume, or choose another --work-dir"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"the output folder must be writable: {path.parent}: {error.strerror}") from error
