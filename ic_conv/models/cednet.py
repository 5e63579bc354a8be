# SPDX-License-Identifier: Apache-2.0
"""CedNet: RedNets of C-volutions (PRCV 2023)."""

from __future__ import annotations

import os
from typing import Any

from ic_conv.layers.cvolution2d import CVolution2d
from ic_conv.models.rednet import RedNet, rednet

DEFAULTS: dict[str, Any] = {"operator": CVolution2d, "kernel_size": 9, "stem_kernel_size": 7}


def cednet38(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> RedNet:
    """CedNet-38; arguments as in `cednet50`."""
    return rednet("rednet38", pattern_path, **(DEFAULTS | options))


def cednet50(pattern_path: str | os.PathLike[str] | None = None, **options: Any) -> RedNet:
    """CedNet-50: RedNet-50 with C-volutions of 9x9 windows, 7x7 in the stem; arguments as in `rednet`.

    Among the options are those of CVolution2d: `channel_reduction=None` leaves the channel branches out.

    Example:
        >>> net = cednet50(num_classes=10, channel_reduction=8)
    """
    return rednet("rednet50", pattern_path, **(DEFAULTS | options))
