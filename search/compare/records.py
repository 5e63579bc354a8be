# SPDX-License-Identifier: Apache-2.0
"""Runs that are made once, in several processes, and kept as JSON files."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ic_conv._files import write_text

Run = tuple[str, int]  # method and seed


def kept(path: Path, identity: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, float]:
    """The result of a run, finished before or made now.

    Args:
        path: of its record.
        identity: the options that it depends on.
        make: gives the record's content, ``result`` among it.

    Raises:
        ValueError: it was made with other options.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"options": identity, **make()}, indent=2) + "\n")
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["options"] != identity:
        raise ValueError(f"{path}: made with {document['options']}; choose another --work-dir")
    return document["result"]


def in_processes(
    run: Callable[..., dict[str, float]], options: object, groups: Sequence[Sequence[Run]], jobs: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Calls run(method, seed, options) in `jobs` processes, group after group; yields what is done."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        for group in groups:
            futures = {pool.submit(run, *one, options): one for one in group}
            try:
                for future in as_completed(futures):
                    yield (*futures[future], future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
