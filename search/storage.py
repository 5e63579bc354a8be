# SPDX-License-Identifier: Apache-2.0
"""Where Optuna's studies are kept: in memory, in a journal file or in a database."""

from __future__ import annotations

import fcntl
from pathlib import Path

from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

NO_STORAGE = "none"


class _Lock:
    """Lets one process at a time write to a journal, in the order of asking; a killed one loses the lock."""

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(f"{journal.name}.lock").absolute()

    def acquire(self) -> bool:
        self._file = self._path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self._file.close()


def open_storage(storage: str) -> BaseStorage:
    """The storage; it is made if it can be.

    Raises:
        ValueError: it cannot be reached, or the URL's database needs a driver that is not installed.
    """
    if storage == NO_STORAGE:
        return InMemoryStorage()
    try:
        if "://" not in storage:
            path = Path(storage)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            return JournalStorage(JournalFileBackend(str(path), _Lock(path)))  # type: ignore[arg-type]
        return RDBStorage(storage)
    except Exception as error:  # each database driver has errors of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"the storage must be a journal file, sqlite:/// or postgresql:// that can be reached: "
            f"{without_password(storage)}: {reason}"
        ) from error


def without_password(storage: str) -> str:
    """The storage as messages name it."""
    scheme, slashes, rest = storage.partition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"
