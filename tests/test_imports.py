# SPDX-License-Identifier: Apache-2.0
"""Importing must be light: no framework, compiler or GPU library that the user did not ask for."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "cupy",
    "triton",
    "numba",
    "mmengine",
    "mmcv",
    "mmdet",
    "mmpose",
    "timm",
    "matplotlib",
    "onnx",
    "scipy",
)


@pytest.mark.parametrize("package", ["ic_conv", "ic_conv.models", "ic_conv.functional"])
def test_import_loads_nothing_heavy_and_does_not_touch_cuda(package: str) -> None:
    code = (
        f"import sys, {package}, torch; "
        f"print([name for name in {HEAVY!r} if name in sys.modules], torch.cuda.is_initialized())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[] False"
