#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compares ways to choose dilations: by the score of a small network, or by planted dilations found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# As in tools/search.py: this folder must not hide the package `search`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

EPILOG = """examples:
  python tools/compare.py digits                  every method, 3 seeds, equal steps; resumes when run again
  python tools/compare.py digits --steps 20 --seeds 1 --work-dir work_dirs/try      a quick look
  python tools/compare.py oneshot                 scores without retraining: taps copied, and refitted
  python tools/compare.py people                  COCO AP of ResNet-18 on drawn people, plain and searched
  python tools/compare.py planted                 share of planted dilations that each criterion finds
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="scores on scattered digits after equal training")
    digits.add_argument("--steps", type=int, default=600, help="training steps of each network (default 600)")
    digits.add_argument("--methods", help="comma-separated, of those that the table lists (default all)")
    digits.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    digits.add_argument(
        "--against", metavar="METHOD", help="a column of the differences to this one, by seed"
    )
    digits.add_argument("--figure", type=Path, help="draw the scores against total compute, as SVG or PNG")
    digits.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    digits.add_argument("--work-dir", type=Path, default=Path("work_dirs/compare"), help="finished runs")
    planted = commands.add_parser("planted", help="one layer with known dilations")
    planted.add_argument("--seeds", type=int, default=5, help="planted layers (default 5)")
    oneshot = commands.add_parser("oneshot", help="scores right after the search, from finished supernets")
    oneshot.add_argument("--seeds", type=int, default=3, help="supernets (default 3)")
    oneshot.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/compare"), help="where `digits` left its supernets"
    )
    oneshot.add_argument(
        "--calibration-images", type=int, default=512, metavar="N", help="images of the fit (default 512)"
    )
    people = commands.add_parser(
        "people", help="bottom-up pose: COCO AP on drawn people after equal training"
    )
    people.add_argument(
        "--steps", type=int, default=2000, help="training steps of each network (default 2000)"
    )
    people.add_argument(
        "--methods",
        default="plain,gradient grown quarter",
        help='default "plain,gradient grown quarter"',
    )
    people.add_argument(
        "--stages", type=int, default=2, choices=(1, 2, 3, 4), help="of the ResNet-18 (default 2)"
    )
    people.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    people.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    people.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/compare_people"), help="pictures, finished runs"
    )
    for command in (digits, oneshot):
        command.add_argument("--first-seed", type=int, default=0, help="the others follow it (default 0)")
    for command in (digits, oneshot, people, planted):
        command.add_argument("--output", type=Path, help="write the table to this file too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        commands = {"digits": _digits, "oneshot": _oneshot, "people": _people, "planted": _planted}
        text = commands[args.command](args)
        if args.output:
            from ic_conv._files import write_text

            write_text(args.output, text + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, the same command goes on", file=sys.stderr)
        return 2
    print(text)
    return 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _digits(args: argparse.Namespace) -> str:
    from search.compare import CompareOptions, compare, draw, methods, table, with_cost, with_needs

    for name in ("steps", "seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    chosen = args.methods.split(",") if args.methods else list(methods())
    for name in (*chosen, *([args.against] if args.against else [])):
        if name not in methods():
            raise ValueError(f"unknown method {name!r}; known ones: {', '.join(methods())}")
    if args.against and args.against not in chosen:
        raise ValueError(f"{args.against} must be among the methods")
    options = CompareOptions(args.work_dir, args.steps)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    every = with_needs(chosen)
    with _progress() as progress:
        bar = progress.add_task("runs", total=len(every) * args.seeds)
        for name, seed, result in compare(options, every, seeds, args.jobs):
            progress.console.print(f"{name}, seed {seed}: mAP {result['mAP']:.1f}")
            progress.advance(bar)
    results = {name: {seed: with_cost(name, seed, options) for seed in seeds} for name in chosen}
    if args.figure:
        draw(results, args.figure)
    return table(results, args.against)


def _oneshot(args: argparse.Namespace) -> str:
    from search.compare import table
    from search.one_shot import one_shot_scores

    results: dict[str, dict[int, dict[str, float]]] = {}
    with _progress() as progress:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        for seed in progress.track(seeds, description="supernets"):
            for name, score in one_shot_scores(args.work_dir, seed, args.calibration_images):
                results.setdefault(name, {})[seed] = score
                progress.console.print(f"{name}, seed {seed}: mAP {score['mAP']:.1f}")
    return table(results)


def _people(args: argparse.Namespace) -> str:
    try:
        from search.compare.people import METHODS, METRICS, PLAIN, SUPERNET, PeopleOptions, compare
    except ModuleNotFoundError as error:
        from ic_conv.openmmlab.runner import INSTALL

        raise ValueError(f"{error}; {INSTALL}") from error
    from search.compare import table

    chosen = args.methods.split(",")
    if unknown := [name for name in chosen if name not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; known ones: {', '.join(METHODS)}")
    for name, least in (("steps", 3), ("seeds", 1), ("jobs", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(args, name)}")
    results: dict[str, dict[int, dict[str, float]]] = {}
    with _progress() as progress:
        bar = progress.add_task("runs", total=None)
        for name, seed, result in compare(
            PeopleOptions(args.work_dir, args.steps, stages=args.stages), chosen, args.seeds, args.jobs
        ):
            results.setdefault(name, {})[seed] = result
            progress.console.print(f"{name}, seed {seed}: AP {result['AP']:.1f}")
            progress.advance(bar)
    made = {name: results[name] for name in (SUPERNET, *chosen) if name in results}
    return table(made, PLAIN if PLAIN in made else None, {name: name for name in METRICS})


def _planted(args: argparse.Namespace) -> str:
    from search.criteria import CRITERIA
    from search.planted import planted_recovery

    lines = [f"| seed | R² of the fit | {' | '.join(CRITERIA)} |", "|---" * (len(CRITERIA) + 2) + "|"]
    sums = dict.fromkeys(CRITERIA, 0.0)
    with _progress() as progress:
        for seed in progress.track(range(args.seeds), description="planted layers"):
            found, reached = planted_recovery(seed)
            lines.append(
                f"| {seed} | {reached:.3f} | {' | '.join(f'{found[name]:.0%}' for name in CRITERIA)} |"
            )
            sums = {name: sums[name] + found[name] / args.seeds for name in CRITERIA}
    lines.append(f"| mean | | {' | '.join(f'{sums[name]:.0%}' for name in CRITERIA)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
