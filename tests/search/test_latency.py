# SPDX-License-Identifier: Apache-2.0
"""The latency table: predictions, files, and measuring on a small network."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ic_conv import DilationPattern, LayerPattern
from ic_conv.models import ic_resnet18
from search.latency import Branches, Kind, LatencyTable, Row, device_name
from search.measure_latency import check_table, layer_units, measure_table, random_patterns

CPU = torch.device("cpu")
WIDE, GROUPED = Kind(64, 64, 1, 1, 28, 28), Kind(64, 64, 8, 2, 28, 28)


def true_ms(kind: Kind, branches: Branches) -> float:
    """A device of our own: so much for a call, a branch, and a step of 16 channels."""
    size = kind.out_channels if kind.groups == 1 else kind.groups
    steps = sum(-(-count * (kind.out_channels // size) // 16) for _, count in branches)
    return (0.02 + 0.01 * len(branches) + 0.05 * steps) * (2 if kind is WIDE else 1)


def synthetic_table(device: str = "abacus") -> LatencyTable:
    layers = {"layer1.0.conv2": WIDE, "layer2.0.conv2": GROUPED}
    rows = []
    for pattern in islice(random_patterns({"layer1.0.conv2": 64, "layer2.0.conv2": 8}, 4, seed=3), 30):
        for layer, kind in zip(pattern.layers, layers.values(), strict=True):
            rows.append(Row(kind, layer.branches, true_ms(kind, layer.branches)))
    return LatencyTable(device, "two layers", 1, 1, 28, layers, 5.0, tuple(rows))


def test_the_prediction_is_the_device_s_own_rule() -> None:
    table = synthetic_table()
    for pattern in islice(random_patterns({"layer1.0.conv2": 64, "layer2.0.conv2": 8}, 4, seed=4), 10):
        kinds = table.layers.values()
        wanted = 5 + sum(true_ms(k, p.branches) for k, p in zip(kinds, pattern.layers, strict=True))
        assert table.predict(pattern) == pytest.approx(wanted, rel=1e-6)


def test_sixteen_channels_in_one_branch_cost_less_than_in_two() -> None:
    table = synthetic_table()
    whole, halves = (
        table.predict_layer(WIDE, (((1, 1), 64),)),
        table.predict_layer(WIDE, (((1, 1), 56), ((2, 2), 8))),
    )
    assert whole < halves


def test_a_table_reads_back(tmp_path: Path) -> None:
    table = synthetic_table()
    table.save(tmp_path / "t.json")
    again = LatencyTable.load(tmp_path / "t.json")
    pattern = next(random_patterns({"layer1.0.conv2": 64, "layer2.0.conv2": 8}, 4, seed=5))
    assert again.predict(pattern) == pytest.approx(table.predict(pattern), rel=1e-3)
    assert (again.device, again.layers, len(again.rows)) == (table.device, dict(table.layers), 60)
    assert json.loads((tmp_path / "t.json").read_text())["device"] == "abacus"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": [{"name": "a"}]}'])
def test_another_file_is_one_clear_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json: not a table of `tools/benchmark\.py latency-table`"):
        LatencyTable.load(tmp_path / "t.json")


def test_another_device_and_another_network_are_refused() -> None:
    table = synthetic_table()
    with pytest.raises(ValueError, match="must be of this device, slide rule; it is of abacus"):
        table.check_device("slide rule")
    table.check_device("abacus")
    with pytest.raises(ValueError, match="the pattern has 1 layers, the network 2"):
        table.predict(DilationPattern((LayerPattern.plain(64),), kernel=9))


def test_random_patterns_are_of_all_sorts_and_seeded() -> None:
    units = {"a": 64, "b": 24, "c": 6}
    patterns = list(islice(random_patterns(units, 4, seed=0), 40))
    assert patterns == list(islice(random_patterns(units, 4, seed=0), 40))
    branches = [len(layer.branches) for pattern in patterns for layer in pattern.layers]
    assert min(branches) == 1 and max(branches) > 8
    assert {layer.units for pattern in patterns for layer in pattern.layers} == {64, 24, 6}


def test_measuring_a_network() -> None:
    network = ic_resnet18(out_indices=(3,))
    units = layer_units(network)
    before = [name for name, _ in network.named_modules()]
    patterns = islice(random_patterns(units, 4, seed=0), 3)
    table = measure_table(network, patterns, CPU, "ic_resnet18", image_size=64, rounds=2)
    assert [name for name, _ in network.named_modules()] == before
    assert list(table.layers) == list(units) and len(table.rows) == 3 * len(units)
    assert table.layers["layer2.0.conv1"] == Kind(64, 128, 1, 2, 16, 16)
    assert all(row.ms > 0 for row in table.rows) and table.device == device_name(CPU)
    (row,) = check_table(table, network, islice(random_patterns(units, 4, seed=1), 1), CPU, 2)
    # how near it comes stands in the docs; here other work disturbs both times
    assert row["predicted_ms"] > table.rest_ms and np.isfinite(row["error_percent"])


class Nap(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


def test_what_lies_between_the_layers_is_not_theirs() -> None:
    conv = nn.Conv2d(3, 16, 3, padding=1)
    network = nn.Sequential(conv, Nap(), nn.Conv2d(16, 16, 3, padding=1))
    patterns = islice(random_patterns(layer_units(network), 2, seed=0), 2)
    table = measure_table(network, patterns, CPU, "napping", image_size=8, rounds=5)
    assert table.rest_ms >= 20 and all(row.ms < 20 for row in table.rows)
    with pytest.raises(ValueError, match="at least one pattern"):
        measure_table(network, [], CPU, "napping")
