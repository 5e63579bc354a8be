# SPDX-License-Identifier: Apache-2.0
"""Where a convolution's output channels go, so that they can change places without changing the network."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, fx, nn
from torch.nn.modules import activation, dropout, padding, pooling, upsampling
from torch.nn.modules.batchnorm import _NormBase

logger = logging.getLogger(__name__)

# What treats every channel alike, or by itself. A module's or function's own state is none or per channel.
_MODULES = (
    _NormBase,
    *(activation.CELU, activation.ELU, activation.GELU, activation.Hardsigmoid, activation.Hardswish),
    *(activation.Hardtanh, activation.LeakyReLU, activation.LogSigmoid, activation.Mish, activation.PReLU),
    *(activation.ReLU, activation.SELU, activation.Sigmoid, activation.SiLU, activation.Softplus),
    *(activation.Softsign, activation.Tanh),
    *(dropout.Dropout, dropout.Dropout2d, nn.Identity, upsampling.Upsample),
    *(pooling.AvgPool2d, pooling.MaxPool2d, pooling.AdaptiveAvgPool2d, pooling.AdaptiveMaxPool2d),
    *(padding.ZeroPad2d, padding.ReflectionPad2d, padding.ReplicationPad2d),
)
_FUNCTIONS = frozenset((
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "mish", "softplus", "tanh",
    "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "sigmoid_", "clamp", "clamp_", "neg", "abs",
    "add", "sub", "mul", "truediv", "iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate",
    "dropout", "dropout2d", "clone", "contiguous", "float", "half", "to",
))  # fmt: skip
_SIZES = frozenset(("shape", "dtype", "device", "ndim"))


@dataclass(frozen=True)
class Destinations:
    """All that reads a convolution's output channels.

    Args:
        channelwise: names of the modules on the way that hold values per channel, batch norms above all.
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
        # The copy shares the tensors. It is traced instead, since modes change and modules may keep proxies.
        skeleton = copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})
        self._modules = dict(skeleton.named_modules())
        self._owners = Counter(id(t) for m in self._modules.values() for t in own_tensors(m))
        self.destinations: dict[str, Destinations] = {}
        self.producers: dict[str, str] = {}
        try:
            # Both modes, since a network may have branches for training only.
            graphs = [_Tracer().trace(skeleton.train(mode)) for mode in (True, False)]
        except Exception as error:  # whatever a forward raises when it meets a proxy
            logger.info("the channels keep their places: torch.fx cannot trace the network (%s)", error)
            return
        training, evaluation = (self._follow_all(graph) for graph in graphs)
        self.destinations = {name: to for name, to in training.items() if to == evaluation.get(name)}
        self.producers = {
            consumer: name for name, to in self.destinations.items() for consumer in to.consumers
        }

    def _follow_all(self, graph: fx.Graph) -> dict[str, Destinations]:
        calls = [node for node in graph.nodes if node.op == "call_module"]
        reads = (str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
        uses = Counter(chain((str(node.target) for node in calls), reads))
        free = {name for name, count in uses.items() if count == 1 and self._is_alone(self._modules[name])}
        found = {str(n.target): self._follow(n, free) for n in calls if str(n.target) in free}
        return {name: to for name, to in found.items() if to is not None}

    def _is_alone(self, module: nn.Module) -> bool:
        """Whether the module's tensors are its own: not computed, not shared, none in modules inside."""
        if isinstance(module, nn.Conv2d) and "weight" not in module._parameters:
            return False
        own = own_tensors(module)
        inside = sum(1 for _ in chain(module.parameters(), module.buffers()))
        return len(own) == inside and all(self._owners[id(t)] == 1 for t in own)

    def _follow(self, start: fx.Node, free: set[str]) -> Destinations | None:
        if not isinstance(self._modules[str(start.target)], nn.Conv2d):
            return None
        channelwise, consumers = set(), set()
        todo = [(start, user) for user in start.users]
        while todo:
            source, node = todo.pop()
            name = str(node.target)
            if node.all_input_nodes != [source]:
                return None
            if node.op == "call_module":
                module = self._modules[name]
                if own_tensors(module) and name not in free:
                    return None
                if isinstance(module, nn.Conv2d):
                    consumers.add(name)
                    continue
                if not isinstance(module, _MODULES):
                    return None
                if own_tensors(module):
                    channelwise.add(name)
            elif _asks_size(node):
                continue
            elif node.op == "output" or _operation(node) not in _FUNCTIONS:
                return None
            todo += [(node, user) for user in node.users]
        return Destinations(frozenset(channelwise), frozenset(consumers))


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that the module itself holds."""
    return [t for t in chain(module._parameters.values(), module._buffers.values()) if t is not None]


def _operation(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _asks_size(node: fx.Node) -> bool:
    operation = _operation(node)
    return operation in ("size", "dim") or (operation == "getattr" and node.args[1] in _SIZES)


class _Tracer(fx.Tracer):
    """Keeps every convolution and norm whole, also those from outside torch.nn."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _NormBase) or super().is_leaf_module(m, module_qualified_name)
