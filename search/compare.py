# SPDX-License-Identifier: Apache-2.0
"""Does a found pattern pay? Every method trains the same small network for the same steps, on several seeds.

Finished runs lie as JSON files in the work folder, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ic_conv._files import write_text
from ic_conv.convert import apply_pattern
from ic_conv.models.resnet import BasicBlock
from ic_conv.pattern import DilationPattern, LayerPattern
from search.criteria import CRITERIA, DEFAULT_CRITERION
from search.data import ScatteredDigits, build_loader
from search.engine import TrainOptions, evaluate, load_checkpoint, train
from search.engine.checkpoint import FINAL
from search.space import DilationSpace
from search.statistics import images_of
from search.strategies import STRATEGIES, EDOStrategy, GradientStrategy, PlainTask, SearchTask
from search.supernet import convert_to_supernet
from search.tasks import wrap

WIDTH, BLOCKS = 32, 2


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


def slim_resnet() -> nn.Module:
    """Two basic blocks of 32 channels at stride 4: 4 searched layers.

    Plain, it sees 35 px; digits reach 60 px, so the receptive field matters.
    """
    stem = nn.Conv2d(3, WIDTH, 7, stride=2, padding=3, bias=False)
    blocks = [BasicBlock(WIDTH, WIDTH, stride=2 if index == 0 else 1) for index in range(BLOCKS)]
    return nn.Sequential(stem, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), *blocks)


def shuffled(pattern: DilationPattern, seed: int) -> DilationPattern:
    """The same dilations dealt out anew over all layers: keeps the mix, loses the place."""
    pool = [dilation for layer in pattern.layers for dilation, count in layer.branches for _ in range(count)]
    order = np.random.default_rng([seed, 1]).permutation(len(pool))
    cards = iter(pool[index] for index in order)
    layers = (
        LayerPattern.from_assignment([next(cards) for _ in range(layer.units)], layer.name)
        for layer in pattern.layers
    )
    return replace(pattern, layers=tuple(layers))


def _found(options: CompareOptions, seed: int, criterion: str = DEFAULT_CRITERION) -> DilationPattern:
    return DilationPattern.load(options.work_dir / f"seed{seed}" / f"{criterion}.json")


def _by_strategy(options: CompareOptions, seed: int, name: str) -> DilationPattern:
    task = SearchTask.of(convert_to_supernet(slim_resnet(), options.kernel), seed=seed)
    return STRATEGIES[name]().search(task)


def _by_gradient(options: CompareOptions, seed: int) -> DilationPattern:
    task = wrap(slim_resnet(), ScatteredDigits.num_classes)
    load_checkpoint(task, options.work_dir / f"seed{seed}" / "plain.result" / FINAL)
    batches = list(build_loader(ScatteredDigits(length=2048, seed=seed + 1000), 32))
    plain = PlainTask(task, task.network, lambda: batches, lambda model, x: model(**x, mode="loss")["loss"])
    return GradientStrategy().search(SearchTask.of_plain(plain, DilationSpace(options.kernel), seed))


PatternMaker = Callable[[CompareOptions, int], DilationPattern]


def methods() -> dict[str, tuple[PatternMaker | None, int]]:
    """By name: where the pattern comes from (None: plain), and how many times the steps are trained."""
    return {
        "plain": (None, 1),
        "plain x2 steps": (None, 2),
        **{f"edo {name}": (partial(_found, criterion=name), 1) for name in CRITERIA},
        f"edo {DEFAULT_CRITERION} shuffled": (
            lambda options, seed: shuffled(_found(options, seed), seed),
            1,
        ),
        "hand": (partial(_by_strategy, name="hand"), 1),
        "uniform": (partial(_by_strategy, name="uniform"), 1),
        "random": (partial(_by_strategy, name="random"), 1),
        "gradient": (_by_gradient, 1),
    }


SUPERNET = "supernet"


def run(method: str, seed: int, options: CompareOptions) -> dict[str, float]:
    """One finished run: the figures of `evaluate`, and the pattern's share of plain channels."""
    record = options.work_dir / f"seed{seed}" / f"{method.replace(' ', '_')}.result.json"
    if record.exists():
        document = json.loads(record.read_text(encoding="utf-8"))
        if document["options"] != _identity(options):
            raise ValueError(f"{record}: made with {document['options']}; choose another --work-dir")
        return document["result"]
    record.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    network, factor, plain_share = slim_resnet(), 1, 1.0
    if method == SUPERNET:
        network = convert_to_supernet(network, options.kernel, inplace=True)
    else:
        make, factor = methods()[method]
        if make is not None:
            pattern = make(options, seed)
            plain_share = sum(layer.plain_share for layer in pattern.layers) / len(pattern.layers)
            network = apply_pattern(network, pattern, inplace=True)
    task = wrap(network, ScatteredDigits.num_classes)
    train(
        task,
        ScatteredDigits(seed=seed),
        TrainOptions(
            record.with_suffix(""),
            steps=options.steps * factor,
            batch_size=options.batch_size,
            seed=seed,
            device="cpu",
            workers=0,
            progress=False,
            resume=True,
        ),
    )
    if method == SUPERNET:
        _search(network, options, seed)
    score = evaluate(task, ScatteredDigits("val", length=options.val_images), device="cpu")
    result = {**score, "plain_share": plain_share}
    write_text(record, json.dumps({"options": _identity(options), "result": result}, indent=2) + "\n")
    return result


def compare(
    options: CompareOptions, names: Sequence[str], seeds: int, jobs: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Runs the named methods on every seed in `jobs` processes; yields each run as it ends."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        # What is trained first is what patterns are found on.
        first = [SUPERNET, *(["plain"] if "gradient" in names else [])]
        for group in (first, [name for name in names if name not in first]):
            futures = {
                pool.submit(run, name, seed, options): (name, seed) for seed in range(seeds) for name in group
            }
            try:
                for future in as_completed(futures):
                    yield (*futures[future], future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table: mean and standard deviation over the seeds, in percent."""
    columns = ("mAP", "mAP_small", "mAP_medium", "mAP_large", "plain_share")
    lines = ["| method | mAP | small | medium | large | plain channels |", "|---|---|---|---|---|---|"]
    for name, runs in results.items():
        cells = []
        for column in columns:
            values = [run[column] * (100 if column == "plain_share" else 1) for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _search(supernet: nn.Module, options: CompareOptions, seed: int) -> None:
    """Writes the pattern of every criterion."""
    images = ScatteredDigits(length=512, seed=seed + 1000)
    batches = [images_of(batch) for batch in build_loader(images, 32)]
    task = replace(SearchTask.of(supernet, seed=seed), batches=lambda: batches)
    for name in CRITERIA:
        EDOStrategy(name).search(task).save(options.work_dir / f"seed{seed}" / f"{name}.json")


def _identity(options: CompareOptions) -> dict[str, Any]:
    values = asdict(options)
    values.pop("work_dir")
    return values
