# SPDX-License-Identifier: Apache-2.0
"""What a study's trials have assigned already: each layer under each rule once, whichever process asks."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ic_conv.pattern import Dilation, LayerPattern
from search.assign import assign_within
from search.assignment import UnitLimits


@dataclass(frozen=True)
class AssignedLayers:
    """Assignments that were found before, kept under a hash of everything that decides them.

    Args:
        path: an SQLite file that processes share, made by the first `save`; None: they stay in this process.
    """

    path: Path | None = None
    _known: dict[str, LayerPattern] = field(default_factory=dict, repr=False)
    _unsaved: set[str] = field(default_factory=set, repr=False)

    def assign(
        self,
        errors: NDArray[np.float64],
        candidates: Sequence[Dilation],
        limits: UnitLimits,
        name: str,
        **search: float,
    ) -> LayerPattern:
        """As `search.assign.assign_within`, but nothing is searched for a second time."""
        question = repr((name, errors.shape, list(candidates), limits, search)).encode()
        key = hashlib.sha256(question + np.ascontiguousarray(errors).tobytes()).hexdigest()
        if key not in self._known:
            layer = self._saved(key, name)
            if layer is None:
                layer, _ = assign_within(errors, candidates, limits, name, **search)
                self._unsaved.add(key)
            self._known[key] = layer
        return self._known[key]

    def save(self) -> None:
        """Tells other processes what this one has found since the last time."""
        if self.path is not None and self._unsaved:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [(key, json.dumps(self._known[key].assignment)) for key in self._unsaved]
            with closing(sqlite3.connect(self.path, timeout=60)) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS layers (key TEXT PRIMARY KEY, assignment TEXT)")
                file.executemany("INSERT OR IGNORE INTO layers VALUES (?, ?)", rows)
        self._unsaved.clear()

    def _saved(self, key: str, name: str) -> LayerPattern | None:
        if self.path is None or not self.path.exists():
            return None
        with closing(sqlite3.connect(self.path, timeout=60)) as file:
            if not file.execute("SELECT 1 FROM sqlite_master WHERE name = 'layers'").fetchone():
                return None  # another process is about to make it
            row = file.execute("SELECT assignment FROM layers WHERE key = ?", (key,)).fetchone()
        return row and LayerPattern.from_assignment([(dy, dx) for dy, dx in json.loads(row[0])], name)
