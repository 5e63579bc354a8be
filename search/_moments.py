# SPDX-License-Identifier: Apache-2.0
"""What one grown layer saw of the calibration data, and the hooks that add it up.

Legend: N images, C input channels, O output channels, G groups, K kernel size, D candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ic_conv.functional import involution2d
from search.autocorrelation import SecondMoments, SecondSums
from search.space import DilationSpace
from search.supernet import SuperConv2d, SuperInvolution2d

RESIDUAL_STEP = 8  # residuals on every 8th batch only: one costs about two forward passes


@dataclass(frozen=True)
class LayerMoments(ABC):
    """Means run over images and output positions; padding counts as zeros, as the layer really sees it.

    So a tap that mostly reads padding, as far ones do on small maps, holds little.

    Attributes:
        residual: variance of the supernet's output minus each candidate's, float64 (O, D), if collected.
        variance: variance of the supernet's output, float64 (O,), if collected.
        stride: pixels of the image per pixel of the layer's input, (vertical, horizontal).
    """

    residual: Tensor | None
    variance: Tensor | None
    stride: tuple[float, float]

    @abstractmethod
    def tap_means(self) -> Tensor:
        """Mean of what each tap adds to the output: float64 (O, K * K)."""

    @abstractmethod
    def tap_energies(self) -> Tensor:
        """Sum over the inputs of the mean square of what each tap adds of it: float64 (O, K * K)."""


@dataclass(frozen=True)
class ConvMoments(LayerMoments):
    """Moments of a convolution's input; its weights are constant, so they are multiplied on afterwards.

    Attributes:
        weight: (O, C / groups, K, K).
        mean, square: mean of the input, and of its square, under each tap, float64 (C, K, K).
        groups: of the convolution.
        second: second moments, if collected.
    """

    weight: Tensor
    mean: Tensor
    square: Tensor
    groups: int = 1
    second: SecondMoments | None = None

    def tap_means(self) -> Tensor:
        return self._weighted(self.mean, squared=False)

    def tap_energies(self) -> Tensor:
        return self._weighted(self.square, squared=True)

    def _weighted(self, moment: Tensor, squared: bool) -> Tensor:
        weight = self.weight.detach()
        per_group = moment.flatten(1).to(weight.device, weight.dtype).unflatten(0, (self.groups, -1))
        # One output channel at a time stays in the cache; a whole 13x13 layer does not.
        sums = [
            ((channel.square() if squared else channel) * per_group[group]).sum(0)
            for group, channels in enumerate(weight.flatten(2).unflatten(0, (self.groups, -1)))
            for channel in channels
        ]
        return torch.stack(sums).double().cpu()


@dataclass(frozen=True)
class InvolutionMoments(LayerMoments):
    """Moments of an involution, whose kernels differ from position to position; O = C.

    Attributes:
        mean, square: mean and mean square of what each tap adds, float64 (C, K * K).
    """

    mean: Tensor
    square: Tensor

    def tap_means(self) -> Tensor:
        return self.mean

    def tap_energies(self) -> Tensor:
        return self.square


class LayerSums(ABC):
    """Forward hook of one layer that adds up its moments."""

    def __init__(self, name: str, channels: tuple[int, int], space: DilationSpace, residuals: bool) -> None:
        inputs, outputs = channels
        self.name, self.space = name, space
        self.first = torch.zeros(inputs, space.kernel, space.kernel, dtype=torch.float64)
        self.squares = torch.zeros_like(self.first)
        self.positions = self.batches = 0
        self.size = (0, 0)
        self.outputs = _Variance(outputs, 1) if residuals else None
        self.left_out = _Variance(outputs, len(space.candidates)) if residuals else None

    @abstractmethod
    def attach(self) -> list[RemovableHandle]:
        """Starts listening to the layer."""

    @abstractmethod
    def moments(self, image_size: tuple[int, int]) -> LayerMoments:
        """The moments of everything that passed."""

    def count(self, x: Tensor, output: Tensor) -> None:
        self.size = x.shape[-2], x.shape[-1]
        self.positions += len(x) * output.shape[-2] * output.shape[-1]
        self.batches += 1

    def add_residuals(self, output: Tensor, candidates: Iterable[Tensor]) -> None:
        """Called once per batch, before `count`. `candidates` are consumed on every 8th batch only."""
        if self.left_out is None or self.outputs is None or self.batches % RESIDUAL_STEP:
            return
        self.outputs.add(output, 0)
        for index, kept in enumerate(candidates):
            self.left_out.add(output - kept, index)  # a bias shifts the mean alone

    def common(self, image_size: tuple[int, int]) -> tuple[Tensor | None, Tensor | None, tuple[float, float]]:
        """The fields of LayerMoments."""
        if not self.positions:
            raise ValueError(
                f"{self.name}: the network never ran this grown layer; leave it out with filter_fn"
            )
        residual = None if self.left_out is None else self.left_out.result()
        variance = None if self.outputs is None else self.outputs.result()[:, 0]
        return residual, variance, (image_size[0] / self.size[0], image_size[1] / self.size[1])


class ConvSums(LayerSums):
    """Besides, if `correlations` are asked for, second moments; about the means, if `centred`."""

    def __init__(
        self,
        name: str,
        layer: SuperConv2d,
        space: DilationSpace,
        residuals: bool,
        correlations: bool = False,
        centred: bool = True,
    ) -> None:
        super().__init__(name, (layer.in_channels, layer.out_channels), space, residuals)
        self.layer, self.centred = layer, centred
        self.second = SecondSums(layer, space) if correlations else None
        self.made = _Variance(layer.out_channels, 1)

    def attach(self) -> list[RemovableHandle]:
        return [self.layer.register_forward_hook(self)]

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = _wide(inputs[0])
        self.first += self._window_sums(x.sum(0), output).cpu()
        self.squares += self._window_sums(x.square().sum(0), output).cpu()
        self.add_residuals(output, self._candidates(x))
        if self.second is not None:
            self.made.add(output, 0)
            self.second.add(x, _wide(output))
        self.count(x, output)

    def moments(self, image_size: tuple[int, int]) -> ConvMoments:
        common = self.common(image_size)
        mean, square = self.first / self.positions, self.squares / self.positions
        second = None if self.second is None else self._second_moments(self.second, mean)
        return ConvMoments(*common, self.layer.weight, mean, square, self.layer.groups, second)

    def _second_moments(self, sums: SecondSums, mean: Tensor) -> SecondMoments:
        level, power = self.made.moments()[..., 0]
        if self.centred:
            power = power - level.square()
        else:
            mean, level = torch.zeros_like(mean), torch.zeros_like(level)
        return sums.result(mean, level, power, self.positions)

    def _window_sums(self, total: Tensor, output: Tensor) -> Tensor:
        """Sum over output positions of the input under each tap: (C, H, W) -> (C, K, K).

        The window of tap u covers the rows i * stride + u - padding of the output rows i, so two 0/1
        matrices select rows and columns; the batch is summed before, which makes this almost free.
        """
        rows, columns = (
            self._tap_counts(axis, total.shape[axis + 1], output.shape[axis + 2], total.device)
            for axis in (0, 1)
        )
        return torch.einsum("uh,chw,vw->cuv", rows, total.double(), columns)

    def _tap_counts(self, axis: int, size: int, outputs: int, device: torch.device) -> Tensor:
        """Entry (u, h) is 1 where tap u of some output position reads row h."""
        tap = torch.arange(self.space.kernel, device=device)[:, None] - self.space.kernel // 2
        read = tap + torch.arange(outputs, device=device) * self.layer.stride[axis]
        return F.one_hot(read.clamp(-1, size) + 1, size + 2).sum(1)[:, 1:-1].double()

    def _candidates(self, x: Tensor) -> Iterable[Tensor]:
        """Output of each candidate with its taps of the big kernel, without bias."""
        layer, centre = self.layer, self.space.kernel // 2
        weight = layer.weight.detach().to(x.dtype)
        for dilation in self.space.candidates:
            padding = [d * (self.space.base_kernel // 2) for d in dilation]
            rows, columns = (
                slice(centre - reach, centre + reach + 1, d)
                for reach, d in zip(padding, dilation, strict=True)
            )
            # A slice is several times quicker than gathering `space.taps`.
            yield F.conv2d(
                x, weight[:, :, rows, columns], None, layer.stride, padding, dilation, layer.groups
            )


class InvolutionSums(LayerSums):
    def __init__(self, name: str, layer: SuperInvolution2d, space: DilationSpace, residuals: bool) -> None:
        super().__init__(name, (layer.channels, layer.channels), space, residuals)
        self.layer = layer
        self.kernel = torch.zeros(0)  # of the forward pass under way

    def attach(self) -> list[RemovableHandle]:
        return [self.layer.conv2.register_forward_hook(self._keep), self.layer.register_forward_hook(self)]

    def _keep(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.kernel = _wide(output).unflatten(1, (self.layer.groups, self.space.kernel, self.space.kernel))

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x, kernel = _wide(inputs[0]), self.kernel
        (sy, sx), margin = self.layer.stride, self.space.kernel // 2
        padded = F.pad(x, [margin] * 4).unflatten(1, (self.layer.groups, -1))
        rows, columns = output.shape[-2:]
        for u in range(self.space.kernel):
            for v in range(self.space.kernel):
                window = padded[..., u : u + sy * rows : sy, v : v + sx * columns : sx][..., :rows, :columns]
                added = (window * kernel[:, :, u, v].unsqueeze(2)).flatten(1, 2)
                self.first[:, u, v] += added.sum((0, 2, 3)).double().cpu()
                self.squares[:, u, v] += added.square().sum((0, 2, 3)).double().cpu()
        self.add_residuals(output, self._candidates(x, kernel))
        self.count(x, output)
        self.kernel = torch.zeros(0)

    def moments(self, image_size: tuple[int, int]) -> InvolutionMoments:
        common = self.common(image_size)
        mean, square = (total.flatten(1) / self.positions for total in (self.first, self.squares))
        return InvolutionMoments(*common, mean, square)

    def _candidates(self, x: Tensor, kernel: Tensor) -> Iterable[Tensor]:
        """Output of each candidate with its taps of the generated kernels."""
        base = self.space.base_kernel
        flat = kernel.flatten(2, 3)
        for dilation, taps in zip(self.space.candidates, self.space.taps.to(x.device), strict=True):
            part = flat[:, :, taps].unflatten(2, (base, base))
            yield involution2d(x, part, stride=self.layer.stride, dilation=dilation)


class _Variance:
    """Streaming variance over images and positions, per channel and column."""

    def __init__(self, channels: int, columns: int) -> None:
        self.sums = torch.zeros(2, channels, columns, dtype=torch.float64)
        self.count = [0] * columns

    def add(self, values: Tensor, column: int) -> None:
        variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        count = values.numel() // values.shape[1]
        self.sums[0, :, column] += count * mean.double().cpu()
        self.sums[1, :, column] += count * (variance.double() + mean.double().square()).cpu()
        self.count[column] += count

    def moments(self) -> Tensor:
        """Mean and mean square: (2, channels, columns)."""
        return self.sums / torch.tensor(self.count, dtype=torch.float64)

    def result(self) -> Tensor:
        mean, square = self.moments()
        return (square - mean.square()).clamp_min(0)


def _wide(x: Tensor) -> Tensor:
    """At least float32, so that sums of squares do not overflow."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()
