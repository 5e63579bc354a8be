# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several packages' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Sample data that lies beside the checkout: published pattern files and a few COCO images."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the sample data folder ../shared/data is not there")
    return folder
