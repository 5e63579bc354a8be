# SPDX-License-Identifier: Apache-2.0
"""Real Runners on a small network, for the tests of the search within a training.

Run as a script, this file is one of two processes: WORK_DIR STRATEGY.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.runner import Runner
from torch import Tensor, nn

import ic_conv.openmmlab  # noqa: F401 (registers the hook)
from ic_conv import ic_resnet18
from search import convert_to_supernet
from search.strategies import STRATEGIES

ADAM = {"type": "AdamW", "lr": 1e-2, "weight_decay": 0.1}
GRADIENT = {"strategy": "gradient"}
SGD = {"type": "SGD", "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}


class Images(torch.utils.data.Dataset[Any]):
    metainfo: ClassVar[dict[str, Any]] = {}

    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 255, (count, 3, 32, 32), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": self.images[index], "data_samples": index % 8}


class Model(BaseModel):
    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__(ImgDataPreprocessor(mean=[127.0], std=[60.0]))
        torch.manual_seed(0)
        plain = ic_resnet18(width=4, out_indices=(0, 1, 2, 3))
        self.backbone: Any = convert_to_supernet(plain, 9) if network is None else network
        self.head = nn.Linear(32, 8)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "loss") -> Any:
        scores = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        if mode == "predict":
            return list(scores)
        return {"loss": nn.functional.cross_entropy(scores, torch.as_tensor(data_samples))}


class Call(Hook):
    """Calls a function after epochs, before or after the search."""

    def __init__(self, priority: str, work: Callable[[Any], None]) -> None:
        self.priority, self.work = priority, work

    def after_train_epoch(self, runner: Any) -> None:
        self.work(runner)


def train(
    folder: Path, hooks: list[Any], epochs: int = 2, resume: bool = False, model: Model | None = None,
    optimizer: dict[str, Any] = ADAM, train_cfg: dict[str, Any] | None = None,
    wrapper: dict[str, Any] | None = None, images: int = 8, **options: Any,
) -> Runner:  # fmt: skip
    sampler = {"type": "DefaultSampler" if train_cfg is None else "InfiniteSampler", "shuffle": True}
    runner = Runner(
        model or Model(),
        str(folder),
        train_dataloader={"batch_size": 4, "num_workers": 0, "dataset": Images(images), "sampler": sampler},
        train_cfg=train_cfg or {"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": optimizer, "paramwise_cfg": {"norm_decay_mult": 0.0}, **(wrapper or {})},
        param_scheduler={"type": "MultiStepLR", "milestones": [1], "gamma": 0.5},
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": train_cfg is None}
        },
        custom_hooks=hooks,
        randomness={"seed": 0},
        resume=resume,
        experiment_name=uuid.uuid4().hex,
        **{"log_level": "ERROR", **options},
    )
    runner.train()
    return runner


def search(**options: Any) -> dict[str, Any]:
    return {"type": "DilationSearchHook", "calibration_batches": 2, "init": "crop", **options}


def model_for(options: dict[str, Any]) -> Model:
    """A supernet, or the plain network that the strategy needs."""
    if not STRATEGIES[options.get("strategy", "edo")].needs_plain:
        return Model()
    torch.manual_seed(1)
    return Model(ic_resnet18(width=4, out_indices=(0, 1, 2, 3)))


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=False)["state_dict"]


def main(folder: Path, strategy: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
    runner = train(
        folder,
        [search(strategy=strategy, at=(1, 2) if strategy == "edo" else 2), {"type": "EMAHook"}],
        3,
        model=model_for({"strategy": strategy}),
        launcher="pytorch",
        cfg={"model_wrapper_cfg": wrapper},
    )
    torch.save(runner.model.module.state_dict(), folder / f"rank{runner.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
