# SPDX-License-Identifier: Apache-2.0
"""Errors of a config in one line that names the key."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.registry import build_from_cfg


def explain(config: Mapping[str, Any], error: BaseException) -> str:
    """The error as one line, ``model.backbone.depth: must be one of 18, 34; got 51``.

    The key is the one that the message begins with. Else it is looked for in the part that was being built
    when the error came, or in the whole config: a file that the message quotes; else it is the part.
    """
    message = one_line(error)
    if match := re.match(r"([a-z_]\w*(?:\.\w+)+): (.*)", message):
        place, *rest = match[1].split(".", 1)
        found = [key for key, _ in _walk(config) if key.rpartition(".")[2] == place]
        if found:
            return f"{'.'.join([found[0], *rest])}: {match[2]}"
    key, part = _failed_part(config, error)
    quoted = [(value, key) for key, value in _walk(part, key) if _is_path(value) and value in message]
    if quoted:  # of a folder and the file in it, the file
        key = max(quoted, key=lambda entry: (message.rfind(entry[0]) + len(entry[0]), len(entry[0])))[1]
    return f"{key}: {message}" if key else message


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


def _failed_part(config: Mapping[str, Any], error: BaseException) -> tuple[str, Any]:
    """Key and content of the innermost part that MMEngine was building; all of the config if it was none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    built = [frame.f_locals["cfg"] for frame in frames if frame.f_code is build_from_cfg.__code__]
    for cfg in reversed(built):
        # Libraries build changed copies: the part is the one of that type with the most in common.
        alike = [
            (sum(part.get(key) == value for key, value in cfg.items()), place, part)
            for place, part in _walk(config)
            if isinstance(part, Mapping) and part.get("type") == cfg.get("type") is not None
        ]
        if alike:
            return max(alike, key=lambda entry: entry[0])[1:]
    return "", config


def _walk(part: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Everything below a part, with its keys."""
    items = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        name = f"{place}.{key}" if place else str(key)
        yield name, value
        yield from _walk(value, name)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(re.search(r"/|\.\w+$", value))
