# SPDX-License-Identifier: Apache-2.0
"""A study that is killed goes on with the trials that it would have made."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from optuna import TrialPruned
from optuna.trial import Trial, TrialState

from search.study import PRUNERS, SAMPLERS, StudyOptions, failures, finished, open_study, work_on

TRIALS = 30  # more than TPE's random start and NSGA-II's first generation


NOBODY = 2**30  # no process has this number


class Killed(BaseException):
    """Ends the work in the middle of a trial, as no error of its own can."""


class Valley:
    """The objective; gives up the ghost after so many calls."""

    def __init__(self, objectives: int, lives: int = 1000) -> None:
        self.objectives, self.lives = objectives, lives

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        x, kind = trial.suggest_float("x", 0, 4), trial.suggest_categorical("kind", ["a", "b"])
        self.lives -= 1
        if not self.lives:
            trial.set_user_attr("owner", [socket.gethostname(), NOBODY])
            raise Killed
        value = (x - 1) ** 2 + (kind == "a")
        if self.objectives == 1:
            for step in range(3):
                trial.report(value + step, step)
                if trial.should_prune():
                    raise TrialPruned
        if x > 3.5:
            raise RuntimeError("too far")
        return (value, -x)[: self.objectives]


def outcome(options: StudyOptions, objectives: int, lives: list[int]) -> tuple[Any, ...]:
    """Parameters, state and values of the trials that count, after the work was killed and went on."""
    directions = ("minimize",) * objectives
    for each in [*lives, 1000]:
        study = open_study(options, directions, {}, seed=3)  # type: ignore[arg-type]
        try:
            work_on(study, Valley(objectives, each), options, {})
        except Killed:
            assert finished(study) < options.trials
    killed = [line for line in failures(study) if "its process was killed" in line]
    assert len(killed) == len(lives) and finished(study) == options.trials
    trials = [t for t in study.trials if t.state != TrialState.FAIL or "error" in t.user_attrs]
    return tuple((t.params, t.state, t.values) for t in trials)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("objectives", "pruner"), [(1, "median"), (1, "none"), (2, "none")])
def test_the_trials_are_those_of_a_study_that_was_left_alone(
    sampler: str, objectives: int, pruner: str, tmp_path: Any
) -> None:
    found = []
    for name, lives in (("whole", []), ("killed", [4, 1, 17])):
        options = StudyOptions(str(tmp_path / name), name, sampler, pruner=pruner, trials=TRIALS)
        found.append(outcome(options, objectives, lives))
    assert found[0] == found[1]
    assert len({str(params) for params, *_ in found[0]}) > TRIALS - 3  # a crossover may repeat a parent


def test_another_seed_draws_other_trials() -> None:
    drawn = []
    for seed in (0, 1, None, None):
        options = StudyOptions(sampler="tpe", trials=3)
        study = open_study(options, ("minimize",), {}, seed)
        work_on(study, Valley(1), options, {})
        drawn.append(str([trial.params for trial in study.trials]))
    assert len(set(drawn)) == 4


def test_options_after_the_sampler_go_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        StudyOptions("none", "x", "tpe", PRUNERS[0])  # type: ignore[misc]
