# SPDX-License-Identifier: Apache-2.0
"""Options of a training; what they leave open comes from the config file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs/search/scattered_digits.py"
_LAUNCHERS = ("none", "pytorch")


@dataclass(frozen=True)
class TrainOptions:
    """How to train; None leaves a value to the config file.

    Args:
        work_dir: folder for checkpoints and the log, made if missing.
        config: MMEngine config file, see configs/search.
        steps: number of optimizer steps.
        until: stop after this step, earlier than `steps`; the state is kept for a later call with `resume`.
        batch_size: images per step and process.
        lr: peak learning rate.
        seed: of weights not yet made, data order and random layers.
        device: "cpu", "cuda", "cuda:1", or "auto" (a GPU if there is one).
        amp: mixed precision: bfloat16, or float16 on a GPU without it.
        resume: go on from the state in work_dir, if there is one.
        launcher: "none", or "pytorch" under torchrun.
        checkpoint_interval: steps between two saved states.
        workers: processes that make the images.
        channels_last: memory format of the network; faster for convolutions.
        progress: show a progress bar, or lines where the output is no terminal.

    Raises:
        ValueError: a value is out of range, or the device is not there.
    """

    work_dir: str | os.PathLike[str]
    config: str | os.PathLike[str] = DEFAULT_CONFIG
    steps: int | None = None
    until: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    device: str = "auto"
    amp: bool = False
    resume: bool = False
    launcher: str = "none"
    checkpoint_interval: int | None = None
    workers: int | None = None
    channels_last: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("until", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("checkpoint_interval", 1),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.launcher not in _LAUNCHERS:
            raise ValueError(f"launcher must be one of {', '.join(_LAUNCHERS)}; got {self.launcher!r}")
        if self.launcher == "pytorch" and "RANK" not in os.environ:
            raise ValueError("launcher 'pytorch' needs torchrun, which sets RANK; it is not set")
        resolve_device(self.device)

    def read_config(self) -> Any:
        """The MMEngine Config with these options in it.

        Raises:
            ValueError: the file is missing or no such config.
        """
        from mmengine.config import Config

        if not Path(self.config).is_file():
            raise ValueError(f"the config file must exist, got {self.config}")
        try:
            config = Config.fromfile(str(self.config), import_custom_modules=False)
            scale = (self.steps or config.train_cfg.max_iters) / config.train_cfg.max_iters
            for scheduler in config.param_scheduler:
                scheduler.begin, scheduler.end = round(scheduler.begin * scale), round(scheduler.end * scale)
            # a warm-up of a single step would never leave its first value
            config.param_scheduler = [part for part in config.param_scheduler if part.end - part.begin > 1]
            for section, key, value in (
                (config.train_cfg, "max_iters", self.steps),
                (config.train_dataloader, "batch_size", self.batch_size),
                (config.train_dataloader, "num_workers", self.workers),
                (config.optim_wrapper.optimizer, "lr", self.lr),
                (config, "checkpoint_interval", self.checkpoint_interval),
            ):
                if value is not None:
                    section[key] = value
        except Exception as error:  # a config is code
            raise ValueError(
                f"not a training config like {DEFAULT_CONFIG.name}: {self.config}: {error}"
            ) from error
        return config


def resolve_device(name: str) -> torch.device:
    """The torch device; under torchrun "auto" and "cuda" take the process's own GPU."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if not has_gpu or index >= torch.cuda.device_count():
            raise ValueError(f"this machine has {torch.cuda.device_count()} GPU(s), got device {name!r}")
        return torch.device("cuda", index)
    return device
