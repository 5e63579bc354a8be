#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measures operators and networks on this machine, every candidate in the same run."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Python puts this script's folder first, where search.py would pass for the package `search`;
# the working folder comes instead, so that --arch finds the user's own modules.
sys.path[0] = str(Path.cwd())
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

EPILOG = """examples:
  python tools/benchmark.py --list                               backends that run here, and why others do not
  python tools/benchmark.py involution --json involution.json    every layer size of RedNet-50
  python tools/benchmark.py involution --layers layer1 --backends reference numba
  python tools/benchmark.py backbones --channels-last            the published run time table, measured here
  python tools/benchmark.py latency-table --output here.json     layer times of this device, for the search
  python tools/benchmark.py assignment --depth 101 --kernel 13   channels into branches of fast sizes
  python tools/benchmark.py ic-conv --pattern my/ic_resnet50_k9.json          what a pattern costs in time
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from ic_conv.benchmark import backbones, ic_conv, involution
    from ic_conv.ops.involution2d import INVOLUTION2D
    from search.assignment import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the tables of backends and stop")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default cpu)")
    common.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: PyTorch's)")
    common.add_argument("--rounds", type=_positive, default=10, metavar="N", help="timed calls (default 10)")
    common.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    commands = parser.add_subparsers(metavar="COMMAND")

    command = commands.add_parser(
        "involution", parents=[common], help="backends of involution, layer by layer"
    )
    layers = [layer.name for layer in involution.LAYERS]
    command.add_argument("--layers", nargs="+", choices=layers, default=layers, help="default: all")
    command.add_argument(
        "--backends", nargs="+", choices=INVOLUTION2D.names, help="default: all that can run"
    )
    command.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="default float32"
    )
    command.set_defaults(run=run_involution)

    command = commands.add_parser("backbones", parents=[common], help="run time of networks")
    networks = list(backbones.NETWORKS)
    command.add_argument("--networks", nargs="+", choices=networks, default=networks, help="default: all")
    command.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default 8")
    command.add_argument("--image-size", type=_positive, default=224, metavar="N", help="default 224")
    command.add_argument("--channels-last", action="store_true", help="memory layout of images and weights")
    command.add_argument(
        "--pattern", metavar="FILE", help="of IC-ResNet-50; default: spread over dilations 1-4"
    )
    command.set_defaults(run=run_backbones)

    command = commands.add_parser(
        "ic-conv",
        parents=[common],
        help="IC-ResNets beside plain ones and the published form of their layers",
    )
    command.add_argument(
        "--pattern",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="files named after their network, as ic_resnet50_k9.json (default: those of pattern_zoo, and the"
        " published samples of ../shared/data/official_patterns where they are)",
    )
    command.add_argument(
        "--batch-size", nargs="+", type=_positive, default=[1, 8], metavar="N", help="default 1 8"
    )
    command.add_argument("--image-size", type=_positive, default=224, metavar="N", help="default 224")
    command.add_argument(
        "--passes", nargs="+", choices=ic_conv.PASSES, default=ic_conv.PASSES, help="default: both"
    )
    command.add_argument("--contiguous", action="store_true", help="memory layout; default: channels last")
    command.set_defaults(run=run_ic_conv)

    command = commands.add_parser(
        "search", parents=[common], help="statistics pass, criteria and assignment of the search"
    )
    command.set_defaults(run=run_search, rounds=3)

    command = commands.add_parser(
        "assignment", help="what fast branch sizes cost in error, and how long it takes to find them"
    )
    command.add_argument(
        "--checkpoint", metavar="FILE", help="errors of this supernet; default: random ones, the hardest"
    )
    command.add_argument("--depth", type=int, default=50, choices=(50, 101), help="ResNet's, default 50")
    command.add_argument("--kernel", type=int, default=9, metavar="K", help="of the supernet (default 9)")
    command.add_argument("--criterion", default="energy", help="of the supernet's errors (default energy)")
    command.add_argument("--target", default="cpu", choices=tuple(TARGETS), help="limits (default cpu)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    command.set_defaults(run=run_assignment, device="cpu", threads=1)

    command = commands.add_parser(
        "latency-table", parents=[common], help="layer times with random patterns, for tools/search.py"
    )
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="the table, as JSON")
    command.add_argument("--arch", default="ic_resnet50", help="as in tools/search.py (default ic_resnet50)")
    command.add_argument("--kernel", type=int, default=9, metavar="K", help="of the supernet (default 9)")
    command.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="default 1")
    command.add_argument("--image-size", type=_positive, default=224, metavar="N", help="default 224")
    command.add_argument(
        "--patterns", type=_positive, default=40, metavar="N", help="random ones to measure (default 40)"
    )
    command.add_argument(
        "--check", type=_positive, default=20, metavar="N", help="others to predict and measure (default 20)"
    )
    command.set_defaults(run=run_latency_table, rounds=5)

    args = parser.parse_args(argv)
    if not args.list and "run" not in args:
        parser.error("one of --list, involution, backbones, ic-conv and search is needed")
    return args


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.list:
            list_backends()
        else:
            run(args)
    except KeyboardInterrupt:
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def list_backends() -> None:
    from ic_conv.ops.ic_conv2d import IC_CONV2D
    from ic_conv.ops.involution2d import INVOLUTION2D

    rows = []
    for table in (INVOLUTION2D, IC_CONV2D):
        for name, reason in table.available().items():
            rows.append({"operator": table.op, "backend": name, "here": reason or "runs"})
    show("Backends, in order of preference", rows)


def run(args: argparse.Namespace) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    title, rows = args.run(args, device)
    machine = describe_machine(device)
    show(f"{title}\n{machine}", rows)
    if args.json:
        from ic_conv._files import write_text

        write_text(args.json, json.dumps({"title": title, "machine": machine, "rows": rows}, indent=1) + "\n")


def run_involution(args: argparse.Namespace, device: Any) -> tuple[str, list[dict[str, Any]]]:
    import torch
    from rich.progress import track

    from ic_conv.benchmark import involution

    chosen = [layer for layer in involution.LAYERS if layer.name in args.layers]
    progress = track(chosen, "measuring", disable=not sys.stderr.isatty(), transient=True)
    rows = involution.benchmark(progress, device, getattr(torch, args.dtype), args.rounds, args.backends)
    return f"Involution, {args.dtype}", [row.as_dict() for row in rows]


def run_backbones(args: argparse.Namespace, device: Any) -> tuple[str, list[dict[str, Any]]]:
    from ic_conv.benchmark import backbones
    from ic_conv.pattern import DilationPattern

    pattern = DilationPattern.load(args.pattern) if args.pattern else None
    rows = backbones.benchmark(
        args.networks, device, args.batch_size, args.image_size, args.rounds, args.channels_last, pattern
    )
    layout = "channels last" if args.channels_last else "contiguous"
    title = f"Backbones, {args.batch_size} images of {args.image_size} x {args.image_size}, {layout}"
    return title, [row.as_dict() for row in rows]


def run_ic_conv(args: argparse.Namespace, device: Any) -> tuple[str, list[dict[str, Any]]]:
    import torch
    from rich.progress import track

    from ic_conv.benchmark import ic_conv

    root = Path(__file__).resolve().parents[1]
    folders = (
        (root.parent / "shared/data/official_patterns").glob("*.json"),
        (root / "pattern_zoo").rglob("*.json"),
    )
    found = sorted(path for folder in folders for path in folder if not path.name.endswith(".meta.json"))
    progress = track(args.pattern or found, "measuring", disable=not sys.stderr.isatty(), transient=True)
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    rows = ic_conv.benchmark(
        progress, device, args.batch_size, args.passes, args.image_size, args.rounds, layout
    )
    name = "contiguous" if args.contiguous else "channels last"
    return f"Inception convolutions, {args.image_size} x {args.image_size}, {name}", [
        row.as_dict() for row in rows
    ]


def run_search(args: argparse.Namespace, device: Any) -> tuple[str, list[dict[str, Any]]]:
    from search.benchmark import benchmark

    return "The search without the training", benchmark(device, args.rounds)


def run_assignment(args: argparse.Namespace, device: Any) -> tuple[str, list[dict[str, Any]]]:
    from rich.progress import track

    from search.assign import unit_errors
    from search.assignment import TARGETS
    from search.assignment.benchmark import benchmark, random_errors, summary
    from search.criteria import criterion
    from search.engine import TrainOptions
    from search.options import SearchOptions
    from search.run import prepare
    from search.space import DilationSpace
    from search.statistics import collect

    space = DilationSpace(args.kernel)
    if args.checkpoint is None:
        errors = random_errors(args.depth, len(space.candidates))
    else:
        arch = f"ic_resnet{args.depth}"
        options = SearchOptions(
            TrainOptions("work_dirs/benchmark", device="cpu"),
            kernel=args.kernel,
            arch=arch,
            checkpoint=args.checkpoint,
        )
        task = prepare(options).search
        assert task.supernet is not None
        moments = collect(task.supernet, task.batches(), space)
        errors_of = criterion(args.criterion)
        errors = {name: unit_errors(errors_of(moments[name], space), n) for name, n in task.units.items()}
    limits = TARGETS[args.target]
    progress = track(errors.items(), "assigning", disable=not sys.stderr.isatty(), transient=True)
    rows = list(benchmark(progress, limits))
    source = f"{args.criterion} of {args.checkpoint}" if args.checkpoint else "random errors"
    size, most = limits.channel_multiple, limits.max_branches
    title = f"ResNet-{args.depth} k{args.kernel}, {source}, multiples of {size}, at most {most} branches"
    return title, [*rows, summary(rows)]


def run_latency_table(args: argparse.Namespace, device: Any) -> tuple[str, list[dict[str, Any]]]:
    from itertools import islice

    from rich.progress import track

    from search.arch import build_network
    from search.measure_latency import check_table, layer_units, measure_table, random_patterns
    from search.space import DilationSpace

    network, reach = build_network(args.arch), DilationSpace(args.kernel).max_dilation
    tried = islice(random_patterns(layer_units(network), reach, seed=0), args.patterns)
    others = islice(random_patterns(layer_units(network), reach, seed=1), args.check)

    def shown(patterns: Any, what: str, count: int) -> Any:
        return track(patterns, what, total=count, disable=not sys.stderr.isatty(), transient=True)

    table = measure_table(
        network,
        shown(tried, "measuring", args.patterns),
        device,
        args.arch,
        batch_size=args.batch_size,
        image_size=args.image_size,
        rounds=args.rounds,
    )
    table.save(args.output)
    rows = list(check_table(table, network, shown(others, "checking", args.check), device, args.rounds))
    mean = sum(abs(row["error_percent"]) for row in rows) / len(rows)
    title = f"{args.arch}, {args.batch_size} images of {args.image_size} px: mean error {mean:.1f} %"
    return f"{title}, table in {args.output}", rows


def describe_machine(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def show(title: str, rows: Iterable[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    # What nothing is known about takes no room.
    columns = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)] if rows else []
    table = Table(title=title, box=SIMPLE)
    for column in columns:
        numbers = any(isinstance(row[column], float) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(row[column]) for column in columns))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width that would have to cut the table
    console.print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
