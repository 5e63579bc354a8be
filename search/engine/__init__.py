# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of supernets, and of any other network, on MMEngine's Runner."""

from search.engine.checkpoint import CheckpointWriteError, load_checkpoint
from search.engine.evaluate import evaluate
from search.engine.optim import NonFiniteLossError
from search.engine.options import TrainOptions
from search.engine.train import train

__all__ = [
    "CheckpointWriteError",
    "NonFiniteLossError",
    "TrainOptions",
    "evaluate",
    "load_checkpoint",
    "train",
]
