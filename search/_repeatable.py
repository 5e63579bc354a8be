# SPDX-License-Identifier: Apache-2.0
"""Samplers of studies that are killed and go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


class RepeatableSampler(BaseSampler):
    """Seeds a sampler anew for each trial, by the number of trials before it: a study that was killed and
    goes on makes the trials that it would have made.

    Args:
        make: makes the sampler for a seed.
        seed: of the study; None: another one each time.
        lost: tells the trials that do not count, because they are made again.
    """

    def __init__(
        self, make: Callable[..., BaseSampler], seed: int | None, lost: Callable[[FrozenTrial], bool]
    ) -> None:
        self._make, self._lost = make, lost
        self._entropy = np.random.SeedSequence(seed).entropy
        self._sampler = make(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        place = trial.number - sum(self._lost(other) and other.number < trial.number for other in failed)
        seed = np.random.SeedSequence(self._entropy, spawn_key=(place,)).generate_state(1)[0]
        self._sampler = self._make(seed=int(seed))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, *parameter: Any) -> Any:
        return self._sampler.sample_independent(study, trial, *parameter)

    def after_trial(self, study: Study, trial: FrozenTrial, *outcome: Any) -> None:
        self._sampler.after_trial(study, trial, *outcome)
