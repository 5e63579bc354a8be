#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Finds a dilation pattern: trains a supernet, then keeps the best dilated sub-kernel of each channel."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

if TYPE_CHECKING:
    from ic_conv.pattern import DilationPattern
    from search.assignment import BranchLimits
    from search.options import SearchOptions
    from search.run import Prepared

# Python puts this script's folder first, where the script itself would pass for the package `search`;
# the working folder comes instead, so that --arch finds the user's own modules.
sys.path[0] = str(Path.cwd())
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

# OpenMP reads this when torch is imported. Threads that wait spinning take the cores from those that work
# whenever anything else runs, and a step then takes twice as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EPILOG = """examples:
  python tools/search.py --kernel 9                      IC-ResNet-50 on scattered digits, minutes on 2 cores
  python tools/search.py --kernel 13 --arch ic_resnet18   a larger search space on a smaller network
  python tools/search.py --arch timm.models.resnet:resnet26 --data photos/      your network, your images
  python tools/search.py --checkpoint supernet.pt         the supernet is trained already
  python tools/search.py --target cpu                     branch sizes that run as fast as a plain convolution
  python tools/search.py --config TASK.py --checkpoint epoch_12.pth     a detector's or pose estimator's own
                                                          supernet (type='SuperResNet'), on its own data
  python tools/search.py --strategy pareto --latency-table here.json --n-jobs 2       many patterns: the front
                                                          of error and latency, WORK_DIR/ARCH_kKERNEL_front
  python tools/search.py --init refit                     write weights for the found network, ready to train
  python tools/search.py --strategy gradient --checkpoint plain/final.pt      from a plain network alone
  python tools/search.py --strategy random --seed 1       a control, found without a supernet
  python tools/search.py --dry-run                        what would be done, and how long it takes here
  torchrun --nproc_per_node 2 tools/search.py --launcher pytorch                several processes

the result: WORK_DIR/ARCH_kKERNEL.json (the pattern), .meta.json (where it comes from), .png (a picture),
.html (the report, one file to read and pass on)
"""

STUDY_OPTIONS = (
    "n_trials", "n_jobs", "storage", "study_name", "sampler", "latency_table", "latency_device",
    "latency_image_size", "criteria", "finetune_steps",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from search.arch import known_archs
    from search.assignment import TARGETS
    from search.criteria import CRITERIA
    from search.strategies import STRATEGIES

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to search")
    what.add_argument(
        "--kernel",
        type=int,
        default=9,
        metavar="K",
        help="size of the grown kernels; 9 offers dilations up to 4, 13 up to 6 (default 9)",
    )
    what.add_argument(
        "--base-kernel",
        type=int,
        default=3,
        metavar="K",
        help="size of the kernels that are dilated (default 3)",
    )
    what.add_argument(
        "--arch",
        default="ic_resnet50",
        help=f"package.module:factory, or one of {', '.join(known_archs())} (default ic_resnet50)",
    )
    what.add_argument("--strategy", default="edo", help=f"{', '.join(STRATEGIES)} (default edo)")
    what.add_argument(
        "--criterion", default="energy", help=f"what edo keeps: {', '.join(CRITERIA)} (default energy)"
    )
    fast = parser.add_argument_group(
        "branches that run fast (strategy edo; by default each channel keeps its best dilation)"
    )
    fast.add_argument(
        "--target", choices=tuple(TARGETS), help="the multiple and number of branches that suit this device"
    )
    fast.add_argument(
        "--channel-multiple",
        type=int,
        metavar="M",
        help="branch sizes are multiples of M; what a layer has over goes to one branch (cpu 16, cuda 32)",
    )
    fast.add_argument("--min-branch", type=int, metavar="N", help="least channels of a branch")
    fast.add_argument("--max-branches", type=int, metavar="N", help="most branches of a layer (targets: 8)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="digits",
        metavar="FOLDER",
        help="a folder with one folder of images per class (default: scattered digits, built in)",
    )
    data.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    data.add_argument(
        "--image-size", type=int, default=96, metavar="PX", help="side of the images (default 96)"
    )
    data.add_argument(
        "--calibration-images",
        type=int,
        default=512,
        metavar="N",
        help="images in the statistics pass after training (default 512)",
    )
    training = parser.add_argument_group("training of the supernet")
    training.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights of a trained supernet (strategy gradient: plain network): skip the training",
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default 160)")
    length.add_argument("--epochs", type=int, metavar="N", help="passes over the data instead of steps")
    training.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="images per step and process (default 8)"
    )
    training.add_argument("--lr", type=float, help="peak learning rate (default 0.02)")
    training.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that prepare images (default 0: none besides the training)",
    )
    training.add_argument(
        "--config",
        metavar="FILE",
        help="training settings (default configs/search/scattered_digits.py), or an OpenMMLab config whose "
        "backbone is the supernet: network and data come from there, the weights from --checkpoint",
    )
    training.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    training.add_argument("--amp", action="store_true", help="mixed precision")
    training.add_argument(
        "--launcher", default="none", choices=("none", "pytorch"), help="pytorch: under torchrun"
    )
    front = parser.add_argument_group(
        "strategy pareto: patterns on the front of error and latency, by an Optuna study over rules per stage"
    )
    front.add_argument(
        "--n-trials", type=int, default=100, metavar="N", help="finished trials of the study (default 100)"
    )
    front.add_argument(
        "--n-jobs", type=int, default=1, metavar="N", help="processes of this machine (default 1)"
    )
    front.add_argument(
        "--storage",
        metavar="URL",
        help="none, a journal file, sqlite:///FILE or postgresql://...; the same command on other machines "
        "works on the same study, and goes on after a kill (default WORK_DIR/study.journal)",
    )
    front.add_argument("--study-name", metavar="NAME", help="within the storage (default ARCH_kKERNEL)")
    front.add_argument(
        "--sampler", default="nsga2", choices=("nsga2", "tpe"), help="what proposes trials (default nsga2)"
    )
    front.add_argument(
        "--latency-table",
        metavar="FILE",
        help="from `tools/benchmark.py latency-table` on this device (default: measure each pattern)",
    )
    front.add_argument(
        "--latency-device",
        metavar="NAME",
        help="search for the device of this name, as its table has it, instead of this one",
    )
    front.add_argument(
        "--latency-image-size",
        type=int,
        default=224,
        metavar="PX",
        help="of images whose latency is measured (default 224)",
    )
    front.add_argument(
        "--criteria",
        nargs="+",
        metavar="NAME",
        default=["energy", "expectation", "taps"],
        help="that a stage may choose from (default energy expectation taps); --criterion is the yardstick",
    )
    front.add_argument(
        "--finetune-steps",
        type=int,
        default=0,
        metavar="N",
        help="third objective: the validation score after so many training steps (default 0: none)",
    )
    moves = parser.add_argument_group("strategy gradient (needs a trained plain network, no supernet)")
    moves.add_argument(
        "--moved-share",
        type=float,
        nargs="+",
        default=[0.5],
        metavar="S",
        help="share of the channels that move to another dilation, one for all or one for each stage "
        "(default 0.5)",
    )
    moves.add_argument(
        "--validation-steps",
        type=int,
        default=0,
        metavar="N",
        help="choose the shares instead: by the loss after so many training steps (default 0: no choice)",
    )
    output = parser.add_argument_group("run and output")
    output.add_argument(
        "--init",
        default="scratch",
        metavar="HOW",
        help="what the found network starts from: scratch, or weights that are written beside the pattern, "
        "crop (the supernet's taps copied) or refit (fitted to its output; best) (default scratch)",
    )
    output.add_argument(
        "--work-dir", metavar="DIR", help="checkpoints and log (default work_dirs/ARCH_kKERNEL)"
    )
    output.add_argument(
        "--output", type=Path, metavar="FILE", help="the pattern file (default WORK_DIR/ARCH_kKERNEL.json)"
    )
    output.add_argument(
        "--resume", action="store_true", help="go on with an interrupted training in the work dir"
    )
    output.add_argument("--seed", type=int, default=0, help="of weights, data and random choices (default 0)")
    output.add_argument(
        "--dry-run", action="store_true", help="print plan, layers, time and memory, then stop"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        run(args)
    except KeyboardInterrupt:
        command = shlex.join(["python", *sys.argv, *([] if args.resume else ["--resume"])])
        print(f"\nstopped; what was trained is kept. Go on with:\n  {command}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: a supernet's gradients would come back page by page in every step."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        set_option(option, value)


def run(args: argparse.Namespace) -> None:
    from search.plan import describe, describe_cost, measure_cost
    from search.run import prepare, processes, search_pattern, write_weights

    started = time.monotonic()
    options = build_options(args)
    first = int(os.environ.get("RANK", 0)) == 0
    console = Console(quiet=not first, highlight=False, soft_wrap=True)
    prepared = prepare(options)
    console.print(describe(options, prepared))
    if args.dry_run:
        cost = describe_cost(options, measure_cost(options, prepared)) if options.trains else "no training"
        console.print(cost)
        return
    batches = prepared.search.batches()

    def shown() -> object:
        return track(batches, "calibrating", total=len(batches), console=console, transient=True)  # type: ignore[arg-type]

    prepared = replace(prepared, search=replace(prepared.search, batches=shown))  # type: ignore[arg-type]
    with processes(options):
        pattern = search_pattern(options, prepared)
        if first:
            show_results(options, prepared, pattern, time.monotonic() - started, console)
        weights = None
        if options.init != "scratch":
            weights = write_weights(options, prepared, pattern)
            console.print(f"weights  {weights}")
    console.print("\nUse it:")
    if options.task_config is None:
        console.print(next_command(args.arch, options.pattern_path, weights), markup=False)
    else:
        from search.on_task import backbone_config

        console.print(
            f"  backbone={backbone_config(options.task_config, options.pattern_path, weights)}", markup=False
        )


def show_results(
    options: SearchOptions, prepared: Prepared, pattern: DilationPattern, seconds: float, console: Console
) -> None:
    """Writes pattern, picture and report, and says where they are."""
    from search.report import record_run, report_run
    from search.run import write_results

    picture = write_results(pattern, options.pattern_path)
    log = Path(options.checkpoint).parent if options.checkpoint else options.train.work_dir
    record = record_run(
        pattern,
        prepared.search,
        log if options.trains or options.finder.needs_supernet else None,
        shlex.join(["python", *sys.argv]),
        seconds,
    )
    report = report_run(pattern, record, options.pattern_path)
    console.print(f"\n{pattern.summary()}\n")
    if options.strategy == "pareto":
        console.print((options.front_path / "front.md").read_text(encoding="utf-8"), markup=False)
        console.print(f"front    {options.front_path}")
    console.print(f"pattern  {options.pattern_path}\npicture  {picture}\nreport   {report}")


def next_command(arch: str, path: Path, weights: Path | None = None) -> str:
    """The command to type next: the network with its pattern, and with its weights if there are some."""
    if ":" not in arch:
        more = "" if weights is None else f", weights={str(weights)!r}"
        code = f"from ic_conv import {arch}; print({arch}(pattern_path={str(path)!r}{more}))"
    else:
        module, _, factory = arch.partition(":")
        code = (
            f"from {module} import {factory}; from ic_conv import DilationPattern, apply_pattern; "
            f"print(apply_pattern({factory}(), DilationPattern.load({str(path)!r})))"
        )
    return f"  python -c {shlex.quote(code)}" if '"' in code else f'  python -c "{code}"'


def pareto_options(args: argparse.Namespace, name: str, work_dir: Path) -> dict[str, Any]:
    """SearchOptions' arguments for the strategy pareto; study and journal are named after the search.

    Raises:
        ValueError: an option of a study was given to another strategy.
    """
    if args.strategy != "pareto":
        defaults = parse_args([])
        for option in STUDY_OPTIONS:
            if getattr(args, option) != getattr(defaults, option):
                raise ValueError(
                    f"--{option.replace('_', '-')} is for the strategy pareto, got {args.strategy}"
                )
        return {}
    from search.engine.options import resolve_device
    from search.latency import LatencyTable, device_name
    from search.strategies import ParetoOptions

    try:
        from search.study import StudyOptions
    except ImportError as error:
        raise ValueError(f"--strategy pareto needs Optuna, pip install -e '.[pareto]': {error}") from error

    study = StudyOptions(
        storage=args.storage or str(work_dir / "study.journal"),
        name=args.study_name or name,
        sampler=args.sampler,
        trials=args.n_trials,
        jobs=args.n_jobs,
    )
    table = None if args.latency_table is None else LatencyTable.load(args.latency_table)
    if table is not None:
        table.check_device(args.latency_device or device_name(resolve_device(args.device)))
    cache = work_dir / "assigned_layers.sqlite"
    pareto = ParetoOptions(table, args.latency_image_size, study, tuple(args.criteria), cache=cache)
    return {"pareto": pareto, "finetune_steps": args.finetune_steps}


def build_limits(args: argparse.Namespace) -> BranchLimits:
    """The target's limits, each replaced by its own option where that is given."""
    from search.assignment import TARGETS, BranchLimits

    given = {name: getattr(args, name) for name in ("channel_multiple", "min_branch", "max_branches")}
    chosen = TARGETS[args.target] if args.target else BranchLimits()
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})


def task_config_of(args: argparse.Namespace) -> str | None:
    """The config of a whole task, if --config names one; training settings have no model.

    Raises:
        ValueError: an option was given that such a config decides.
    """
    from mmengine.config import Config

    from search.strategies import STRATEGIES

    if args.config is None or not Path(args.config).is_file():
        return None
    try:
        if "model" not in Config.fromfile(args.config, import_custom_modules=False):
            return None
    except Exception:  # a config is code; whoever builds from it says what is wrong
        return None
    defaults = parse_args([])
    decided = ["arch", "data", "image_size", "steps", "epochs", "lr", "workers"]
    if args.strategy in STRATEGIES and not STRATEGIES[args.strategy].needs_plain:  # a plain network has none
        decided += ["kernel", "base_kernel"]
    for name in decided:
        if getattr(args, name) != getattr(defaults, name):
            raise ValueError(
                f"--{name.replace('_', '-')}: {args.config} decides that, with its model and data"
            )
    if args.batch_size == defaults.batch_size:
        args.batch_size = None  # the config's
    return str(args.config)


def build_options(args: argparse.Namespace) -> SearchOptions:
    """SearchOptions from the command line."""
    from search.arch import file_stem
    from search.data import FolderImages, ScatteredDigits
    from search.engine import TrainOptions
    from search.engine.options import DEFAULT_CONFIG
    from search.options import DIGITS, SearchOptions

    task_config = task_config_of(args)
    steps = args.steps
    if args.epochs is not None:
        if args.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {args.epochs}")
        images = (
            ScatteredDigits()
            if args.data == DIGITS
            else FolderImages(args.data, skip_bad=args.skip_bad, views=1)
        )
        steps = max(1, args.epochs * len(images) // args.batch_size)
    name = Path(task_config).stem if task_config else file_stem(args.arch, args.kernel)
    work_dir = Path(args.work_dir or Path("work_dirs") / name)
    train = TrainOptions(
        work_dir=work_dir,
        config=DEFAULT_CONFIG if task_config or not args.config else args.config,
        steps=steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=args.device,
        amp=args.amp,
        resume=args.resume,
        launcher=args.launcher,
        workers=args.workers,
    )
    return SearchOptions(
        train,
        kernel=args.kernel,
        base_kernel=args.base_kernel,
        arch=args.arch,
        strategy=args.strategy,
        criterion=args.criterion,
        limits=build_limits(args),
        **pareto_options(args, name, work_dir),
        data=args.data,
        image_size=args.image_size,
        calibration_images=args.calibration_images,
        checkpoint=args.checkpoint,
        task_config=task_config,
        output=args.output,
        skip_bad=args.skip_bad,
        init=args.init,
        moved_shares=tuple(args.moved_share),
        validation_steps=args.validation_steps,
    )


if __name__ == "__main__":
    sys.exit(main())
