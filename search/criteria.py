# SPDX-License-Identifier: Apache-2.0
"""How badly each candidate stands for the supernet's kernel: the error of every channel and candidate.

A criterion takes the moments of a layer and the space, and returns float64 errors (O, D) relative to the
channel's own scale (0: nothing lost), since batch normalisation removes that scale.

Legend: O output channels, K kernel size, D candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from search.space import DilationSpace
from search.statistics import ConvMoments, LayerMoments

Criterion = Callable[[LayerMoments, DilationSpace], Tensor]


def energy(moments: LayerMoments, space: DilationSpace) -> Tensor:
    """Share of the energy, sum over inputs of w^2 E[x^2], that stands on the taps left out."""
    return _share_left_out(moments.tap_energies(), space)


def expectation(moments: LayerMoments, space: DilationSpace) -> Tensor:
    """The paper's criterion, |E[W x] - E[W_d x]| (IC-Conv, CVPR 2021, eq. 4); taps may cancel.

    Relative to the sum of the taps' absolute means.
    """
    means = moments.tap_means()
    left_out = means.sum(1, keepdim=True) - means[:, space.taps].sum(2)
    return _relative(left_out.abs(), means.abs().sum(1))


def taps(moments: LayerMoments, space: DilationSpace) -> Tensor:
    """Like `expectation`, but without cancellation: the absolute mean of each tap left out, summed."""
    return _share_left_out(moments.tap_means().abs(), space)


def mse(moments: LayerMoments, space: DilationSpace) -> Tensor:
    """Mean squared difference of the supernet's and the candidate's output, means removed."""
    if moments.residual is None or moments.variance is None:
        raise ValueError("the criterion mse needs moments that were collected with residuals=True")
    return _relative(moments.residual, moments.variance)


def refit(moments: LayerMoments, space: DilationSpace) -> Tensor:
    """Like `mse`, after the candidate's weights were fitted to the supernet's output by least squares."""
    second = moments.second if isinstance(moments, ConvMoments) else None
    if second is None:
        raise ValueError(
            "the criterion refit needs second moments, that is convolutions, and correlations=True in collect"
        )
    left = torch.stack([second.fit(dilation).error for dilation in space.candidates], 1)
    return _relative(left.double().cpu(), second.variance.double().cpu())


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {"energy": energy, "expectation": expectation, "taps": taps, "mse": mse, "refit": refit}
)
DEFAULT_CRITERION = "energy"
FIRST_ORDER = ("energy", "expectation", "taps")  # those whose moments are always there


def criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; known ones: {', '.join(CRITERIA)}")
    return CRITERIA[name]


def needs_residuals(name: str) -> bool:
    """Whether the criterion needs `collect(..., residuals=True)`."""
    return criterion(name) is mse


def needs_correlations(name: str) -> bool:
    """Whether the criterion needs `collect(..., correlations=True)`."""
    return criterion(name) is refit


def _share_left_out(amounts: Tensor, space: DilationSpace) -> Tensor:
    """1 - kept / total for non-negative amounts (O, K * K)."""
    total = amounts.sum(1)
    return _relative(total[:, None] - amounts[:, space.taps].sum(2), total)


def _relative(error: Tensor, scale: Tensor) -> Tensor:
    """error (O, D) / scale (O,); a channel without scale (dead) loses nothing with any candidate."""
    dead = scale <= 0
    return torch.where(dead[:, None], 0.0, error / scale.masked_fill(dead, 1.0)[:, None]).clamp_min(0)
