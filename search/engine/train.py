# SPDX-License-Identifier: Apache-2.0
"""Training of a task on MMEngine's Runner."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from rich.console import Console
from torch import distributed, nn
from torch.utils.data import Dataset

from search.data.loader import build_loader
from search.engine.checkpoint import FINAL, STATE, CheckpointWriteError, load_checkpoint, write_checkpoint
from search.engine.hooks import Interrupt, ProgressHook, StateHook, check_identity
from search.engine.optim import NonFiniteLossError, build_optim
from search.engine.options import TrainOptions, resolve_device
from search.tasks import Task


def train(task: Task, dataset: Dataset[Any], options: TrainOptions, hooks: Sequence[Hook] = ()) -> Path:
    """Trains `task` in place and returns the path of its final checkpoint.

    The work folder holds `final.pt` (state_dict and meta, all a user needs), while a training is under
    way `state.pt` (what `resume` takes up, bit by bit on a CPU; removed at the end, and returned where the
    options stop the training earlier), and MMEngine's log in `log/`. A finished run that is resumed returns
    at once. Under torchrun every process calls this with the same options; `batch_size` counts for each, and
    all end with the same weights.

    Args:
        task: see `search.tasks`; moved to the device.
        dataset: a data set of `search.data`.
        options: see TrainOptions.
        hooks: MMEngine's, called in the training.

    Raises:
        ValueError: an option does not fit, or the state to resume belongs to another run.
        NonFiniteLossError: the loss or a gradient became nan or infinite; the last state is kept.
        CheckpointWriteError: the disk is full or the work folder cannot be written.
        KeyboardInterrupt: Ctrl-C, after the state of the last completed step was saved.

    Example:
        >>> task = wrap(ic_resnet18(out_indices=(0, 1, 2, 3)), num_classes=10)
        >>> train(task, ScatteredDigits(), TrainOptions("work_dirs/r18", steps=500))
        PosixPath('work_dirs/r18/final.pt')
    """
    config = options.read_config()
    device = resolve_device(options.device)
    work_dir = _make_folder(Path(options.work_dir))
    with _processes(options.launcher, device):
        meta = _meta(task, dataset, options, config, hooks)
        final, state = work_dir / FINAL, work_dir / STATE
        if options.resume and final.exists() and not state.exists():
            check_identity(meta, load_checkpoint(task, final), final)
            task.to(device)
            return final
        try:
            loss = _run(task, dataset, options, config, device, meta, hooks)
        except NonFiniteLossError as error:
            kept = f"the last good weights are in {state}" if state.exists() else "no weights were saved yet"
            raise NonFiniteLossError(
                f"{error}; start again with a lower lr than {meta['lr']}; {kept}"
            ) from None
        if options.until is not None and options.until < meta["steps"]:
            return state
        if is_main_process():
            write_checkpoint(final, {"state_dict": task.state_dict(), "meta": {**meta, "loss": loss}})
            state.unlink(missing_ok=True)
        if distributed.is_initialized():
            distributed.barrier()
        return final


def _run(
    task: Task,
    dataset: Dataset[Any],
    options: TrainOptions,
    config: Any,
    device: torch.device,
    meta: dict[str, Any],
    hooks: Sequence[Hook],
) -> float:
    """Builds the Runner, trains, and leaves neither workers nor MMEngine's global instances behind."""
    work_dir = Path(options.work_dir)
    interrupt = Interrupt()
    state = StateHook(
        work_dir / STATE, meta, config.checkpoint_interval, interrupt, options.resume, options.until
    )
    progress = ProgressHook(Console() if options.progress and is_main_process() else None)
    model = _place(task, device, options)
    loader = build_loader(
        dataset,
        config.train_dataloader.batch_size,
        config.train_dataloader.num_workers,
        options.seed,
        InfiniteSampler(dataset, seed=options.seed),
        pin_memory=device.type == "cuda",
    )
    with _global_instances() as name:
        runner = _QuietRunner(
            model,
            str(work_dir / "log"),
            train_dataloader=loader,
            train_cfg=dict(config.train_cfg),
            optim_wrapper=build_optim(task, config.optim_wrapper, device, options.amp),
            param_scheduler=[dict(part) for part in config.param_scheduler],
            default_hooks=dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "checkpoint")),
            custom_hooks=[*hooks, state, progress],
            launcher=options.launcher,
            visualizer={"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
            randomness={"seed": options.seed},
            experiment_name=name,
        )
        try:
            with interrupt.listening():
                runner.train()
        finally:
            progress.close()
            _stop_workers(runner)
    if distributed.is_initialized():
        for buffer in task.buffers():  # BN statistics differ since the last forward pass
            distributed.broadcast(buffer, 0)
    return progress.loss


class _QuietRunner(Runner):
    """MMEngine's Runner, without output to the terminal and with the model where we put it."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        logger.handlers = [part for part in logger.handlers if isinstance(part, logging.FileHandler)]
        for handler in logger.handlers:  # a full disk is told once, by the checkpoint
            handler.handleError = lambda record: None
        return logger

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        return model


def _place(task: Task, device: torch.device, options: TrainOptions) -> nn.Module:
    task.to(device)
    if options.channels_last:
        task.to(memory_format=torch.channels_last)
    if options.launcher == "none":
        return task
    # rank 0's BN statistics count: they are what a checkpoint holds, so a resumed run equals a whole one
    return MMDistributedDataParallel(
        task,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=True,
        static_graph=True,  # allows parameters without use, as a classifier behind a feature network
    )


def _meta(
    task: Task, dataset: Dataset[Any], options: TrainOptions, config: Any, hooks: Sequence[Hook]
) -> dict[str, Any]:
    return {
        "task": type(task).__name__,
        "network": type(task.network).__name__,
        "num_classes": task.num_classes,
        "dataset": type(dataset).__name__,
        "steps": config.train_cfg.max_iters,
        "batch_size": config.train_dataloader.batch_size,
        "lr": config.optim_wrapper.optimizer.lr,
        "seed": options.seed,
        "amp": options.amp,
        "processes": get_world_size(),
        "torch": str(torch.__version__),
        **({"hooks": list(map(repr, hooks))} if hooks else {}),
    }


def _make_folder(work_dir: Path) -> Path:
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        probe = work_dir / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointWriteError(
            f"the work folder must be writable: {work_dir}: {error.strerror}"
        ) from error
    return work_dir


@contextmanager
def _processes(launcher: str, device: torch.device) -> Iterator[None]:
    """torchrun's process group; MMEngine's own start asks for a GPU even with gloo."""
    if launcher == "none" or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _global_instances() -> Iterator[str]:
    """A name for MMEngine's global instances, which are closed and forgotten at the end."""
    name = f"train-{uuid.uuid4().hex}"
    known = {kind: set(kind._instance_dict) for kind in (MMLogger, MessageHub, Visualizer, DefaultScope)}
    try:
        yield name
    finally:
        for kind, before in known.items():
            for key in set(kind._instance_dict) - before:
                instance = kind._instance_dict.pop(key)
                for handler in getattr(instance, "handlers", ()):
                    with suppress(OSError):  # a full disk
                        handler.close()


def _stop_workers(runner: Runner) -> None:
    """Ends the data workers now, not when the garbage collector finds the Runner."""
    batches = getattr(runner._train_loop, "dataloader_iterator", None)
    stop = getattr(getattr(batches, "_iterator", None), "_shutdown_workers", None)
    if stop is not None:
        stop()
