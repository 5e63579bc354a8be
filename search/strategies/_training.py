# SPDX-License-Identifier: Apache-2.0
"""Short trainings inside a search, on copies of the plain network."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ic_conv._modes import evaluating
from search.progress import bar
from search.strategies.base import PlainTask, SearchTask
from search.supernet import SuperConv2d, convert_to_supernet, super_layers

LEARNING_RATE = 1e-3  # AdamW's
HELD_OUT = 4  # batches that are kept for validation, or a quarter of them where they are few


@torch.no_grad()
def grown_copy(task: SearchTask, plain: PlainTask) -> tuple[nn.Module, dict[str, SuperConv2d]]:
    """A copy of the plain model with large kernels, on which each candidate's taps hold the plain weights.

    Returns:
        The model, and its grown layers by name.

    Raises:
        ValueError: an involution is among the layers.
    """
    model, network = copy.deepcopy((plain.model, plain.network))
    space = task.space
    convert_to_supernet(
        network,
        space.kernel,
        base_kernel=space.base_kernel,
        filter_fn=lambda module, name: name in task.units,
        inplace=True,
    )
    layers: dict[str, SuperConv2d] = {}
    for name, layer in super_layers(network).items():
        if not isinstance(layer, SuperConv2d):
            raise ValueError(f"{name}: trained searches are for convolutions, got {type(layer).__name__}")
        old = plain.network.get_submodule(name).get_parameter("weight")
        for taps in reversed(space.taps.to(old.device)):  # plain taps last: they stay as they are
            layer.weight.flatten(2)[:, :, taps] = old.flatten(2)
        layers[name] = layer
    return model, layers


def held_out(plain: PlainTask, most: int = HELD_OUT) -> list[Any]:
    """The first batches of a pass: a quarter of them, and no more than `most`.

    Raises:
        ValueError: there are fewer than four batches.
    """
    batches = list(islice(plain.samples(), 4 * most))
    if len(batches) < 4:
        raise ValueError(
            f"a search by validation keeps a quarter of the batches: at least 4, got {len(batches)}"
        )
    return batches[: len(batches) // 4]


def batches_after(plain: PlainTask, held: int) -> Iterator[Any]:
    """Pass after pass, without the first `held` batches of each.

    Raises:
        ValueError: no batch is left.
    """
    while True:
        count = 0
        for batch in islice(plain.samples(), held, None):
            count += 1
            yield batch
        if not count:
            raise ValueError(f"a training needs batches beyond the {held} that are held out, got none")


def network_inputs(plain: PlainTask, batches: Iterable[Any]) -> list[Tensor]:
    """What the model gives its network of the batches, after its own preparation."""
    seen: list[Tensor] = []
    handle = plain.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    try:
        with evaluating(plain.model):
            for batch in batches:
                plain.loss(plain.model, batch)
    finally:
        handle.remove()
    return seen


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of their values, by which searches tell whether they are the same."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fit(
    model: nn.Module,
    plain: PlainTask,
    batches: Iterator[Any],
    steps: int,
    *,
    seed: int,
    groups: Sequence[dict[str, Any]] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    progress: bool = False,
) -> None:
    """Trains a model of the task by AdamW.

    Args:
        seed: of what the model draws, such as dropout.
        groups: of the optimizer; by default all parameters.
        before_step: called with the number of each step, from 0.
        progress: show how far it is.
    """
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=LEARNING_RATE)
    model.train()
    with torch.random.fork_rng(), bar("search step", steps, progress) as report:
        torch.manual_seed(seed)
        for step, batch in enumerate(islice(batches, steps)):
            before_step(step)
            optimizer.zero_grad()
            plain.loss(model, batch).backward()
            optimizer.step()
            report(step + 1)


@torch.no_grad()
def loss_on(model: nn.Module, plain: PlainTask, batches: Sequence[Any]) -> float:
    """Mean loss, with the batches' own statistics in batch norms, since running ones lag behind."""
    model.train()
    return sum(float(plain.loss(model, batch)) for batch in batches) / len(batches)
