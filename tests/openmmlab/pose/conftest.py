# SPDX-License-Identifier: Apache-2.0
"""A few drawn pictures of people that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in COCO's layout: six training images, the first with a crowd region, and two to test on."""
    pytest.importorskip("mmpose")
    from ic_conv.openmmlab.pose.drawn_people import write_people

    return write_people(tmp_path_factory.mktemp("drawn"), {"train": 6, "val": 2})
