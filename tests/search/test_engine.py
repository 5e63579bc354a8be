# SPDX-License-Identifier: Apache-2.0
"""train and evaluate: checkpoints, options, failures, and nothing left behind."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import PARAM_SCHEDULERS
from torch import Tensor, nn

from search.data import ScatteredDigits
from search.engine import (
    CheckpointWriteError,
    NonFiniteLossError,
    TrainOptions,
    evaluate,
    load_checkpoint,
    train,
)
from search.tasks import Task, wrap

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = ScatteredDigits(length=40)


class Network(nn.Module):
    """Two convs with BN and dropout; `at_step` is called with the number of each training step."""

    def __init__(self, width: int = 8, at_step: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.at_step, self.calls = at_step, 0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(self.conv(x)).relu(), 0.1, self.training)
        if self.training:
            self.calls += 1
            x = self.at_step(self.calls, x) if self.at_step else x
        return x


def make_task(**options: Any) -> Task:
    torch.manual_seed(5)
    return wrap(Network(**options), num_classes=10)


def options_for(folder: Path, **changes: Any) -> TrainOptions:
    short = TrainOptions(
        folder,
        steps=8,
        batch_size=2,
        lr=0.01,
        device="cpu",
        workers=0,
        checkpoint_interval=3,
        progress=False,
    )
    return replace(short, **changes)


def same_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_training_learns_and_its_checkpoint_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_task(width=16)
    val = ScatteredDigits("val", length=32)
    path = train(
        task, ScatteredDigits(), options_for(tmp_path / "run", steps=40, batch_size=8, progress=True)
    )
    assert path == tmp_path / "run" / "final.pt"
    assert not (tmp_path / "run" / "state.pt").exists()
    content = torch.load(path, weights_only=True)
    assert content["meta"].items() >= {"steps": 40, "lr": 0.01, "seed": 0, "task": "CenterHeatmap"}.items()
    assert content["meta"]["loss"] < 2.7  # from 3.3
    fresh = make_task(width=16)
    meta = load_checkpoint(fresh, path)
    assert meta == content["meta"]
    assert evaluate(fresh, val, device="cpu") == evaluate(task, val, batch_size=5, device="cpu")
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("step ") for line in printed)  # nothing of MMEngine's
    assert [printed[i].split()[1] for i in (0, -1)] == ["1/40", "40/40"]
    logs = list((tmp_path / "run" / "log").rglob("*.log"))
    assert len(logs) == 1
    assert printed[-1] in logs[0].read_text()


def test_evaluate_keeps_the_mode_and_measures_in_eval_mode() -> None:
    task = make_task()
    task.network.eval()
    result = evaluate(task, DATA, device="cpu")
    assert set(result) == {"mAP", "mAP_small", "mAP_medium", "mAP_large"}
    assert task.training
    assert task.network.calls == 0
    assert not task.network.get_buffer("norm.num_batches_tracked")


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    weights = []
    for i, changes in enumerate(({}, {"workers": 2}, {"seed": 1}, {"checkpoint_interval": 1})):
        train(task := make_task(), DATA, options_for(tmp_path / str(i), **changes))
        weights.append(task.state_dict())
    assert same_weights(weights[0], weights[1])
    assert same_weights(weights[0], weights[3])
    assert not same_weights(weights[0], weights[2])


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    train(make_task(), DATA, options_for(tmp_path / "first", workers=1))
    gc.collect()

    def census() -> tuple[Any, ...]:
        logs = [
            handle for handle in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(handle.resolve())
        ]
        return (
            threading.active_count(),
            multiprocessing.active_children(),
            logs,
            len(MMLogger._instance_dict),
            len(MessageHub._instance_dict),
            signal.getsignal(signal.SIGINT),
        )

    before = census()
    for i in range(2):
        train(make_task(), DATA, options_for(tmp_path / str(i), workers=1))
    assert census() == before
    assert not before[1]
    assert not before[2]


def test_amp_on_a_cpu(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def look(step: int, x: Tensor) -> Tensor:
        seen.append(torch.nn.functional.conv2d(x, x.new_ones(1, x.shape[1], 1, 1)).dtype)
        return x

    train(task := make_task(at_step=look), DATA, options_for(tmp_path, amp=True))
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in task.parameters()} == {torch.float32}


@pytest.mark.parametrize("interval", [3, 100])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_state(tmp_path: Path, interval: int, where: str) -> None:
    def spoil(step: int, x: Tensor) -> Tensor:
        if step == 5:
            if where == "loss":
                return x * math.nan
            x.register_hook(lambda gradient: gradient * math.inf)
        return x

    task = make_task(at_step=spoil)
    words = f"the {where}.* became (nan|inf) in step 5; .* lower lr than 0.01; " + (
        "the last good weights are in .*state.pt" if interval == 3 else "no weights were saved yet"
    )
    with pytest.raises(NonFiniteLossError, match=words):
        train(task, DATA, options_for(tmp_path, checkpoint_interval=interval))
    assert all(value.isfinite().all() for value in task.parameters())
    assert not (tmp_path / "final.pt").exists()
    if interval == 3:
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["step"] == 3
        assert all(value.isfinite().all() for value in state["state_dict"].values())


@pytest.mark.parametrize("at", [5, 8])
def test_interrupt_saves_the_completed_step_and_resume_ends_equal(tmp_path: Path, at: int) -> None:
    train(whole := make_task(), DATA, options_for(tmp_path / "whole"))

    def press(step: int, x: Tensor) -> Tensor:
        if step == at:
            for pid in (*(worker.pid for worker in multiprocessing.active_children()), os.getpid()):
                os.kill(pid or 0, signal.SIGINT)  # as a terminal does
        return x

    options = options_for(tmp_path / "broken", workers=1, checkpoint_interval=100)
    with pytest.raises(KeyboardInterrupt):
        train(make_task(at_step=press), DATA, options)
    assert torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["step"] == at
    resumed = make_task()
    train(resumed, DATA, replace(options, resume=True))
    assert resumed.network.calls == 8 - at
    assert same_weights(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("calls", [1, 2])
def test_a_training_stopped_between_goes_on_as_if_it_had_not(tmp_path: Path, calls: int) -> None:
    train(whole := make_task(), DATA, options_for(tmp_path / "whole"))
    options = options_for(tmp_path / "parts", resume=True)
    for _ in range(calls):  # the second one finds all done
        part = make_task()
        assert train(part, DATA, replace(options, until=4)) == tmp_path / "parts/state.pt"
    assert part.network.calls == (4 if calls == 1 else 0)
    resumed = make_task()
    assert train(resumed, DATA, options) == tmp_path / "parts/final.pt"
    assert same_weights(whole.state_dict(), resumed.state_dict())


def test_resume_skips_samples_without_making_them(tmp_path: Path) -> None:
    class Counting(ScatteredDigits):
        made: list[int]

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            self.made.append(index)
            return super().__getitem__(index)

    data = Counting(length=40)
    data.made = whole = list[int]()
    train(make_task(), data, options_for(tmp_path / "whole"))
    data.made = other = list[int]()
    train(make_task(), data, options_for(tmp_path / "other", seed=1))
    assert other != whole
    data.made = []
    with pytest.raises(NonFiniteLossError):
        stop = make_task(at_step=lambda step, x: x * math.nan if step == 5 else x)
        train(stop, data, options_for(tmp_path / "broken"))
    data.made = rest = list[int]()
    train(make_task(), data, options_for(tmp_path / "broken", resume=True))
    assert rest == whole[6:]


def test_resume_of_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    train(first := make_task(), DATA, options_for(tmp_path))
    again = make_task()
    assert train(again, DATA, options_for(tmp_path, resume=True)) == tmp_path / "final.pt"
    assert again.network.calls == 0
    assert same_weights(first.state_dict(), again.state_dict())


@pytest.mark.parametrize("finished", [True, False])
def test_resume_refuses_other_options_and_other_networks(tmp_path: Path, finished: bool) -> None:
    if finished:
        train(make_task(), DATA, options_for(tmp_path))
    else:
        with pytest.raises(NonFiniteLossError):
            train(
                make_task(at_step=lambda step, x: x * math.nan if step == 5 else x),
                DATA,
                options_for(tmp_path),
            )
    with pytest.raises(ValueError, match="batch_size was 2, got 4"):
        train(make_task(), DATA, options_for(tmp_path, resume=True, batch_size=4))
    with pytest.raises(
        ValueError, match=r"network\.conv\.weight is \(8, 3, 7, 7\) in the file, \(4, 3, 7, 7\) in"
    ):
        train(make_task(width=4), DATA, options_for(tmp_path, resume=True))


def test_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files, as a full disk, stops the second state, and the log's lines."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("search.engine.hooks._LINE_SECONDS", 0)

    def fill(step: int, x: Tensor) -> Tensor:
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        return x

    try:
        with pytest.raises(
            CheckpointWriteError, match=r"state.pt: File too large; the one before it is kept"
        ):
            train(make_task(at_step=fill), DATA, options_for(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "state.pt"]
    assert capfd.readouterr().err == ""


def test_unwritable_work_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointWriteError, match=r"work folder must be writable: .*file/run"):
        train(make_task(), DATA, options_for(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"until": 0}, "until must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        ({"device": "meta"}, "got 'meta'"),
        ({"device": "cuda:99"}, r"GPU\(s\), got device 'cuda:99'"),
        ({"launcher": "slurm"}, "none, pytorch; got 'slurm'"),
        ({"launcher": "pytorch"}, "needs torchrun"),
        ({"config": "no.py"}, "config file must exist, got no.py"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options_for(tmp_path, **changes).read_config()


@pytest.mark.parametrize("text", ["train_cfg = dict(", "train_cfg = dict(max_iters=3)"])
def test_bad_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=r"not a training config like scattered_digits.py: .*mine.py"):
        options_for(tmp_path, config=tmp_path / "mine.py").read_config()


@pytest.mark.parametrize("steps", [1, 5, 8, 12, 25, 250, 1000])
def test_schedule_reaches_its_peak_and_falls_whatever_the_steps(tmp_path: Path, steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    config = options_for(tmp_path, steps=steps).read_config()
    parts = [
        PARAM_SCHEDULERS.build(part, default_args={"optimizer": optimizer}) for part in config.param_scheduler
    ]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for part in parts:
            part.step()
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(1)
    assert peak <= 0.1 * steps
    assert rates[0] == pytest.approx(0.01 if steps >= 25 else 1)
    assert rates[-1] < 0.2 or steps == 1
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "must exist"),
        (b"", "not a checkpoint that torch can read"),
        (b"PK\x03\x04 torn", "not a checkpoint that torch can read"),
        ({"model": 1}, "must hold state_dict and meta"),
        ({"state_dict": {}, "meta": {}}, r"network\.conv\.weight is missing in the file"),
        (
            {"state_dict": make_task().state_dict() | {"more": torch.ones(2)}, "meta": {}},
            r"more is \(2,\) in the",
        ),
    ],
)
def test_bad_checkpoint(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "some.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words) as error:
        load_checkpoint(make_task(), path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
