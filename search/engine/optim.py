# SPDX-License-Identifier: Apache-2.0
"""Optimizer wrappers that stop before a non-finite loss or gradient reaches the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer


class NonFiniteLossError(ValueError):
    """The loss, or a gradient, became nan or infinite."""


class _Guarded(OptimWrapper):
    """Refuses non-finite values. Unlike MMEngine's, it logs no gradient norms (a growing array each)."""

    skips_bad_gradients = False  # a float16 loss scaler meets infinite gradients in good health

    def update_params(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss became {loss.item()} in step {self._inner_count + 1}")
        super().update_params(loss, *args, **kwargs)

    def _clip_grad(self) -> None:
        parameters = [
            p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = nn.utils.clip_grad_norm_(parameters, **self.clip_grad_kwargs)
        if not self.skips_bad_gradients and not torch.isfinite(norm):
            raise NonFiniteLossError(f"the gradient's norm became {norm.item()} in step {self._inner_count}")


class FullPrecision(_Guarded):
    """float32."""


class CpuBfloat16(_Guarded):
    """bfloat16 autocast on a CPU, for which MMEngine's AmpOptimWrapper refuses to be built."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


class GpuAmp(_Guarded, AmpOptimWrapper):
    """MMEngine's AMP: bfloat16, or float16 on a GPU that lacks it."""

    def __init__(self, **kwargs: Any) -> None:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        super().__init__(dtype=dtype, **kwargs)
        self.skips_bad_gradients = dtype == torch.float16


def build_optim(task: nn.Module, settings: Any, device: torch.device, amp: bool) -> OptimWrapper:
    """The wrapper for this device, round the optimizer that the config names (a class of torch.optim)."""
    options = dict(settings.optimizer)
    name = options.pop("type")
    kind = getattr(torch.optim, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ValueError(f"the optimizer must be a class of torch.optim, got {name!r}")
    wrapper = (GpuAmp if device.type == "cuda" else CpuBfloat16) if amp else FullPrecision
    return wrapper(optimizer=kind(task.parameters(), **options), clip_grad=dict(settings.clip_grad))
