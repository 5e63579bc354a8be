# SPDX-License-Identifier: Apache-2.0
"""Patterns on the front of accuracy and latency, found by an Optuna study over rules for each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ic_conv._pattern_summary import stage_of
from ic_conv.pattern import PLAIN, DilationPattern, LayerPattern
from search.assign import unit_errors
from search.assigned import AssignedLayers
from search.assignment import BranchLimits
from search.criteria import DEFAULT_CRITERION, criterion, needs_correlations, needs_residuals
from search.latency import LatencyTable
from search.measure_latency import MeasuredLatency
from search.progress import bar
from search.space import DilationSpace
from search.statistics import collect
from search.strategies.base import SearchTask, Strategy
from search.strategies.edo import layer_channels

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

    from search.study import StudyOptions

MULTIPLES, MOST_BRANCHES = (1, 4, 8, 16, 32), (1, 2, 4, 8, 16)
# A study tries many assignments, so each is certified less closely than a single search's.
TOLERANCE, EFFORT = 0.02, 2e7
Score = Callable[[DilationPattern, int], float]


@dataclass(frozen=True)
class ParetoOptions:
    """What a study varies and what it optimises.

    Args:
        latency: the table from which latencies are predicted; None: each pattern is measured, on the
            supernet's device.
        image_size: of the images of measured latencies, in pixels.
        study: storage, sampler, number of trials and processes; None: 100 trials in memory.
        criteria: names of `search.criteria.CRITERIA` that a stage may choose from.
        yardstick: the criterion in which the first objective is counted.
        score: called with a pattern and a trial's number, gives a validation score to maximise, for example
            after a short training; None: error and latency alone.
        identity: what else must be equal in processes that share a study; plain JSON values.
        progress: show how many trials are finished.
        cache: an SQLite file in which processes, and later runs, find the layers that were assigned already.

    Raises:
        ValueError: no or unknown criteria.
    """

    latency: LatencyTable | None = None
    image_size: int = 224
    study: StudyOptions | None = None
    criteria: Sequence[str] = ("energy", "expectation", "taps")
    yardstick: str = DEFAULT_CRITERION
    score: Score | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.criteria:
            raise ValueError("a study needs at least one criterion to choose from")
        for name in (*self.criteria, self.yardstick):
            criterion(name)


@dataclass(frozen=True)
class FrontMember:
    """A pattern that no other one found beats in every objective.

    Attributes:
        error: total error as a share of the plain network's.
        latency_ms: milliseconds.
        score: of the validation, if the study has it.
    """

    pattern: DilationPattern
    trial: int
    error: float
    latency_ms: float
    score: float | None = None


@dataclass(frozen=True)
class Objective:
    """Rules for each stage -> pattern -> error and latency. Knows no study and can be sent to a process.

    Args:
        errors: by criterion and layer, (units, candidates).
        channels: output channels of each layer.
        latency: milliseconds of a pattern.
        score, criteria, yardstick: see ParetoOptions.
        assigned: layers that have their assignment.
    """

    space: DilationSpace
    errors: Mapping[str, Mapping[str, np.ndarray]]
    channels: Mapping[str, int]
    criteria: Sequence[str]
    yardstick: str
    latency: Callable[[DilationPattern], float]
    score: Score | None
    assigned: AssignedLayers = field(default_factory=AssignedLayers, repr=False)

    @property
    def directions(self) -> tuple[Literal["minimize", "maximize"], ...]:
        return ("minimize", "minimize") if self.score is None else ("minimize", "minimize", "maximize")

    def __call__(self, trial: Any) -> tuple[float, ...]:
        pattern = self.pattern(trial)
        values = self.error(pattern), self.latency(pattern)
        return values if self.score is None else (*values, self.score(pattern, trial.number))

    def pattern(self, trial: BaseTrial) -> DilationPattern:
        """The pattern of a trial: the same for the same parameters."""
        layers = []
        for stage, members in groupby(self.channels, key=stage_of):
            names = list(members)
            least = min(self.channels[name] for name in names)
            limits = BranchLimits(
                trial.suggest_categorical(f"{stage}.channel_multiple", [m for m in MULTIPLES if m <= least]),
                max_branches=trial.suggest_categorical(f"{stage}.max_branches", MOST_BRANCHES),
            )
            reach = trial.suggest_int(f"{stage}.dmax", 1, self.space.max_dilation)
            name = trial.suggest_categorical(f"{stage}.criterion", list(self.criteria))
            layers += [self._layer(layer, name, reach, limits) for layer in names]
        self.assigned.save()
        return DilationPattern(tuple(layers), self.space.kernel, self.space.base_kernel)

    def _layer(self, layer: str, criterion: str, reach: int, limits: BranchLimits) -> LayerPattern:
        errors = self.errors[criterion][layer]
        near = [index for index, dilation in enumerate(self.space.candidates) if max(dilation) <= reach]
        rules = limits.of_layer(len(errors), self.channels[layer], layer)
        candidates = [self.space.candidates[index] for index in near]
        return self.assigned.assign(
            errors[:, near], candidates, rules, layer, tolerance=TOLERANCE, effort=EFFORT
        )

    def error(self, pattern: DilationPattern) -> float:
        """Mean error of the units, summed over the layers, as a share of what plain dilations have."""
        column = {dilation: index for index, dilation in enumerate(self.space.candidates)}
        total = plain = 0.0
        for layer in pattern.layers:
            errors = self.errors[self.yardstick][str(layer.name)]
            chosen = [column[dilation] for dilation in layer.assignment or ()]
            total += errors[np.arange(len(errors)), chosen].mean()
            plain += errors[:, column[PLAIN]].mean()
        return float(total / plain) if plain > 0 else 1.0


class ParetoStrategy(Strategy):
    """Varies for each stage the multiple of the branches' sizes, their number, the largest dilation and the
    criterion; minimises error and latency, and maximises a validation score if there is one.

    NSGA-II (Deb et al., IEEE Trans. Evol. Comp. 6, 2002) or TPE, by Optuna.

    Args:
        options: see ParetoOptions.
    """

    name = "pareto"
    needs_supernet = True

    def __init__(self, options: ParetoOptions | None = None) -> None:
        from search.study import StudyOptions

        self.options = options or ParetoOptions()
        self.study_options = self.options.study or StudyOptions()

    def check(self, task: SearchTask) -> None:
        from search.study import check_study

        if self.options.latency is not None:
            plain = (LayerPattern.plain(units, name) for name, units in task.units.items())
            self.options.latency.predict(DilationPattern(tuple(plain), task.space.kernel))
        elif self.study_options.jobs > 1:
            raise ValueError(
                f"latencies that {self.study_options.jobs} jobs measure disturb each other: "
                "give a latency table, or one job"
            )
        check_study(self.study_options, self.identity(task))

    def search(self, task: SearchTask) -> DilationPattern:
        return knee(self.front(task)).pattern

    def front(self, task: SearchTask) -> list[FrontMember]:
        """Works on the study until it has its trials; returns its front by ascending error.

        Raises:
            ValueError: the study was made with other options, or no trial succeeded.
        """
        from optuna.trial import FixedTrial

        from search import study as studies

        self.check(task)
        objective = self.objective(task)
        identity = self.identity(task)
        study = studies.open_study(self.study_options, objective.directions, identity, task.seed)
        with bar(
            "trial", self.study_options.trials, self.options.progress, studies.finished(study)
        ) as report:
            studies.work_on(study, objective, self.study_options, identity, report)
        if not study.best_trials:
            raise ValueError(f"no trial succeeded: {studies.failures(study)[0]}")
        members = []
        for trial in studies.front(study):
            meta = {"trial": trial.number, "params": trial.params, "values": trial.values}
            pattern = replace(objective.pattern(FixedTrial(trial.params)), meta=meta)
            members.append(FrontMember(pattern, trial.number, *trial.values))
        return members

    def objective(self, task: SearchTask) -> Objective:
        """Collects the moments and makes the objective."""
        if task.supernet is None:
            raise ValueError("the strategy pareto needs a trained supernet, got none")
        options = self.options
        names = tuple(dict.fromkeys((*options.criteria, options.yardstick)))
        moments = collect(
            task.supernet,
            task.batches(),
            task.space,
            residuals=any(map(needs_residuals, names)),
            correlations=any(map(needs_correlations, names)),
        )
        errors = {
            name: {
                layer: unit_errors(criterion(name)(moments[layer], task.space), units)
                for layer, units in task.units.items()
            }
            for name in names
        }
        latency: Callable[[DilationPattern], float] = MeasuredLatency(
            task.supernet, image_size=options.image_size
        )
        if options.latency is not None:
            latency = options.latency.predict
        channels = layer_channels(task)
        return Objective(
            task.space,
            errors,
            channels,
            tuple(options.criteria),
            options.yardstick,
            latency,
            options.score,
            AssignedLayers(options.cache),
        )

    def identity(self, task: SearchTask) -> dict[str, Any]:
        """What processes that share a study must agree on."""
        table = self.options.latency
        return {
            "kernel": task.space.kernel,
            "base_kernel": task.space.base_kernel,
            "layers": dict(task.units),
            "criteria": list(self.options.criteria),
            "yardstick": self.options.yardstick,
            "latency": f"measured at {self.options.image_size} px"
            if table is None
            else f"table of {table.device}, {len(table.rows)} rows, {table.rest_ms:.6f} ms besides",
            **self.options.identity,
        }


def knee(front: Sequence[FrontMember]) -> FrontMember:
    """The member nearest to having the best of every objective, each scaled to its range on the front."""
    values = np.array([[member.error, member.latency_ms, -(member.score or 0.0)] for member in front])
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    return front[int((scaled**2).sum(axis=1).argmin())]
