# SPDX-License-Identifier: Apache-2.0
"""From a trained network to its form for inference: batch norms folded, weights frozen."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from itertools import chain
from typing import Any, TypeGuard

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ic_conv._channels import LayerTracer, is_conv2d, own_tensors
from ic_conv.convert import replace_modules
from ic_conv.layers.ic_conv2d import ICConv2d

logger = logging.getLogger(__name__)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def fuse(model: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them, for inference.

    A batch norm that alone reads the output of a `Conv2d` or `ICConv2d` goes into its weight and bias, and an
    `nn.Identity` takes the norm's place; so does a `nn.ReLU` that is called once, after an `ICConv2d`. The
    order of calls is that of the network's `torch.fx` graph, or of its parts' if it cannot be traced. The
    parameters of `ICConv2d` are constants from then on: backends may keep them in an order of their own.

    Args:
        model: any module, on any device. It stays as it is.

    Returns:
        A copy in evaluation mode, whose parameters need no gradient. What is called twice, shares its tensors
        or is parametrised stays unfolded.

    Example:
        >>> net = fuse(ic_resnet50("pattern_zoo/scattered_digits/ic_resnet50_k9.json"))
        >>> net(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    folded = _fold_all(network)
    for module in network.modules():
        if isinstance(module, ICConv2d):
            module.freeze()
    logger.info("modules folded into convolutions: %s", ", ".join(folded) or "none")
    return network


def _fold_all(module: nn.Module, prefix: str = "") -> list[str]:
    """Folds what `module` calls; returns the names of the modules that became an identity."""
    if not any(isinstance(m, (*NORMS, ICConv2d)) for m in module.modules()):
        return []
    try:
        # A copy that shares the tensors is traced: modules may keep proxies.
        shared: dict[int, Any] = {id(t): t for t in chain(module.parameters(), module.buffers())}
        graph = LayerTracer().trace(copy.deepcopy(module, shared))
    except Exception:  # whatever a module raises that meets a proxy
        return [n for name, child in module.named_children() for n in _fold_all(child, f"{prefix}{name}.")]
    gone = _fold_graph(graph, dict(module.named_modules()))
    replace_modules(module, {name: nn.Identity() for name in gone})
    return [prefix + name for name in gone]


def _fold_graph(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    calls += Counter(str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
    owners = Counter(id(t) for module in modules.values() for t in own_tensors(module))
    gone = []
    for node in graph.nodes:
        name = str(node.target)
        conv = modules[name] if node.op == "call_module" else None
        if not _is_convolution(conv) or calls[name] > 1 or any(owners[id(t)] > 1 for t in own_tensors(conv)):
            continue
        reader = _only_reader(node, calls, modules)
        if reader is not None and _fold_norm(conv, modules[str(reader.target)]):
            gone.append(str(reader.target))
            reader = _only_reader(reader, calls, modules)
        if reader is not None and type(conv) is ICConv2d and type(modules[str(reader.target)]) is nn.ReLU:
            conv.relu = True
            gone.append(str(reader.target))
    return gone


def _is_convolution(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return module is not None and (is_conv2d(module) or type(module) is ICConv2d)


def _only_reader(node: fx.Node, calls: Counter[str], modules: dict[str, nn.Module]) -> fx.Node | None:
    """The module call that alone reads the node's result, if that module is called nowhere else."""
    reader = next(iter(node.users), None)
    if len(node.users) != 1 or reader is None or reader.op != "call_module":
        return None
    name = str(reader.target)
    if type(modules[name]) is nn.Identity:
        return _only_reader(reader, calls, modules)
    return reader if calls[name] == 1 else None


def _fold_norm(conv: nn.Conv2d, norm: Any) -> bool:
    """Multiplies the norm into the convolution; False if it is no norm with fixed statistics."""
    if type(norm) not in NORMS or norm.running_mean is None:
        return False
    values: list[Any] = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    if (order := getattr(conv, "output_order", None)) is not None:
        # The norm stands behind the reordering, the weight's rows before it.
        values = [value if value is None else value[order.argsort()] for value in values]
    mean, variance, weight, bias = values
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, weight, bias
    )
    return True
