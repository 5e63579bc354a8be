# SPDX-License-Identifier: Apache-2.0
"""Search of the mix of dilations: how many channels stay plain and how far the others spread, by validation.

Which channel takes which dilation matters less than how many take each, so a study has two numbers per stage
to find, and the channels are dealt at least fitted error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import nn

from ic_conv._pattern_summary import stage_of
from ic_conv.convert import apply_pattern
from ic_conv.pattern import PLAIN, DilationPattern, LayerPattern
from search.assign import unit_errors
from search.criteria import criterion
from search.progress import bar
from search.refit import RIDGE, fit_layer
from search.space import DilationSpace
from search.statistics import ConvMoments, LayerMoments, collect
from search.strategies._training import batches_after, digest, fit, held_out, loss_on, network_inputs
from search.strategies.base import PlainTask, SearchTask, Strategy
from search.strategies.pareto import FrontMember, knee
from search.supernet import convert_to_supernet, super_layers

if TYPE_CHECKING:
    from optuna.trial import BaseTrial, Trial

    from search.latency import LatencyTable
    from search.study import StudyOptions

SPREADS = (0.3, 10.0)
REPORTS = 4  # losses that a trial shows to the pruner


class HistogramStrategy(Strategy):
    """An Optuna study over each stage's share of plain units and the spread of the others' dilations.

    A trial starts from the trained network: the taps that it keeps are fitted to the output of the supernet,
    or of the plain network, whose kernels count as grown by zeros. It trains for some steps; its score is the
    loss on batches that were held out.

    Args:
        steps: of a trial's training.
        study: storage, sampler, pruner and number of trials; None: 40 trials by TPE in memory, half of which
            the median prunes.
        latency: makes milliseconds a second objective; its trials are not pruned, and the front's knee is
            returned.
        progress: show how many trials are finished.

    Raises:
        ValueError: too few steps, several jobs, or a pruner besides the latency.
    """

    name = "histogram"
    needs_plain = True

    def __init__(
        self,
        steps: int = 40,
        study: StudyOptions | None = None,
        latency: LatencyTable | None = None,
        progress: bool = False,
    ) -> None:
        from search.study import StudyOptions

        if steps < REPORTS:
            raise ValueError(f"a trial needs at least {REPORTS} steps, got {steps}")
        pruner = "median" if latency is None else "none"
        self.study = study or StudyOptions(name=self.name, sampler="tpe", pruner=pruner, trials=40)
        self.steps, self.latency, self.progress = steps, latency, progress
        if self.study.jobs > 1:
            raise ValueError(
                f"trials that train take one job, got {self.study.jobs}; "
                "start the command several times with one --storage instead"
            )
        if self.latency is not None and self.study.pruner != "none":
            raise ValueError(
                f"Optuna prunes single objectives, two need pruner none; got {self.study.pruner}"
            )

    def check(self, task: SearchTask) -> None:
        from search.study import check_study

        if self.latency is not None:
            plain = (LayerPattern.plain(units, name) for name, units in task.units.items())
            self.latency.predict(DilationPattern(tuple(plain), task.space.kernel))
        check_study(self.study, self._identity(task))

    def search(self, task: SearchTask) -> DilationPattern:
        from optuna.trial import FixedTrial

        from search import study as studies

        if task.plain is None:
            raise ValueError("the strategy histogram needs a trained network and its loss, got none")
        self.check(task)
        latency = None if self.latency is None else self.latency.predict
        trials = Trials.of(task, task.plain, self.steps, latency)
        identity = {**self._identity(task), **trials.identity}
        study = studies.open_study(self.study, trials.directions, identity, task.seed)
        with bar("trial", self.study.trials, self.progress, studies.finished(study)) as report:
            studies.work_on(study, trials, self.study, identity, report)
        if not study.best_trials:
            raise ValueError(f"no trial succeeded: {studies.failures(study)[0]}")
        members = []
        for trial in studies.front(study):
            loss, ms = (*trial.values, 0.0)[:2]
            members.append(FrontMember(trials.pattern(FixedTrial(trial.params)), trial.number, loss, ms))
        best = members[0] if self.latency is None else knee(members)
        params = study.trials[best.trial].params
        meta = {
            "search_steps": self.steps,
            "params": {name: round(value, 4) for name, value in params.items()},
            "validation_loss": round(best.error, 6),
            "trials": studies.finished(study),
        }
        if self.latency is not None:
            meta["latency_ms"] = round(best.latency_ms, 4)
        return replace(best.pattern, meta=meta)

    def _identity(self, task: SearchTask) -> dict[str, Any]:
        return {
            "kernel": task.space.kernel,
            "base_kernel": task.space.base_kernel,
            "layers": dict(task.units),
            "steps": self.steps,
            "latency": None
            if self.latency is None
            else f"{self.latency.device}, {len(self.latency.rows)} rows",
        }


@dataclass(frozen=True)
class Trials:
    """The objective: a trial's loss, and its latency if there is a model of it.

    Attributes:
        plain: the trained network in its task; it is a supernet in `grown`.
        moments: of the supernet's layers.
        errors: of the fitted candidates, (units, candidates) by layer.
        identity: of weights and held-out images.
    """

    task: SearchTask
    plain: PlainTask
    grown: tuple[nn.Module, nn.Module]
    moments: Mapping[str, LayerMoments]
    errors: Mapping[str, NDArray[np.float64]]
    validation: Sequence[Any]
    steps: int
    latency: Callable[[DilationPattern], float] | None
    identity: Mapping[str, str]

    @classmethod
    def of(
        cls,
        task: SearchTask,
        plain: PlainTask,
        steps: int,
        latency: Callable[[DilationPattern], float] | None = None,
    ) -> Trials:
        """Collects what every trial needs: one pass over the calibration batches."""
        validation = held_out(plain)
        model, network = copy.deepcopy((plain.model, plain.network))
        # A training leaves another layout than a checkpoint; losses would differ in their last digit.
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        space = task.space
        if not super_layers(network):
            convert_to_supernet(
                network,
                space.kernel,
                base_kernel=space.base_kernel,
                filter_fn=lambda module, name: name in task.units,
                init="inflate",
                inplace=True,
            )
        images = network_inputs(plain, validation)
        moments = collect(network, images, space, correlations=True)
        errors = {
            name: unit_errors(criterion("refit")(moments[name], space), units)
            for name, units in task.units.items()
        }
        identity = {"weights": digest(plain.model.state_dict().values()), "validation": digest(images)}
        return cls(task, plain, (model, network), moments, errors, validation, steps, latency, identity)

    @property
    def directions(self) -> tuple[Literal["minimize"], ...]:
        return ("minimize",) if self.latency is None else ("minimize", "minimize")

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        from optuna import TrialPruned

        pattern = self.pattern(trial)
        model = self._started(pattern)

        def report(step: int) -> None:
            if self.latency is None and step and step % (self.steps // REPORTS) == 0:
                trial.report(loss_on(model, self.plain, self.validation), step)
                if trial.should_prune():
                    raise TrialPruned

        batches = batches_after(self.plain, len(self.validation))
        fit(model, self.plain, batches, self.steps, seed=self.task.seed, before_step=report)
        loss = loss_on(model, self.plain, self.validation)
        return (loss,) if self.latency is None else (loss, self.latency(pattern))

    def pattern(self, trial: BaseTrial) -> DilationPattern:
        """The pattern of a trial: the same for the same parameters."""
        layers = []
        for stage, names in groupby(self.task.units, key=stage_of):
            share = trial.suggest_float(f"{stage}.plain", 0, 1)
            spread = trial.suggest_float(f"{stage}.spread", *SPREADS, log=True)
            layers += [dealt(self.errors[name], self.task.space, share, spread, name) for name in names]
        return DilationPattern(tuple(layers), self.task.space.kernel, self.task.space.base_kernel)

    @torch.no_grad()
    def _started(self, pattern: DilationPattern) -> nn.Module:
        """The model with the pattern, fitted to what the grown one computes."""
        model, network = copy.deepcopy(self.grown)
        layers = super_layers(network)
        for layer in pattern.layers:
            moment = self.moments[str(layer.name)]
            if isinstance(moment, ConvMoments) and moment.second is not None:
                fit_layer(layers[str(layer.name)], layer, moment.second, RIDGE)
        apply_pattern(network, pattern, filter_fn=lambda module, name: name in layers, inplace=True)
        return model


def dealt(
    errors: NDArray[np.float64], space: DilationSpace, share: float, spread: float, name: str
) -> LayerPattern:
    """A layer's units dealt out at least total error.

    Args:
        errors: (units, candidates).
        share: of plain units.
        spread: the others' dilations (dy, dx) are as frequent as exp(-(dy + dx) / spread).
    """
    reach = np.array([sum(dilation) for dilation in space.candidates], float)
    weights = np.where([d == PLAIN for d in space.candidates], 0.0, np.exp((reach.min() - reach) / spread))
    plain = round(share * len(errors))
    wanted = weights / weights.sum() * (len(errors) - plain)
    counts = np.floor(wanted).astype(int)
    largest = np.argsort(counts - wanted, kind="stable")[: len(errors) - plain - counts.sum()]
    counts[largest] += 1
    counts[space.candidates.index(PLAIN)] = plain
    seats = np.repeat(np.arange(len(counts)), counts)
    _, order = linear_sum_assignment(np.round(errors[:, seats], 9))
    return LayerPattern.from_assignment([space.candidates[seats[place]] for place in order], name)
