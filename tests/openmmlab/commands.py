# SPDX-License-Identifier: Apache-2.0
"""The command lines of tools/, called in this process: importing the libraries anew takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(name: str) -> Callable[..., int]:
    """The main function of tools/NAME.py; it takes arguments that need not be strings."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return lambda *arguments: module.main([str(argument) for argument in arguments])
