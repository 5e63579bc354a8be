# SPDX-License-Identifier: Apache-2.0
"""RedNet and CedNet: structure, published checkpoints, patterns, features."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ic_conv.convert import searchable_layers, units_of
from ic_conv.layers.cvolution2d import CVolution2d
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.layers.involution2d import Involution2d
from ic_conv.models._rednet_keys import from_published, to_published
from ic_conv.models.cednet import cednet50
from ic_conv.models.rednet import RedNet, rednet, rednet26
from ic_conv.pattern import DilationPattern, LayerPattern

SLIM: dict[str, Any] = {"width": 8, "group_channels": 4, "kernel_size": 3}


def published_keys(stage_blocks: tuple[int, ...]) -> Iterator[str]:
    """The keys of a published classifier, written down from the published network's structure."""

    def bn(name: str) -> Iterator[str]:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            yield f"{name}.{part}"

    def involution(name: str) -> Iterator[str]:
        yield f"{name}.conv1.conv.weight"
        yield from bn(f"{name}.conv1.bn")
        yield from (f"{name}.conv2.conv.weight", f"{name}.conv2.conv.bias")

    yield "backbone.stem.0.conv.weight"
    yield from bn("backbone.stem.0.bn")
    yield from involution("backbone.stem.1")
    yield from bn("backbone.stem.2")
    yield "backbone.stem.4.conv.weight"
    yield from bn("backbone.stem.4.bn")
    for stage, blocks in enumerate(stage_blocks, 1):
        for index in range(blocks):
            block = f"backbone.layer{stage}.{index}"
            yield f"{block}.conv1.weight"
            yield from bn(f"{block}.bn1")
            yield from involution(f"{block}.conv2")
            yield from bn(f"{block}.bn2")
            yield f"{block}.conv3.weight"
            yield from bn(f"{block}.bn3")
            if index == 0:
                yield f"{block}.downsample.0.weight"
                yield from bn(f"{block}.downsample.1")
    yield from ("head.fc.weight", "head.fc.bias")


def randomised(net: RedNet) -> RedNet:
    """The network in evaluation mode, with statistics of noise and without blocks that are the identity."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 40, 40))
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


@pytest.fixture(scope="module")
def slim() -> RedNet:
    torch.manual_seed(0)
    return randomised(rednet26(num_classes=5, **SLIM))


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 40, 33, generator=torch.Generator().manual_seed(1))


def test_keys_are_the_published_ones() -> None:
    with torch.device("meta"):
        keys = list(to_published(rednet("rednet26").state_dict()))
    assert keys == list(published_keys((1, 2, 4, 1)))


@pytest.mark.parametrize("others", [(), ("neck.fpn.weight", "rpn_head.conv1.weight", "roi_head.fc.weight")])
def test_published_weights_load(slim: RedNet, image: Tensor, tmp_path: Path, others: tuple[str, ...]) -> None:
    published = to_published(slim.state_dict()) | {key: torch.zeros(1) for key in others}
    torch.save({"meta": {"epoch": 130}, "state_dict": published}, tmp_path / "red.pth")
    net = rednet26(weights=tmp_path / "red.pth", **SLIM).eval()
    assert torch.equal(net(image), slim(image))


def test_key_map_goes_both_ways(slim: RedNet) -> None:
    state = slim.state_dict()
    back = from_published(to_published(state))
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)
    assert list(from_published(state)) == list(state)


@pytest.mark.parametrize(
    ("saved", "built", "option"),
    [
        ({"stem_kernel_size": 3}, {}, "stem.1 has a window of 3x3, .* stem_kernel_size=3"),
        ({"stem_kernel_size": 7}, {"kernel_size": 5}, "stem.1 has a window of 7x7, .* stem_kernel_size=7"),
        ({}, {"stem_kernel_size": 7, "kernel_size": 3}, "layer1.0.conv2 has .* 7x7, .* kernel_size=7"),
    ],
)
def test_another_window_is_one_clear_error(saved: dict[str, Any], built: dict[str, Any], option: str) -> None:
    small: dict[str, Any] = {"width": 16, "group_channels": 4}
    weights = rednet26(**small, **saved).state_dict()
    with pytest.raises(ValueError, match=option):
        rednet26(weights=weights, **small, **built)


def test_other_weights_are_refused(slim: RedNet) -> None:
    with pytest.raises(ValueError, match=r"the weights: weights of another network: missing layer1\.1"):
        rednet("rednet38", weights=slim.state_dict(), **SLIM)


def test_classifier_follows_the_weights_unless_told(slim: RedNet) -> None:
    state = slim.state_dict()
    assert rednet26(weights=state, **SLIM).fc.out_features == 5
    assert rednet26(weights=state, num_classes=7, **SLIM).fc.out_features == 7
    assert not hasattr(rednet26(weights=state, out_indices=(3,), **SLIM), "fc")


def test_features(slim: RedNet, image: Tensor) -> None:
    net = rednet26(weights=slim.state_dict(), out_indices=(0, 2, 3), **SLIM).eval()
    features = net(image)
    assert [tuple(f.shape) for f in features] == [(2, 32, 10, 9), (2, 128, 3, 3), (2, 256, 2, 2)]
    assert net.out_channels == (32, 64, 128, 256)
    torch.testing.assert_close(slim.fc(features[-1].mean((2, 3))), slim(image))


def test_computes_in_channels_last_on_a_cpu(slim: RedNet, image: Tensor) -> None:
    """There contiguous images take a quarter longer."""
    net = rednet26(weights=slim.state_dict(), out_indices=(0, 1), **SLIM).eval()
    last = image.contiguous(memory_format=torch.channels_last)
    for feature, same in zip(net(image), net(last), strict=True):
        assert feature.is_contiguous(memory_format=torch.channels_last) and torch.equal(feature, same)


def test_small_images_need_no_pooling() -> None:
    net = rednet26(stem_pool=False, out_indices=(0,), **SLIM).eval()
    assert net(torch.zeros(1, 3, 16, 16))[0].shape == (1, 32, 8, 8)


def involutions(net: RedNet) -> dict[str, Involution2d]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Involution2d)}


def pattern_for(net: RedNet, base_kernel: int = 3) -> DilationPattern:
    """One without names that gives the last unit of each searchable layer dilation (1, 2)."""
    units = (units_of(layer) for layer in searchable_layers(net, base_kernel).values())
    layers = (LayerPattern.from_counts({(1, 1): n - 1, (1, 2): 1}) for n in units)
    return DilationPattern(tuple(layers), kernel=9)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"kernel_size": 7}, ["stem.1", "layer1.0.conv2", "layer2.0.conv2"]),
        ({"kernel_size": 5, "stem_kernel_size": 3}, ["layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv2"]),
        ({"kernel_size": 3}, ["stem.0.conv", "stem.1", "stem.4.conv"]),
    ],
)
def test_pattern_binds_as_the_search_finds_layers(
    options: dict[str, Any], first: list[str], tmp_path: Path
) -> None:
    options = SLIM | options
    plain = rednet26(**options)
    pattern_for(plain, options["kernel_size"]).save(tmp_path / "red.json")
    (tmp_path / "red.meta.json").unlink(missing_ok=True)  # the published format: a list of counts
    net = rednet26(tmp_path / "red.json", **options)
    dilated = [
        name
        for name, module in net.named_modules()
        if getattr(module, "group_dilations", None) is not None or isinstance(module, ICConv2d)
    ]
    assert dilated[:3] == first
    assert len(dilated) == len(searchable_layers(plain, options["kernel_size"]))
    assert all(module.group_dilations is None for module in involutions(plain).values())


def test_named_pattern_must_be_this_networks(slim: RedNet) -> None:
    layers = tuple(LayerPattern.plain(module.groups, name) for name, module in involutions(slim).items())
    with pytest.raises(ValueError, match=r"layer stem\.0\.conv is not in the pattern"):
        rednet26(pattern=DilationPattern(layers, kernel=9), **SLIM)


def test_cednet_pattern() -> None:
    options: dict[str, Any] = {"width": 16, "group_channels": 4, "channel_reduction": 2}
    layers = tuple(
        LayerPattern.from_assignment([(2, 1)] + [(1, 1)] * (module.groups - 1), name)
        for name, module in involutions(cednet50(**options)).items()
        if not name.startswith("stem.")
    )
    net = cednet50(pattern=DilationPattern(layers, kernel=17, base_kernel=9), **options)
    assert isinstance(net.layer1[0].conv2, CVolution2d)
    assert involutions(net)["layer1.0.conv2.spatial"].dilations == ((2, 1), (1, 1), (1, 1), (1, 1))
    assert involutions(net)["stem.1.spatial"].kernel_size == (7, 7)


def test_own_weights_bring_their_pattern(slim: RedNet, image: Tensor) -> None:
    dilated = rednet26(pattern=pattern_for(slim), weights=slim.state_dict(), **SLIM).eval()
    loaded = rednet26(weights=dilated.state_dict(), **SLIM).eval()
    assert torch.equal(loaded(image), dilated(image))
    assert not torch.allclose(loaded(image), slim(image))


def test_group_channels_none_is_one_kernel_per_layer() -> None:
    net = rednet26(width=16, group_channels=None)
    assert {module.groups for module in involutions(net).values()} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (4,)}, r"out_indices must be stages from 0 to 3; got \(4,\)"),
        ({"out_indices": ()}, r"out_indices must be stages from 0 to 3; got \(\)"),
        ({"pattern_path": "a.json", "pattern": object()}, "exclude each other; got both, the path a.json"),
        (
            {"pattern": DilationPattern((LayerPattern.plain(2),), 9)},
            "1 layers, the network 9 searchable ones",
        ),
        ({"group_channels": 64}, "group_channels must divide channels; got 64 and 32"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rednet26(**options)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"the RedNets are rednet26, .*; got 'rednet18'"):
        rednet("rednet18")


def test_copies_and_pickles(slim: RedNet, image: Tensor) -> None:
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(twin(image), slim(image))


@pytest.mark.parametrize(
    "options", [{}, {"operator": CVolution2d, "channel_reduction": 2}, {"kernel_generation": "linear"}]
)
def test_a_step_of_training_changes_every_parameter(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = randomised(RedNet((1, 2, 1, 1), num_classes=3, **SLIM, **options)).train()
    before = copy.deepcopy(dict(net.named_parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(net(torch.randn(4, 3, 32, 32)).float(), torch.arange(4) % 3)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert [name for name, value in net.named_parameters() if torch.equal(value, before[name])] == []


def test_a_new_network_starts_as_published() -> None:
    torch.manual_seed(0)
    net = rednet26(**SLIM)
    assert not net.get_parameter("layer2.1.bn3.weight").any()
    weight = net.get_parameter("layer4.0.conv3.weight")
    assert weight.std().item() == pytest.approx((2 / len(weight)) ** 0.5, rel=0.02)
