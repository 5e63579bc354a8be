# SPDX-License-Identifier: Apache-2.0
"""Training and testing of any OpenMMLab config: what the command lines do beside MMEngine's Runner."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ic_conv.openmmlab import processes
from ic_conv.openmmlab._blame import explain, one_line
from ic_conv.openmmlab._loading import only_weights
from ic_conv.openmmlab.checkpoint_hook import AtomicCheckpointHook

LIBRARIES = ("mmpretrain", "mmdet", "mmseg", "mmpose")
INSTALL = "run `make install-openmmlab`, or install the extra ic-conv[openmmlab] as the README says"
_USER_ERRORS = (ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError, ImportError)


class ConfigError(ValueError):
    """A config that cannot run; one line that names the config and the key."""


def load_config(path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Config:
    """A config with its bases, overrides and scope.

    Args:
        path: a config file of this package or of an OpenMMLab library.
        options: overrides, ``{"model.backbone.depth": 101}``.

    Raises:
        ConfigError: the file is missing or broken, or a library that it needs is not installed.
    """
    if not Path(path).is_file():
        raise ConfigError(f"the config must be a file, got {path}")
    # MMEngine looks for the distribution mmsegmentation, which has another name today; the module has not.
    MODULE2PACKAGE["mmseg"] = "mmseg"
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(dict(options or {}))
        config.default_scope = scope_of(config)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path}: {one_line(error)}; {INSTALL}") from error
    except (*_USER_ERRORS, SyntaxError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    return config


def scope_of(config: Config) -> str:
    """The library whose registries know a config's types: the one that it names, or that has its model.

    Raises:
        ValueError: no installed library knows the type of the model.
    """
    if config.get("default_scope"):
        return config.default_scope
    kind = config.get("model", {}).get("type")
    scope, _, name = str(kind).rpartition(".")
    if scope:
        return scope
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is not None:
            models = importlib.import_module(f"{library}.registry").MODELS
            models.import_from_location()
            if name in models.module_dict:
                return library
    raise ValueError(f"model.type: no installed library of {', '.join(LIBRARIES)} knows {kind!r}")


def prepare(
    config: Config,
    path: str | os.PathLike[str],
    *,
    work_dir: str | None = None,
    launcher: str = "none",
    amp: bool = False,
    auto_scale_lr: bool = False,
    resume: str | None = None,
    checkpoint: str | None = None,
) -> Config:
    """Merges what a command line says into a config.

    Args:
        config: changed in place.
        path: of the config's file, whose name is the default work folder's.
        work_dir: comes before the config's own.
        launcher: none, pytorch or slurm.
        amp: mixed precision.
        auto_scale_lr: scale the learning rate to the batch size, where the config says from which.
        resume: a checkpoint to go on from, or ``"auto"`` for the last one in the work folder.
        checkpoint: weights to start from.

    Raises:
        ConfigError: a file is missing, or the config lacks what an option needs.
    """
    config.launcher = launcher
    config.work_dir = work_dir or config.get("work_dir") or str(Path("work_dirs") / Path(path).stem)
    hook = config.setdefault("default_hooks", {}).setdefault("checkpoint", {"type": "CheckpointHook"})
    if hook is not None and hook.get("type") == "CheckpointHook":
        hook["type"] = AtomicCheckpointHook.__name__
    if amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ConfigError(f"{path}: auto_scale_lr.base_batch_size must be set for --auto-scale-lr")
        config.auto_scale_lr.enable = True
    if resume is not None:
        config.resume = True
        config.load_from = None if resume == "auto" else resume
    if checkpoint is not None:
        config.load_from = checkpoint
    if config.get("load_from") and "://" not in config.load_from and not Path(config.load_from).is_file():
        raise ConfigError(f"the checkpoint must be a file, got {config.load_from}")
    if launcher != "none" and not torch.cuda.is_available():
        wrapper = {  # as MMEngine's own, but for the GPU's number
            "device_ids": None,
            "broadcast_buffers": False,
            "find_unused_parameters": config.get("find_unused_parameters", False),
        }
        config.model_wrapper_cfg = {**wrapper, **config.get("model_wrapper_cfg", {})}
        try:
            processes.join(launcher)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return config


def train(config: Config, trust_checkpoint: bool = False) -> Runner:
    """Trains a prepared config and returns the runner.

    Args:
        config: see `prepare`.
        trust_checkpoint: read checkpoints as pickles, which may run any code that their authors put in.

    Raises:
        ConfigError: the config cannot run; raised before the first step.
    """
    with _explained(config) as start, only_weights(config.get("load_from"), trust_checkpoint):
        runner = Runner.from_cfg(config)
        runner.register_hook(start, "HIGHEST")
        runner.train()
    return runner


def test(config: Config, out: str | None = None, trust_checkpoint: bool = False) -> dict[str, float]:
    """Tests a prepared config and returns the metrics.

    Args:
        config: with its checkpoint in ``load_from``.
        out: a .pkl file for the predictions.
        trust_checkpoint: see `train`.

    Raises:
        ConfigError: the config cannot run; raised before the first image.
    """
    if out is not None:
        given = config.test_evaluator
        dump = {"type": "mmengine.DumpResults", "out_file_path": out}
        config.test_evaluator = [*(given if isinstance(given, list) else [given]), dump]
    with _explained(config) as start, only_weights(config.get("load_from"), trust_checkpoint):
        runner = Runner.from_cfg(config)
        runner.register_hook(start, "HIGHEST")
        result = runner.test()
    return result  # noqa: RET504 (mypy takes the block for one that may swallow errors)


class _Start(Hook):
    """Remembers that the first step came: what fails before is the config's fault."""

    def __init__(self) -> None:
        self.came = False

    def before_train(self, runner: Runner) -> None:
        self.came = True

    before_test = before_train


@contextmanager
def _explained(config: Config) -> Iterator[_Start]:
    """Turns what goes wrong before the first step into one line that names the key."""
    start = _Start()
    try:
        yield start
    except _USER_ERRORS as error:
        if start.came:
            raise
        logging.getLogger(__name__).debug("the config cannot run", exc_info=True)
        raise ConfigError(explain(config._cfg_dict, error)) from error
