# SPDX-License-Identifier: Apache-2.0
"""Batches in an order that depends on the seed alone."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def build_loader(
    dataset: Dataset[Any],
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    sampler: Sampler[int] | None = None,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A DataLoader that leaves the global random state alone and whose workers outlive Ctrl-C.

    Args:
        dataset: the samples of `search.data` are dicts of tensors that stack.
        batch_size: samples per batch; the last one of a pass may hold fewer.
        workers: processes that make the samples; 0 makes them here. They stay between passes.
        seed: of the workers' own random numbers.
        sampler: order of the samples, by default 0, 1, 2 and so on.
        pin_memory: faster copies to a GPU.
    """
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupt,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),
    )


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one saves its state and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
