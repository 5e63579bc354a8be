# SPDX-License-Identifier: Apache-2.0
"""The export command: what the file computes, and what it says when it cannot write one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from ic_conv import DilationPattern, LayerPattern, apply_pattern

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "pattern_zoo" / "scattered_digits"
ARCH = "tests.tools.test_export:small"


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 1, 1)
    )


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_tool", ROOT / "tools" / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    layers = ({(1, 1): 10, (2, 1): 6}, {(1, 1): 17, (2, 2): 7})
    path = tmp_path / "small_k5.json"
    DilationPattern(tuple(LayerPattern.from_counts(layer) for layer in layers), kernel=5).save(path)
    return path


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["plain", "own"])
def test_file_computes_what_the_network_does(
    tool: ModuleType, pattern: Path, kind: str, fused: bool, tmp_path: Path
) -> None:
    network = small()
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = apply_pattern(network, DilationPattern.load(pattern)).eval()
    torch.save((network if kind == "plain" else expected).state_dict(), tmp_path / "weights.pth")
    arguments = ["--arch", ARCH, "--pattern", str(pattern), "--checkpoint", str(tmp_path / "weights.pth")]
    arguments += ["--output", str(tmp_path / "net.onnx"), "--image-size", "21", "30"]
    assert tool.main(arguments if fused else [*arguments, "--no-fuse"]) == 0
    session = ort.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 21, 30)
    result = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(result, expected(images).detach(), rtol=0, atol=1e-4)
    kinds = {node.op_type for node in pytest.importorskip("onnx").load(tmp_path / "net.onnx").graph.node}
    assert "Conv" in kinds and not any("ic_conv" in kind for kind in kinds)


@pytest.mark.slow
def test_ic_resnet50(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, output = ZOO / "ic_resnet50_k9.json", tmp_path / "net.onnx"
    assert tool.main(["--pattern", str(pattern), "--output", str(output), "--image-size", "64"]) == 0
    assert "any N" in capsys.readouterr().out and output.stat().st_size > 90e6


def test_refuses_a_file_that_computes_something_else(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = tool.write

    def write_other(network: nn.Module, *rest: object) -> None:
        with torch.no_grad():
            network[3].bias.add_(0.01)
        original(network, *rest)
        with torch.no_grad():
            network[3].bias.sub_(0.01)

    monkeypatch.setattr(tool, "write", write_other)
    output = tmp_path / "net.onnx"
    output.write_text("older")
    assert tool.main(["--arch", ARCH, "--output", str(output), "--image-size", "16"]) == 2
    assert "differ by" in capsys.readouterr().err and output.read_text() == "older"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "ic_resnet49"], "unknown arch"),
        (["--pattern", "missing.json"], "missing.json"),
        (["--checkpoint", "missing.pth"], "missing.pth"),
        (["--output", "no/folder/net.onnx"], "no/folder does not exist"),
        (["--arch", "ic_resnet18", "--pattern", str(ZOO / "ic_resnet50_k9.json")], "another network"),
    ],
)
def test_errors_are_one_line(
    tool: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--output", str(tmp_path / "net.onnx"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.onnx"))


def test_missing_packages_are_named(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "_missing", lambda: "onnxruntime")
    assert tool.main(["--output", str(tmp_path / "net.onnx")]) == 2
    assert "ic-conv[export]" in capsys.readouterr().err
