# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs of a model, counted the way the published tables count them.

    python -m ic_conv.complexity rednet50 ic_resnet50 --image-size 224

FLOPs are multiply-accumulates of convolutions and linear layers, plus 1 per element for their biases, plus
Kh * Kw * C per output position of an involution (its kernel generation is made of convolutions), plus 2 per
element of a batch normalisation and 1 per element of a ReLU. Pooling, sums and sigmoids count nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ic_conv._modes import evaluating
from ic_conv.layers.involution2d import Involution2d


@dataclass(frozen=True)
class LayerComplexity:
    """Own parameters and FLOPs of one counted module, all its calls together."""

    name: str
    kind: str
    params: int
    flops: int


@dataclass(frozen=True)
class Complexity:
    """Size and work of a model at one input size.

    Args:
        params: number of parameters of the model, each counted once.
        layers: the modules that cost FLOPs, in order of their first call.
    """

    params: int
    layers: tuple[LayerComplexity, ...]

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    def __str__(self) -> str:
        return f"{self.params / 1e6:.2f} M params, {self.flops / 1e9:.3f} GFLOPs"

    def table(self) -> str:
        """One line per counted module."""
        rows = (f"{x.name:<40} {x.kind:<16} {x.params:>12,} {x.flops:>16,}" for x in self.layers)
        return "\n".join([f"{'layer':<40} {'kind':<16} {'params':>12} {'FLOPs':>16}", *rows])


def count(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Complexity:
    """Counts parameters and FLOPs by one forward pass, in evaluation mode and without gradients.

    The pass runs on the model's own device. Only modules are seen, not functions called in a forward, such as
    `torch.nn.functional.relu`.

    Args:
        model: any module that takes one image tensor.
        input_size: (C, H, W) of the one image, in pixels.

    Example:
        >>> print(count(rednet50()))
        15.54 M params, 2.714 GFLOPs
    """
    flops: dict[nn.Module, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        flops[module] = flops.get(module, 0) + _flops(module, inputs[0], output)

    hooks = [module.register_forward_hook(add) for module in names if isinstance(module, _COUNTED)]
    parameter = next(model.parameters(), torch.empty(0))
    try:
        with evaluating(model):
            model(parameter.new_zeros(1, *input_size))
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(
        LayerComplexity(names[m], type(m).__name__, sum(p.numel() for p in m.parameters(recurse=False)), n)
        for m, n in flops.items()
    )
    return Complexity(sum(p.numel() for p in model.parameters()), layers)


_COUNTED = (_ConvNd, nn.Linear, Involution2d, _BatchNorm, nn.ReLU)


def _flops(module: nn.Module, x: Tensor, output: Tensor | tuple[Tensor, ...]) -> int:
    out = output[0] if isinstance(output, tuple) else output
    bias = 0 if getattr(module, "bias", None) is None else out.numel()
    if isinstance(module, _ConvTransposeNd):
        return x.numel() * module.weight[0].numel() + bias
    if isinstance(module, (_ConvNd, nn.Linear)):
        return out.numel() * module.weight[0].numel() + bias
    if isinstance(module, Involution2d):
        return out.numel() * module.kernel_size[0] * module.kernel_size[1]
    return out.numel() * (2 if isinstance(module, _BatchNorm) else 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per model, or a table of its layers."""
    parser = argparse.ArgumentParser(prog="python -m ic_conv.complexity", description="Parameters and FLOPs.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"one of {', '.join(factories())}")
    parser.add_argument("--image-size", type=int, nargs="+", default=[224], metavar="PX", help="side, or H W")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="N")
    parser.add_argument("--layers", action="store_true", help="a table of each model's layers")
    args = parser.parse_args(argv)
    size = (args.image_size * 2)[:2]
    for name in args.models:
        if name not in factories():
            parser.error(f"the models are {', '.join(factories())}; got {name!r}")
        cost = count(factories()[name](num_classes=args.num_classes), (3, *size))
        print(f"{name:<20} {cost}")
        if args.layers:
            print(cost.table())
    return 0


def factories() -> dict[str, Callable[..., nn.Module]]:
    """The package's models by name."""
    from ic_conv import models

    return {name: getattr(models, name) for name in models.__all__ if any(map(str.isdigit, name))}


if __name__ == "__main__":
    raise SystemExit(main())
