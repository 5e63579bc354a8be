# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ic_conv import DilationPattern, LayerPattern
from search import SearchTask, convert_to_supernet
from search.report.effective import centre_gradients, effective_fields, extent, last_layers, take_images
from search.report.peers import compare_peers, expected_errors
from search.report.record import RunRecord, record_run, training_curve


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ([0, 0, 1, 0], [1, 0, 0, 0], (0.9, 0.9)),  # one pixel holds all
        ([1] * 10, [0, 1, 1, 0], (9, 1.8)),
        ([1, 8, 1], [1, 0, 1], (2, 2.8)),  # half of either outer row, across the gap
        ([0, 0], [0, 0], (0, 0)),
    ],
)
def test_extent_is_the_middle_nine_tenths(
    rows: list[float], columns: list[float], expected: tuple[float, float]
) -> None:
    assert extent(np.outer(rows, columns).astype(float)) == pytest.approx(expected, abs=0.01)


def two_stages() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    for stage in ("one", "two"):
        net.add_module(stage, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)))
    return net


def test_gradient_of_the_centre_lies_on_the_taps() -> None:
    supernet = convert_to_supernet(two_stages(), 9)
    gradients = centre_gradients(supernet, ["one.0"], torch.randn(2, 3, 21, 15))
    assert list(gradients) == ["one.0"] and gradients["one.0"].shape == (21, 15)
    rows, columns = np.nonzero(gradients["one.0"])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 14, 3, 11)


def test_fields_compare_plain_with_found_and_leave_the_supernet_alone() -> None:
    supernet = convert_to_supernet(two_stages(), 9)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    layers = tuple(LayerPattern.from_counts({(4, 1): 3}, name) for name in ("one.0", "two.0"))
    fields = effective_fields(supernet, DilationPattern(layers, 9), torch.randn(4, 3, 100, 60))
    assert list(fields) == ["one.0", "two.0"]
    for depth, pair in enumerate(fields.values(), 1):
        support = {kind: np.argwhere(np.array(field["map"])) for kind, field in pair.items()}
        assert np.array(pair["plain"]["map"]).shape == (34, 20)  # cells of 3 px
        assert len(np.unique(support["found"][:, 0])) > len(np.unique(support["plain"][:, 0]))
        assert len(np.unique(support["found"][:, 1])) == len(np.unique(support["plain"][:, 1]))
        (plain_rows, plain_columns), (rows, columns) = pair["plain"]["extent"], pair["found"]["extent"]
        assert plain_rows <= 2 * depth + 1 and 2 * plain_rows < rows <= 8 * depth + 1
        assert columns == pytest.approx(plain_columns, rel=0.25)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_last_layer_of_each_stage() -> None:
    assert last_layers(["a.0.c", "a.1.c", "b.0.c", "head"]) == ["a.1.c", "b.0.c", "head"]


def test_images_of_one_size_are_taken() -> None:
    batches = [torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 9, 8), (torch.ones(2, 3, 8, 8), "labels")]
    assert take_images(batches, 3).mean((1, 2, 3)).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="calibration data is empty"):
        take_images([], 3)


def test_expected_error_is_the_mean_over_all_ways_to_deal() -> None:
    rng = np.random.default_rng(0)
    layer = LayerPattern.from_counts({(1, 1): 2, (2, 1): 1, (4, 3): 1}, "a")
    pattern = DilationPattern((layer,), 9)
    errors = rng.random((4, 16))
    dealt = [d for d, count in layer.branches for _ in range(count)]
    ways = [
        np.mean([errors[unit, pattern.candidates.index(d)] for unit, d in enumerate(way)])
        for way in permutations(dealt)
    ]
    assert expected_errors(pattern, {"a": errors.mean(0).tolist()}) == pytest.approx((np.mean(ways),))


def test_peers_stand_beside_the_found_pattern() -> None:
    layer = LayerPattern.from_counts({(1, 1): 3, (2, 2): 1}, "a")
    wide = LayerPattern.plain(12, "b")
    errors = {name: [1 - 1 / (index + 1) for index in range(16)] for name in "ab"}
    meta = {"layer_error": {"a": 0.5, "b": 0.1}, "candidate_error": errors, "seed": 3}
    peers = compare_peers(DilationPattern((layer, wide), 9, meta=meta))
    assert [peer.name for peer in peers] == ["found", "found, shuffled", "plain", "hand", "uniform", "random"]
    assert peers[0].error == pytest.approx((4 * 0.5 + 12 * 0.1) / 16)
    assert peers[1].errors == pytest.approx((0.25 * (1 - 1 / 6), 0))
    assert peers[2].error == 0 and peers[4].error == pytest.approx(1 - 1 / 6)
    assert compare_peers(DilationPattern((layer, wide), 9)) == []


def write_log(folder: Path, lines: Sequence[object], place: str = "log/20260101_0000") -> None:
    path = folder / place / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def points(first: int, last: int, loss: float) -> list[dict[str, float]]:
    return [{"step": step, "loss": loss, "lr": 0.1} for step in range(first, last + 1)]


@pytest.mark.parametrize(
    ("first", "second", "steps", "losses"),
    [
        (3, points(4, 6, 2.0), [1, 2, 3, 4, 5, 6], [1.0] * 3 + [2.0] * 3),  # resumed
        (5, points(3, 3, 2.0), [1, 2, 3], [1.0, 1.0, 2.0]),  # resumed at a state before the last step
        (5, points(1, 2, 2.0), [1, 2], [2.0, 2.0]),  # begun again
        (5, [{"step": 5, "bbox_mAP": 0.3}], [1, 2, 3, 4, 5], [1.0] * 5),  # a validation
    ],
)
def test_curve_of_several_runs(
    first: int, second: list[dict[str, float]], steps: list[int], losses: list[float], tmp_path: Path
) -> None:
    write_log(tmp_path, points(1, first, 1.0))
    write_log(tmp_path, second, "log/20260101_0001")
    curve = training_curve(tmp_path)
    assert curve["step"] == steps and curve["loss"] == losses and curve["lr"] == [0.1] * len(steps)


def test_long_curves_are_thinned_and_none_is_empty(tmp_path: Path) -> None:
    assert training_curve(tmp_path) == {}
    write_log(tmp_path, points(1, 4000, 2.5), "20260101_0000")  # where OpenMMLab's runner puts it
    curve = training_curve(tmp_path)
    assert len(curve["step"]) == 400 and curve["step"][0] == 5.5 and set(curve["loss"]) == {2.5}


def test_record_survives_its_file(tmp_path: Path) -> None:
    supernet = convert_to_supernet(two_stages(), 9)
    layers = tuple(LayerPattern.plain(3, name) for name in ("one.0", "two.0"))
    pattern = DilationPattern(layers, 9)
    write_log(tmp_path, points(1, 3, 1.0))
    record = record_run(pattern, SearchTask.of(supernet, [torch.randn(2, 3, 16, 16)]), tmp_path, "cmd", 1.26)
    record.save(tmp_path / "r.json")
    again = RunRecord.load(tmp_path / "r.json")
    assert again.command == "cmd" and again.seconds == 1.3 and again.curve == record.curve
    assert again.fields == record.fields and list(again.fields) == ["one.0", "two.0"]
    assert list(again.field_images) == [2, 16, 16] and not again.trained


def test_a_network_without_backward_pass_costs_the_fields_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Detached(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    supernet = convert_to_supernet(Detached(*two_stages()), 9)
    names = [name for name, module in supernet.named_modules() if isinstance(module, nn.Conv2d)]
    pattern = DilationPattern(tuple(LayerPattern.plain(3, name) for name in names), 9)
    record = record_run(pattern, SearchTask.of(supernet, [torch.randn(2, 3, 16, 16)]), command="cmd")
    assert record.command == "cmd" and record.fields == {}
    assert "the report lacks the effective receptive field" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1, "odd": 1}'])
def test_bad_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"not the record of a search: .*r.json"):
        RunRecord.load(tmp_path / "r.json")
