# SPDX-License-Identifier: Apache-2.0
"""Scores a task on a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from search.data.loader import build_loader
from search.engine.options import resolve_device
from search.tasks import Task


def evaluate(
    task: Task, dataset: Dataset[Any], batch_size: int = 64, device: str = "auto", workers: int = 0
) -> dict[str, float]:
    """The task's figures in percent over all of `dataset`, with BN and dropout in evaluation mode.

    Args:
        task: stays on `device`; its train mode is kept.
        dataset: a data set of `search.data`, usually of the val split.
        batch_size: images per forward pass.
        device: "cpu", "cuda", "cuda:1" or "auto".
        workers: processes that make the images.

    Example:
        >>> evaluate(task, ScatteredDigits("val", length=1000))["mAP"]
    """
    place = resolve_device(device)
    task.to(place)
    was_training = task.training
    task.eval()
    predictions, batches = [], []
    try:
        with torch.no_grad():
            for batch in build_loader(dataset, batch_size, workers):
                inputs = batch.pop("inputs").to(place, non_blocking=True)
                predictions.append(task(inputs, mode="predict"))
                batches.append({name: value.to(place) for name, value in batch.items()})
    finally:
        task.train(was_training)
    return task.score(predictions, batches)
