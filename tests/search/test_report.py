# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ic_conv import DilationPattern, LayerPattern
from search.report.figure import draw_pattern, receptive_field, share_map


def pattern(blocks: int = 2) -> DilationPattern:
    layers = tuple(
        LayerPattern.from_counts({(1, 1): 6, (2, 4): 2}, f"layer{stage}.{block}.conv2")
        for stage in (1, 2)
        for block in range(blocks)
    )
    strides = {layer.name: (4.0, 8.0) for layer in layers}
    return DilationPattern(layers, 9, meta={"layer_stride": strides})


def test_share_map_has_dy_in_rows() -> None:
    shares = share_map(pattern().layers[0], 4)
    assert shares.shape == (4, 4) and shares[0, 0] == 0.75 and shares[1, 3] == 0.25 and shares.sum() == 1


def test_receptive_field_adds_the_windows_in_image_pixels() -> None:
    # mean dilation (1.25, 1.75): each layer adds 2.5 * 4 rows and 3.5 * 8 columns
    np.testing.assert_allclose(receptive_field(pattern()), [[1 + 10 * n, 1 + 28 * n] for n in (1, 2, 3, 4)])
    np.testing.assert_allclose(receptive_field(pattern(), plain=True)[-1], [1 + 4 * 8, 1 + 4 * 16])
    unknown = DilationPattern(pattern().layers, 9)
    np.testing.assert_allclose(receptive_field(unknown)[0], [1 + 2.5, 1 + 3.5])


@pytest.mark.parametrize("blocks", [1, 2, 11])
def test_the_picture_grows_with_the_layers(blocks: int, tmp_path: Path) -> None:
    draw_pattern(pattern(blocks), tmp_path / "p.png", title="a title")
    with Image.open(tmp_path / "p.png") as picture:
        width, height = picture.size
        colours = len(set(picture.convert("L").resize((200, 200)).tobytes()))
    assert width > 800 and height > (600 if blocks > 8 else 300) and colours > 40
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]


def test_one_unnamed_layer_is_enough(tmp_path: Path) -> None:
    draw_pattern(DilationPattern((LayerPattern.plain(4),), 9), tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().lstrip().startswith("<?xml")
