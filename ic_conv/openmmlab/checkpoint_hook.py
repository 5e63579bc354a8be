# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of MMEngine's Runner that never replace a good one by half of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from ic_conv._files import atomic_path


class AtomicBackend(LocalBackend):
    """Local files, written in one step, and removed only when `remove_retired` is called."""

    def __init__(self) -> None:
        self.retired: list[str | Path] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(filepath) as temporary:
            temporary.write_bytes(obj)

    def remove(self, filepath: str | Path) -> None:
        self.retired.append(filepath)

    def remove_retired(self) -> None:
        while self.retired:
            super().remove(self.retired.pop())


register_backend("atomic", AtomicBackend, force=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's hook, but whatever fails half-way, the checkpoint before stays whole and in its place.

    MMEngine writes in place, and removes what `max_keep_ckpts` or `save_best` retires before it writes.
    Options are those of CheckpointHook; with `backend_args` of the user's own, files are that backend's.

    Example:
        >>> default_hooks = dict(checkpoint=dict(type="AtomicCheckpointHook", max_keep_ckpts=1))
    """

    def __init__(self, *args: Any, backend_args: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(*args, backend_args=backend_args or {"backend": "atomic"}, **options)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_retired()

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_retired()

    def _remove_retired(self) -> None:
        if isinstance(self.file_backend, AtomicBackend):
            self.file_backend.remove_retired()
