# SPDX-License-Identifier: Apache-2.0
"""FPNs with involutions, as MMDetection and MMSegmentation build them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.models.necks import FPN
from mmdet.registry import MODELS as MMDET
from mmseg.models.necks.fpn import FPN as SegFPN
from mmseg.registry import MODELS as MMSEG

import ic_conv.openmmlab  # noqa: F401
from ic_conv.layers import CVolution2d, Involution2d

CHANNELS = [64, 128, 256, 512]
LIBRARIES = [(MMDET, "InvolutionFPN"), (MMSEG, "SegInvolutionFPN")]


def build(library: Any, kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    neck = {"type": kind, "in_channels": CHANNELS, "out_channels": 32, "num_outs": 5}
    return library.build(neck | options)


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = zip(CHANNELS, (32, 16, 8, 4), strict=True)
    return [torch.randn(2, channels, size, size + 2, generator=generator) for channels, size in sizes]


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("library", "kind"), LIBRARIES)
@pytest.mark.parametrize(
    ("output_cfg", "layer", "window"),
    [
        ({}, Involution2d, 7),
        ({"output_cfg": {"type": "Involution2d", "kernel_size": 5}}, Involution2d, 5),
        ({"output_cfg": {"type": "CVolution2d"}}, CVolution2d, 9),
    ],
)
def test_output_convolutions_are_replaced_and_nothing_else(
    library: Any, kind: str, output_cfg: Any, layer: type[nn.Module], window: int
) -> None:
    neck, plain = build(library, kind, **output_cfg), build(library, "FPN")
    assert all(isinstance(output, layer) for output in neck.fpn_convs) and len(neck.fpn_convs) == 4
    spatial = neck.fpn_convs[0] if layer is Involution2d else neck.fpn_convs[0].spatial
    assert spatial.kernel_size == (window, window)
    neck.lateral_convs.load_state_dict(plain.lateral_convs.state_dict())
    for fpn in (neck, plain):  # leaves what stands before the output convolutions
        fpn.fpn_convs = nn.ModuleList(nn.Identity() for _ in range(4))
    for x, y in zip(neck(features()), plain(features()), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("library", "kind"), LIBRARIES)
def test_outputs_are_the_involved_laterals(library: Any, kind: str) -> None:
    neck = build(library, kind).eval()
    outputs = neck(features())
    assert [tuple(x.shape[2:]) for x in outputs] == [(32, 34), (16, 18), (8, 10), (4, 6), (2, 3)]
    top = neck.fpn_convs[3](neck.lateral_convs[3](features()[3]))
    assert torch.equal(outputs[3], top) and torch.equal(outputs[4], top[..., ::2, ::2])


def test_extra_levels_keep_their_convolutions() -> None:
    options = {"start_level": 1, "add_extra_convs": "on_input"}
    neck, plain = (build(MMDET, kind, **options) for kind in ("InvolutionFPN", "FPN"))
    kinds = [isinstance(layer, Involution2d) for layer in neck.fpn_convs]
    assert kinds == [True, True, True, False, False]
    outputs = neck.eval()(features())
    assert [x.shape for x in outputs] == [x.shape for x in plain(features())]
    neck.fpn_convs[3].load_state_dict(plain.fpn_convs[3].state_dict())
    assert torch.equal(neck(features())[3], plain(features())[3])


def test_norms_and_activations_of_the_outputs_stay() -> None:
    neck = build(MMDET, "InvolutionFPN", norm_cfg={"type": "BN"}, act_cfg={"type": "ReLU"})
    assert isinstance(neck.fpn_convs[0].conv, Involution2d) and isinstance(
        neck.fpn_convs[0].norm, nn.BatchNorm2d
    )
    assert all((x >= 0).all() for x in neck(features()))


def test_published_size_and_key_names() -> None:
    """K = 7, 16 channels to a group, reduction 4: the four levels of the published detectors."""
    neck = build(MMDET, "InvolutionFPN", in_channels=[256, 512, 1024, 2048], out_channels=256)
    reduce, generate = 256 * 64 + 2 * 64, 64 * 16 * 49 + 16 * 49
    laterals = sum(channels * 256 + 256 for channels in (256, 512, 1024, 2048))
    assert parameters(neck) == laterals + 4 * (reduce + generate)
    assert {"fpn_convs.0.conv1.conv.weight", "fpn_convs.3.conv2.conv.bias"} <= set(neck.state_dict())


def test_necks_extend_the_libraries() -> None:
    assert isinstance(build(MMDET, "InvolutionFPN"), FPN)
    assert isinstance(build(MMSEG, "SegInvolutionFPN"), SegFPN)
