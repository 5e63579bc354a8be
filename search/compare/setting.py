# SPDX-License-Identifier: Apache-2.0
"""What all methods have in common: network, data, steps, and what an image costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ic_conv.complexity import count
from ic_conv.models.resnet import BasicBlock
from search.data import ScatteredDigits, build_loader
from search.engine import TrainOptions
from search.engine.checkpoint import FINAL, load_checkpoint
from search.statistics import images_of
from search.supernet import convert_to_supernet
from search.tasks import Task, wrap

WIDTH, BLOCKS = 32, 2
CALIBRATION = 512  # images
IMAGES = 32  # in a batch of a search
PLAIN, SUPERNET, NARROWED = "plain", "supernet", "supernet narrowed"


@dataclass(frozen=True)
class CompareOptions:
    """What is equal for all methods.

    Args:
        work_dir: folder for finished runs and patterns.
        steps: training steps of the supernet and of every network.
        batch_size: images per step.
        kernel: size of the supernet's kernels.
        val_images: images of the validation score.
    """

    work_dir: Path
    steps: int = 600
    batch_size: int = 32
    kernel: int = 9
    val_images: int = 1000

    @property
    def identity(self) -> dict[str, Any]:
        """What finished runs must have been made with."""
        return {name: value for name, value in asdict(self).items() if name != "work_dir"}

    def path(self, seed: int, name: str) -> Path:
        return self.work_dir / f"seed{seed}" / name.replace(" ", "_")

    def training(self, seed: int, name: str, steps: int) -> TrainOptions:
        return TrainOptions(
            self.path(seed, f"{name}.result"),
            steps=steps,
            batch_size=self.batch_size,
            seed=seed,
            device="cpu",
            workers=0,
            progress=False,
            resume=True,
        )


class Cost(NamedTuple):
    """Work done: multiply-accumulates, three times a forward pass for one with backward, and CPU seconds."""

    flops: float = 0.0
    seconds: float | None = 0.0

    def plus(self, other: Cost) -> Cost:
        unknown = self.seconds is None or other.seconds is None
        return Cost(self.flops + other.flops, None if unknown else self.seconds + other.seconds)  # type: ignore[operator]


def slim_resnet() -> nn.Module:
    """Two basic blocks of 32 channels at stride 4: 4 searched layers.

    Plain, it sees 35 px; digits reach 60 px, so the receptive field matters.
    """
    stem = nn.Conv2d(3, WIDTH, 7, stride=2, padding=3, bias=False)
    blocks = [BasicBlock(WIDTH, WIDTH, stride=2 if index == 0 else 1) for index in range(BLOCKS)]
    return nn.Sequential(stem, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), *blocks)


def task_of(network: nn.Module) -> Task:
    return wrap(network, ScatteredDigits.num_classes)


def trained(options: CompareOptions, seed: int, name: str) -> Task:
    """The finished plain network, or a supernet of that name.

    Raises:
        ValueError: it is not there.
    """
    network = slim_resnet()
    if name != PLAIN:
        network = convert_to_supernet(network, options.kernel, inplace=True)
    task = task_of(network)
    load_checkpoint(task, options.path(seed, f"{name}.result") / FINAL)
    return task


def calibration(seed: int, images: int = CALIBRATION) -> list[Tensor]:
    return [images_of(batch) for batch in calibration_samples(seed, images)]


def calibration_samples(seed: int, images: int = CALIBRATION) -> list[Any]:
    """Batches that no training sees."""
    return list(build_loader(ScatteredDigits(length=images, seed=seed + 1000), IMAGES))


@lru_cache
def training_flops(kernel: int | None = None) -> float:
    """Of one image, forward and backward, through the network (its FLOPs are the same with any pattern), or
    through its supernet."""
    network = slim_resnet() if kernel is None else convert_to_supernet(slim_resnet(), kernel)
    return 3.0 * count(task_of(network), (3, 64, 64)).flops
