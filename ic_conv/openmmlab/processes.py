# SPDX-License-Identifier: Apache-2.0
"""Several processes without GPUs: MMEngine's own start asks for one with every launcher."""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping

from torch import distributed

_STARTERS = {"pytorch": "torchrun", "slurm": "srun"}
_VARIABLES = {
    "pytorch": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODELIST"),
}
_PORT = "29500"


def join(launcher: str) -> None:
    """Joins the processes that a launcher has started, over gloo; once is enough.

    Args:
        launcher: pytorch (torchrun) or slurm (srun).

    Raises:
        ValueError: the launcher's variables are not set, so it is not what started this process.
    """
    if distributed.is_initialized():
        return
    if absent := [name for name in _VARIABLES[launcher] if name not in os.environ]:
        starter = _STARTERS[launcher]
        raise ValueError(f"launcher {launcher!r} needs {starter}, which sets {absent[0]}; it is not set")
    if launcher == "slurm":
        _take_over_from_slurm(os.environ)
    distributed.init_process_group("gloo")


def _take_over_from_slurm(variables: MutableMapping[str, str]) -> None:
    """Says in PyTorch's words what Slurm has said in its own."""
    for name, source in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
        variables[name] = variables[f"SLURM_{source}"]
    variables.setdefault("MASTER_PORT", _PORT)
    if "MASTER_ADDR" not in variables:
        command = ["scontrol", "show", "hostnames", variables["SLURM_NODELIST"]]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"launcher 'slurm': set MASTER_ADDR, since {command[0]} failed: {error}"
            ) from error
        variables["MASTER_ADDR"] = hosts[0]
