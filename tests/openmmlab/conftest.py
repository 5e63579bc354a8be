# SPDX-License-Identifier: Apache-2.0
"""MMEngine keeps the last library's scope for the whole process; here each test starts without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_scope() -> Iterator[None]:
    registry = pytest.importorskip("mmengine.registry")
    registry.DefaultScope._instance_dict.clear()
    yield
    registry.DefaultScope._instance_dict.clear()
