#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Finds a dilation pattern: trains a supernet, then keeps the best dilated sub-kernel of each channel."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

if TYPE_CHECKING:
    import argparse

    from ic_conv.pattern import DilationPattern
    from search.options import SearchOptions
    from search.run import Prepared

# Python puts this script's folder first, where the script itself would pass for the package `search`;
# the working folder comes instead, so that --arch finds the user's own modules.
sys.path[0] = str(Path.cwd())
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

# OpenMP reads this when torch is imported. Threads that wait spinning take the cores from those that work
# whenever anything else runs, and a step then takes twice as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str] | None = None) -> int:
    from search.command_line import parse_args

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
    from search.command_line import build_options
    from search.plan import describe, describe_cost, measure_cost
    from search.run import prepare, processes, search_pattern, train_network, write_weights

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
    with processes(options):
        train_network(options, prepared)
        prepared = with_progress(prepared, console)
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


def with_progress(prepared: Prepared, console: Console) -> Prepared:
    """Each pass over the calibration data shows how far it is."""
    batches = prepared.search.batches()

    def shown() -> object:
        return track(batches, "calibrating", total=len(batches), console=console, transient=True)  # type: ignore[arg-type]

    return replace(prepared, search=replace(prepared.search, batches=shown))  # type: ignore[arg-type]


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


if __name__ == "__main__":
    sys.exit(main())
