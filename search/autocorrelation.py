# SPDX-License-Identifier: Apache-2.0
"""Second-order statistics of a convolution's input, and the least-squares fit of dilated kernels from them.

Legend: N images, C input channels, O output channels, G groups, c = C / G, K kernel size, T taps of a dilated
kernel, S slots; p an output position, t and u taps, counted from the kernel's centre.

The fit of a dilated kernel needs, for every two of its taps, the sum over p of x[s p + t] x[s p + u]. Where
only p's range limits nothing, that sum depends on the lag u - t alone (with stride s: and on the phases t mod
s and u mod s), and a Fourier transform gives all lags at once. It limits something only where both taps lie
on one side of the centre: of the lag's sum those rows or columns are missing that lie outside the window's
reach at the map's border. They are subtracted, one by one. Zero padding is thus counted exactly as the layer
sees it, at a memory that depends neither on the number nor on the size of the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ic_conv.pattern import Dilation
from search._correlator import Correlator, Pair, phases_of
from search._tap_pairs import TapPairs, kept_rows, lost_row, nearer_pair
from search.space import DilationSpace

RIDGE = 1e-4  # of the inputs' mean variance: how strongly the fit is held to the copied taps


class Fit(NamedTuple):
    """A fitted dilated kernel of O' output channels: what it needs and what it leaves.

    Attributes:
        taps: (O', c, T).
        offset: what is to be added to its output, (O',); zero if means were not removed.
        error: mean squared difference to the grown kernel's output that is left, (O',).
    """

    taps: Tensor
    offset: Tensor
    error: Tensor


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of a convolution's input windows, and of them with its output; means run over p.

    Attributes:
        pairs: where the sums stand.
        space: the search space.
        weight: the grown kernel, (O, c, K, K).
        inputs: by slot, (S, G, c, c).
        cross: of output and window, (O, c, K * K).
        mean: of the window, (G, c, K * K); zeros if means shall count.
        output_mean, variance: of the output, (O,).
        positions: number of p.
    """

    pairs: TapPairs
    space: DilationSpace
    weight: Tensor
    inputs: Tensor
    cross: Tensor
    mean: Tensor
    output_mean: Tensor
    variance: Tensor
    positions: int

    @property
    def unknowns(self) -> int:
        """Weights of a dilated kernel per output channel, T * c."""
        return self.weight.shape[1] * self.space.base_kernel**2

    def normal_matrix(self, dilation: Dilation) -> Tensor:
        """Covariance of the window's values under a dilated kernel, taps outermost: (G, T * c, T * c)."""
        taps = self._taps(dilation)
        rows = [
            torch.cat([self._block(t, u) for u in taps], 2)  # (G, c, T * c)
            for t in taps
        ]
        mean = self._mean(dilation)
        return torch.cat(rows, 1).baddbmm_(mean, mean.mT, alpha=-1)

    def fit(self, dilation: Dilation, units: Tensor | None = None, ridge: float = RIDGE) -> Fit:
        """The dilated kernel whose output is nearest to the grown kernel's, in the mean square over p.

        Solves (A + r I) v = b + r w for all channels at once: A is the covariance of the inputs, b that of
        inputs and output, w the grown kernel's own taps, to which r holds what the data leave open. Dead and
        constant inputs so keep the copied taps.

        Args:
            dilation: (dy, dx).
            units: output channels, or groups of a grouped layer, by index; all by default.
            ridge: r over the mean of A's diagonal.
        """
        groups = len(self.mean)
        target = self._by_group(self.cross, dilation)
        level, mean = self.output_mean.view(groups, 1, -1), self._mean(dilation)
        target = target.baddbmm(mean, level, alpha=-1)
        copied = self._by_group(self.weight.detach().flatten(2).to(target), dilation)
        matrix, variance = self.normal_matrix(dilation), self.variance.view(groups, -1)
        if units is not None and groups == 1:
            target, copied, variance, level = (x[..., units] for x in (target, copied, variance, level))
        elif units is not None:
            target, copied, variance, level = (x[units] for x in (target, copied, variance, level))
            matrix, mean = matrix[units], mean[units]
        strength = matrix.diagonal(dim1=1, dim2=2).mean(1) * ridge
        strength = torch.where(strength > 0, strength, 1.0)
        factor, held = _factor(matrix, strength)
        taps = torch.cholesky_solve(target + held * copied, factor)
        # The residual's variance is V - 2 b v + v A v, and A v = b + r (w - v).
        error = variance - ((target - held * (copied - taps)) * taps).sum(1)
        rows = taps.mT.flatten(0, 1).unflatten(1, (-1, self.weight.shape[1])).mT
        return Fit(rows, (level - mean.mT @ taps).flatten(), error.flatten().clamp_min(0))

    def _taps(self, dilation: Dilation) -> list[Pair]:
        steps = range(-(self.space.base_kernel // 2), self.space.base_kernel // 2 + 1)
        return [(dilation[0] * i, dilation[1] * j) for i in steps for j in steps]

    def _block(self, t: Pair, u: Pair) -> Tensor:
        slot = self.pairs.slot(t, u)
        stored = self.inputs[slot.place]
        return stored.mT if slot.transposed else stored

    def _columns(self, dilation: Dilation) -> Tensor:
        return self.space.taps[self.space.candidates.index(dilation)].to(self.mean.device)

    def _mean(self, dilation: Dilation) -> Tensor:
        """(G, T * c, 1)"""
        return self.mean[:, :, self._columns(dilation)].mT.flatten(1).unsqueeze(2)

    def _by_group(self, values: Tensor, dilation: Dilation) -> Tensor:
        """The taps of a dilated kernel, (O, c, K * K) -> (G, T * c, O / G)."""
        return values[:, :, self._columns(dilation)].mT.flatten(1).unflatten(0, (len(self.mean), -1)).mT


def _factor(matrix: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of matrix + r I, which changes the matrix, and r (G, 1, 1).

    r grows tenfold until the factor exists, for rounding may leave a nearly singular matrix indefinite.
    """
    while True:
        matrix.diagonal(dim1=1, dim2=2).add_(strength[:, None])
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.any():
            return factor, strength[:, None, None]
        if not matrix.isfinite().all():
            raise ValueError("the statistics must be finite; does the supernet hold NaN weights?")
        matrix.diagonal(dim1=1, dim2=2).sub_(strength[:, None])
        strength = torch.where(failed > 0, 10 * strength, strength)


class SecondSums:
    """Adds up second moments of one convolution over batches of any sizes.

    Sums are of the input's precision, at least float32; each batch adds to them in the order of the calls.
    """

    def __init__(self, layer: nn.Conv2d, space: DilationSpace) -> None:
        self.layer, self.space, self.groups = layer, space, layer.groups
        self.pairs = TapPairs.of(space, (layer.stride[0], layer.stride[1]))
        self.inputs, self.cross = torch.zeros(0), torch.zeros(0)

    def add(self, x: Tensor, output: Tensor) -> None:
        """x (N, C, H, W) and what the layer made of it."""
        if not len(self.inputs):
            width = x.shape[1] // self.groups
            self.inputs = x.new_zeros(len(self.pairs.slots), self.groups, width, width)
            self.cross = x.new_zeros(self.space.kernel**2, self.groups, output.shape[1] // self.groups, width)
        phases = phases_of(x, self.pairs.stride)
        correlator = Correlator(phases, output, self.space.kernel - 1, self.groups)
        self._add_lags(correlator)
        correlator.add_cross(self.cross, self.space.kernel, self.pairs.stride)
        apart = {phase: part.permute(1, 2, 3, 0).contiguous() for phase, part in phases.items()}
        self._take_missing(apart, (output.shape[2], output.shape[3]))

    def result(self, mean: Tensor, output_mean: Tensor, variance: Tensor, positions: int) -> SecondMoments:
        """The moments; call it once, since it works in place.

        Args:
            mean: of the window, (C, K, K); zeros for a fit that does not remove means.
            output_mean, variance: (O,).
            positions: number of output positions that were added.
        """
        for index, other in self.pairs.missing():
            more = self.inputs[other.place]
            self.inputs[index] += more.mT if other.transposed else more
        return SecondMoments(
            self.pairs,
            self.space,
            self.layer.weight,
            self.inputs.div_(positions),
            self.cross.div_(positions).flatten(1, 2).movedim(0, 2),
            mean.flatten(1).unflatten(0, (self.groups, -1)).to(self.inputs),
            output_mean.to(self.inputs),
            variance.to(self.inputs),
            positions,
        )

    def _add_lags(self, correlator: Correlator) -> None:
        """The slots that no row or column is missing in: sums over a lag."""
        sy, sx = self.pairs.stride
        wanted: dict[tuple[Pair, Pair], dict[int, Pair]] = {}
        for key, index in self.pairs.slots.items():
            (ty, uy), (tx, ux) = key
            if self.pairs.nearer(key) is None:  # so t is the phase itself
                lags = wanted.setdefault(((ty, tx), (uy % sy, ux % sx)), {})
                lags[index] = uy // sy, ux // sx
        for (first, second), lags in wanted.items():
            correlator.add_lags(self.inputs, first, second, lags)

    def _take_missing(self, phases: Mapping[Pair, Tensor], outputs: Pair) -> None:
        """Takes from each other slot the row or column that it has less than its neighbour.

        phases: (C, rows, columns, N).
        """
        for (y, x), index in self.pairs.slots.items():
            gone = [
                nearer_pair(pair, s) is not None for pair, s in zip((y, x), self.pairs.stride, strict=True)
            ]
            if not any(gone):
                continue
            sides = [phases[y[i] % self.pairs.stride[0], x[i] % self.pairs.stride[1]] for i in (0, 1)]
            spans = []
            for axis, (pair, lost) in enumerate(zip((y, x), (gone[0], not gone[0]), strict=True)):
                lengths = sides[0].shape[axis + 1], sides[1].shape[axis + 1]
                spans.append(
                    (lost_row if lost else kept_rows)(pair, self.pairs.stride[axis], outputs[axis], lengths)
                )
            (rows, height), (columns, width) = spans
            if height > 0 and width > 0:
                first, second = (
                    side[:, row : row + height, column : column + width]
                    .flatten(1)
                    .unflatten(0, (self.groups, -1))
                    for side, row, column in zip(sides, rows, columns, strict=True)
                )
                self.inputs[index].baddbmm_(first, second.mT, alpha=-1)
