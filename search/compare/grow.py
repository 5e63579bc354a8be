# SPDX-License-Identifier: Apache-2.0
"""Search within one training: a plain network learns for a while, takes a pattern and learns on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ic_conv.convert import apply_pattern
from ic_conv.pattern import DilationPattern
from search.engine import TrainOptions, train
from search.engine.checkpoint import FINAL, STATE, load_weights, read_checkpoint, write_checkpoint
from search.tasks import Task

GROWN = "grown.json"
GROW_AFTER = 8  # a growing network is plain for this fraction of its steps


def train_growing(
    task: Task,
    dataset: Dataset[Any],
    options: TrainOptions,
    at: int,
    find: Callable[[Task], DilationPattern],
) -> DilationPattern:
    """Trains a plain network that takes a pattern after some steps, under one learning-rate schedule.

    Channels that move to another dilation keep their weights; momenta start anew. An interrupted training
    goes on where it was.

    Args:
        task: with the plain network, which has the pattern at the end.
        options: of the whole training, with `resume`.
        at: steps before the search.
        find: the search, on the task as it is then.

    Returns:
        The pattern, which is kept in the work folder.
    """
    folder = Path(options.work_dir)
    path, state = folder / GROWN, folder / STATE
    if not path.exists():
        train(task, dataset, replace(options, until=at))
        find(task).save(path)
    pattern = DilationPattern.load(path)
    content = None if (folder / FINAL).exists() else read_checkpoint(state)
    if content is not None and content["state_dict"].keys() == task.state_dict().keys():  # it is plain yet
        load_weights(task, content["state_dict"], state)
        task.network = apply_pattern(task.network, pattern, inplace=True)
        optimizer = {**content["optimizer"], "state": {}}
        write_checkpoint(state, {**content, "state_dict": task.state_dict(), "optimizer": optimizer})
    else:
        task.network = apply_pattern(task.network, pattern, inplace=True)
    train(task, dataset, options)
    return pattern
