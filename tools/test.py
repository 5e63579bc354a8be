#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Tests a checkpoint on the test data of its config and prints the metrics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

# Python puts this script's folder first, where search.py would pass for the package `search`.
sys.path[0] = str(Path.cwd())
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from ic_conv.checkpoint import TRUST  # noqa: E402

EPILOG = """examples:
  python tools/test.py configs/detection/faster-rcnn_rednet50_fpn_1x_coco.py faster_rcnn_red50.pth
  python tools/test.py CONFIG CHECKPOINT --out predictions.pkl
  torchrun --nproc_per_node 8 tools/test.py CONFIG CHECKPOINT --launcher pytorch
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint of the whole model")
    parser.add_argument("--work-dir", metavar="DIR", help="logs and metrics (default work_dirs/CONFIG)")
    parser.add_argument("--out", metavar="FILE.pkl", help="write the predictions there")
    parser.add_argument("--trust-checkpoint", action="store_true", help=TRUST)
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="override keys of the config: model.test_cfg.rcnn.score_thr=0.1",
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
            checkpoint=args.checkpoint,
        )
        runner.test(config, args.out, args.trust_checkpoint)
    except (runner.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
