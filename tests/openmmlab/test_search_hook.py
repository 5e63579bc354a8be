# SPDX-License-Identifier: Apache-2.0
"""The search within a training: real Runners on a small network, also killed and resumed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from ic_conv import DilationPattern, ICConv2d, apply_pattern, ic_resnet18
from ic_conv.openmmlab._runner_parts import averages_of
from search import DilationSpace, SearchTask
from search.refit import estimate_batch_norms, warm_start
from search.strategies import GradientStrategy, PlainTask
from search.supernet import SuperConv2d, super_layers
from tests.openmmlab import small_training
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


@pytest.mark.parametrize("init", ["crop", "refit"])
def test_the_training_ends_with_the_found_network(init: str, tmp_path: Path) -> None:
    seen: list[Any] = []
    spy = Call("VERY_HIGH", lambda runner: seen.append(copy.deepcopy(runner.model)))
    runner = train(tmp_path, [search(init=init), spy])
    pattern = DilationPattern.load(tmp_path / "pattern.json")
    assert len(pattern.layers) == 16 and pattern.kernel == 9 and pattern.layers[0].assignment
    assert pattern.meta["criterion"] == "energy" and pattern.meta["training"] == {"epochs": 2}
    assert isinstance(seen[-1].backbone.layer1[0].conv1, SuperConv2d)
    order = RandomSampler(range(8), generator=torch.Generator().manual_seed(0))
    images = (torch.stack([Images()[index]["inputs"] for index in order]) - 127.0) / 60.0
    expected = warm_start(seen[-1].backbone, pattern, lambda: images.split(4), init=init)  # type: ignore[arg-type]
    found = runner.model.backbone
    assert not super_layers(found) and sum(isinstance(m, ICConv2d) for m in found.modules()) == 16
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value)
    saved = {key.removeprefix("backbone."): value for key, value in weights(tmp_path / "epoch_2.pth").items()}
    fresh = ic_resnet18(tmp_path / "pattern.json", width=4, out_indices=(0, 1, 2, 3))
    fresh.load_state_dict({key: value for key, value in saved.items() if not key.startswith("head.")})
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(images)[-1], found.eval()(images)[-1])


def test_a_plain_network_moves_half_of_its_channels(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(runner: Any) -> None:
        seen.append(copy.deepcopy([runner.model, averages_of(runner)[0].module]))

    model = model_for(GRADIENT)
    model.backbone.layer1.requires_grad_(False)
    hooks = [search(**GRADIENT, at=1, kernel_size=5), {"type": "EMAHook", "momentum": 0.3}]
    spies = [Call(priority, look) for priority in ("VERY_HIGH", "BELOW_NORMAL")]
    train(tmp_path, [*hooks, *spies], model=model)
    pattern = DilationPattern.load(tmp_path / "pattern.json")
    assert pattern.kernel == 5 and pattern.meta["training"] == {"epochs": 1} and "init" not in pattern.meta
    before, switched, _, last = seen

    order = RandomSampler(range(8), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(list(order))
    images = (torch.stack([Images()[int(index)]["inputs"] for index in labels]) - 127.0) / 60.0
    plain = PlainTask(
        before[0],
        before[0].backbone,
        lambda: zip(images.split(4), labels.split(4), strict=True),
        lambda model, batch: model(*batch)["loss"],
    )
    wanted = GradientStrategy().search(SearchTask.of_plain(plain, DilationSpace(5)))
    for found, layer in zip(pattern.layers, wanted.layers, strict=True):
        moved = sum(dilation != (1, 1) for dilation in found.assignment or ())
        if str(found.name).startswith("layer1."):  # frozen
            assert moved == 0
        else:
            assert found == layer and moved == layer.units // 2
    for one, two in zip(before, switched, strict=True):  # the trained network and the average
        expected = apply_pattern(one.backbone, pattern)
        estimate_batch_norms(expected, images.split(4))
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(two.backbone.state_dict()[name], value)
    name = "layer2.0.conv1.weight"
    assert not torch.equal(last[0].backbone.get_parameter(name), switched[0].backbone.get_parameter(name))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(ADAM, {}), (SGD, {}), (ADAM, GRADIENT)],
    ids=["adam", "sgd", "adam-plain"],
)
def test_the_optimizers_state_goes_along_element_by_element(
    optimizer: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """Each element of the state is made a function of its weight: so it must still be after the switch."""
    groups: list[Any] = []

    def plant(runner: Any) -> None:
        if runner.epoch == 0:
            inner = runner.optim_wrapper.optimizer
            for parameter, state in inner.state.items():
                for factor, key in enumerate(sorted(set(state) - {"step"}), 2):
                    state[key] = factor * parameter.detach().clone() + 1
            groups.append(described(runner))

    def described(runner: Any) -> Any:
        names = {parameter: name for name, parameter in runner.model.named_parameters()}
        inner = runner.optim_wrapper.optimizer
        settings = ({**group, "params": [names[p] for p in group["params"]]} for group in inner.param_groups)
        return list(settings)

    def check(runner: Any) -> None:
        if runner.epoch == 0:
            inner = runner.optim_wrapper.optimizer
            assert len(inner.state) == len(list(runner.model.parameters()))
            for parameter in runner.model.parameters():
                state = inner.state[parameter]
                keys = sorted(set(state) - {"step"})
                assert keys and (optimizer is SGD or state["step"] == 2)
                for factor, key in enumerate(keys, 2):
                    assert torch.equal(state[key], factor * parameter.detach() + 1)
            assert isinstance(runner.model.backbone.layer1[0].conv1, ICConv2d)
            groups.append(described(runner))
            groups.append(copy.deepcopy(runner.model.state_dict()))

    hooks = [search(at=1, **options), Call("VERY_HIGH", plant), Call("BELOW_NORMAL", check)]
    runner = train(tmp_path, hooks, optimizer=optimizer, model=model_for(options))
    before, after, then = groups
    assert before == after and {group["weight_decay"] for group in before} == {0.0, 0.1}
    now = runner.model.state_dict()
    moved = [name for name in now if "conv1.weight" in name and not torch.equal(now[name], then[name])]
    assert len(moved) == 9  # with the stem's: the training goes on
    assert {group["lr"] for group in runner.optim_wrapper.optimizer.param_groups} == {5e-3}


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
def test_kernels_shrink_to_the_kept_candidates(optimizer: dict[str, Any], tmp_path: Path) -> None:
    zeros: list[dict[str, Tensor]] = []

    def look(runner: Any) -> None:
        layers = super_layers(runner.model.backbone)
        zeros.append({name: next(layer.parameters()).detach() == 0 for name, layer in layers.items()})

    train(tmp_path, [search(at=(1, 3)), Call("BELOW_NORMAL", look)], 3, optimizer=optimizer)
    first, second, last = zeros
    assert last == {} and len(first) == 16
    masks = DilationPattern.load(tmp_path / "pattern.json").layers
    for layer in masks:
        assert layer.name and torch.equal(first[layer.name], second[layer.name])
        zero = first[layer.name].flatten(2)
        assert torch.equal(zero, zero[:, :1].expand_as(zero))  # alike for all inputs
        # 4 of 16 dilations share the centre, and have 8 taps more each at most
        assert all(9 <= taps <= 33 for taps in (~zero[:, 0]).sum(1).tolist())
        for unit, (dy, dx) in enumerate(layer.assignment or ()):
            taps = (~first[layer.name])[unit, 0]
            rows, columns = (torch.tensor([4 - d, 4, 4 + d]) for d in (dy, dx))
            assert taps[rows[:, None], columns].all()  # the one that was found is among them


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        *(({"at": (1, 3)}, broken) for broken in (1, 2, 3)),
        *(({"at": 3, **GRADIENT}, broken) for broken in (2, 3)),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    options: dict[str, Any], broken: int, tmp_path: Path
) -> None:
    """A supernet's kernels shrink after epoch 1, the switch is after epoch 3, the average goes along."""

    class Killed(Exception):
        pass

    def kill(runner: Any) -> None:
        if runner.epoch + 1 == broken:
            raise Killed

    average = {"type": "EMAHook", "momentum": 0.3, "update_buffers": True}
    hooks = [search(**options), average]
    whole = train(tmp_path / "whole", hooks, 4, model=model_for(options))
    with pytest.raises(Killed):
        train(tmp_path / "broken", [*hooks, Call("LOWEST", kill)], 4, model=model_for(options))
    resumed = train(tmp_path / "broken", hooks, 4, resume=True, model=model_for(options))
    for one, two in (
        (whole.model.state_dict(), resumed.model.state_dict()),
        (weights(tmp_path / "whole/epoch_4.pth"), weights(tmp_path / "broken/epoch_4.pth")),  # the average
    ):
        assert one.keys() == two.keys() and any(name.endswith("branches") for name in one)
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    of_switch, later = (weights(tmp_path / f"whole/epoch_{n}.pth") for n in (3, 4))
    name = "backbone.layer1.0.conv1.weight"
    distance = [
        (whole.model.state_dict()[name] - average[name]).abs().sum() for average in (of_switch, later)
    ]
    assert 0 < distance[1] < distance[0]  # the average follows
    for name in ("pattern.json", "pattern.meta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    states = [runner.optim_wrapper.optimizer.state_dict()["state"] for runner in (whole, resumed)]
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


@pytest.mark.parametrize(("at", "epochs", "due"), [(1, 3, 1), (None, 2, 2)])
def test_a_search_that_was_missed_is_told(at: int | None, epochs: int, due: int, tmp_path: Path) -> None:
    train(tmp_path, [], 2)
    runner = train(tmp_path, [search(at=at)], epochs, resume=True, log_level="WARNING")
    assert (
        f"the last search was due after {due} epochs, 2 are done"
        in Path(runner._log_dir).joinpath(f"{runner.timestamp}.log").read_text()
    )
    assert super_layers(runner.model.backbone) and not (tmp_path / "pattern.json").exists()


def test_in_a_training_that_counts_iterations(tmp_path: Path) -> None:
    train_cfg = {"by_epoch": False, "max_iters": 4, "val_interval": 100}
    runner = train(tmp_path, [search(at=3, strategy="random", seed=1)], train_cfg=train_cfg)
    assert not super_layers(runner.model.backbone)
    meta = DilationPattern.load(tmp_path / "pattern.json").meta
    assert meta["training"] == {"iterations": 3} and meta["strategy"] == "random"
    names = [set(weights(tmp_path / f"iter_{n}.pth")) for n in (2, 3)]
    assert "backbone.layer1.0.conv1.branches" in names[1] - names[0]


def test_the_search_leaves_the_trainings_random_numbers_alone(tmp_path: Path) -> None:
    drawn = []
    for at in (1, 2):
        train(tmp_path / str(at), [search(at=at, seed=5), Call("LOW", lambda _: drawn.append(torch.rand(1)))])
    assert drawn[0] == drawn[2]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["edo", "gradient"])
def test_two_processes_go_on_with_one_network(strategy: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += [small_training.__file__, str(tmp_path), strategy]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(name.endswith("branches") for name in one)
    trained = [name for name in one if "running" not in name]
    assert [name for name in trained if not torch.equal(one[name], two[name])] == []
    assert json.loads((tmp_path / "pattern.meta.json").read_text())["kernel"] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 3}, "at must lie within the training's 2 epochs, got 3"),
        ({"at": 0}, r"at must name epochs or iterations from 1 on, ascending; got \[0\]"),
        ({"at": [2, 1]}, r"ascending; got \[2, 1\]"),
        ({"at": []}, r"ascending; got \[\]"),
        ({"criterion": "best"}, "unknown criterion 'best'; known ones: energy, expectation"),
        ({"strategy": "best"}, "strategy must be one of edo, .*; got 'best'"),
        (GRADIENT, "the strategy gradient searches once: at must name when, got None"),
        (GRADIENT | {"at": [1, 2]}, r"searches once: at must name when, got \[1, 2\]"),
        (GRADIENT | {"at": 1}, "must be a plain network .* for the strategy gradient, got ResNet"),
        (GRADIENT | {"at": 1, "kernel_size": 3}, "must be larger than the base kernel, got kernel 3"),
        ({"kernel_size": 13}, "a supernet has its own kernel_size, got 13 for the strategy edo"),
        ({"strategy": "hand", "at": [1, 2]}, "as the strategy edo does; got hand"),
        ({"init": "scratch"}, "init must be one of crop, refit; got 'scratch'"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, [search(**options)])


def test_a_network_without_grown_layers_is_refused(tmp_path: Path) -> None:
    plain = Model(ic_resnet18(width=4, out_indices=(0, 1, 2, 3)))
    with pytest.raises(ValueError, match=r"model\.backbone must be a supernet \(type='SuperResNet'\), got"):
        train(tmp_path, [search()], model=plain)


def test_what_the_strategy_cannot_search_is_refused(tmp_path: Path) -> None:
    model = model_for(GRADIENT)
    model.backbone.layer1[0].with_cp = True  # as in MMDetection's blocks
    with pytest.raises(ValueError, match=r"layer1\.0: the strategy gradient needs with_cp=False, got True"):
        train(tmp_path, [search(at=1, **GRADIENT)], model=model)


def test_a_network_that_has_a_pattern_is_refused(tmp_path: Path) -> None:
    train(tmp_path, [search(at=1, **GRADIENT)], 1, model=(model := model_for(GRADIENT)))
    with pytest.raises(ValueError, match=r"must be a plain network .*, got ResNet with a pattern"):
        train(tmp_path, [search(at=1, **GRADIENT)], model=model)
