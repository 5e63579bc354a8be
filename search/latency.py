# SPDX-License-Identifier: Apache-2.0
"""How long a network takes with a pattern, predicted from layer times that were measured on a device.

Times are taken inside the network, where caches are in the state that they have in use: a network with random
patterns runs, and each of its searched layers is timed. Layers of the same sizes share their measurements. A
layer's time is taken as a sum over its branches of what a branch costs, what each started step of 16 channels
costs and what each channel costs, more so at larger dilations; the factors are fitted for each kind of layer.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from ic_conv._files import write_text
from ic_conv.pattern import Dilation, DilationPattern

STEP = 16  # output channels that vector units work on at a time
Branches = tuple[tuple[Dilation, int], ...]


class Kind(NamedTuple):
    """What layers must share to share their measurements."""

    in_channels: int
    out_channels: int
    groups: int
    stride: int
    height: int
    width: int


@dataclass(frozen=True)
class Row:
    """One measurement: a layer's kind, its branches and its milliseconds."""

    kind: Kind
    branches: Branches
    ms: float


@dataclass(frozen=True)
class LatencyTable:
    """Layer times of a network on a device.

    Args:
        device: name of the device, see `device_name`.
        network: what was measured, for people.
        threads, batch_size, image_size: as measured; image_size in pixels.
        layers: kind of each searched layer by name, in module order.
        rest_ms: time of everything but the searched layers.
        rows: the measurements.
    """

    device: str
    network: str
    threads: int
    batch_size: int
    image_size: int
    layers: Mapping[str, Kind]
    rest_ms: float
    rows: tuple[Row, ...]

    def predict(self, pattern: DilationPattern) -> float:
        """Milliseconds that the network takes with this pattern.

        Raises:
            ValueError: the pattern does not fit the network that was measured.
        """
        units = [(name, _units(kind)) for name, kind in self.layers.items()]
        bound = pattern.bind(units)
        return self.rest_ms + sum(
            self.predict_layer(self.layers[str(layer.name)], layer.branches) for layer in bound.layers
        )

    def predict_layer(self, kind: Kind, branches: Branches) -> float:
        """Milliseconds of one layer."""
        return float(_features(kind, branches) @ self._factors[kind])

    @cached_property
    def _factors(self) -> dict[Kind, NDArray[np.float64]]:
        """Not negative: more work never takes less time. Relative errors count, as small layers do."""
        factors = {}
        for kind in dict.fromkeys(self.layers.values()):
            rows = [row for row in self.rows if row.kind == kind]
            weights = np.array([1 / row.ms for row in rows])
            features = np.array([_features(kind, row.branches) for row in rows])
            factors[kind] = nnls(features * weights[:, None], np.ones(len(rows)))[0]
        return factors

    def check_device(self, device: str) -> None:
        """Raises ValueError when the table was measured on another device."""
        if device != self.device:
            raise ValueError(f"the latency table must be of this device, {device}; it is of {self.device}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON, in one atomic step."""
        document = asdict(self) | {
            "format_version": 1,
            "torch": torch.__version__,
            "layers": [{"name": name, **kind._asdict()} for name, kind in self.layers.items()],
            "rows": [
                {
                    "layer": next(name for name, kind in self.layers.items() if kind == row.kind),
                    "branches": [[dy, dx, count] for (dy, dx), count in row.branches],
                    "ms": round(row.ms, 5),
                }
                for row in self.rows
            ],
        }
        write_text(path, json.dumps(document).replace('{"', '\n{"').lstrip() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads a table.

        Raises:
            ValueError: the file is no latency table.
            OSError: it is missing or cannot be read.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            document = json.loads(text)
            layers = {
                layer["name"]: Kind(*(int(layer[key]) for key in Kind._fields))
                for layer in document["layers"]
            }
            rows = tuple(
                Row(
                    layers[row["layer"]],
                    tuple(((int(dy), int(dx)), int(count)) for dy, dx, count in row["branches"]),
                    float(row["ms"]),
                )
                for row in document["rows"]
            )
            if missing := set(layers.values()) - {row.kind for row in rows if row.ms > 0}:
                raise KeyError(f"measurements of {missing.pop()}")
            return cls(
                device=str(document["device"]),
                network=str(document["network"]),
                threads=int(document["threads"]),
                batch_size=int(document["batch_size"]),
                image_size=int(document["image_size"]),
                layers=layers,
                rest_ms=float(document["rest_ms"]),
                rows=rows,
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: not a table of `tools/benchmark.py latency-table`: {reason}"
            ) from error


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _units(kind: Kind) -> int:
    return kind.out_channels if kind.groups == 1 else kind.groups


def _features(kind: Kind, branches: Branches) -> NDArray[np.float64]:
    """What a layer's time is made of; each factor of the sum is fitted."""
    size = kind.out_channels // _units(kind)
    counts = np.array([count * size for _, count in branches], dtype=np.float64)
    reach = np.array([max(dilation) - 1 for dilation, _ in branches], dtype=np.float64)
    steps = np.ceil(counts / STEP)
    several = len(branches) > 1
    return np.array([1.0, several, len(branches), steps.sum(), counts.sum() * several, (steps * reach).sum()])
