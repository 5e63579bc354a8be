# SPDX-License-Identifier: Apache-2.0
"""How processes share layers; that the result is a single process's is tested with the search command."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from search import DilationSpace, convert_to_supernet, sharing
from search.statistics import ConvMoments, collect


@pytest.mark.parametrize(("rank", "layers"), [(0, ["a", "d"]), (1, ["b"]), (2, ["c"])])
def test_layers_take_turns(rank: int, layers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    assert sharing.own("abcd") == layers
    assert [name for name, owner in sharing.owners("abcd").items() if owner == rank] == layers


def test_a_process_that_is_alone_has_all() -> None:
    assert sharing.own("ab") == ["a", "b"] and set(sharing.owners("ab").values()) == {0}
    assert sharing.gathered({"a": 1}) == {"a": 1}


def test_second_moments_are_collected_of_own_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    supernet, space = convert_to_supernet(net, 5), DilationSpace(5)
    monkeypatch.setattr("search.statistics.own", lambda layers: [*layers][1:])
    for shared, expected in ((True, ["1"]), (False, ["0", "1"])):
        moments = collect(supernet, [torch.randn(2, 3, 9, 9)], space, correlations=True, shared=shared)
        seconds = {name: m.second for name, m in moments.items() if isinstance(m, ConvMoments)}
        assert [name for name, second in seconds.items() if second is not None] == expected
