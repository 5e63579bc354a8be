#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Trains the model of a config: classifier, detector, segmenter or pose estimator."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from mmengine.config import DictAction

# Python puts this script's folder first, where search.py would pass for the package `search`.
sys.path[0] = str(Path.cwd())
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from ic_conv.checkpoint import TRUST  # noqa: E402

EPILOG = """examples:
  python tools/train.py configs/detection/faster-rcnn_rednet50_fpn_1x_coco.py
  python tools/train.py CONFIG --resume                     go on where the work folder's last checkpoint ends
  python tools/train.py CONFIG --cfg-options train_dataloader.batch_size=4 data_root=/data/coco/
  torchrun --nproc_per_node 8 tools/train.py CONFIG --launcher pytorch

the config may be one of ours or one of MMPretrain, MMDetection, MMSegmentation or MMPose
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", metavar="DIR", help="checkpoints and logs (default work_dirs/CONFIG)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from this checkpoint, by default the last one in the work folder",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the learning rate to the batch size"
    )
    parser.add_argument("--trust-checkpoint", action="store_true", help=TRUST)
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="override keys of the config: model.backbone.depth=101 key=a,b key='[(a,b)]'",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from ic_conv.openmmlab import runner

    if args.trust_checkpoint:
        print(f"warning: --trust-checkpoint: {TRUST}", file=sys.stderr)
    try:
        config = runner.load_config(args.config, args.cfg_options)
        runner.prepare(
            config,
            args.config,
            work_dir=args.work_dir,
            launcher=args.launcher,
            amp=args.amp,
            auto_scale_lr=args.auto_scale_lr,
            resume=args.resume,
        )
        runner.train(config, args.trust_checkpoint)
    except KeyboardInterrupt:
        command = shlex.join(["python", *sys.argv, *([] if args.resume else ["--resume"])])
        print(f"\nstopped; checkpoints are kept. Go on with:\n  {command}", file=sys.stderr)
        return 2
    except (runner.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
