# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ic_conv import DilationPattern, LayerPattern
from ic_conv._pattern_file import meta_path
from ic_conv.pattern import largest_dilation

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def small_pattern() -> DilationPattern:
    first = LayerPattern.from_assignment([(1, 1), (2, 4), (1, 1), (3, 1)], "layer1.0.conv2")
    second = LayerPattern.from_counts({(1, 1): 5, (4, 4): 3}, "layer2.0.conv2")
    return DilationPattern((first, second), kernel=9, meta={"criterion": "energy", "seed": 0})


@st.composite
def patterns(draw: st.DrawFn) -> DilationPattern:
    base_kernel = draw(st.sampled_from([3, 5]))
    side = draw(st.integers(2, 6))
    dilations = st.tuples(st.integers(1, side), st.integers(1, side))
    layers = []
    for index in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([None, f"layer{index}.conv"]))
        if draw(st.booleans()):
            layers.append(
                LayerPattern.from_assignment(draw(st.lists(dilations, min_size=1, max_size=40)), name)
            )
        else:
            counts = draw(st.dictionaries(dilations, st.integers(1, 600), min_size=1, max_size=12))
            layers.append(LayerPattern.from_counts(counts, name))
    return DilationPattern(tuple(layers), side * (base_kernel - 1) + 1, base_kernel)


@SHARED_FOLDER
@given(pattern=patterns())
def test_any_pattern_survives_its_file(pattern: DilationPattern, tmp_path: Path) -> None:
    pattern.save(tmp_path / "p.json")
    assert DilationPattern.load(tmp_path / "p.json") == pattern
    meta_path(tmp_path / "p.json").unlink()
    bare = DilationPattern.load(tmp_path / "p.json")
    assert [layer.branches for layer in bare.layers] == [layer.branches for layer in pattern.layers]


MUTATIONS = st.tuples(
    st.sampled_from(["cut", "flip", "insert", "swap"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=6),
)


@settings(SHARED_FOLDER, max_examples=2000)
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=4), which=st.sampled_from(["pattern", "meta"]))
def test_a_mutated_file_loads_or_is_a_value_error(mutations: list[Any], which: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    small_pattern().save(path)
    target = path if which == "pattern" else meta_path(path)
    data = target.read_bytes()
    for kind, where, junk in mutations:
        at = int(where * len(data))
        if kind == "cut":
            data = data[:at] + data[at + len(junk) * 3 :]
        elif kind == "flip":
            data = data[:at] + bytes([data[at] ^ junk[0]]) + data[at + 1 :] if data else junk
        elif kind == "insert":
            data = data[:at] + junk + data[at:]
        else:
            data = data[at:] + data[:at]
    target.write_bytes(data)
    try:
        DilationPattern.load(path)
    except ValueError as error:
        assert str(error).startswith((str(path), str(meta_path(path)))), "the message must name the file"


BAD_FILES = [
    ("{", "not a JSON document"),
    ("[" * 100_000, "not a JSON document"),
    ("\xff\xfe", "not a JSON document"),
    ("{}", "a list with one object per layer"),
    ("[]", "a list with one object per layer"),
    ("[3]", "layer 0: expected an object"),
    ("[{}]", "layer 0: a layer needs at least one count above zero"),
    ('[{"(0, 0)": 0}]', "layer 0: a layer needs at least one count above zero"),
    ('[{"(0, 0)": 4}, {"0, 0": 4}]', 'layer 1: a key must read "(i, j)"'),
    ('[{"(0, -1)": 4}]', 'layer 0: a key must read "(i, j)"'),
    ('[{"(0, 0)": 4, "(0,0)": 1}]', "layer 0: each key may stand once"),
    ('[{"(0, 0)": 4, "(0, 0)": 4}]', "each key may stand once"),
    ('[{"(0, 0)": -4}]', "layer 0: the count of '(0, 0)' must be an integer >= 0, got -4"),
    ('[{"(0, 0)": 4.0}]', "must be an integer >= 0, got 4.0"),
    ('[{"(0, 0)": true}]', "must be an integer >= 0, got True"),
    ('[{"(0, 0)": NaN}]', "must be an integer >= 0, got nan"),
    ('[{"(0, 64)": 4}]', "layer 0: dilations may reach 64, got (1, 65)"),
]


@pytest.mark.parametrize(("text", "rule"), BAD_FILES)
def test_a_malformed_file_names_file_layer_and_rule(text: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        DilationPattern.load(path)
    assert str(path) in str(caught.value) and rule in str(caught.value)


BAD_META = [
    (lambda meta: meta.pop("kernel"), "the key 'kernel' is missing"),
    (lambda meta: meta.update(kernel=8), "the kernel must be an odd number of at least 3, got 8"),
    (lambda meta: meta.update(kernel=5), "integers from 0 to 3"),
    (lambda meta: meta.update(format_version=2), "format_version must be 1, got 2"),
    (lambda meta: meta["layers"].pop(), "layers must be a list of 2"),
    (
        lambda meta: meta["layers"][0]["assignment"].pop(),
        "layer1.0.conv2: the assignment must give the counts",
    ),
    (lambda meta: meta["layers"][1].update(name="layer1.0.conv2"), "got layer1.0.conv2 twice"),
]


@pytest.mark.parametrize(("change", "rule"), BAD_META)
def test_a_malformed_meta_file_names_file_and_rule(change: Any, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    small_pattern().save(path)
    meta = json.loads(meta_path(path).read_text())
    change(meta)
    meta_path(path).write_text(json.dumps(meta))
    with pytest.raises(ValueError) as caught:
        DilationPattern.load(path)
    assert str(meta_path(path)) in str(caught.value) and rule in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kernel", "layers"),
    [
        ("detection_ic_resnet50_k9", 9, 16),
        ("detection_ic_resnet101_k9", 9, 33),
        ("human_pose_ic_resnet50_k13", 13, 16),
    ],
)
def test_published_files_are_read_and_written_key_by_key(
    name: str, kernel: int, layers: int, shared_data: Path, tmp_path: Path
) -> None:
    published = shared_data / "official_patterns" / f"{name}.json"
    pattern = DilationPattern.load(published)
    assert (pattern.kernel, len(pattern.layers)) == (kernel, layers)
    pattern.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(published.read_text())
    written, original = (tmp_path / "again.json").read_text(), published.read_text()
    assert "".join(written.split()) == "".join(original.split()), "same keys in the same order"


def test_branches_out_of_row_order_keep_their_order(tmp_path: Path) -> None:
    layer = LayerPattern.from_counts({(3, 1): 2, (1, 1): 6})
    DilationPattern((layer,), kernel=9).save(tmp_path / "p.json")
    assert DilationPattern.load(tmp_path / "p.json").layers[0].branches == (((3, 1), 2), ((1, 1), 6))


def test_order_lists_original_channels_branch_by_branch() -> None:
    layer = LayerPattern.from_assignment([(2, 2), (1, 1), (2, 2), (1, 3)])
    assert layer.branches == (((1, 1), 1), ((1, 3), 1), ((2, 2), 2))
    assert layer.order() == (1, 3, 0, 2)
    assert LayerPattern.plain(3).order() == (0, 1, 2)


def test_figures_of_a_layer() -> None:
    layer = LayerPattern.from_counts({(1, 1): 3, (1, 5): 1})
    assert (layer.units, layer.max_dilation, layer.plain_share) == (4, 5, 0.75)
    assert layer.mean_dilation == (1.0, 2.0)
    assert layer.window() == (3.0, 5.0)
    assert layer.window(base_kernel=5) == (5.0, 9.0)


NETWORK = [("layer1.0.conv2", 4), ("layer2.0.conv2", 8)]
BAD_BINDINGS = [
    ([("a", 4)], "the pattern has 2 layers, the network 1"),
    ([("a", 4), ("b", 9)], "layer b: counts must sum to 9, got 8"),
    ([("layer1.0.conv2", 4), ("b", 8)], "layer b is not in the pattern"),
    ([("layer1.0.conv2", 4)], "layer layer2.0.conv2 is not a searchable layer of the network"),
    ([*NETWORK, ("layer3.0.conv2", 8)], "layer layer3.0.conv2 is not in the pattern"),
    ([("layer1.0.conv2", 5), ("layer2.0.conv2", 8)], "layer layer1.0.conv2: counts must sum to 5, got 4"),
]


def test_bind_matches_names_then_positions() -> None:
    pattern = small_pattern()
    assert pattern.bind(NETWORK) == pattern
    assert pattern.bind([("a.0", 4), ("b.0", 8)]).names == ("a.0", "b.0")


@pytest.mark.parametrize(("network", "rule"), BAD_BINDINGS)
def test_bind_refuses_another_network(network: list[tuple[str, int]], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        small_pattern().bind(network)


@pytest.mark.parametrize(
    ("kernel", "base", "expected"), [(9, 3, 4), (13, 3, 6), (13, 5, 3), (13, 7, 2), (3, 3, 1)]
)
def test_largest_dilation(kernel: int, base: int, expected: int) -> None:
    assert largest_dilation(kernel, base) == expected


@pytest.mark.parametrize(("kernel", "base"), [(8, 3), (9, 4), (1, 3), (11, 5), (9.0, 3), (True, 3)])
def test_largest_dilation_refuses_sizes_that_do_not_fit(kernel: Any, base: int) -> None:
    with pytest.raises(ValueError, match="kernel must be"):
        largest_dilation(kernel, base)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: LayerPattern(()), "at least one branch"),
        (lambda: LayerPattern((((0, 1), 3),)), "pair of positive integers"),
        (lambda: LayerPattern((((1, 1), 0),), "a"), "a: the count of dilation"),
        (lambda: LayerPattern((((1, 1), 1), ((1, 1), 2))), "may stand once"),
        (lambda: LayerPattern((((1, 1), 2),), None, ((1, 1),)), "the assignment must give the counts"),
        (lambda: DilationPattern((), 9), "at least one layer"),
        (
            lambda: DilationPattern((LayerPattern.from_counts({(5, 1): 1}),), 9),
            "dilations of kernel 9 reach 4, got 5",
        ),
    ],
)
def test_invalid_values_are_refused_when_made(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


def test_equality_and_hash_ignore_provenance_only() -> None:
    pattern = small_pattern()
    same = DilationPattern(pattern.layers, 9, meta={"seed": 7}, source="elsewhere")
    other = DilationPattern(pattern.layers, 13)
    assert same == pattern and hash(same) == hash(pattern)
    assert other != pattern
    assert copy.deepcopy(pattern) == pickle.loads(pickle.dumps(pattern)) == pattern


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    small_pattern().save(path)
    before = path.read_bytes(), meta_path(path).read_bytes()

    def full(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode()[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        DilationPattern(small_pattern().layers, 13).save(path)
    assert (path.read_bytes(), meta_path(path).read_bytes()) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.json", "p.meta.json"], "no litter"
    with pytest.raises(ValueError, match=r"must end in \.json"):
        small_pattern().save(tmp_path / "p.txt")


def test_provenance_survives_the_file(tmp_path: Path) -> None:
    small_pattern().save(tmp_path / "p.json")
    assert DilationPattern.load(tmp_path / "p.json").meta == {"criterion": "energy", "seed": 0}


def test_summary_has_a_row_per_layer_and_stage_and_the_network() -> None:
    layers = tuple(
        LayerPattern.from_counts({(1, 1): 3, (1, 5): 1}, f"layer{s}.{b}.conv2")
        for s in (1, 2)
        for b in (0, 1)
    )
    text = DilationPattern(layers, 13).summary()
    rows = {line.rsplit("%", 4)[0].strip().split("  ")[0]: line for line in text.splitlines()[2:]}
    assert list(rows) == [
        *[
            "layer1.0.conv2",
            "layer1.1.conv2",
            "= layer1",
            "layer2.0.conv2",
            "layer2.1.conv2",
            "= layer2",
            "= network",
        ]
    ]
    assert "16    75%  1.00  2.00     3.0x5.0  (1,1) 75%  (1,5) 25%" in rows["= network"]
