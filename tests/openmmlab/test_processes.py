# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU train one model: started by torchrun, and as Slurm's srun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ic_conv.openmmlab import processes
from tests.openmmlab.commands import ROOT
from tests.openmmlab.generated import write_data

CONFIG = ROOT / "configs/classification/rednet26_32xb64-130e_in1k.py"
OPTIONS = (
    "model.backbone.init_cfg=None",
    "train_cfg.max_epochs=1",
    "param_scheduler.0.end=2",
    "train_dataloader.batch_size=2",
    *(f"{name}_dataloader.num_workers=0" for name in ("train", "val")),
    *(f"{name}_dataloader.persistent_workers=False" for name in ("train", "val")),
    *(f"{name}_dataloader.dataset.pipeline.1.scale=32" for name in ("train", "val")),
    "val_dataloader.dataset.pipeline.2.crop_size=32",
)
IMAGES = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_torchrun(command: list[str], tmp_path: Path) -> list[subprocess.Popen[bytes]]:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return [subprocess.Popen([sys.executable, *torchrun, *command, "--launcher", "pytorch"])]


def by_slurm(command: list[str], tmp_path: Path) -> list[subprocess.Popen[bytes]]:
    """What srun does on two nodes; scontrol names them."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    common = {
        "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}",
        "MASTER_PORT": str(free_port()),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "node[1-2]",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command, "--launcher", "slurm"],
            env={**os.environ, **common, "SLURM_PROCID": str(rank)},
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("start", [by_torchrun, by_slurm])
def test_two_processes_share_the_images(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = write_data(tmp_path / "data", images=IMAGES)
    roots = [f"{name}_dataloader.dataset.data_root={data / 'imagenet'}/" for name in ("train", "val")]
    work_dir = tmp_path / "run"
    command = [str(ROOT / "tools/train.py"), str(CONFIG), "--work-dir", str(work_dir), "--cfg-options"]
    # The launcher's option follows the others.
    started = start([*command, *OPTIONS, *roots], tmp_path)
    assert [process.wait(240) for process in started] == [0] * len(started)
    checkpoint = torch.load(work_dir / "epoch_1.pth", weights_only=False)
    assert checkpoint["meta"]["iter"] == IMAGES / 2 / 2  # 2 images a step in each of 2 processes


@pytest.mark.parametrize(
    ("launcher", "words"), [("pytorch", "torchrun.* RANK"), ("slurm", "srun.* SLURM_PROCID")]
)
def test_a_launcher_that_did_not_start_the_process(
    launcher: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"launcher '{launcher}' needs {words}; it is not set"):
        processes.join(launcher)


def test_slurm_without_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODELIST": "node1"}
    for name, value in {**variables, "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="set MASTER_ADDR, since scontrol failed"):
        processes.join("slurm")
