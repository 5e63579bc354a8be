#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measures parameters and FLOPs of the configs in configs/README.md and writes them into its tables."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

# Python puts this script's folder first, where search.py would pass for the package `search`.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from ic_conv._files import write_text  # noqa: E402
from ic_conv.openmmlab.model_table import update  # noqa: E402
from ic_conv.openmmlab.runner import ConfigError  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, default=ROOT / "configs" / "README.md", metavar="FILE")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a figure differs from a fresh one"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only configs with this in their name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        old = args.readme.read_text(encoding="utf-8")
        new, problems = update(old, args.readme.parent, lambda config: args.only in config)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    changed = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]
    if args.check:
        problems += [f"changed: {line}" for line in changed]
    elif changed:
        write_text(args.readme, new)
    print("\n".join(problems) or "every row is within 0.5 % (parameters) and 2 % (FLOPs), or has a footnote")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
