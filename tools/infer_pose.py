#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Finds people in pictures: draws their skeletons and writes their joints in COCO's result format."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

# Python puts this script's folder first, where search.py would pass for the package `search`.
sys.path[0] = str(Path.cwd())
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from ic_conv.checkpoint import TRUST  # noqa: E402

DEFAULT_CONFIG = "configs/human_pose/ic_res18_k9_drawn_256x256.py"
EPILOG = """examples:
  python tools/infer_pose.py photo.jpg other.png            the last checkpoint of the config's work folder
  python tools/infer_pose.py --config configs/human_pose/ic_res50_k13_coco_640x640.py \\
      --checkpoint epoch_300.pth --device cuda photos/*.jpg

the result: OUT_DIR/people.json, and OUT_DIR/NAME.png for each picture
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"of the trained model (default {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="its weights (default: the last ones in work_dirs/CONFIG)"
    )
    parser.add_argument(
        "--out-dir", type=Path, default=Path("people"), metavar="DIR", help="made if missing (default people)"
    )
    parser.add_argument(
        "--score-thr", type=float, default=0.2, metavar="X", help="people below it are left out (default 0.2)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--trust-checkpoint", action="store_true", help=TRUST)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from ic_conv.openmmlab import runner

    if args.trust_checkpoint:
        print(f"warning: --trust-checkpoint: {TRUST}", file=sys.stderr)
    try:
        run(args)
    except (runner.ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    from mmengine.runner import find_latest_checkpoint

    from ic_conv._files import write_text
    from ic_conv.openmmlab.pose.inference import PoseEstimator
    from ic_conv.openmmlab.runner import load_config

    missing = [str(image) for image in args.images if not image.is_file()]
    if missing:
        raise ValueError(f"no such picture: {', '.join(missing)}")
    names = [image.stem for image in args.images]
    if len(set(names)) < len(names):
        raise ValueError("pictures must have different names: their results lie in one folder")
    config = load_config(args.config)
    work_dir = Path("work_dirs") / Path(args.config).stem
    checkpoint = args.checkpoint or find_latest_checkpoint(str(work_dir))
    if checkpoint is None or not Path(checkpoint).is_file():
        raise ValueError(f"no checkpoint in {args.checkpoint or work_dir}: train first, or give --checkpoint")
    estimator = PoseEstimator(config, checkpoint, args.device, args.trust_checkpoint)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    results, lines = [], []
    for number, image in enumerate(track(args.images, "finding people", console=console, transient=True), 1):
        people = estimator.find_people(image)
        found = estimator.results(
            people, int(image.stem) if image.stem.isdecimal() else number, args.score_thr
        )
        estimator.draw(image, people, args.out_dir / f"{image.stem}.png", args.score_thr)
        results += [person | {"file_name": image.name} for person in found]
        lines.append(f"{args.out_dir / image.stem}.png  {len(found)} people")
    write_text(args.out_dir / "people.json", json.dumps(results, indent=1))
    console.print("\n".join([*lines, str(args.out_dir / "people.json")]), markup=False)


if __name__ == "__main__":
    sys.exit(main())
