#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Translates checkpoints of the published IC-Conv and RedNet into ours, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Python puts this script's folder first, where search.py would pass for the package `search`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from ic_conv import DilationPattern  # noqa: E402
from ic_conv._files import atomic_path  # noqa: E402
from ic_conv.checkpoint import TRUST, read_weights  # noqa: E402
from ic_conv.published import backbone_of, to_ours, to_published  # noqa: E402

EPILOG = """examples:
  python tools/convert_checkpoint.py ic_resnet50.pth ours.pth --pattern ic_resnet50_k9.json
  python tools/convert_checkpoint.py faster_rcnn_red50.pth ours.pth --trust-checkpoint
  python tools/convert_checkpoint.py rednet50.pth ours.pth --backbone     keys of ic_conv.rednet50
  python tools/convert_checkpoint.py epoch_12.pth published.pth --to published
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="file to read; of a whole model or a backbone")
    parser.add_argument("output", type=Path, help="file to write: a state_dict of tensors, and no more")
    parser.add_argument("--to", choices=("ours", "published"), default="ours", help="(default ours)")
    parser.add_argument(
        "--pattern",
        type=Path,
        metavar="FILE",
        help="pattern file of an IC network: read for ours, since the published weights do not tell it; "
        "written for published (default OUTPUT.json)",
    )
    parser.add_argument(
        "--backbone", action="store_true", help="write the backbone alone, and its classifier if it has one"
    )
    parser.add_argument("--trust-checkpoint", action="store_true", help=TRUST)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.trust_checkpoint:
        print(f"warning: --trust-checkpoint: {TRUST}", file=sys.stderr)
    try:
        convert(args)
    except (ValueError, OSError) as error:
        hint = "; --trust-checkpoint reads it as a pickle" if "read safely" in str(error) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    return 0


def convert(args: argparse.Namespace) -> None:
    """Reads, translates and writes; each file in one atomic step."""
    state, _ = read_weights(args.checkpoint, trust=args.trust_checkpoint)
    if args.to == "ours":
        state = to_ours(state, args.pattern and DilationPattern.load(args.pattern))
    else:
        state, pattern = to_published(state)
        if pattern is not None:
            path = args.pattern or args.output.with_suffix(".json")
            pattern.save(path)
            print(f"pattern     {path}")
    if args.backbone:
        state = backbone_of(state)
    with atomic_path(args.output) as temporary:
        torch.save({"state_dict": state}, temporary)
    print(f"checkpoint  {args.output} ({len(state)} tensors)")


if __name__ == "__main__":
    sys.exit(main())
