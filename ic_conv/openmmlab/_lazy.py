# SPDX-License-Identifier: Apache-2.0
"""Classes that extend an OpenMMLab library, imported when a config asks for them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from mmengine.registry import MODELS


def register_lazily(name: str, module: str, library: str) -> None:
    """Registers the class `name` of `module`, which extends a class of `library`.

    The libraries take seconds to import and not every one is installed, hence not before it is needed.
    """

    def build(*args: Any, **options: Any) -> Any:
        require(library, name)
        return getattr(importlib.import_module(module), name)(*args, **options)

    build.__name__ = build.__qualname__ = name
    MODELS.register_module(name, module=build, force=True)


def require(library: str, user: str) -> None:
    """Raises an ImportError that says what to install if a library is missing."""
    if importlib.util.find_spec(library) is None:
        raise ImportError(
            f"{user} needs {library}, which is not installed: run `make install-openmmlab`, "
            "or install the extra ic-conv[openmmlab] as the README says"
        )
