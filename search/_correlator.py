# SPDX-License-Identifier: Apache-2.0
"""Correlations of feature maps at many lags, by Fourier transforms.

Legend: N images, C channels, G groups, c = C / G, O output channels, K kernel size, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.fft import next_fast_len
from torch import Tensor

Pair = tuple[int, int]  # two taps along one axis, or one value for each axis
BLOCK = 2**26  # bytes of a spectrum that are in work at a time


def phases_of(x: Tensor, stride: Pair) -> dict[Pair, Tensor]:
    """Every stride-th row and column of x (N, C, H, W), by the first row and column."""
    sy, sx = stride
    return {(i, j): x[:, :, i::sy, j::sx] for i in range(sy) for j in range(sx)}


class Correlator:
    """Correlations of one batch, by Fourier transforms of the input's phases and of the output.

    Args:
        phases: of the input, (N, C, rows, columns) each.
        output: (N, O, Ho, Wo), as large as the first phase.
        reach: the largest lag.
        groups: only channels of one group are correlated.
    """

    def __init__(self, phases: Mapping[Pair, Tensor], output: Tensor, reach: int, groups: int) -> None:
        self.size = output.shape[2], output.shape[3]
        self.grid = [next_fast_len(n + min(reach, n - 1), real=True) for n in self.size]
        self.groups = groups
        self.phases = {phase: self._spectrum(part) for phase, part in phases.items() if part.numel()}
        self.output = self._spectrum(output)

    def add_lags(self, sums: Tensor, first: Pair, second: Pair, lags: Mapping[int, Pair]) -> None:
        """Adds the sum over q of phase_1[q] phase_2[q + lag] to the slots of sums (S, G, c, c)."""
        if {first, second} <= self.phases.keys():
            self._add(sums, self.phases[first], self.phases[second], lags)

    def add_cross(self, sums: Tensor, kernel: int, stride: Pair) -> None:
        """Adds the sum over p of output[p] x[s p + t] to sums (K * K, G, O / G, c)."""
        half, (sy, sx) = kernel // 2, stride
        for (py, px), spectrum in self.phases.items():
            lags = {
                y * kernel + x: ((y - half) // sy, (x - half) // sx)
                for y in range((py + half) % sy, kernel, sy)
                for x in range((px + half) % sx, kernel, sx)
            }
            self._add(sums, self.output, spectrum, lags)

    def _spectrum(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (frequencies, G, c, N), complex."""
        transformed = torch.fft.rfft2(x, s=self.grid).permute(2, 3, 1, 0)
        return transformed.flatten(0, 1).unflatten(1, (self.groups, -1))

    def _add(self, sums: Tensor, first: Tensor, second: Tensor, lags: Mapping[int, Pair]) -> None:
        near = {
            i: lag for i, lag in lags.items() if all(abs(d) < n for d, n in zip(lag, self.size, strict=True))
        }
        if not near:
            return
        cosine, sine = self._waves(list(near.values()), sums)
        index = torch.tensor(list(near), device=sums.device)
        right = torch.cat([second.real, second.imag], 3).mT  # (frequencies, G, 2 N, c)
        turned = torch.cat([second.imag, -second.real], 3).mT
        step = max(1, BLOCK // (right[..., 0, :].numel() * right.element_size()))
        for start in range(0, first.shape[2], step):
            rows = slice(start, start + step)
            left = torch.cat([first.real[:, :, rows], first.imag[:, :, rows]], 3)
            found = torch.addmm(sine @ (left @ turned).flatten(1), cosine, (left @ right).flatten(1))
            sums[:, :, rows].index_add_(0, index, found.unflatten(1, sums[0, :, rows].shape))

    def _waves(self, lags: list[Pair], like: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the inverse transform that give these lags: (lags, frequencies) for either part."""
        rows, columns = self.grid
        fy, fx = torch.arange(rows), torch.arange(columns // 2 + 1)
        at = torch.tensor(lags)
        # Whole turns go before the cosine: its argument stays small and exact.
        y, x = at[:, :1] * fy % rows, at[:, 1:] * fx % columns
        angle = 2 * torch.pi * (y[:, :, None].double() / rows + x[:, None, :].double() / columns)
        weight = torch.where((fx == 0) | (2 * fx == columns), 1.0, 2.0).double() / (rows * columns)
        cosine, sine = ((wave * weight).flatten(1).to(like) for wave in (angle.cos(), -angle.sin()))
        return cosine, sine
