# SPDX-License-Identifier: Apache-2.0
"""One streaming pass over calibration data: the moments that the criteria need, at constant memory.

Legend: N images, C input channels, O output channels, K kernel size, D candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.space import DilationSpace
from search.supernet import SuperConv2d, super_layers

RESIDUAL_STEP = 8  # residuals on every 8th batch only: one costs about two forward passes


@dataclass(frozen=True)
class LayerMoments:
    """What one layer saw. Means run over images and output positions; padding counts as zeros.

    Attributes:
        mean: mean of the input under each tap, float64 (C, K, K).
        square: mean of the squared input under each tap, float64 (C, K, K).
        residual: variance of the supernet's output minus each candidate's, float64 (O, D), if collected.
        variance: variance of the supernet's output, float64 (O,), if collected.
        stride: pixels of the image per pixel of the layer's input, (vertical, horizontal).
    """

    mean: Tensor
    square: Tensor
    residual: Tensor | None
    variance: Tensor | None
    stride: tuple[float, float]


@torch.no_grad()
def collect(
    supernet: nn.Module, batches: Iterable[Any], space: DilationSpace, *, residuals: bool = False
) -> dict[str, LayerMoments]:
    """Runs the batches through the supernet in eval mode and returns the moments of each grown layer.

    Args:
        supernet: a network made by `convert_to_supernet`.
        batches: image batches (N, 3, H, W), or tuples, lists or dicts that hold one first or under
            ``"inputs"``. Sizes may vary from batch to batch.
        space: the search space of the supernet.
        residuals: collect `residual` and `variance` too, which the criterion ``mse`` needs, on the first
            batch and every eighth after it.

    Raises:
        ValueError: no batch, or no grown layer.
    """
    layers = super_layers(supernet)
    if not layers:
        raise ValueError("the network has no grown layer: make a supernet with convert_to_supernet first")
    device = next(supernet.parameters()).device
    sums = {name: _LayerSums(name, layer, space, residuals) for name, layer in layers.items()}
    modes = [(module, module.training) for module in supernet.modules()]
    supernet.eval()
    size = None
    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(sums[name])
            hooks.callback(handle.remove)
        for batch in batches:
            images = images_of(batch).to(device, non_blocking=True)
            size = images.shape[-2], images.shape[-1]
            supernet(images)
    for module, training in modes:
        module.training = training
    if size is None:
        raise ValueError("the calibration data is empty: at least one batch is needed")
    return {name: layer_sums.moments(size) for name, layer_sums in sums.items()}


def images_of(batch: Any) -> Tensor:
    """The image tensor of a batch as data loaders yield it."""
    if isinstance(batch, Mapping):
        batch = batch["inputs"]
    elif isinstance(batch, list | tuple):
        batch = batch[0]
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        raise TypeError(f"a calibration batch must hold images (N, C, H, W), got {type(batch).__name__}")
    return batch


class _LayerSums:
    """Forward hook of one layer that adds up its moments."""

    def __init__(self, name: str, layer: SuperConv2d, space: DilationSpace, residuals: bool) -> None:
        self.name = name
        k = layer.kernel_size[0]
        self.first = torch.zeros(layer.in_channels, k, k, dtype=torch.float64)
        self.second = torch.zeros_like(self.first)
        self.positions = self.batches = 0
        self.space = space
        self.size = (0, 0)
        self.outputs = _Variance(layer.out_channels, 1) if residuals else None
        self.left_out = _Variance(layer.out_channels, len(space.candidates)) if residuals else None

    def __call__(self, layer: SuperConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        self.size = x.shape[-2], x.shape[-1]
        self.positions += len(x) * output.shape[-2] * output.shape[-1]
        wide = x if x.dtype == torch.float64 else x.float()
        self.first += _window_sums(wide.sum(0), layer, output).cpu()
        self.second += _window_sums(wide.square().sum(0), layer, output).cpu()
        if self.left_out is not None and self.outputs is not None and self.batches % RESIDUAL_STEP == 0:
            full = output.detach()
            self.outputs.add(full, 0)
            for index, kept in enumerate(_candidate_outputs(wide, layer, self.space)):
                self.left_out.add(full - kept, index)  # a bias shifts the mean alone
        self.batches += 1

    def moments(self, image_size: tuple[int, int]) -> LayerMoments:
        if not self.positions:
            raise ValueError(
                f"{self.name}: the network never ran this grown layer; leave it out with filter_fn"
            )
        return LayerMoments(
            mean=self.first / self.positions,
            square=self.second / self.positions,
            residual=None if self.left_out is None else self.left_out.result(),
            variance=None if self.outputs is None else self.outputs.result()[:, 0],
            stride=(image_size[0] / self.size[0], image_size[1] / self.size[1]),
        )


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

    def result(self) -> Tensor:
        mean, square = self.sums / torch.tensor(self.count, dtype=torch.float64)
        return (square - mean.square()).clamp_min(0)


def _window_sums(total: Tensor, layer: SuperConv2d, output: Tensor) -> Tensor:
    """Sum over output positions of the input under each tap: (C, H, W) -> (C, K, K).

    The window of tap u covers the rows i * stride + u - padding of the output rows i, so two 0/1 matrices
    select rows and columns; the batch is summed before, which makes this almost free.
    """
    rows, columns = (
        _tap_counts(total.shape[axis + 1], output.shape[axis + 2], layer, axis, total.device)
        for axis in (0, 1)
    )
    return torch.einsum("uh,chw,vw->cuv", rows, total.double(), columns)


def _tap_counts(size: int, outputs: int, layer: SuperConv2d, axis: int, device: torch.device) -> Tensor:
    """Entry (u, h) is 1 where tap u of some output position reads row h."""
    tap = torch.arange(layer.kernel_size[axis], device=device)[:, None] - int(layer.padding[axis])
    read = tap + torch.arange(outputs, device=device) * layer.stride[axis]
    return F.one_hot(read.clamp(-1, size) + 1, size + 2).sum(1)[:, 1:-1].double()


def _candidate_outputs(x: Tensor, layer: SuperConv2d, space: DilationSpace) -> Iterable[Tensor]:
    """Output of each candidate with the nine taps of the big kernel, without bias."""
    base = space.base_kernel
    flat = layer.weight.detach().to(x.dtype).flatten(2)
    for dilation, taps in zip(space.candidates, space.taps.to(x.device), strict=True):
        weight = flat[:, :, taps].unflatten(2, (base, base))
        padding = tuple(d * (base // 2) for d in dilation)
        yield F.conv2d(x, weight, None, layer.stride, padding, dilation, layer.groups)
