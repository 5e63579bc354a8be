# SPDX-License-Identifier: Apache-2.0
"""The command line of `tools/search.py`: what it takes, and the SearchOptions that it means."""

from __future__ import annotations

import argparse
from pathlib import Path

from search.arch import file_stem, known_archs
from search.data import FolderImages, ScatteredDigits
from search.engine import TrainOptions
from search.engine.options import DEFAULT_CONFIG
from search.options import DIGITS, SearchOptions
from search.strategies import STRATEGIES
from search.strategy_arguments import add_strategy_arguments, build_strategy

DESCRIPTION = "Finds a dilation pattern: trains a supernet and keeps each channel's best dilated sub-kernel."
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
  python tools/search.py --init refit --searches 3        write weights for the found network, ready to train;
                                                          the supernet adapts to what is left to each channel
  python tools/search.py --strategy gradient --checkpoint plain/final.pt      from a plain network alone
  python tools/search.py --strategy histogram --n-trials 60     the mix of dilations, chosen by validation in
                                                          an Optuna study
  python tools/search.py --strategy random --seed 1       a control, found without a supernet
  python tools/search.py --dry-run                        what would be done, and how long it takes here
  torchrun --nproc_per_node 2 tools/search.py --launcher pytorch                several processes

the result: WORK_DIR/ARCH_kKERNEL.json (the pattern), .meta.json (where it comes from), .png (a picture),
.html (the report, one file to read and pass on)
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """What was typed, by default after the command's name."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
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
    add_strategy_arguments(parser)
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
    training = parser.add_argument_group("training of the supernet, or of the plain network")
    training.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights of a trained supernet (gradient, histogram, rfnext, darts, single-path: of a plain "
        "network): skip the training",
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default 160)")
    length.add_argument("--epochs", type=int, metavar="N", help="passes over the data instead of steps")
    training.add_argument(
        "--searches",
        type=int,
        default=1,
        metavar="N",
        help="of edo, evenly spread over the training, the last one after it; the earlier ones leave each "
        "channel a share of its dilations, to which the weights adapt: 3 suit --init refit (default 1)",
    )
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


def _task_config(args: argparse.Namespace) -> str | None:
    """The config of a whole task, if --config names one; training settings have no model.

    Raises:
        ValueError: an option was given that such a config decides.
    """
    from mmengine.config import Config

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
    """The options that were typed.

    Raises:
        ValueError: they are unknown, out of range, or do not go together.
    """
    task_config = _task_config(args)
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
        finder=build_strategy(args, name, work_dir),
        finetune_steps=args.finetune_steps or 0,
        data=args.data,
        image_size=args.image_size,
        calibration_images=args.calibration_images,
        checkpoint=args.checkpoint,
        task_config=task_config,
        output=args.output,
        skip_bad=args.skip_bad,
        init=args.init,
        searches=args.searches,
    )
