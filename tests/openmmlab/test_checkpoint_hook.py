# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that fails half-way never replaces a good one."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from ic_conv.openmmlab import checkpoint_hook


class Line(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs: list[Tensor], mode: str) -> Any:
        return {"loss": self.layer(inputs[0]).square().mean()} if mode == "loss" else inputs


class Rising(BaseMetric):
    """A metric that is better each time."""

    def process(self, *_: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        self.calls = getattr(self, "calls", 0) + 1
        return {"score": float(self.calls)}


def train(folder: Path, epochs: int, **options: Any) -> Runner:
    loader = {
        "batch_size": 1,
        "dataset": [{"inputs": torch.ones(1)}],
        "sampler": {"type": "DefaultSampler", "shuffle": False},
    }
    hook = {"type": "AtomicCheckpointHook", "interval": 1, "max_keep_ckpts": 1, "rule": "greater", **options}
    runner = Runner(
        Line(),
        str(folder),
        train_dataloader=loader,
        val_dataloader=dict(loader),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        val_cfg={},
        val_evaluator=Evaluator(Rising()),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={"checkpoint": hook},
        resume=True,
        experiment_name=uuid.uuid4().hex,  # MMEngine keeps what a run knows under its name
        log_level="ERROR",
    )
    runner.train()
    return runner


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def test_retired_checkpoints_go_when_the_next_is_there(tmp_path: Path) -> None:
    train(tmp_path, 3, save_best="score")
    assert files(tmp_path) == ["best_score_epoch_3.pth", "epoch_3.pth"]


@pytest.mark.parametrize(
    ("name", "time"),
    [("epoch_3.pth", 1), ("best_score_epoch_3.pth", 1), ("epoch_3.pth", 2)],
    ids=["the last one", "the best one", "the last one again, which names the best"],
)
def test_a_full_disk_leaves_the_last_good_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, time: int
) -> None:
    times = 0

    def write_bytes(path: Path, data: bytes) -> int:
        nonlocal times
        times += name in path.name and (name.startswith("best") or "best" not in path.name)
        full = times == time
        with path.open("wb") as file:
            file.write(data[: len(data) // 2] if full else data)
        if full:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, 3, save_best="score")
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*"))
    last = Path((tmp_path / "last_checkpoint").read_text())
    assert torch.load(last, weights_only=False)["meta"]["epoch"] == int(last.stem[-1])
    for path in tmp_path.glob("best_*.pth"):
        assert torch.load(path, weights_only=False)["state_dict"]
    assert list(tmp_path.glob("best_*.pth"))
    train(tmp_path, 3, save_best="score")  # it goes on


def test_own_backend_is_left_alone() -> None:
    hook = checkpoint_hook.AtomicCheckpointHook(backend_args={"backend": "local"})
    assert hook.backend_args == {"backend": "local"}
