# SPDX-License-Identifier: Apache-2.0
"""What a finished search leaves for its report: ``NAME.report.json`` beside the pattern."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ic_conv._files import write_text
from ic_conv.pattern import DilationPattern
from search.report.effective import effective_fields, take_images
from search.strategies import SearchTask

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_IMAGES = 16  # for the effective receptive field
_POINTS = 400  # of a stored curve


@dataclass(frozen=True)
class RunRecord:
    """Plain values; each may be missing, and the report then leaves its part out.

    Attributes:
        command: what was typed.
        seconds: how long it took.
        device: what it ran on.
        curve: ``step``, ``loss`` and ``lr`` of the training, equally long lists.
        fields: effective receptive fields, see `search.report.effective.effective_fields`.
        field_images: number, height and width of the images that gave them.
        trained: whether they are of trained weights.
    """

    command: str | None = None
    seconds: float | None = None
    device: str | None = None
    curve: Mapping[str, list[float]] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    field_images: tuple[int, ...] = ()
    trained: bool = True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record in one atomic step."""
        write_text(path, json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Reads what `save` wrote.

        Raises:
            ValueError: not such a file.
            OSError: it cannot be read.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"format_version must be {FORMAT_VERSION}")
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the record of a search: {path}: {error}") from error


def record_run(
    pattern: DilationPattern,
    task: SearchTask,
    log_folder: str | os.PathLike[str] | None = None,
    command: str | None = None,
    seconds: float | None = None,
) -> RunRecord:
    """Measures the receptive fields, and collects the rest.

    Args:
        pattern: what the search found.
        task: its supernet and calibration data.
        log_folder: the work folder of the supernet's training.
        command: what was typed.
        seconds: how long it took.
    """
    fields: Mapping[str, Any] = {}
    size: tuple[int, ...] = ()
    if task.supernet is not None:
        images = take_images(task.batches(), _IMAGES).to(next(task.supernet.parameters()).device)
        size = (len(images), *images.shape[2:])
        try:
            fields = effective_fields(task.supernet, pattern, images)
        except (ValueError, RuntimeError) as error:  # a network of the user's may not allow a backward pass
            logger.warning("the report lacks the effective receptive field: %s", error)
    return RunRecord(
        command=command,
        seconds=None if seconds is None else round(seconds, 1),
        device=_device_name(task),
        curve={} if log_folder is None else training_curve(log_folder),
        fields=fields,
        field_images=size,
        trained="supernet_sha256" in pattern.meta,
    )


def training_curve(folder: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Loss and learning rate by step, from the scalars that MMEngine left in a work folder.

    A run that began again at an earlier step, or was resumed there, replaces what others logged from that
    step on. Long curves are thinned to means over a few steps each.
    """
    root = Path(folder)
    points: dict[int, tuple[float, float]] = {}
    files = [*root.glob("log/*/vis_data/scalars.json"), *root.glob("*/vis_data/scalars.json")]
    for file in sorted(files):
        for line in file.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if "loss" not in values or "step" not in values:
                continue
            step = values["step"]
            if points and step <= next(reversed(points)):
                points = {known: value for known, value in points.items() if known < step}
            points[step] = (values["loss"], values.get("lr", float("nan")))
    if not points:
        return {}
    table = np.array([(step, *values) for step, values in points.items()], dtype=np.float64)
    if len(table) > _POINTS:
        table = np.stack([part.mean(axis=0) for part in np.array_split(table, _POINTS)])
    return {name: [float(f"{x:.6g}") for x in table[:, i]] for i, name in enumerate(("step", "loss", "lr"))}


def _device_name(task: SearchTask) -> str | None:
    if task.supernet is None:
        return None
    place = next(task.supernet.parameters()).device
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    threads = torch.get_num_threads()
    return f"{place.type}, {threads} thread{'s' * (threads > 1)}"
