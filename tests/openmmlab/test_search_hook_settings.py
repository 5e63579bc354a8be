# SPDX-License-Identifier: Apache-2.0
"""The search within a training of other settings: stopped early, mixed precision, accumulated gradients."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.optim.optimizer import amp_optimizer_wrapper
from torch import Tensor

from ic_conv import DilationPattern, ICConv2d
from ic_conv.pattern import PLAIN
from search.supernet import super_layers
from tests.openmmlab.small_training import (
    ADAM,
    GRADIENT,
    SGD,
    Call,
    Images,
    Model,
    model_for,
    search,
    train,
    weights,
)

BY_ITERATION = {"by_epoch": False, "max_iters": 6, "val_interval": 2}

IN_ORDER = {"type": "DefaultSampler", "shuffle": False}


class Score(BaseMetric):
    """Never gets better, and notes which network it was that it looked at."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.found = model, list[bool]()

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        self.found.append(any(isinstance(module, ICConv2d) for module in self.model.modules()))
        return {"score": 0.0}


def stopped(folder: Path, hook: dict[str, Any], **options: Any) -> tuple[Any, list[bool]]:
    """A training whose second validation ends it; whether each validation saw a found network."""
    model = model_for(hook)
    early = {"type": "EarlyStoppingHook", "monitor": "score", "rule": "greater", "patience": 1}
    data = {"batch_size": 4, "num_workers": 0, "dataset": Images(), "sampler": IN_ORDER}
    score = Score(model)
    runner = train(
        folder, [hook, early, {"type": "EMAHook", "momentum": 0.3}], 5, model=model,
        val_dataloader=data, val_cfg={}, val_evaluator=[score], **options,
    )  # fmt: skip
    return runner, score.found


@pytest.mark.parametrize(
    ("at", "train_cfg", "when"),
    [
        (None, None, {"epochs": 2}),
        ((1, 4), None, {"epochs": 2}),
        (None, BY_ITERATION, {"iterations": 4}),
    ],
)
def test_a_supernet_is_searched_where_the_training_stops_early(
    at: Any, train_cfg: dict[str, Any] | None, when: dict[str, int], tmp_path: Path
) -> None:
    runner, found = stopped(tmp_path, search(at=at), train_cfg=train_cfg)
    assert DilationPattern.load(tmp_path / "pattern.json").meta["training"] == when
    assert found == [False, False, True]  # what was found is validated
    last = Path((tmp_path / "last_checkpoint").read_text())
    assert last.name == ("epoch_2.pth" if train_cfg is None else "iter_4.pth")
    kept = torch.load(last, weights_only=False)
    name = "backbone.layer1.0.conv1.weight"
    assert kept["state_dict"].keys() == runner.model.state_dict().keys()
    assert torch.equal(kept["ema_state_dict"][f"module.{name}"], runner.model.get_parameter(name))
    resumed = train(tmp_path, [search(at=at)], 5, model=Model(), resume=True, train_cfg=train_cfg)
    unit, done = next(iter(when.items()))
    assert (resumed.epoch, resumed.iter)[unit != "epochs"] > done
    assert not torch.equal(resumed.model.get_parameter(name), runner.model.get_parameter(name))


def test_a_plain_network_that_stops_early_stays_plain_and_says_so(tmp_path: Path) -> None:
    runner, found = stopped(tmp_path, search(at=4, **GRADIENT), log_level="WARNING")
    assert found == [False, False] and not (tmp_path / "pattern.json").exists()
    log = Path(runner._log_dir).joinpath(f"{runner.timestamp}.log").read_text()
    assert "stopped after 2 epochs, the last search was due after 4; the network stays plain" in log


@pytest.mark.parametrize(
    ("hook", "moved"),
    [
        ({"strategy": "gradient", "options": {"shares": (0.25,)}}, 1),
        ({"strategy": "gradient", "options": {"shares": (0.0,), "validation_steps": 0}}, 0),
        ({"strategy": "uniform", "options": {"dilation": (1, 2)}}, 4),
        ({"strategy": "histogram", "options": {"steps": 4, "study": {"trials": 1, "sampler": "tpe"}}}, None),
        ({"strategy": "single-path", "options": {"steps": 1, "trials": 1}}, None),
        ({"strategy": "darts", "options": {"steps": 1}}, None),
    ],
    ids=lambda value: value["strategy"] if isinstance(value, dict) else "",
)
def test_a_strategy_has_options_of_its_own(hook: dict[str, Any], moved: int | None, tmp_path: Path) -> None:
    settings = search(at=1, **hook) | {"calibration_batches": 4}
    train(tmp_path, [settings], 1, model=model_for(hook), images=16)
    pattern = DilationPattern.load(tmp_path / "pattern.json")
    first = [dilation for dilation, count in pattern.layers[0].branches for _ in range(count)]
    assert moved is None or sum(dilation != PLAIN for dilation in first) == moved
    written = copy.deepcopy(hook["options"])
    assert pattern.meta["options"] == {
        name: list(value) if isinstance(value, tuple) else value for name, value in written.items()
    }


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"options": {"share": 1}}, "gradient has the options shares, .*got {'share': 1}: .*'share'"),
        ({"options": {"shares": 0.25}}, "got {'shares': 0.25}: 'float' object is not iterable"),
        ({"options": {"shares": (2,)}}, r"shares of moved units must lie between 0 and 1, got \[2\]"),
        ({"options": {"steps": {"trials": 1}}}, "got {'steps': {'trials': 1}}: "),
        ({"strategy": "random", "options": {"seed": 1}}, "random has no options, got {'seed': 1}"),
        ({"strategy": "edo", "options": {"limits": {"size": 1}}}, "edo has the options limits, got .*'size'"),
        ({"strategy": "edo", "options": {"criterion": "taps"}}, "has the options limits, got .*criterion"),
        *(
            ({"strategy": name, "options": options}, f"{name} holds a quarter of its batches .* 4, got 2")
            for name, options in (
                ("histogram", {}),
                ("single-path", {}),
                ("gradient", {"validation_steps": 1}),
            )
        ),
    ],
)
def test_what_a_strategy_cannot_do_is_said_before_the_first_step(
    hook: dict[str, Any], message: str, tmp_path: Path
) -> None:
    steps: list[Any] = []
    hook = GRADIENT | {"at": 1} | hook
    with pytest.raises(ValueError, match=message):
        train(tmp_path, [search(**hook), Call("VERY_HIGH", steps.append)], model=model_for(hook))
    assert not steps


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
@pytest.mark.parametrize("hook", [{"at": (1, 2)}, {"at": 2, "init": "refit"}, {"at": 1, **GRADIENT}])
def test_mixed_precision_is_for_the_training_alone(
    hook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)  # autocast runs without
    model, seen, switched = model_for(hook), set[Any](), dict[str, Tensor]()

    def look(module: Any, inputs: Any, output: Tensor) -> None:
        seen.add((module.training, output.dtype))

    model.backbone.conv1.register_forward_hook(look)
    copied = Call("BELOW_NORMAL", lambda runner: switched.update(copy.deepcopy(runner.model.state_dict())))
    bf16 = {"type": "AmpOptimWrapper", "dtype": "bfloat16"}
    train(tmp_path, [search(**hook), copied], 3, model=model, wrapper=bf16)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    pattern = DilationPattern.load(tmp_path / "pattern.json")
    assert any(layer.branches[0][0] != PLAIN or len(layer.branches) > 1 for layer in pattern.layers)
    state = weights(tmp_path / "epoch_3.pth")
    assert all(value.isfinite().all() for value in state.values())
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("hook", [{"at": (1, 3)}, {"at": 3, **GRADIENT}], ids=["edo", "gradient"])
def test_a_search_while_gradients_accumulate(
    hook: dict[str, Any], optimizer: dict[str, Any], tmp_path: Path
) -> None:
    """Steps are after the iterations 2, 4 and 6: at each search gradients wait for one."""
    seen: list[Any] = []

    class EachIteration(Hook):
        priority = "BELOW_NORMAL"

        def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
            look(runner)

    def look(runner: Any) -> None:
        names = {parameter: name for name, parameter in runner.model.named_parameters()}
        groups = runner.optim_wrapper.optimizer.param_groups
        named = [{**group, "params": [names[each] for each in group["params"]]} for group in groups]
        seen.append((named, copy.deepcopy(runner.model)))

    train(
        tmp_path, [search(**hook), EachIteration()], model=model_for(hook),
        optimizer=optimizer, train_cfg=BY_ITERATION, wrapper={"accumulative_counts": 2},
    )  # fmt: skip
    groups, models = zip(*seen, strict=True)
    assert all(named == groups[0] for named in groups)
    kernels = [model.backbone.layer1[0].conv1.weight for model in models]
    moved = [not torch.equal(one, two) for one, two in pairwise(kernels) if one.shape == two.shape]
    assert moved == ([True, True, False, True] if len(moved) == 4 else [True, True, True, False, True])
    if hook["at"] != 3:
        zeros = [
            {name: next(layer.parameters()) == 0 for name, layer in super_layers(model.backbone).items()}
            for model in models[:2]
        ]
        assert len(zeros[0]) == 16 and zeros[0]["layer1.0.conv1"].float().mean() > 0.5
        assert all(torch.equal(zero, zeros[1][name]) for name, zero in zeros[0].items())
