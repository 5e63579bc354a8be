# SPDX-License-Identifier: Apache-2.0
"""Does a pattern searched on poses pay? Plain and inception networks learn drawn people for the same steps.

A supernet's pattern is found once; the seeds are those of the trainings after it. A growing network finds its
own, and the search counts as a part of its steps.
Finished runs lie as JSON files in the work folder; an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from ic_conv.openmmlab.pose.drawn_people import write_people
from ic_conv.openmmlab.runner import load_config, prepare
from ic_conv.pattern import DilationPattern
from search.compare.grow import GROW_AFTER
from search.compare.records import in_processes, kept
from search.criteria import CRITERIA
from search.engine import TrainOptions
from search.options import SearchOptions
from search.run import prepare as prepare_search
from search.run import search_pattern
from search.strategies import EDOStrategy

CONFIG = Path(__file__).resolve().parents[2] / "configs/human_pose/res18_drawn_256x256.py"
SUPERNET, PLAIN, FOUND = "supernet", "plain", "edo "
GROWN = MappingProxyType({"gradient grown": 0.5, "gradient grown quarter": 0.25})  # shares of moved channels
METHODS = (PLAIN, *GROWN, *(FOUND + name for name in CRITERIA))
GROWING_IMAGES = 256  # of the search in a growing network, forward and backward, then for its batch norms
METRICS = ("AP", "AP .5", "AP .75", "AP (M)")  # COCO's; M: people above 32² pixels of the picture


@dataclass(frozen=True)
class PeopleOptions:
    """What is equal for all networks.

    Args:
        work_dir: folder for pictures, finished runs and patterns.
        steps: training steps of every network.
        batch_size: images per step.
        image_size: side of the training images in pixels, a multiple of 32.
        base_channels: of the ResNet-18, which has 64.
        stages: of the ResNet-18, which has 4; the first one's maps are a quarter of the image.
        kernel: size of the supernet's kernels.
        lr: peak learning rate.
        tag_weight: of the tag losses; 0.001 where heatmaps have 160 x 160 pixels, most of them empty.
        train_images, val_images: drawn pictures.
    """

    work_dir: Path
    steps: int = 2000
    batch_size: int = 8
    image_size: int = 192
    base_channels: int = 32
    stages: int = 2
    kernel: int = 9
    lr: float = 4e-3
    tag_weight: float = 0.01
    train_images: int = 200
    val_images: int = 400

    @property
    def supernet_steps(self) -> int:
        """Of the supernet, which costs four times as much: three fifths of the same schedule."""
        return max(1, 3 * self.steps // 5)

    @property
    def growing_steps(self) -> int:
        """Of a growing network, whose search takes the rest."""
        return max(2, self.steps - 2 * GROWING_IMAGES // self.batch_size)


def task_config(method: str, seed: int, options: PeopleOptions) -> Config:
    """The config of one run: ResNet-18 plain, as a supernet, or with the pattern in the work folder."""
    config = load_config(CONFIG)
    folder, channels, stages = run_folder(method, seed, options), options.base_channels, options.stages
    backbone = config.model.backbone
    # maps of the size that they have in the published training, of images three times as large
    backbone.update(base_channels=channels, num_stages=stages, out_indices=(stages - 1,))
    if method == SUPERNET:
        backbone.update(type="SuperResNet", kernel_size=options.kernel)
    elif method.startswith(FOUND):
        backbone.pattern = str(pattern_path(method, options))
    size = (options.image_size, options.image_size)
    codec = {"input_size": size, "heatmap_size": (size[0] // 4, size[1] // 4)}
    config.model.head.decoder.update(codec)
    config.model.head.tag_loss.loss_weight = options.tag_weight
    channels *= 2 ** (stages - 1)
    ups = stages - 1  # heatmaps are a quarter of the image
    config.model.head.update(
        in_channels=channels, deconv_out_channels=(channels,) * ups, deconv_kernel_sizes=(4,) * ups
    )
    loaders = (config.train_dataloader, config.val_dataloader, config.test_dataloader)
    for loader in loaders:
        loader.dataset.data_root = str(options.work_dir / "people")
        loader.dataset.pipeline[1].input_size = size
    config.train_dataloader.batch_size = options.batch_size
    config.train_dataloader.dataset.pipeline[3].encoder.update(codec)
    config.optim_wrapper.optimizer.lr = options.lr
    steps = options.supernet_steps if method == SUPERNET else options.steps
    if method in GROWN:
        config.custom_hooks = [*config.get("custom_hooks", []), _growing(options, GROWN[method])]
        steps = options.growing_steps
    config.train_cfg.update(max_iters=steps, val_begin=steps + 1)  # one test, after it
    warm_up, cosine = config.param_scheduler
    warm_up.end = cosine.begin = max(2, options.steps // 20)
    cosine.end = steps if method in GROWN else options.steps
    config.default_hooks.checkpoint.update(interval=max(1, options.steps // 10), save_best=None)
    config.randomness = {"seed": seed}
    config.log_level = "WARNING"
    # MMEngine keeps loggers and visualizers by name in global tables
    config.experiment_name = config.visualizer.name = str(folder)
    return prepare(config, CONFIG, work_dir=str(folder), resume="auto")


def _growing(options: PeopleOptions, share: float) -> dict[str, Any]:
    return {
        "type": "DilationSearchHook",
        "strategy": "gradient",
        "at": max(1, options.growing_steps // GROW_AFTER),
        "kernel_size": options.kernel,
        "calibration_batches": GROWING_IMAGES // options.batch_size,
        "options": {"shares": (share,)},
    }


def run(method: str, seed: int, options: PeopleOptions) -> dict[str, float]:
    """One finished run: COCO's figures in percent, and the pattern's share of plain channels."""
    identity = {key: value for key, value in asdict(options).items() if key != "work_dir"}
    record = run_folder(method, seed, options).with_suffix(".result.json")
    return kept(record, identity, lambda: {"result": _make(method, seed, options)})


def _make(method: str, seed: int, options: PeopleOptions) -> dict[str, float]:
    pattern = _search(method, options) if method.startswith(FOUND) else None
    config = task_config(method, seed, options)
    folder = run_folder(method, seed, options)
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(folder.with_suffix(".py"))
    with redirect_stdout(StringIO()):  # COCO's tools print their tables
        runner = Runner.from_cfg(config)
        runner.train()
        scores = runner.val()
    result = {name: round(100 * float(scores[f"coco/{name}"]), 2) for name in METRICS}
    if method in GROWN:
        pattern = DilationPattern.load(folder / "pattern.json")
    shares = [1.0] if pattern is None else [layer.plain_share for layer in pattern.layers]
    return {**result, "plain_share": sum(shares) / len(shares)}


def _search(method: str, options: PeopleOptions) -> DilationPattern:
    """The pattern of the supernet, by what `tools/search.py --config` does."""
    path, supernet = pattern_path(method, options), run_folder(SUPERNET, 0, options)
    if not path.exists():
        search = SearchOptions(
            TrainOptions(path.parent, device="cpu"),
            finder=EDOStrategy(method.removeprefix(FOUND)),
            task_config=str(supernet.with_suffix(".py")),
            checkpoint=str(supernet / f"iter_{options.supernet_steps}.pth"),
            output=path,
        )
        search_pattern(search, prepare_search(search)).save(path)
    return DilationPattern.load(path)


def run_folder(method: str, seed: int, options: PeopleOptions) -> Path:
    return options.work_dir.absolute() / f"seed{seed}" / method.replace(" ", "_")


def pattern_path(method: str, options: PeopleOptions) -> Path:
    return run_folder(method, 0, options).with_suffix(".json")


def compare(
    options: PeopleOptions, names: Sequence[str], seeds: int, jobs: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Runs the named methods on every seed in `jobs` processes; yields each run as it ends."""
    write_people(
        options.work_dir / "people", {"train": options.train_images, "val": options.val_images}
    )  # the same pictures each time
    found = [name for name in names if name.startswith(FOUND)]
    before = [(SUPERNET, 0)] if found else []
    before += [(name, seed) for name in names if name not in found for seed in range(seeds)]
    groups = (before, [(name, seed) for name in found for seed in range(seeds)])
    return in_processes(run, options, groups, jobs)
