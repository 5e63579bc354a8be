# SPDX-License-Identifier: Apache-2.0
"""The strategy pareto from a prepared search: fine-tuned scores, provenance, and the files of the front."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ic_conv.convert import apply_pattern
from ic_conv.pattern import DilationPattern
from search.engine import TrainOptions, evaluate, train
from search.report import write_front
from search.strategies import ParetoStrategy, SearchTask, knee
from search.tasks import Task


@dataclass(frozen=True)
class FineTuned:
    """Validation score of a pattern after a short training with the supernet's own weights, cropped.

    Args:
        task: a trained supernet in its task.
        images, validation: data sets.
        options: of the training; each trial has a folder of its own in the work folder.
    """

    task: Task
    images: Dataset[Any]
    validation: Dataset[Any]
    options: TrainOptions

    def __call__(self, pattern: DilationPattern, trial: int) -> float:
        task = copy.deepcopy(self.task)
        task.network = apply_pattern(task.network, pattern, inplace=True)
        folder = Path(self.options.work_dir) / "trials" / str(trial)
        train(task, self.images, replace(self.options, work_dir=folder, resume=False, progress=False))
        return next(iter(evaluate(task, self.validation, device=self.options.device).values()))


def search_front(
    strategy: ParetoStrategy, task: SearchTask, score: FineTuned | None, folder: Path, meta: Mapping[str, Any]
) -> DilationPattern:
    """Works on the study, writes its front to `folder`, returns the front's knee.

    Args:
        meta: provenance of the patterns; what decides the objectives goes into the study's identity.
    """
    identity = {key: meta[key] for key in ("supernet_sha256", "calibration_images") if key in meta}
    options = replace(strategy.options, score=score, identity={**strategy.options.identity, **identity})
    front = ParetoStrategy(options).front(task)
    chosen = knee(front)
    write_front(front, chosen, folder, dict(meta))
    return chosen.pattern
