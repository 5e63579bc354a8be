# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written in one atomic step, read with weights_only, checked against the task."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ic_conv._files import atomic_path

FINAL, STATE = "final.pt", "state.pt"  # the trained weights; what a resumed training needs


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the one before it is whole."""


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` so that `path` holds the old file or the new one, never half of one.

    Raises:
        CheckpointWriteError: the disk is full or the folder cannot be written.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(dict(content), file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        )
        kept = "; the one before it is kept" if path.exists() else ""
        raise CheckpointWriteError(f"cannot write the checkpoint {path}: {reason}{kept}") from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        ValueError: the file is missing or no checkpoint of this engine.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"the checkpoint must exist, got {path}") from error
    except Exception as error:  # torch raises many types for a file that is none of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"not a checkpoint that torch can read: {path}: {reason}") from error
    if not isinstance(content, dict) or not {"state_dict", "meta"} <= content.keys():
        raise ValueError(f"a checkpoint must hold state_dict and meta: {path}")
    return content


def load_checkpoint(task: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads the weights of a checkpoint into `task` and returns the checkpoint's meta values.

    Raises:
        ValueError: the file cannot be read, or belongs to another architecture; it names the first
            weight that differs.

    Example:
        >>> load_checkpoint(task, "work_dirs/resnet50_k9/final.pt")["steps"]
        250
    """
    content = read_checkpoint(path)
    load_weights(task, content["state_dict"], path)
    return content["meta"]


def load_weights(task: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """load_state_dict with one clear line for weights of another architecture."""
    own = task.state_dict()
    for name in [*own, *weights]:
        here, there = (tuple(part[name].shape) if name in part else None for part in (own, weights))
        if here != there:
            raise ValueError(
                f"the checkpoint must fit the network, {path}: {name} is {there or 'missing'} in the file, "
                f"{here or 'missing'} in the network"
            )
    task.load_state_dict(weights)
