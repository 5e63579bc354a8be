# SPDX-License-Identifier: Apache-2.0
"""The layers in MMCV's ConvModule, and what importing the package costs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmcv")

from mmcv.cnn import ConvModule
from mmengine import Config
from mmengine.registry import MODELS

import ic_conv.openmmlab  # noqa: F401
from ic_conv.layers import CVolution2d, ICConv2d, Involution2d

TUPLES = {(1, 1): 20, (2, 3): 12}
STRINGS = {"(0, 0)": 20, "(1, 2)": 12, "(3, 3)": 0}


def image() -> Tensor:
    return torch.randn(2, 32, 15, 17, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("conv_cfg", "layer"),
    [
        (
            {"type": "ICConv2d", "pattern": TUPLES},
            lambda s: ICConv2d(32, 32, 3, s, pattern=TUPLES, bias=False),
        ),
        (
            {"type": "ICConv2d", "pattern": STRINGS},
            lambda s: ICConv2d(32, 32, 3, s, pattern=TUPLES, bias=False),
        ),
        ({"type": "Involution2d"}, lambda s: Involution2d(32, 3, s)),
        (
            {"type": "Involution2d", "kernel_size": 7, "group_channels": 8},
            lambda s: Involution2d(32, 7, s, group_channels=8),
        ),
        ({"type": "CVolution2d", "kernel_size": 9}, lambda s: CVolution2d(32, 9, s)),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_module_computes_the_layer_norm_and_activation(conv_cfg: Any, layer: Any, stride: int) -> None:
    norm_cfg = {"type": "BN"}
    module = ConvModule(32, 32, 3, stride=stride, padding=1, conv_cfg=conv_cfg, norm_cfg=norm_cfg)
    alone = layer(stride)
    alone.load_state_dict(module.conv.state_dict())
    expected = nn.BatchNorm2d(32)(alone(image())).relu()
    torch.testing.assert_close(module(image()), expected)


def test_layers_keep_the_dilation_of_the_convolution() -> None:
    module = ConvModule(32, 32, 3, padding=2, dilation=2, conv_cfg={"type": "Involution2d"})
    assert module.conv.dilations == ((2, 2), (2, 2))


def test_pattern_survives_a_dumped_config() -> None:
    config = Config({"conv_cfg": {"type": "ICConv2d", "pattern": TUPLES}})
    again = Config.fromstring(config.pretty_text, ".py")
    conv = MODELS.build({**again.conv_cfg, "in_channels": 32, "out_channels": 32})
    assert conv.pattern.counts == TUPLES


@pytest.mark.parametrize(
    ("arguments", "conv_cfg", "message"),
    [
        ((32, 64, 3), {"type": "Involution2d"}, "in_channels must equal out_channels; got 32 and 64"),
        ((32, 32, 3, 1, 1, 1, 4), {"type": "Involution2d"}, "groups must be 1; got 4"),
        (
            (32, 32, 3, 1, 0),
            {"type": "CVolution2d"},
            r"CVolution2d .*padding must be \(1, 1\), 'same'; got 0",
        ),
        (
            (32, 32, 3, 1, 1),
            {"type": "Involution2d", "group_channels": 5},
            "group_channels must divide channels",
        ),
        ((32, 64, 3, 1, 1), {"type": "ICConv2d", "pattern": TUPLES}, "sum to 64 output channels; got 32"),
        (
            (32, 32, 3, 1, 1),
            {"type": "ICConv2d", "pattern": {"(0, x)": 32}},
            r"conv_cfg\.pattern: a key must read",
        ),
    ],
)
def test_what_a_layer_cannot_do_is_an_error(arguments: Any, conv_cfg: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvModule(*arguments, conv_cfg=conv_cfg)


def test_importing_loads_no_library_but_mmengine() -> None:
    libraries = ("mmcv", "mmdet", "mmseg", "mmpose", "mmpretrain", "search")
    code = f"import sys, ic_conv.openmmlab; print([name for name in {libraries} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("config", "library"),
    [
        ({"type": "InvolutionFPN"}, "mmdet"),
        ({"type": "SegInvolutionFPN"}, "mmseg"),
        ({"type": "InvolutionRPNHead"}, "mmdet"),
        ({"type": "InvolutionFCNMaskHead"}, "mmdet"),
        ({"type": "ICResNet", "depth": 18, "norm_cfg": {"type": "SyncBN"}}, "mmcv"),
    ],
)
def test_missing_library_is_named_with_the_extra(
    config: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    with pytest.raises(ImportError, match=rf"needs {library}, .*ic-conv\[openmmlab\]"):
        MODELS.build(config)
