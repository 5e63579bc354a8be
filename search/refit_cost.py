# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the refit, and of the search by gradients: ``python -m search.refit_cost --help``."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from search.arch import build_network
from search.data import ScatteredDigits, build_loader
from search.refit import estimate_batch_norms, fit_layer
from search.statistics import ConvMoments, collect, images_of
from search.strategies import GradientStrategy, PlainTask, RandomStrategy, SearchTask
from search.supernet import convert_to_supernet, super_layers
from search.tasks import wrap

TRAINING_STEPS, TRAINING_BATCH = 160, 8  # of the search command by default
T = TypeVar("T")


def statistics_cost(arch: str, kernel: int, images: int, image_size: int) -> Iterator[str]:
    """The first lines of `refit_cost`, which say what memory the statistics take."""
    yield from islice(refit_cost(arch, kernel, images, image_size), 3)


def refit_cost(arch: str, kernel: int, images: int, image_size: int) -> Iterator[str]:
    """Seconds of each part, with a random pattern, which has all dilations in every layer; and memory."""
    supernet = convert_to_supernet(build_network(arch), kernel, inplace=True).eval()
    task = SearchTask.of(supernet)
    pattern = RandomStrategy().search(task)
    batches = [torch.randn(32, 3, image_size, image_size) for _ in range(max(1, images // 32))]
    threads = torch.get_num_threads()
    yield f"{arch} k{kernel}, {32 * len(batches)} images of {image_size} px, {threads} threads"
    _, forward = _timed(lambda: _run(supernet, batches))
    yield f"forward passes alone {forward:.1f} s"
    before = _peak()
    moments, statistics = _timed(lambda: collect(supernet, batches, task.space, correlations=True))
    seconds = {name: m.second for name, m in moments.items() if isinstance(m, ConvMoments) and m.second}
    size = sum(s.inputs.nbytes + s.cross.nbytes for s in seconds.values())
    yield (
        f"statistics {size / 2**30:.2f} GiB, {statistics:.0f} s; peak of the process {_peak():.2f} GiB, "
        f"{before:.2f} before"
    )
    moments.clear()
    layers = super_layers(supernet)

    def fit() -> None:
        for layer in pattern.layers:
            with torch.no_grad():
                fit_layer(layers[str(layer.name)], layer, seconds.pop(str(layer.name)), 1e-4)

    _, fitting = _timed(fit)
    _, norms = _timed(lambda: estimate_batch_norms(supernet, batches))
    total = statistics + fitting + norms
    yield f"refit {total:.1f} s: statistics {statistics:.1f}, fit {fitting:.1f}, batch norms {norms:.1f}"


def gradient_cost(arch: str, kernel: int, images: int, image_size: int) -> Iterator[str]:
    """Seconds of the search by gradients, beside the training of a supernet that it saves."""
    torch.manual_seed(0)
    data = ScatteredDigits(length=images, image_size=image_size)
    batches = list(build_loader(data, TRAINING_BATCH))
    plain = wrap(build_network(arch), 10, image_size).to(
        memory_format=torch.channels_last
    )  # as after training

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, mode="loss")["loss"]

    search = PlainTask(plain, plain.network, lambda: batches, loss)
    supernet = convert_to_supernet(plain.network, kernel)
    task = SearchTask.of_plain(search, SearchTask.of(supernet).space)
    _, found = _timed(lambda: GradientStrategy().search(task))
    trained = wrap(supernet, 10, image_size).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss(trained, batches[0]).backward()
        optimizer.step()

    step()
    _, second = _timed(step)
    _, calibration = _timed(lambda: _run(trained.eval(), [images_of(batch) for batch in batches]))
    route = TRAINING_STEPS * second + calibration
    yield (
        f"gradient strategy {found:.1f} s on {images} images; the supernet's route {route:.1f} s "
        f"({TRAINING_STEPS} steps of {second:.2f} s, calibration {calibration:.1f} s): {found / route:.3f}"
    )


@torch.no_grad()
def _run(network: nn.Module, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        network(batch)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m search.refit_cost", description=__doc__)
    parser.add_argument("--arch", default="ic_resnet50", help="as in tools/search.py (default ic_resnet50)")
    parser.add_argument("--kernel", type=int, default=9, help="of the supernet (default 9)")
    parser.add_argument("--images", type=int, default=512, help="of the calibration (default 512)")
    parser.add_argument("--image-size", type=int, default=96, metavar="PX", help="(default 96)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--statistics", action="store_true", help="stop after the statistics")
    what.add_argument("--gradient", action="store_true", help="the search by gradients instead of the refit")
    args = parser.parse_args(argv)
    cost = gradient_cost if args.gradient else statistics_cost if args.statistics else refit_cost
    for line in cost(args.arch, args.kernel, args.images, args.image_size):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
