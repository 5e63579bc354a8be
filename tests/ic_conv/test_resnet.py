# SPDX-License-Identifier: Apache-2.0
"""IC-ResNets: torchvision's networks without a pattern, published patterns, and every layout of weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet

from ic_conv import models
from ic_conv.convert import apply_pattern, searchable_layers
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.models.resnet import ARCHITECTURES, BasicBlock, Bottleneck, ResNet, ic_resnet
from ic_conv.pattern import DilationPattern, LayerPattern


def image(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def spread(net: nn.Module, assigned: bool = False) -> DilationPattern:
    """A pattern with several branches in each layer; `assigned` mixes its channels."""
    layers = []
    for name, conv in searchable_layers(net).items():
        units = conv.out_channels if conv.groups == 1 else conv.groups
        dilations = [((1, 1), (2, 3), (4, 1), (1, 2))[index % 4] for index in range(units)]
        layers.append(LayerPattern.from_assignment(dilations if assigned else sorted(dilations), name))
    return DilationPattern(tuple(layers), kernel=9)


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in the published layout: each branch a convolution of its own."""
    result = {}
    for key, value in state.items():
        branches = state.get(key.replace(".weight", ".branches")) if key.endswith(".weight") else None
        if branches is None or key.endswith(".branches"):
            if not key.endswith((".branches", "_order")):
                result[key] = value
            continue
        size = len(value) // int(branches[:, 2].sum())
        parts = value.split([count * size for count in branches[:, 2].tolist()])
        for index, part in enumerate(parts):
            result[key.replace(".weight", f".conv_list.{index}.weight")] = part
    return result


def torchvisions(name: str) -> nn.Module:
    if name == "ic_resnext101_32x4d":
        return resnet.ResNet(resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    return getattr(resnet, name.removeprefix("ic_"))()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_network_has_torchvisions_layers_and_cost(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), torchvisions(name)
        x = torch.empty(1, 3, 224, 224)
    shapes = [[(key, value.shape) for key, value in net.state_dict().items()] for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    flops = []
    for net in (ours, theirs, apply_pattern(ours, spread(ours))):
        with FlopCounterMode(display=False) as counter:
            net(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == flops[2] > 0


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (BasicBlock, resnet.BasicBlock, {}),
        (Bottleneck, resnet.Bottleneck, {}),
        (Bottleneck, resnet.Bottleneck, {"groups": 32, "width_per_group": 4}),
    ],
    ids=["basic", "bottleneck", "resnext"],
)
def test_plain_network_gives_torchvisions_results(ours: Any, theirs: Any, options: dict[str, int]) -> None:
    reference = resnet.ResNet(theirs, [1, 2, 1, 1], 7, **options).eval()
    net = ResNet(ours, (1, 2, 1, 1), 7, **options).eval()
    net.load_state_dict(reference.state_dict())
    torch.testing.assert_close(net(image(33)), reference(image(33)))


@pytest.mark.parametrize(
    ("name", "file", "convolutions"),
    [
        ("ic_resnet50", "detection_ic_resnet50_k9.json", 16),
        ("ic_resnet50", "human_pose_ic_resnet50_k13.json", 16),
        ("ic_resnet101", "detection_ic_resnet101_k9.json", 33),
    ],
)
def test_published_patterns(shared_data: Path, name: str, file: str, convolutions: int) -> None:
    path = str(shared_data / "official_patterns" / file)
    with torch.device("meta"):
        nets = [getattr(models, name)(pattern_path=path) for _ in range(2)]
        plain = getattr(models, name)()
    expected = DilationPattern.load(path)
    for net in nets:
        layers = [m for m in net.modules() if isinstance(m, ICConv2d)]
        assert len(layers) == convolutions
        assert [m.pattern.branches for m in layers] == [layer.branches for layer in expected.layers]
    assert sum(p.numel() for p in nets[1].parameters()) == sum(p.numel() for p in plain.parameters())


def slim(**options: Any) -> ResNet:
    return ic_resnet("ic_resnet18", width=8, **options)


def test_two_networks_are_independent() -> None:
    pattern = spread(slim())
    first, second = slim(pattern=pattern), slim(pattern=pattern)
    before = second.eval()(image())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    torch.testing.assert_close(second(image()), before)


def test_wrong_pattern_names_file_and_counts(shared_data: Path) -> None:
    path = shared_data / "official_patterns" / "detection_ic_resnet101_k9.json"
    with pytest.raises(ValueError, match=r"detection_ic_resnet101_k9.json.*33.*16"):
        models.ic_resnet50(path)


def test_features() -> None:
    torch.manual_seed(0)
    whole = ResNet(Bottleneck, (1, 1, 1, 1), 7, width=8)
    part = ResNet(Bottleneck, (1, 1, 1, 1), width=8, out_indices=(0, 3))
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")})
    features = part(image())
    assert [tuple(f.shape) for f in features] == [(2, 32, 16, 16), (2, 256, 2, 2)]
    assert [f.shape[1] for f in features] == [part.out_channels[0], part.out_channels[3]]
    torch.testing.assert_close(whole.fc(features[1].mean((2, 3))), whole(image()))


def test_stem_without_pooling_doubles_the_resolution() -> None:
    net = ResNet(BasicBlock, (1, 1, 1, 1), width=8, stem_pool=False, out_indices=(0,))
    assert net(image())[0].shape == (2, 8, 32, 32)


def trained(**options: Any) -> ResNet:
    """A slim network in evaluation mode whose norms differ from channel to channel."""
    torch.manual_seed(0)
    net = slim(num_classes=7, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.3)
    return net.eval()


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_plain_weights_are_unwrapped(tmp_path: Path, wrap: Any, prefix: str) -> None:
    net = trained()
    file = tmp_path / "weights.pth"
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save(wrap(state | ({"head.weight": torch.zeros(2)} if prefix else {})), file)
    torch.testing.assert_close(slim(weights=file).eval()(image()), net(image()))


def test_plain_weights_go_where_their_channels_go() -> None:
    """Weights that are the same at every dilation show whether channels kept their meaning."""
    net = trained()
    with torch.no_grad():
        for conv in searchable_layers(net).values():
            conv.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    pattern = spread(net, assigned=True)
    converted = slim(pattern=pattern, weights=net.state_dict()).eval()
    torch.testing.assert_close(converted(image()), net(image()), rtol=1e-4, atol=1e-4)
    assert any(m.output_order is not None for m in converted.modules() if isinstance(m, ICConv2d))


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("give_pattern", [False, True])
def test_own_weights_bring_their_pattern(assigned: bool, give_pattern: bool) -> None:
    pattern = spread(slim(), assigned)
    net = trained(pattern=pattern)
    again = slim(pattern=pattern if give_pattern else None, weights=net.state_dict()).eval()
    torch.testing.assert_close(again(image()), net(image()))


def test_published_weights() -> None:
    pattern = spread(slim())
    net = trained(pattern=pattern)
    state = published(net.state_dict())
    assert "layer1.0.conv1.conv_list.3.weight" in state and "layer1.0.conv1.weight" not in state
    torch.testing.assert_close(slim(pattern=pattern, weights=state).eval()(image()), net(image()))


def test_classes_follow_the_weights_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    state = trained().state_dict()
    assert slim(weights=state).fc.out_features == 7
    assert slim().fc.out_features == 1000
    assert not hasattr(slim(weights=state, out_indices=(3,)), "fc")
    with caplog.at_level(logging.WARNING):
        other = slim(weights=state, num_classes=3)
    assert other.fc.out_features == 3 and "7 classes" in caplog.text
    torch.testing.assert_close(other.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("bn1", "norm1"): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"w.pth: .*missing bn1.*and 33 more.*unknown norm1"),
        (
            lambda s: {k: v[..., :1] if v.dim() == 4 else v for k, v in s.items()},
            "w.pth: size mismatch.*more",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, "w.pth: .*missing fc.bias$"),
        (lambda s: {"layers": list(s)}, "w.pth: must hold a dict of tensors"),
        (lambda s: nn.ReLU(), "w.pth: .*safely"),
    ],
    ids=["names", "shapes", "missing", "no tensors", "pickled module"],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "w.pth"
    torch.save(change(trained().state_dict()), file)
    with pytest.raises(ValueError, match=message) as caught:
        slim(weights=file)
    assert "\n" not in str(caught.value)


def test_weights_of_another_pattern() -> None:
    net = trained(pattern=spread(slim()))
    plain = DilationPattern(
        tuple(LayerPattern.plain(c.out_channels, n) for n, c in searchable_layers(slim()).items()), 9
    )
    for state in (net.state_dict(), published(net.state_dict())):
        with pytest.raises(
            ValueError, match=r"the weights: layer1.0.conv1.(branches|conv_list): .*and 13 more"
        ):
            slim(pattern=plain, weights=state)
    with pytest.raises(ValueError, match="give the pattern"):
        slim(weights=published(net.state_dict()))


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"w.pth: .*safely"):
        slim(weights=file)
    with pytest.raises(FileNotFoundError, match=r"none.pth"):
        slim(weights=tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 4)}, r"from 0 to 3; got \(0, 4\)"),
        ({"out_indices": ()}, "from 0 to 3"),
        (
            {"pattern_path": "a.json", "pattern": DilationPattern((LayerPattern.plain(1),), 9)},
            "exclude each other",
        ),
        ({"name": "resnet50"}, "ic_resnet18.*got 'resnet50'"),
    ],
)
def test_refuses_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ic_resnet(**{"name": "ic_resnet18", "width": 8, **options})
