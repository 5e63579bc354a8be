# SPDX-License-Identifier: Apache-2.0
"""Reading weights: from files and other libraries' wrappings, with errors that say what does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ic_conv.pattern import DilationPattern, LayerPattern

Weights = str | os.PathLike[str] | Mapping[str, Tensor]
Layout = Literal["plain", "branches", "published"]

# What the command lines say of --trust-checkpoint.
TRUST = (
    "read the checkpoint as a pickle, as old ones need. A pickle can run any code that its author put in, "
    "with all your rights: only for files whose author you trust"
)


def read_weights(weights: Weights, trust: bool = False) -> tuple[dict[str, Tensor], str]:
    """A state dict on the CPU, and how to call its source in messages.

    Args:
        weights: a file of `torch.save`, or a state dict. A dict that holds it under ``state_dict`` or
            ``model``, as training programs save it, is unpacked. Only tensors and plain values are read.
        trust: read a file as a pickle, which may run any code that its author put in.

    Raises:
        ValueError: the file holds something else; the message names it.
        OSError: the file is missing or cannot be read.
    """
    state: Any = weights
    source = "the weights"
    if not isinstance(weights, Mapping):
        source = os.fspath(weights)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=not trust)
        except OSError:
            raise
        except Exception as error:  # unpickling a damaged or foreign file may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{source}: not a file of weights that can be read safely ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source}: must hold a dict of tensors")
    return dict(state), source


def without_prefix(state: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """The part of a state dict in which `key` stands, without what stands before it (``backbone.``)."""
    prefix = next((name[: -len(key)] for name in state if name.endswith(key)), "")
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def layout(state: Mapping[str, Tensor]) -> Layout:
    """How a state dict keeps searchable layers: as plain convolutions, as `ICConv2d`, or as published."""
    if any(".conv_list." in name for name in state):
        return "published"
    return "branches" if any(name.endswith(".branches") for name in state) else "plain"


def pattern_of(state: Mapping[str, Tensor], base_kernel: int = 3) -> DilationPattern | None:
    """The pattern that the `ICConv2d` layers of a state dict tell; its kernel is the smallest that fits."""
    layers = []
    for name, rows in state.items():
        if name.endswith(".branches"):
            branches = tuple(((dy, dx), count) for dy, dx, count in rows.tolist())
            layers.append(LayerPattern(branches, name.removesuffix(".branches")))
    if not layers:
        return None
    reach = max(layer.max_dilation for layer in layers)
    return DilationPattern(tuple(layers), reach * (base_kernel - 1) + 1, base_kernel)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a state dict that must fit.

    Raises:
        ValueError: keys are missing or unknown, or shapes or patterns differ; one line names the first few.
    """
    try:
        missing, unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{source}: {_few(problems, '; ')}") from error
    problems = [f"{kind} {_few(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
    if problems:
        raise ValueError(f"{source}: weights of another network: {'; '.join(problems)}")


def _few(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(items[:3]) + more
