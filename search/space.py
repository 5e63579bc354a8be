# SPDX-License-Identifier: Apache-2.0
"""The search space: which dilated kernels fit into the supernet's kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ic_conv.pattern import Dilation, largest_dilation


@dataclass(frozen=True)
class DilationSpace:
    """All dilations (dy, dx) with which a base kernel fits into the supernet's kernel.

    Args:
        kernel: size of the supernet's kernels, odd.
        base_kernel: size of the kernels that are dilated, odd.

    Raises:
        ValueError: a size is even, too small, or the base kernel does not fit at a whole dilation.

    Example:
        >>> len(DilationSpace(9).candidates), len(DilationSpace(13).candidates)
        (16, 36)
    """

    kernel: int = 9
    base_kernel: int = 3

    def __post_init__(self) -> None:
        if largest_dilation(self.kernel, self.base_kernel) < 2:
            raise ValueError(
                f"the supernet's kernel must be larger than the base kernel, "
                f"got kernel {self.kernel} for base kernel {self.base_kernel}"
            )

    @property
    def max_dilation(self) -> int:
        return largest_dilation(self.kernel, self.base_kernel)

    @cached_property
    def candidates(self) -> tuple[Dilation, ...]:
        """Row by row: (1, 1), (1, 2), ..., (2, 1), ..."""
        side = range(1, self.max_dilation + 1)
        return tuple((dy, dx) for dy in side for dx in side)

    @cached_property
    def taps(self) -> Tensor:
        """Positions of the candidates' taps in the flattened kernel: int64 (candidates, base_kernel ** 2)."""
        steps = torch.arange(self.base_kernel) - self.base_kernel // 2
        dy, dx = torch.tensor(self.candidates).T
        rows = self.kernel // 2 + dy[:, None] * steps
        columns = self.kernel // 2 + dx[:, None] * steps
        return (rows[:, :, None] * self.kernel + columns[:, None, :]).flatten(1)

    def tap_masks(self) -> Tensor:
        """Which taps of the kernel each candidate keeps: bool (candidates, kernel, kernel)."""
        masks = torch.zeros(len(self.candidates), self.kernel**2, dtype=torch.bool)
        masks.scatter_(1, self.taps, True)
        return masks.unflatten(1, (self.kernel, self.kernel))
