# SPDX-License-Identifier: Apache-2.0
"""How far long work is: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.dist import is_main_process
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


@contextmanager
def bar(what: str, total: int, shown: bool = True, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives the function that is called with how much is done, again and again.

    Args:
        what: is counted, in a word.
        total: of it.
        shown: if not, nothing is; nor do processes besides the first show anything.
        done: of it, before this work.
    """
    console = Console(quiet=not (shown and is_main_process()), highlight=False)
    if not console.is_terminal:
        yield _Lines(console, what, total, done)
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        row = progress.add_task("", total=total, completed=done)
        yield lambda done: progress.update(row, completed=min(done, total))


class _Lines:
    def __init__(self, console: Console, what: str, total: int, done: int) -> None:
        self._console, self._what, self._total, self._first = console, what, total, done
        self._start = time.monotonic()
        self._line_at, self._told = 0.0, -1

    def __call__(self, done: int) -> None:
        done, now = min(done, self._total), time.monotonic()
        if done == self._told or (done < self._total and now < self._line_at):
            return
        self._line_at, self._told = now + _LINE_SECONDS, done
        seconds = (self._total - done) * (now - self._start) / max(done - self._first, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds))
        self._console.print(f"{self._what} {done}/{self._total}  ETA {left}", soft_wrap=True)
