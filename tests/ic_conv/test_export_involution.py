# SPDX-License-Identifier: Apache-2.0
"""ONNX: what onnxruntime computes from exported involutions and their networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ic_conv.layers import CVolution2d, Involution2d
from ic_conv.models import RedNet, cednet50, rednet50

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


def run(path: Path, x: Tensor) -> Tensor:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def with_statistics_of(x: Tensor, net: nn.Module) -> nn.Module:
    """The network in evaluation mode; its norms know the statistics of x, which keeps outputs near one.

    Residual branches are scaled by 0.2: untrained ones of gain 1 amplify float32's rounding to a tenth.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.constant_(module.weight, 0.2 if name.endswith("bn3") else 1.0)
    with torch.no_grad():
        net.train()(x)
    return net.eval()


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Involution2d(32),
        lambda: Involution2d(32, kernel_size=3, stride=2, pattern={(1, 1): 1, (2, 3): 1}),
        lambda: CVolution2d(32, kernel_size=5, stride=2, kernel_generation="linear"),
    ],
)
def test_layers(build: Callable[[], nn.Module], dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 11, 8)
    layer = with_statistics_of(x, build())
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=dynamo, verbose=False)
    expected = layer(x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(run(tmp_path / "layer.onnx", x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "fewest", "most"), [({}, 10, 20), ({"dilation": 2}, 10, 20), ({"backend": "shift"}, 98, 600)]
)
def test_few_operations_unless_the_loop_is_wanted(
    options: dict[str, Any], fewest: int, most: int, tmp_path: Path
) -> None:
    """The loop adds one product for each of the 49 taps."""
    layer = Involution2d(32, **options).eval()
    torch.onnx.export(layer, (torch.randn(1, 32, 9, 9),), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    assert fewest <= len(onnx.load(tmp_path / "layer.onnx").graph.node) <= most


def test_one_file_for_every_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 32, 12, 10)
    layer = with_statistics_of(example, Involution2d(32, kernel_size=3, stride=2))
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    torch.onnx.export(
        layer, (example,), tmp_path / "layer.onnx", dynamo=True, dynamic_shapes=(free,), verbose=False
    )
    for shape in ((3, 32, 7, 15), (1, 32, 8, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(tmp_path / "layer.onnx", x), layer(x), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("build", [rednet50, cednet50])
def test_networks(build: Callable[..., RedNet], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    net = with_statistics_of(x, build(num_classes=10))
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=(batch,), verbose=False)
    assert len(onnx.load(tmp_path / "net.onnx").graph.node) < 600
    expected = net(x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), expected, rtol=0, atol=1e-4)
