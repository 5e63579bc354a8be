# SPDX-License-Identifier: Apache-2.0
"""How far a result may lie from its float64 reference: the one table of the tests, by dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative and absolute, for sums of up to some hundred terms of size one. A backend rounds a float32 sum at
# every step, and a half-precision result once.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 3e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (8e-3, 8e-3),
}


def assert_near(actual: Tensor, reference: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fails unless `actual` equals the float64 `reference` within the tolerance of its dtype (or `dtype`)."""
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), reference, rtol=rtol, atol=atol, equal_nan=True)
