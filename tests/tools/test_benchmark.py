# SPDX-License-Identifier: Apache-2.0
"""The benchmark command, and the measuring behind it."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ic_conv.benchmark import backbones, ic_conv, involution, measure
from ic_conv.benchmark.measure import peak_memory
from ic_conv.models import ic_resnet50
from ic_conv.ops.involution2d import INVOLUTION2D
from ic_conv.pattern import DilationPattern, LayerPattern
from search.latency import LatencyTable, device_name

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_medians_tell_slow_from_quick() -> None:
    calls: list[str] = []

    def quick() -> None:
        calls.append("quick")

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.01)

    result = measure({"quick": quick, "slow": slow}, CPU, rounds=3, warmup=1)
    assert calls[:8] == ["quick", "slow"] * 4  # in turn, after the warm-up
    assert result["slow"].median_ms >= result["slow"].best_ms >= 10 > result["quick"].median_ms


def test_peak_memory_sees_what_is_freed_again() -> None:
    def use() -> int:
        torch.ones(5 * 2**20)  # 20 MiB
        return 1

    if (peak := peak_memory(use, CPU)) is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 20 * 2**20 <= peak < 24 * 2**20


def test_involution_rows() -> None:
    layer = involution.Layer("small", 2, 32, (13, 9), stride=2, kernel=3)
    rows = list(involution.benchmark([layer], CPU, rounds=2))
    able = [name for name, reason in INVOLUTION2D.available().items() if reason is None]
    able = [name for name in able if not name.startswith("cupy")]
    assert [(row.passes, row.backend) for row in rows] == [(p, b) for p in involution.PASSES for b in able]
    assert all(row.speedup == 1 for row in rows if row.backend == "reference")
    assert all(row.median_ms and row.speedup for row in rows)


def test_reference_that_would_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(involution, "_free_memory", lambda device: 1000)
    layer = involution.Layer("small", 1, 16, (5, 5), kernel=3)
    rows = list(involution.benchmark([layer], CPU, rounds=1, backends=["shift", "reference"]))
    assert [(row.backend, row.median_ms is None, row.speedup) for row in rows[:2]] == [
        ("shift", False, None),
        ("reference", True, None),
    ]
    assert "GiB" in rows[1].note


def test_layer_sizes_are_those_of_rednet50() -> None:
    """Every involution of the network at 224 x 224 stands in the table."""
    from ic_conv.layers import Involution2d
    from ic_conv.models import rednet50

    seen: set[tuple[int, ...]] = set()
    net = rednet50().to("meta").eval()
    for module in net.modules():
        if isinstance(module, Involution2d):
            module.register_forward_hook(
                lambda m, x, y: seen.add((m.channels, *x[0].shape[2:], m.stride[0], m.kernel_size[0]))
            )
    net(torch.zeros(1, 3, 224, 224, device="meta"))
    table = {(layer.channels, *layer.size, layer.stride, layer.kernel) for layer in involution.LAYERS[:-1]}
    assert seen == table


def test_spread_pattern_fits_resnet50() -> None:
    pattern = backbones.spread_pattern()
    assert ic_resnet50(pattern=pattern).training
    assert all(len(layer.branches) == 16 for layer in pattern.layers)


@pytest.mark.parametrize("pattern", ["ic_resnet18_k9", "ic_resnext101_32x4d_k9"])
def test_published_layers_compute_the_same(pattern: str) -> None:
    path = ROOT / "pattern_zoo" / "scattered_digits" / f"{pattern}.json"
    passes = ic_conv.PASSES if "resnet18" in pattern else ["inference"]
    rows = list(ic_conv.benchmark([path], CPU, [1], passes, size=64, rounds=1))
    names = ["plain", "published", "ours"]
    expected = [*names, "plain, fused", "ours, fused", *(names if len(passes) > 1 else [])]
    assert [row.network for row in rows] == expected
    assert all(row.difference is None or row.difference < 1e-5 for row in rows)
    assert sum(row.difference is not None for row in rows) == len(passes)


def test_cost_of_steps_of_16_channels() -> None:
    layers = LayerPattern.from_counts({(1, 1): 16}), LayerPattern.from_counts({(1, 1): 31, (2, 1): 1})
    assert ic_conv.step_cost(DilationPattern(layers, kernel=5)) == (1 + 48 / 32) / 2


def test_ic_conv_command(tool: ModuleType, tmp_path: Path) -> None:
    path, figures = (
        ROOT / "pattern_zoo" / "scattered_digits" / "ic_resnet18_k9.json",
        tmp_path / "figures.json",
    )
    arguments = ["--pattern", str(path), "--batch-size", "1", "--image-size", "32", "--rounds", "1"]
    assert tool.main(["ic-conv", *arguments, "--passes", "inference", "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())["rows"]
    assert rows[0]["to_plain"] == rows[1]["speedup"] == 1 and len(rows) == 5


def test_assignment_command(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert tool.main(["assignment", "--kernel", "5", "--json", str(path)]) == 0
    *layers, total = json.loads(path.read_text())["rows"]
    assert len(layers) == 16 and total["layer"] == "all"
    for row in layers:
        assert row["argmin"] < row["assigned"] <= row["rounded"] and row["gap_percent"] <= 0.5
    assert total["assigned"] < total["rounded"]
    assert total["assigned"] == pytest.approx(sum(row["assigned"] for row in layers))


def test_latency_table_command(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path, size = tmp_path / "here.json", ["--image-size", "32", "--patterns", "3", "--check", "1"]
    assert tool.main(["latency-table", "--arch", "ic_resnet18", "--output", str(path), *size]) == 0
    assert "mean error" in capsys.readouterr().out
    table = LatencyTable.load(path)
    table.check_device(device_name(CPU))
    assert (table.network, table.image_size, len(table.layers)) == ("ic_resnet18", 32, 16)
    assert len(table.rows) == 3 * 16 and table.rest_ms > 0


def test_list(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*INVOLUTION2D.names, "split", "runs"))


def test_involution_command_writes_json(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--layers", "layer4", "--backends", "shift", "--rounds", "1", "--json", str(path)]
    assert tool.main(["involution", *arguments]) == 0
    figures = json.loads(path.read_text())
    assert [row["backend"] for row in figures["rows"]] == ["shift", "shift"]


def test_backbones_command(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--networks", "ResNet-50", "RedNet-50", "--batch-size", "1", "--image-size", "32"]
    assert tool.main(["backbones", *arguments, "--rounds", "1", "--channels-last"]) == 0
    shown = capsys.readouterr().out
    assert "RedNet-50" in shown and "211.20" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needed"),
        (["involution", "--layers", "layer9"], "layer9"),
        (["involution", "--rounds", "0"], "at least 1; got 0"),
    ],
)
def test_usage_errors(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        tool.main(arguments)
    assert info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["involution", "--layers", "layer4", "--device", "nonsense"],
        ["backbones", "--pattern", "missing.json"],
        ["ic-conv", "--pattern", "missing_ic_resnet50.json"],
        ["ic-conv", "--pattern", "pattern_zoo/scattered_digits/unknown.json"],
        [
            "involution",
            "--layers",
            "layer4",
            "--backends",
            "shift",
            "--rounds",
            "1",
            "--json",
            "no/folder/f.json",
        ],
    ],
)
def test_errors_are_one_line(
    tool: ModuleType,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
