# SPDX-License-Identifier: Apache-2.0
"""Choice of a backend: one ordered table per operator, fastest first, plain PyTorch last."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Call = TypeVar("Call")
logger = logging.getLogger(__name__)


class BackendUnavailableError(RuntimeError):
    """No backend of the table can run the call; the message lists every backend with its reason."""


@dataclass(frozen=True)
class Backend(Generic[Call]):
    """One implementation of an operator.

    Args:
        name: how users ask for it, `backend="name"`.
        why_not: answers None when the backend can run the call, else the reason, and never raises.
            It is asked with None for the call when only the machine matters (`available`).
        run: runs a call that `why_not` accepted. It trusts its arguments: they were checked before.
    """

    name: str
    why_not: Callable[[Call | None], str | None]
    run: Callable[[Call], Any]


@dataclass(frozen=True)
class BackendTable(Generic[Call]):
    """The backends of one operator in order of preference."""

    op: str
    backends: tuple[Backend[Call], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(backend.name for backend in self.backends)

    def available(self) -> dict[str, str | None]:
        """Each backend's name with None, or with the reason why this machine cannot run it."""
        return {backend.name: backend.why_not(None) for backend in self.backends}

    def check_name(self, wanted: str | None) -> str | None:
        """The name itself; ValueError that lists the known names if it is none of them."""
        if wanted is not None and wanted not in self.names:
            raise ValueError(f"{self.op} has the backends {', '.join(self.names)}; got {wanted!r}")
        return wanted

    def choose(self, call: Call, wanted: str | None = None) -> Backend[Call]:
        """The first backend that can run `call`, or the wanted one.

        Raises:
            ValueError: no backend has the wanted name.
            BackendUnavailableError: the wanted backend cannot run this call, or none can.
        """
        self.check_name(wanted)
        reasons = {}
        for backend in self.backends:
            if wanted is not None and backend.name != wanted:
                continue
            reason = backend.why_not(call)
            if reason is None:
                return backend
            reasons[backend.name] = reason
            logger.debug("%s: not %s, %s", self.op, backend.name, reason)
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BackendUnavailableError(f"{self.op} cannot run here ({listed})")
