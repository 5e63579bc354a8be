# SPDX-License-Identifier: Apache-2.0
"""What a search would do, and what it would cost here: the answer to --dry-run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from search.data import build_loader
from search.engine.options import resolve_device
from search.options import SearchOptions
from search.run import Prepared
from search.strategies import EDOStrategy
from search.supernet import super_layers


@dataclass(frozen=True)
class Cost:
    """Measured on one real training step.

    Attributes:
        step_seconds: forward, backward and optimizer step, of the second one.
        state_bytes: weights, gradients and AdamW's two moments.
        activation_bytes: what the forward pass keeps for the backward pass.
        parameters: of the supernet and its task head.
    """

    step_seconds: float
    state_bytes: int
    activation_bytes: int
    parameters: int


def measure_cost(options: SearchOptions, prepared: Prepared) -> Cost:
    """Runs two training steps on a scratch optimizer; the prepared weights are of no use afterwards."""
    config = options.train.read_config()
    device = resolve_device(options.train.device)
    task = prepared.task.to(device).train()
    if options.train.channels_last:
        task.to(memory_format=torch.channels_last)
    batch = next(iter(build_loader(prepared.dataset, config.train_dataloader.batch_size)))
    batch = {name: value.to(device) for name, value in batch.items()}
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-6)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = task(**batch, mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    weights = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in task.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    return Cost(seconds, 4 * sum(weights.values()), activations, sum(p.numel() for p in task.parameters()))


def describe(options: SearchOptions, prepared: Prepared) -> str:
    """The plan as text: layers, sizes, candidates."""
    space = prepared.search.space
    width = max(map(len, prepared.search.units))
    base, grown = (f"{size}x{size}" for size in (space.base_kernel, space.kernel))
    lines = [
        f"{options.name}: {len(prepared.search.units)} layers grow from {base} to {grown}; "
        f"{len(space.candidates)} dilations for each channel"
    ]
    for name, layer in super_layers(prepared.task).items():
        groups = f", {layer.groups} groups" if layer.groups > 1 else ""
        stride = f", stride {layer.stride[0]}" if layer.stride != (1, 1) else ""
        lines.append(f"  {name:<{width}}  {layer.in_channels:>4} -> {layer.out_channels:<4}{stride}{groups}")
    lines.append(prepared.origin)
    ranked = f", criterion {options.finder.criterion}" if isinstance(options.finder, EDOStrategy) else ""
    lines.append(f"strategy: {options.strategy}{ranked}")
    if options.searches > 1:
        lines.append(
            f"searches: {options.searches}, evenly spread over the training; the last one follows it"
        )
    lines.append(f"result: {options.pattern_path}")
    return "\n".join(lines)


def describe_cost(options: SearchOptions, cost: Cost) -> str:
    """Time and memory of the training, from one measured step."""
    config = options.train.read_config()
    steps, batch_size = config.train_cfg.max_iters, config.train_dataloader.batch_size
    memory = (cost.state_bytes + cost.activation_bytes) / 2**30
    minutes = steps * cost.step_seconds / 60
    return (
        f"training: {cost.parameters / 1e6:.1f} M parameters, {steps} steps of {batch_size} images\n"
        f"memory: about {memory:.1f} GiB ({cost.state_bytes / 2**30:.1f} weights and optimizer, "
        f"{cost.activation_bytes / 2**30:.1f} activations)\n"
        f"time: about {minutes:.1f} minutes here ({cost.step_seconds:.2f} s per step, measured on one)"
    )
