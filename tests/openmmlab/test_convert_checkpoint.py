# SPDX-License-Identifier: Apache-2.0
"""Checkpoints between the published layouts and ours, by the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ic_conv import DilationPattern, LayerPattern, ic_resnet18
from ic_conv.models.rednet import RedNet
from ic_conv.models.resnet import ResNet
from ic_conv.published import backbone_of, to_ours, to_published
from tests.openmmlab.commands import command

convert = command("convert_checkpoint")
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def pattern18() -> DilationPattern:
    """A pattern of ResNet-18 whose branches do not stand row by row."""
    widths = [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    layers = [LayerPattern.from_counts({(2, 4): 16, (1, 1): width - 24, (3, 1): 8}) for width in widths]
    return DilationPattern(tuple(layers), kernel=9)


def published18(net: ResNet) -> dict[str, Tensor]:
    """The state dict that the published code would have: a convolution for each branch, in file order."""
    state: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        name, _, kind = key.rpartition(".")
        if f"{name}.branches" not in net.state_dict():
            state[key] = value
        elif kind == "weight":
            for index, part in enumerate((value[:16], value[16:-8], value[-8:])):
                state[f"{name}.conv_list.{index}.weight"] = part
    return state


@pytest.fixture
def ic_net() -> ResNet:
    torch.manual_seed(0)
    return ic_resnet18(pattern=pattern18(), num_classes=5).eval()


def test_published_ic_weights_become_ours_and_come_back(ic_net: ResNet, tmp_path: Path) -> None:
    pattern, published, ours = tmp_path / "p.json", tmp_path / "published.pth", tmp_path / "ours.pth"
    pattern18().save(pattern)
    original = published18(ic_net)
    torch.save({"state_dict": {f"module.{key}": value for key, value in original.items()}}, published)
    assert convert(published, ours, "--pattern", pattern) == 0
    loaded = ic_resnet18(weights=ours).eval()  # tells its own pattern
    torch.testing.assert_close(loaded(IMAGE), ic_net(IMAGE), rtol=0, atol=0)

    back = tmp_path / "back.pth"
    assert convert(ours, back, "--to", "published") == 0
    state = torch.load(back, weights_only=True)["state_dict"]
    assert list(state) == list(original)
    assert all(torch.equal(state[key], original[key]) for key in original)
    assert (
        DilationPattern.load(back.with_suffix(".json")).layers[0].branches == pattern18().layers[0].branches
    )
    again = ic_resnet18(back.with_suffix(".json"), weights=back).eval()
    torch.testing.assert_close(again(IMAGE), ic_net(IMAGE), rtol=0, atol=0)


def test_prefixes_of_whole_models_stay(ic_net: ResNet) -> None:
    """A pose estimator's backbone, with whatever stands beside it."""
    state = {f"backbone.{key}": value for key, value in published18(ic_net).items()}
    ours = to_ours({**state, "keypoint_head.weight": torch.ones(1)}, pattern18())
    assert "backbone.layer1.0.conv1.branches" in ours and "keypoint_head.weight" in ours
    assert to_published(ours)[0].keys() == {*state, "keypoint_head.weight"}
    pattern = to_published(ours)[1]
    assert pattern is not None and pattern.names[0] == "layer1.0.conv1"


def test_published_rednet_becomes_ours_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = RedNet((1, 1, 1, 1), 5, width=16, group_channels=8).eval()
    published = {
        key.replace("fc.", "head.fc.") if key.startswith("fc.") else f"backbone.{key}": value
        for key, value in net.state_dict().items()
    }
    source, ours, back = (tmp_path / name for name in ("published.pth", "ours.pth", "back.pth"))
    torch.save({"meta": {"epoch": 130}, "state_dict": published}, source)
    assert convert(source, ours, "--backbone") == 0
    other = RedNet((1, 1, 1, 1), 5, width=16, group_channels=8).eval()
    other.load_state_dict(torch.load(ours, weights_only=True)["state_dict"])
    torch.testing.assert_close(other(IMAGE), net(IMAGE), rtol=0, atol=0)
    assert convert(ours, back, "--to", "published") == 0
    assert list(torch.load(back, weights_only=True)["state_dict"]) == list(published)


def test_mask_head_of_a_published_detector() -> None:
    published = {
        "backbone.layer1.0.conv1.weight": torch.zeros(1),
        "neck.fpn_convs.0.conv1.conv.weight": torch.zeros(1),
        "roi_head.mask_head.convs.0.0.conv1.conv.weight": torch.zeros(1),
        "roi_head.mask_head.2.convs.1.0.conv2.conv.bias": torch.zeros(1),
    }
    ours = to_ours(published)
    assert set(ours) - set(published) == {
        "roi_head.mask_head.convs.0.conv.conv1.conv.weight",
        "roi_head.mask_head.2.convs.1.conv.conv2.conv.bias",
    }
    assert to_published(ours)[0].keys() == published.keys()
    assert backbone_of(published).keys() == {"layer1.0.conv1.weight"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pattern: None, "the published layout does not tell the dilations"),
        (
            lambda pattern: DilationPattern(pattern.layers[:-1], 9),
            "must have 16 layers, as the weights; got 15",
        ),
        (
            lambda pattern: DilationPattern(pattern.layers[1:] + pattern.layers[:1], 9),
            r"layer1.1.conv2: .* the weights, \[16, 40, 8\]; got \[16, 104, 8\]",
        ),
        (
            lambda pattern: DilationPattern((LayerPattern.plain(64), *pattern.layers[1:]), 9),
            r"layer1.0.conv1: .* got \[64\]",
        ),
    ],
)
def test_pattern_of_another_network(ic_net: ResNet, change: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_ours(published18(ic_net), change(pattern18()))  # type: ignore[operator]


@pytest.mark.parametrize("key", ["layer1.0.conv2.group_dilations", "backbone.layer1.0.conv2.output_order"])
def test_what_the_published_layout_cannot_hold(key: str) -> None:
    with pytest.raises(ValueError, match=f"no place for {key}"):
        to_published({key: torch.tensor([0])})


def test_old_pickles_need_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, ours = tmp_path / "old.pth", tmp_path / "ours.pth"
    torch.save({"meta": argparse.Namespace(epoch=1), "state_dict": {"a": torch.ones(2)}}, old)
    ours.write_text("whole")
    assert convert(old, ours) == 2
    assert "--trust-checkpoint" in capsys.readouterr().err and ours.read_text() == "whole"
    assert convert(old, ours, "--trust-checkpoint") == 0
    assert "can run any code" in capsys.readouterr().err
    assert torch.load(ours, weights_only=True)["state_dict"]["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"junk", "read safely"), (b"", "read safely")],
    ids=["missing", "junk", "empty"],
)
def test_unreadable_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    source = tmp_path / "source.pth"
    if content is not None:
        source.write_bytes(content)
    assert convert(source, tmp_path / "ours.pth") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "ours.pth").exists()
