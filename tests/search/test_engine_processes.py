# SPDX-License-Identifier: Apache-2.0
"""train in processes of its own: killed without warning and resumed, and two together under torchrun.

Run as a script, this file is what those processes run: WORK_DIR HANG_AT [OPTION=VALUE ...].
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search.data import ScatteredDigits
from search.engine import TrainOptions, train
from search.tasks import wrap


class Network(nn.Module):
    """One conv with BN and dropout, which hangs at a given training step."""

    def __init__(self, hang_at: int, marker: Path) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.unused = nn.Linear(8, 2)  # as a classifier behind a feature network
        self.left, self.marker = hang_at, marker

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        if self.left == 0 and self.training:
            self.marker.touch()
            time.sleep(600)
        return nn.functional.dropout(self.norm(self.conv(x)).relu(), 0.1, self.training)


def main(work_dir: Path, hang_at: int, **changes: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would differ in the last bit
    torch.manual_seed(5)
    task = wrap(Network(hang_at, work_dir / "hangs"), num_classes=10)
    options: dict[str, Any] = {"steps": 8, "batch_size": 4, "checkpoint_interval": 3, "workers": 1}
    path = train(task, ScatteredDigits(), TrainOptions(work_dir, device="cpu", **(options | changes)))
    torch.set_num_threads(threads)
    assert path.exists()
    torch.save(task.state_dict(), work_dir / f"rank{os.environ.get('RANK', 0)}.pt")


def command(work_dir: Path, hang_at: int, *changes: str) -> list[str]:
    return [__file__, str(work_dir), str(hang_at), *changes]


def weights(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)


def assert_equal(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def kill_when_it_hangs(process: subprocess.Popen[bytes], marker: Path) -> None:
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert process.poll() is None, "it ended before the step where it should hang"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_and_resumed_ends_as_the_unbroken_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main(whole, 0)
    with subprocess.Popen([sys.executable, *command(broken, 6)]) as process:
        kill_when_it_hangs(process, broken / "hangs")
    assert torch.load(broken / "state.pt", weights_only=True)["step"] == 3
    assert not (broken / "final.pt").exists()
    done = subprocess.run(
        [sys.executable, *command(broken, 6, "resume=1")], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[0].startswith("step 4/8")
    assert_equal(whole / "final.pt", broken / "final.pt")
    assert_equal(whole / "rank0.pt", broken / "rank0.pt")


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    done = subprocess.run(
        [*torchrun, *command(both, 0, "launcher=pytorch")], check=True, capture_output=True, text=True
    )
    main(alone, 0)
    assert_equal(both / "rank0.pt", both / "rank1.pt")
    assert_equal(both / "rank0.pt", both / "final.pt")
    assert done.stdout.count("step 8/8") == 1  # the second process is silent
    moved = (
        weights(both / "final.pt")["network.conv.weight"] - weights(alone / "final.pt")["network.conv.weight"]
    )
    assert moved.abs().max() > 0  # the second process's images count


if __name__ == "__main__":
    pairs = (change.split("=") for change in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), **{name: int(v) if v.isdigit() else v for name, v in pairs})
