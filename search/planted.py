# SPDX-License-Identifier: Apache-2.0
"""Planted recovery: does a criterion find dilations that are known to be there?

One dilated layer with known random dilations makes targets from spatially correlated inputs; a layer with
the full kernel is fitted to them, as a supernet would be; each criterion then names the dilations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from search.assign import assign_argmin, unit_errors
from search.criteria import CRITERIA
from search.space import DilationSpace
from search.statistics import collect
from search.supernet import convert_to_supernet


@dataclass(frozen=True)
class PlantedTask:
    """A planted problem.

    Args:
        kernel: size of the fitted kernel.
        in_channels, out_channels: of the layer.
        size: height and width of the inputs in pixels.
        blur: standard deviation of the inputs' spatial correlation in pixels.
        batch_size: images per fitting step.
        fit: fit until the held-out coefficient of determination R^2 reaches this.
        max_steps: give up fitting after so many steps.
    """

    kernel: int = 9
    in_channels: int = 16
    out_channels: int = 24
    size: int = 24
    blur: float = 1.5
    batch_size: int = 16
    fit: float = 0.99
    max_steps: int = 3000

    def inputs(self, generator: torch.Generator) -> Tensor:
        """A batch of blurred noise after a ReLU, as a layer inside a network sees it."""
        noise = torch.randn(self.batch_size, self.in_channels, self.size, self.size, generator=generator)
        window = 2 * round(3 * self.blur) + 1
        blurred = gaussian_blur(noise, [window, window], [self.blur, self.blur])
        return F.relu(blurred / blurred.std())


def planted_recovery(seed: int, task: PlantedTask | None = None) -> tuple[dict[str, float], float]:
    """Share of the channels whose planted dilation each criterion finds.

    Returns:
        The share by criterion, and the R^2 that the fit reached.
    """
    task = task or PlantedTask()
    space = DilationSpace(task.kernel)
    generator = torch.Generator().manual_seed(seed)
    planted = np.random.default_rng(seed).integers(len(space.candidates), size=task.out_channels)
    truth = torch.randn(task.out_channels, task.in_channels, 9, generator=generator) / task.in_channels**0.5
    kernel = torch.zeros(task.out_channels, task.in_channels, task.kernel**2)
    taps = space.taps[torch.from_numpy(planted)]
    kernel.scatter_(2, taps[:, None].expand_as(truth), truth)
    kernel = kernel.unflatten(2, (task.kernel, task.kernel))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Conv2d(task.in_channels, task.out_channels, 3, padding=1, bias=False))
        supernet = convert_to_supernet(plain, task.kernel)
    reached = _fit(supernet, kernel, task, generator)

    moments = collect(supernet, _batches(task, generator, 8), space, residuals=True, correlations=True)["0"]
    found = {}
    for name, criterion in CRITERIA.items():
        errors = unit_errors(criterion(moments, space), task.out_channels)
        assignment = assign_argmin(errors, space).assignment or ()
        hits = [
            dilation == space.candidates[index] for dilation, index in zip(assignment, planted, strict=True)
        ]
        found[name] = sum(hits) / len(hits)
    return found, reached


def _fit(supernet: nn.Module, kernel: Tensor, task: PlantedTask, generator: torch.Generator) -> float:
    """Fits the supernet to the planted kernel's outputs; returns the held-out R^2."""
    optimizer = torch.optim.Adam(supernet.parameters(), lr=3e-3)
    held_out = list(_batches(task, generator, 2))
    reached = -float("inf")
    for step, images in enumerate(_batches(task, generator, task.max_steps)):
        target = F.conv2d(images, kernel, padding=task.kernel // 2)
        loss = F.mse_loss(supernet(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 24:
            reached = min(_r2(supernet, kernel, images) for images in held_out)
            if reached >= task.fit:
                break
    return reached


@torch.no_grad()
def _r2(supernet: nn.Module, kernel: Tensor, images: Tensor) -> float:
    target = F.conv2d(images, kernel, padding=kernel.shape[-1] // 2)
    return float(1 - (supernet(images) - target).var() / target.var())


def _batches(task: PlantedTask, generator: torch.Generator, count: int) -> Iterator[Tensor]:
    return (task.inputs(generator) for _ in range(count))
