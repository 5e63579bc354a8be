#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draws what a network's layers do on an image, and what a search found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Python puts this script's folder first, where search.py would pass for the package `search`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

EPILOG = """examples:
  python tools/visualize.py involution --image photo.jpg --checkpoint rednet50.pth --stem-kernel-size 3 \\
      --output maps.png
  python tools/visualize.py report work_dirs/ic_resnet50_k9
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from ic_conv import models

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "involution", help="heat maps of the kernels that a RedNet or CedNet generates for an image"
    )
    command.set_defaults(run=draw_involution)
    archs = [name for name in models.__all__ if name.startswith(("rednet", "cednet"))]
    command.add_argument("--image", required=True, metavar="FILE", help="the image")
    command.add_argument("--output", required=True, metavar="FILE", help="the picture, a .png for example")
    command.add_argument("--arch", choices=archs, default="rednet50", help="default rednet50")
    command.add_argument("--checkpoint", metavar="FILE", help="weights of this network, or published ones")
    command.add_argument(
        "--stem-kernel-size", type=int, metavar="K", help="window in the stem; 3 for published classifiers"
    )
    command.add_argument(
        "--layers", nargs="+", metavar="NAME", help="involutions to draw (default: the last of each stage)"
    )
    command.add_argument(
        "--groups", type=int, default=6, metavar="N", help="the most maps of a layer (default 6)"
    )
    command.add_argument(
        "--image-size", type=int, default=448, metavar="PX", help="short side of the image (default 448)"
    )

    command = commands.add_parser(
        "report", help="the HTML report of a search, made again from what the run left in its work folder"
    )
    command.set_defaults(run=make_report)
    command.add_argument("place", type=Path, metavar="WORK_DIR", help="the folder, or one pattern file in it")
    command.add_argument(
        "--patterns",
        nargs="+",
        default=[],
        metavar="FILE",
        help="more patterns for the same layers to compare with: of the strategy gradient, from the zoo",
    )
    command.add_argument(
        "--table", metavar="FILE", help="scores to show, as `tools/compare.py ... --output FILE` writes them"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw_involution(args: argparse.Namespace) -> None:
    import torch

    from ic_conv import models
    from ic_conv.visualize import draw_kernel_maps, kernel_maps, last_of_each_stage, read_image

    image = read_image(args.image, args.image_size)
    torch.manual_seed(0)
    options = {} if args.stem_kernel_size is None else {"stem_kernel_size": args.stem_kernel_size}
    net = getattr(models, args.arch)(weights=args.checkpoint, **options)
    weights = Path(args.checkpoint).name if args.checkpoint else "random weights"
    if args.checkpoint is None:
        print(
            "no --checkpoint: the weights are random, so the maps show no learned attention", file=sys.stderr
        )
    maps = kernel_maps(net, image, args.layers or last_of_each_stage(net))
    title = f"Sums of the kernels that {args.arch} generates ({weights})"
    draw_kernel_maps(image, maps, args.output, title, args.groups)
    print(args.output)


def make_report(args: argparse.Namespace) -> None:
    from search.report import Comparison, remake_reports

    for page in remake_reports(args.place, Comparison.read(args.patterns, args.table)):
        print(page)


if __name__ == "__main__":
    sys.exit(main())
