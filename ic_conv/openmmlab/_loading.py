# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that MMEngine reads: it takes them for pickles, which can run code, when the safe way fails."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_weights(source: str | None = None, trust: bool = False) -> Iterator[None]:
    """Has PyTorch refuse files that hold more than weights and plain values.

    Args:
        source: what is read, for the message.
        trust: let MMEngine have its way.

    Raises:
        ValueError: a file holds more.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "0" if trust else "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{source or 'the checkpoint'}: not a file of weights that can be read safely; "
            "--trust-checkpoint reads it as a pickle"
        ) from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
