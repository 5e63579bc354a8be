# SPDX-License-Identifier: Apache-2.0
"""What happens round a training step: state saved and restored, progress shown, Ctrl-C heard."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from search.engine.checkpoint import load_weights, read_checkpoint, write_checkpoint

_LINE_SECONDS = 10.0  # between two lines where there is no terminal
_REFRESH_SECONDS = 0.2  # of the bar


class Interrupt:
    """Remembers Ctrl-C until the step is complete; the second one takes effect at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # signals come to that one alone
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def request(*_: Any) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def anywhere(self, device: torch.device) -> bool:
        """Whether any process heard it: all must stop after the same step."""
        if not is_distributed():
            return self.requested
        flag = torch.tensor(float(self.requested), device=device)
        torch.distributed.all_reduce(flag)
        return bool(flag)


class StateHook(Hook):
    """Saves everything a resumed training needs, and takes it up again before the first step.

    Args:
        path: the state's file; only the main process writes.
        meta: plain values; those in `identity` must not change between the runs.
        interval: steps between two states.
        interrupt: asked after each step.
        resume: take up the state at `path`, if there is one.
        until: stop after this step, with its state saved; None: at the end.
    """

    priority = "VERY_LOW"  # after the schedulers' step
    identity = ("steps", "batch_size", "lr", "seed", "amp", "processes", "hooks")

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Any],
        interval: int,
        interrupt: Interrupt,
        resume: bool,
        until: int | None = None,
    ) -> None:
        self.path, self.meta, self.interval = path, meta, interval
        self.interrupt, self.resume, self.until = interrupt, resume, until

    def before_run(self, runner: Any) -> None:
        if not (self.resume and self.path.exists()):
            return
        state = read_checkpoint(self.path)
        check_identity(self.meta, state["meta"], self.path)
        load_weights(bare(runner.model), state["state_dict"], self.path)
        runner.optim_wrapper.load_state_dict(state["optimizer"])
        for scheduler, values in zip(runner.param_schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        runner.train_loop._iter = state["step"]  # as Runner.resume does; the loop skips the data order
        runner.train_loop.stop_training = self.until is not None and state["step"] >= self.until
        torch.set_rng_state(state["cpu_rng"])
        device = device_of(runner.model)
        if device.type == "cuda" and state["gpu_rng"] is not None:
            torch.cuda.set_rng_state(state["gpu_rng"], device)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        step = batch_idx + 1
        stop = self.interrupt.anywhere(device_of(runner.model))
        due = step % self.interval == 0 or step == self.until
        if (stop or (due and step < runner.max_iters)) and is_main_process():
            self.save(runner, step)
        if stop:
            raise KeyboardInterrupt
        if step == self.until:
            runner.train_loop.stop_training = True

    def save(self, runner: Any, step: int) -> None:
        device = device_of(runner.model)
        content = {
            "meta": dict(self.meta),
            "step": step,
            "state_dict": bare(runner.model).state_dict(),
            "optimizer": runner.optim_wrapper.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in runner.param_schedulers],
            "cpu_rng": torch.get_rng_state(),
            "gpu_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        write_checkpoint(self.path, content)


def check_identity(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: Path) -> None:
    """ValueError that names the first option that a resumed run may not change."""
    for name in StateHook.identity:
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"a resumed run needs the first run's options: {name} was {theirs.get(name)}, "
                f"got {mine.get(name)}; see {path}"
            )


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def bare(model: Any) -> Any:
    """The task inside MMEngine's data-parallel wrapper."""
    return model.module if is_model_wrapper(model) else model


class ProgressHook(Hook):
    """Loss, speed and time left: a bar on a terminal, else a line every ten seconds; lines go to the log.

    Loss and learning rate of every step go to MMEngine's visualizer: ``log/*/vis_data/scalars.json``.
    """

    priority = "LOWEST"

    def __init__(self, console: Console | None) -> None:
        self.loss = float("nan")  # running mean
        self._console = console
        self._bar: Progress | None = None

    def before_train(self, runner: Any) -> None:
        self._first, self._start = runner.iter, time.monotonic()
        self._line_at = self._bar_at = 0.0
        if self._console and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.2f} steps/s  ETA"),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,  # no thread
            )
            self._row = self._bar.add_task(
                "", total=runner.max_iters, completed=runner.iter, loss=0.0, speed=0.0
            )
            self._bar.start()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._lr = runner.optim_wrapper.get_lr()["lr"][0]

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        loss, step, now = outputs["loss"].item(), batch_idx + 1, time.monotonic()
        with suppress(OSError):  # a full disk is told once, by the checkpoint
            runner.visualizer.add_scalars({"loss": loss, "lr": self._lr}, step)
        self.loss = loss if self.loss != self.loss else self.loss + 0.1 * (loss - self.loss)
        speed = (step - self._first) / max(now - self._start, 1e-9)
        last = step == runner.max_iters
        if self._bar and (last or now >= self._bar_at):
            self._bar_at = now + _REFRESH_SECONDS
            self._bar.update(self._row, completed=step, loss=self.loss, speed=speed, refresh=True)
        if last or now >= self._line_at:
            self._line_at = now + _LINE_SECONDS
            left = time.strftime("%H:%M:%S", time.gmtime((runner.max_iters - step) / speed))
            line = f"step {step}/{runner.max_iters}  loss {self.loss:.4f}  {speed:.2f} steps/s  ETA {left}"
            runner.logger.info(line)
            if self._console and not self._bar:
                self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it was, whatever ended the training."""
        if self._bar:
            self._bar.stop()
