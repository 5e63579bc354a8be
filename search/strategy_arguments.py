# SPDX-License-Identifier: Apache-2.0
"""The part of the command line that configures strategies: what each takes, and the Strategy it makes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from search.assignment import TARGETS, BranchLimits
from search.criteria import CRITERIA, DEFAULT_CRITERION
from search.engine.options import resolve_device
from search.latency import LatencyTable, device_name
from search.strategies import (
    STRATEGIES,
    EDOStrategy,
    GradientStrategy,
    HistogramStrategy,
    ParetoOptions,
    ParetoStrategy,
    Strategy,
)

if TYPE_CHECKING:
    from search.study import StudyOptions

_LIMITS = ("target", "channel_multiple", "min_branch", "max_branches")
_STUDY = ("n_trials", "storage", "study_name", "sampler", "latency_table", "latency_device")
# None of these has a default here: what is not given is the strategy's own affair.
TAKEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "edo": ("criterion", *_LIMITS),
        "gradient": ("moved_share", "validation_steps", *_LIMITS),
        "pareto": ("criterion", *_STUDY, "n_jobs", "criteria", "latency_image_size", "finetune_steps"),
        "histogram": ("search_steps", *_STUDY, "pruner"),
        "rfnext": ("search_steps", "updates"),
        "darts": ("search_steps",),
        "single-path": ("search_steps", "n_trials"),
    }
)
# What some of them are called in Python.
_NAMES = {
    "moved_share": "shares",
    "search_steps": "steps",
    "n_trials": "trials",
    "n_jobs": "jobs",
    "study_name": "name",
    "latency_image_size": "image_size",
}


def add_strategy_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --strategy and what the strategies take, in groups."""
    which = parser.add_argument_group("how to search")
    which.add_argument("--strategy", default="edo", help=f"{', '.join(STRATEGIES)} (default edo)")
    which.add_argument(
        "--criterion",
        metavar="NAME",
        help=f"of edo, and of pareto's errors: {', '.join(CRITERIA)} (default {DEFAULT_CRITERION})",
    )
    fast = parser.add_argument_group(
        "branches that run fast (strategies edo and gradient; by default any size goes)"
    )
    fast.add_argument(
        "--target", choices=tuple(TARGETS), help="the multiple and number of branches that suit this device"
    )
    fast.add_argument(
        "--channel-multiple",
        type=int,
        metavar="M",
        help="branch sizes are multiples of M; what a layer has over goes to one branch (cpu 16, cuda 32)",
    )
    fast.add_argument("--min-branch", type=int, metavar="N", help="least channels of a branch")
    fast.add_argument("--max-branches", type=int, metavar="N", help="most branches of a layer (targets: 8)")
    moves = parser.add_argument_group("strategy gradient (needs a trained plain network, no supernet)")
    moves.add_argument(
        "--moved-share",
        type=float,
        nargs="+",
        metavar="S",
        help="share of the channels that move to another dilation, one for all or one for each stage "
        "(default 0.5)",
    )
    moves.add_argument(
        "--validation-steps",
        type=int,
        metavar="N",
        help="choose the shares instead: by the loss after so many training steps (default 0: no choice)",
    )
    short = parser.add_argument_group(
        "strategies histogram, rfnext, darts and single-path (train copies of a trained plain network)"
    )
    short.add_argument(
        "--search-steps",
        type=int,
        metavar="N",
        help="training steps: of each trial of histogram (default 40), of the others' search (default 200)",
    )
    short.add_argument(
        "--updates", type=int, metavar="N", help="of the dilations by rfnext, within its steps (default 10)"
    )
    _add_study_arguments(parser)


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    study = parser.add_argument_group(
        "Optuna studies: pareto finds patterns on the front of error and latency by rules for each stage, "
        "histogram each stage's mix of dilations by the loss after a short training"
    )
    study.add_argument(
        "--n-trials",
        type=int,
        metavar="N",
        help="finished trials of the study (default: pareto 100, histogram 40, single-path 50)",
    )
    study.add_argument(
        "--storage",
        metavar="URL",
        help="none, a journal file, sqlite:///FILE or postgresql://...; the same command on other machines "
        "works on the same study, and goes on after a kill (default WORK_DIR/study.journal)",
    )
    study.add_argument(
        "--study-name",
        metavar="NAME",
        help="within the storage (default ARCH_kKERNEL, histogram: ARCH_kKERNEL_histogram)",
    )
    study.add_argument(
        "--sampler",
        choices=("nsga2", "tpe"),
        help="what proposes trials (default: pareto nsga2, histogram tpe)",
    )
    study.add_argument(
        "--pruner",
        choices=("none", "median", "halving"),
        help="which trials of histogram stop early (default median; none with a latency table)",
    )
    study.add_argument(
        "--latency-table",
        metavar="FILE",
        help="from `tools/benchmark.py latency-table` on this device (default: pareto measures each pattern, "
        "histogram has no second objective)",
    )
    study.add_argument(
        "--latency-device",
        metavar="NAME",
        help="search for the device of this name, as its table has it, instead of this one",
    )
    front = parser.add_argument_group("strategy pareto alone")
    front.add_argument("--n-jobs", type=int, metavar="N", help="processes of this machine (default 1)")
    front.add_argument(
        "--latency-image-size",
        type=int,
        metavar="PX",
        help="of images whose latency is measured (default 224)",
    )
    front.add_argument(
        "--criteria",
        nargs="+",
        metavar="NAME",
        help="that a stage may choose from (default energy expectation taps); --criterion is the yardstick",
    )
    front.add_argument(
        "--finetune-steps",
        type=int,
        metavar="N",
        help="third objective: the validation score after so many training steps (default 0: none)",
    )


def build_strategy(args: argparse.Namespace, name: str, work_dir: Path) -> Strategy:
    """The strategy that was asked for.

    Args:
        args: from a parser with `add_strategy_arguments`.
        name: of the search; studies are called by it.
        work_dir: where studies live unless the arguments say otherwise.

    Raises:
        ValueError: the strategy is unknown, does not take an argument that was given, or lacks a package.
    """
    _check(args)
    match args.strategy:
        case EDOStrategy.name:
            return EDOStrategy(**_given(args, "criterion"), limits=_limits(args))
        case GradientStrategy.name:
            return GradientStrategy(**_given(args, "moved_share", "validation_steps"), limits=_limits(args))
        case ParetoStrategy.name:
            return _pareto(args, name, work_dir)
        case HistogramStrategy.name:
            usual = HistogramStrategy(latency=_latency_table(args))
            study = _study(args, usual.study, f"{name}_histogram", work_dir)
            steps = _given(args, "search_steps")
            return HistogramStrategy(**steps, study=study, latency=usual.latency, progress=True)
    given = _given(args, "search_steps", "updates", "n_trials")
    progress = {"progress": True} if args.strategy in TAKEN else {}
    return STRATEGIES[args.strategy](**given, **progress)


def _check(args: argparse.Namespace) -> None:
    if args.strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {args.strategy!r}; known ones: {', '.join(STRATEGIES)}")
    for option in dict.fromkeys(option for options in TAKEN.values() for option in options):
        takers = [strategy for strategy, options in TAKEN.items() if option in options]
        if getattr(args, option) is not None and args.strategy not in takers:
            raise ValueError(
                f"--{option.replace('_', '-')} is for the strategy {' or '.join(takers)}, got {args.strategy}"
            )
    if "n_trials" in TAKEN.get(args.strategy, ()):
        try:
            import search.study  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"--strategy {args.strategy} needs Optuna, pip install -e '.[pareto]': {error}"
            ) from error


def _given(args: argparse.Namespace, *options: str) -> dict[str, Any]:
    """Values of those that were given, under their names in Python."""
    found = {_NAMES.get(option, option): getattr(args, option) for option in options}
    return {name: value for name, value in found.items() if value is not None}


def _limits(args: argparse.Namespace) -> BranchLimits:
    """The target's limits, each replaced by its own option where that is given."""
    chosen = TARGETS[args.target] if args.target else BranchLimits()
    return replace(chosen, **_given(args, "channel_multiple", "min_branch", "max_branches"))


def _study(args: argparse.Namespace, usual: StudyOptions, name: str, work_dir: Path) -> StudyOptions:
    given = _given(args, "storage", "study_name", "sampler", "pruner", "n_trials", "n_jobs")
    return replace(usual, **{"storage": str(work_dir / "study.journal"), "name": name, **given})


def _latency_table(args: argparse.Namespace) -> LatencyTable | None:
    if args.latency_table is None:
        return None
    table = LatencyTable.load(args.latency_table)
    table.check_device(args.latency_device or device_name(resolve_device(args.device)))
    return table


def _pareto(args: argparse.Namespace, name: str, work_dir: Path) -> ParetoStrategy:
    options = ParetoOptions(
        _latency_table(args),
        study=_study(args, ParetoStrategy().study_options, name, work_dir),
        yardstick=args.criterion or DEFAULT_CRITERION,
        identity={"finetune_steps": args.finetune_steps or 0, "data": Path(args.data).name},
        cache=work_dir / "assigned_layers.sqlite",
        progress=True,
        **_given(args, "criteria", "latency_image_size"),
    )
    return ParetoStrategy(options)
