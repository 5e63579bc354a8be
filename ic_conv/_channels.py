# SPDX-License-Identifier: Apache-2.0
"""Where a convolution's output channels go, so that they can change places without changing the network."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import TypeGuard

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

logger = logging.getLogger(__name__)

# What treats each channel by itself and all of them alike, but for values per channel that modules may hold.
_MODULES = (
    _NormBase, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Upsample,
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.PReLU, nn.ReLU, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh,
    nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
_FUNCTIONS = frozenset((
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "mish", "softplus", "tanh",
    "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "sigmoid_", "clamp", "clamp_", "neg", "abs",
    "add", "sub", "mul", "truediv", "iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate",
    "dropout", "dropout2d", "clone", "contiguous", "float", "half", "to",
))  # fmt: skip


@dataclass(frozen=True)
class Destinations:
    """All that reads a convolution's output channels.

    Args:
        channelwise: names of the modules on the way; they may hold values per channel, as batch norms do.
        consumers: names of the convolutions at the ends.
    """

    channelwise: frozenset[str]
    consumers: frozenset[str]


class ChannelGraph:
    """Follows the output channels of each convolution through the network's torch.fx graph.

    Attributes:
        destinations: by name of the convolution; one is missing if its channels also go where their order
            matters (a sum, a concatenation, the network's output), or if torch.fx cannot trace the network.
        producers: by name of a convolution, the one whose output channels it reads.
    """

    def __init__(self, model: nn.Module) -> None:
        self.destinations: dict[str, Destinations] = {}
        self.producers: dict[str, str] = {}
        try:
            # The copy, which shares the tensors, is traced: modes change, and modules may keep proxies.
            skeleton = copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})
            # Both modes, since a network may have branches for training only.
            graphs = [LayerTracer().trace(skeleton.train(mode)) for mode in (True, False)]
        except Exception as error:  # whatever a network raises that is copied or meets a proxy
            logger.info("channels keep their places: torch.fx cannot trace the network (%s)", error)
            return
        self._modules = dict(skeleton.named_modules())
        self._owners = Counter(id(t) for m in self._modules.values() for t in own_tensors(m))
        training, evaluation = (self._follow_all(graph) for graph in graphs)
        self.destinations = {name: to for name, to in training.items() if to == evaluation.get(name)}
        self.producers = {reader: name for name, to in self.destinations.items() for reader in to.consumers}

    def _follow_all(self, graph: fx.Graph) -> dict[str, Destinations]:
        calls = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
        uses = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        uses += Counter(str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
        free = {name for name in calls if uses[name] == 1 and self._is_alone(self._modules[name])}
        found = {name: self._follow(calls[name], free) for name in free if is_conv2d(self._modules[name])}
        return {name: to for name, to in found.items() if to is not None}

    def _is_alone(self, module: nn.Module) -> bool:
        """Whether the module's tensors are nobody else's, and none are in modules inside it."""
        own = own_tensors(module)
        inside = sum(1 for _ in chain(module.parameters(), module.buffers()))
        return len(own) == inside and all(self._owners[id(t)] == 1 for t in own)

    def _follow(self, start: fx.Node, free: set[str]) -> Destinations | None:
        channelwise, consumers = set(), set()
        todo = [(start, user) for user in start.users]
        while todo:
            source, node = todo.pop()
            if node.all_input_nodes != [source]:
                return None
            name = str(node.target)
            module = self._modules[name] if node.op == "call_module" else None
            if module is not None and is_conv2d(module) and name in free:
                consumers.add(name)
            elif isinstance(module, _MODULES) and (name in free or not own_tensors(module)):
                channelwise.add(name)
                todo += [(node, user) for user in node.users]
            elif module is None and _operation(node) in _FUNCTIONS:
                todo += [(node, user) for user in node.users]
            elif not _asks_size(node):
                return None
        return Destinations(frozenset(channelwise), frozenset(consumers))


def is_conv2d(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it computes what `torch.nn.Conv2d` does, with a weight of its own (not a normed one)."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and "weight" in module._parameters
    )


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that the module itself holds."""
    return [t for t in chain(module._parameters.values(), module._buffers.values()) if t is not None]


def _operation(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _asks_size(node: fx.Node) -> bool:
    """Whether the node reads something else of a tensor than its values."""
    if _operation(node) == "getattr":
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")


class LayerTracer(fx.Tracer):
    """Keeps every convolution and norm whole, also those from outside torch.nn."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _NormBase) or super().is_leaf_module(m, module_qualified_name)
